"""From samples to figures: rounds in turns, medians, slopes, targets, tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Timed:
    """Base of what is timed in rounds. samples_s: seconds per call, one of each round."""

    samples_s: list[float]

    @property
    def seconds(self) -> float:
        """The median of the rounds."""
        return median(self.samples_s)


def in_turns(items: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(number of the round, item): each item once per round. The order rotates, so that whatever else the machine does
    hits all of them: 0 a, 0 b, 0 c, 1 b, 1 c, 1 a, ..."""
    for turn in range(rounds):
        for place in range(len(items)):
            yield turn, items[(turn + place) % len(items)]


def log_log_slope(points: Iterable[tuple[int, float]]) -> float | None:
    """Least squares of log seconds against log events over (events, seconds); None for fewer than two points."""
    logs = np.log(list(points))
    return float(np.polyfit(*logs.T, 1)[0]) if len(logs) > 1 else None


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured. value: None if it was not, and then the target is not met."""

    name: str
    bound: str
    value: float | None
    met: bool

    @property
    def text(self) -> str:
        """The value for people, three digits."""
        return "not measured" if self.value is None else f"{self.value:.3g}"


def at_least(name: str, bound: float, value: float | None, unit: str = "") -> list[Verdict]:
    """One verdict; none if the bound is 0, which turns a target off."""
    met = value is not None and value >= bound
    return [Verdict(name, f"at least {bound:g}{unit}", value, met)] if bound else []


def at_most(name: str, bound: float, value: float | None, unit: str = "") -> list[Verdict]:
    """One verdict; none if the bound is 0, which turns a target off."""
    met = value is not None and value <= bound
    return [Verdict(name, f"at most {bound:g}{unit}", value, met)] if bound else []


def between(name: str, low: float, high: float, value: float | None) -> list[Verdict]:
    """One verdict; none if the upper bound is 0, which turns a target off."""
    met = value is not None and low <= value <= high
    return [Verdict(name, f"{low:g} to {high:g}", value, met)] if high else []


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 0) -> list[str]:
    """Lines of a Markdown table. left: how many of the first columns are aligned left; the others are numbers."""
    align = ["---"] * left + ["--:"] * (len(head) - left)
    return [f"| {' | '.join(row)} |" for row in (head, align, *rows)]
