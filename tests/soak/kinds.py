"""What a kind of fault is: a name, and trials with an outcome each."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol


class Result(IntEnum):
    """The higher, the worse."""

    survived = 0
    lost = 1  # said so, but the rerun does not bring it back; or it hangs
    silent = 2  # another answer without a word


@dataclass(frozen=True)
class Outcome:
    """how: in two or three words, counted. what: the trial, enough to find it again. rank: worse among equals."""

    result: Result
    how: str
    what: str
    rank: float = 0
    text: str = ""


class Kind(Protocol):
    """per_turn: trials before the next kind's turn, many where they are cheap."""

    name: str
    per_turn: int

    def trial(self, number: int, draw: random.Random) -> Outcome: ...


@dataclass
class Tally:
    """Outcomes of a kind, counted."""

    results: Counter[Result] = field(default_factory=Counter)
    how: Counter[str] = field(default_factory=Counter)
    worst: Outcome | None = None
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return self.results.total()

    def add(self, outcome: Outcome, seconds: float) -> None:
        self.results[outcome.result] += 1
        self.how[outcome.how] += 1
        self.seconds += seconds
        if self.worst is None or (outcome.result, outcome.rank) > (self.worst.result, self.worst.rank):
            self.worst = outcome


def table(tallies: dict[str, Tally]) -> str:
    """Markdown."""
    lines = ["| fault | tried | survived | lost | silent | how | worst case |", "|---|---:|---:|---:|---:|---|---|"]
    for name, tally in tallies.items():
        counts = [tally.results[result] for result in Result]
        how = ", ".join(f"{text} {count}" for text, count in tally.how.most_common())
        worst = f"{tally.worst.how}: {tally.worst.what}" if tally.worst else "not tried"
        lines.append("| " + " | ".join(map(str, [name, tally.tried, *counts, how, worst.replace("|", "/")])) + " |")
    return "\n".join(lines)


def figures(tallies: dict[str, Tally]) -> dict:
    return {
        name: {
            "tried": tally.tried,
            **{result.name: tally.results[result] for result in Result},
            "how": dict(tally.how),
            "worst": tally.worst.what if tally.worst else None,
            "seconds": round(tally.seconds, 1),
        }
        for name, tally in tallies.items()
    }
