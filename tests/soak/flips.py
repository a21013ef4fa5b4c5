"""One bit of one file is flipped, then a verb reads the file: it says so, or its answer is that of the whole file."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak.kinds import Outcome, Result
from soak.lab import Lab
from soak.processes import Call, Ended
from soak.trees import flip, fresh, tree


@dataclass(frozen=True)
class Reader:
    """A call that returns an answer. must_notice: it exists to find damage, whatever its answer."""

    name: str
    call: Call
    must_notice: bool = False


@dataclass(frozen=True)
class Target:
    """Files of a pristine folder, by glob patterns, and their readers."""

    pristine: Path
    patterns: list[str]
    readers: list[Reader]


class Flips:
    """Each trial draws a target, one of its files, a bit, and one of its readers."""

    per_turn = 4

    def __init__(self, name: str, lab: Lab, make: Callable[[Lab], list[Target]]) -> None:
        self.name, self.lab, self._make = name, lab, make
        self._targets: list[Target] = []
        self._whole: dict[str, Ended] = {}

    def trial(self, number: int, draw: random.Random) -> Outcome:
        self._targets = self._targets or self._make(self.lab)
        target = self._targets[number % len(self._targets)]
        reader = draw.choice(target.readers)
        whole = self._answer(target, reader)
        before = tree(target.pristine)
        fresh(self.lab.trial, target.pristine, linked=True)
        found = {path for pattern in target.patterns for path in self.lab.trial.glob(pattern) if path.is_file()}
        path = draw.choice(sorted(path for path in found if path.stat().st_size))
        which = flip(path, draw)
        ended = self.lab.processes.run(reader.call)
        what = f"{path.relative_to(self.lab.trial)}, {which}, read by {reader.name}"
        if (now := tree(target.pristine)) != before:
            changed = [name for name in now if now[name] != before.get(name)]
            raise RuntimeError(f"{what}: wrote into files in place, not by a rename: {changed}")
        result, how, rank = _judge(path, ended, whole, reader)
        text = f"{ended.text}\nanswer: {str(ended.answers[0])[:700]}\nof the whole file: {str(whole.answers[0])[:700]}"
        return Outcome(result, how, what, rank=rank, text=text)

    def _answer(self, target: Target, reader: Reader) -> Ended:
        """Of the reader of whole files."""
        if reader.name not in self._whole:
            fresh(self.lab.trial, target.pristine)
            self._whole[reader.name] = self.lab.processes.must(reader.call)
        return self._whole[reader.name]


def _judge(path: Path, ended: Ended, whole: Ended, reader: Reader) -> tuple[Result, str, int]:
    """(result, how, how far from a line that says what is wrong)"""
    if not ended.is_good:
        result = Result.lost if ended.hung else Result.survived
        return result, f"refused: {ended.failure}", 0 if ended.failure == "one line" else 2
    names = [path.name, *([path.parent.name] if path.parent.name.startswith("step-") else [])]
    is_named = any(ended.text.count(name) > whole.text.count(name) for name in names)
    if reader.must_notice:
        return Result.silent, "not noticed", 3
    if ended.answers == whole.answers:
        return Result.survived, "named, answer whole" if is_named else "harmless", 1
    if not is_named:
        return Result.silent, "another answer", 3
    is_alike = are_alike(ended.answers, whole.answers)
    return Result.survived, "named, answer alike" if is_alike else "named, another answer", 2 - is_alike


def are_alike(found: Any, want: Any) -> bool:
    """Equal, but for the rounding of numbers that were computed in another order."""
    if isinstance(found, dict) and isinstance(want, dict):
        return found.keys() == want.keys() and all(are_alike(found[key], want[key]) for key in found)
    if isinstance(found, list) and isinstance(want, list):
        return len(found) == len(want) and all(map(are_alike, found, want))
    if isinstance(found, float) and isinstance(want, float):
        return math.isclose(found, want, rel_tol=1e-4, abs_tol=1e-4)
    return found == want
