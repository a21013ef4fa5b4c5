"""Which events of a user are for training, and which one is the validation or test target.

    leave_one_out, n = 6        e0 e1 e2 e3 | e4    | e5          train_end = 4
                                train         valid   test        train targets are e1..e3, each after what precedes it
    global_time                 t < valid_time | first in [valid_time, test_time) | first >= test_time

No event at or after train_end is ever a training target or in a training prefix. An evaluation target is predicted
from everything that precedes it in its user's history (for the test target that includes the validation event).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.times import parse_time_s


class Targets(Enum):
    """What a user's training events are used for: all of them are targets, or some drawn ones."""

    every_event = "every_event"
    sampled = "sampled"


class SplitKind(Enum):
    leave_one_out = "leave_one_out"
    global_time = "global_time"


@dataclass
class SplitConfig:
    """How each user's history is split."""

    kind: SplitKind = field(
        default=SplitKind.leave_one_out,
        metadata={"help": "leave_one_out: the last two events of a user; global_time: one moment for all users."},
    )
    valid_time: str | None = field(
        default=None,
        metadata={"help": "global_time: first moment of validation, ISO date (UTC unless it says) or epoch seconds."},
    )
    test_time: str | None = field(
        default=None, metadata={"help": "global_time: first moment of the test period, as valid_time."}
    )

    def __post_init__(self) -> None:
        self.kind = SplitKind(self.kind)
        if self.kind is SplitKind.leave_one_out:
            if self.valid_time is not None or self.test_time is not None:
                raise ValueError("valid_time and test_time have no effect on leave_one_out; set kind=global_time")
        elif self.valid_time is None or self.test_time is None:
            raise ValueError("kind=global_time needs valid_time and test_time; set both, or kind=leave_one_out")
        elif not self.valid_s() < self.test_s():
            raise ValueError(f"valid_time={self.valid_time} must be before test_time={self.test_time}")

    def valid_s(self) -> int:
        return parse_time_s(self.valid_time, key="valid_time")

    def test_s(self) -> int:
        return parse_time_s(self.test_time, key="test_time")


class SplitBounds(NamedTuple):
    """(B,) int64 each, positions counted from the user's first event; valid, test: -1 where there is no target."""

    train_end: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def split_bounds(config: SplitConfig, histories: Histories) -> SplitBounds:
    if config.kind is SplitKind.leave_one_out:
        return _leave_one_out(np.diff(histories.offsets))
    return _global_time(histories, config.valid_s(), config.test_s())


def _leave_one_out(n_B: np.ndarray) -> SplitBounds:
    return SplitBounds(
        train_end=np.maximum(n_B - 2, 0),
        valid=np.where(n_B >= 3, n_B - 2, -1),
        test=np.where(n_B >= 2, n_B - 1, -1),
    )


def _global_time(histories: Histories, valid_s: int, test_s: int) -> SplitBounds:
    train_end = _count_before(histories, valid_s)
    test_start = _count_before(histories, test_s)
    n_B = np.diff(histories.offsets)
    # A target needs an event before it.
    valid = np.where((train_end < test_start) & (train_end > 0), train_end, -1)
    test = np.where((test_start < n_B) & (test_start > 0), test_start, -1)
    return SplitBounds(train_end, valid, test)


def _count_before(histories: Histories, moment_s: int) -> np.ndarray:
    """(B,) events with time < moment_s; times rise within a user, so these are the user's first ones."""
    before = np.zeros(len(histories.times_s) + 1, np.int64)
    np.cumsum(histories.times_s < moment_s, out=before[1:])
    return before[histories.offsets[1:]] - before[histories.offsets[:-1]]


_SHARE = re.compile(r"(\d+)%")


class TimeRange(NamedTuple):
    """Times low <= t < high, in the store's unit; None: open."""

    low: int | None
    high: int | None


@dataclass
class ImpressionSplit:
    """Train before valid_time, validate up to test_time, test from there on: one moment for all users."""

    valid_time: str = field(
        default="80%",
        metadata={"help": "First moment of validation: ISO date (UTC), epoch seconds, or N% of the impressions."},
    )
    test_time: str = field(default="90%", metadata={"help": "First moment of the test period, as valid_time."})

    def __post_init__(self) -> None:
        for key in ("valid_time", "test_time"):
            if not _SHARE.fullmatch(str(getattr(self, key))):
                parse_time_s(getattr(self, key), key=key)

    def range(self, stage: str, *, percentiles: list[int], time_unit: str) -> TimeRange:
        """percentiles: times of the impressions at 0, 1, ..., 100 %. Raises ValueError for times that make no split."""
        valid = _moment(self.valid_time, "valid_time", percentiles, time_unit)
        test = _moment(self.test_time, "test_time", percentiles, time_unit)
        if not valid < test:
            raise ValueError(
                f"valid_time={self.valid_time} ({valid} {time_unit}) must be before test_time={self.test_time} "
                f"({test} {time_unit}); set two moments between which there are impressions"
            )
        return {"train": TimeRange(None, valid), "valid": TimeRange(valid, test), "test": TimeRange(test, None)}[stage]


def _moment(text: str, key: str, percentiles: list[int], time_unit: str) -> int:
    if share := _SHARE.fullmatch(str(text)):
        if not 0 < int(share[1]) < 100:
            raise ValueError(f"{key} '{text}': give more than 0% and less than 100%")
        return percentiles[int(share[1])]
    return parse_time_s(text, key=key) * UNITS_PER_SECOND[time_unit]
