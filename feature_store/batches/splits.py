"""Which events of a user are for training, and which one is the validation or test target.

    leave_one_out, n = 6        e0 e1 e2 e3 | e4    | e5          train_end = 4
                                train         valid   test        train targets: e1 e2 e3, each given the events before
    global_time                 t < valid_time | first in [valid_time, test_time) | first >= test_time

No event at or after train_end is ever a training target or in a training prefix. An evaluation target is predicted
from all events before it in its user's history; for the test target these include the validation event.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.times import parse_time_s
from elastic_rec.feature_store.utils.jagged import offsets_of


class Targets(Enum):
    """What a user's training events are used for: all of them are targets, or some drawn ones."""

    every_event = "every_event"
    sampled = "sampled"


class SplitKind(Enum):
    """Where a user's history is cut: by place, or at moments that all users share."""

    leave_one_out = "leave_one_out"
    global_time = "global_time"


@dataclass
class SplitConfig(Options, prefix="data.split."):
    """How each user's history is split. Raises ValueError for times that do not fit `kind`."""

    kind: SplitKind = option(
        SplitKind.leave_one_out, "leave_one_out: the last two events of a user; global_time: one moment for all users."
    )
    valid_time: str | None = option(
        None, "global_time: first moment of validation, ISO date (UTC unless it says) or epoch seconds."
    )
    test_time: str | None = option(None, "global_time: first moment of the test period, as valid_time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind is SplitKind.leave_one_out:
            if self.valid_time is not None or self.test_time is not None:
                raise ValueError("valid_time and test_time have no effect on leave_one_out; set kind=global_time")
        elif self.valid_time is None or self.test_time is None:
            raise ValueError("kind=global_time needs valid_time and test_time; set both, or kind=leave_one_out")
        elif not self.valid_s() < self.test_s():
            raise ValueError(f"valid_time={self.valid_time} must be before test_time={self.test_time}")

    def valid_s(self) -> int:
        """First moment of validation, epoch seconds. With kind=global_time only."""
        return parse_time_s(self.valid_time, key="valid_time")

    def test_s(self) -> int:
        """First moment of the test period, epoch seconds. With kind=global_time only."""
        return parse_time_s(self.test_time, key="test_time")


class SplitBounds(NamedTuple):
    """(B,) int64 each, counted from a user's first event. train_end: training events; valid, test: the target's place,
    -1 for none. Leave one out, users of 5, 2 and 0 events: train_end [3, 0, 0], valid [3, -1, -1], test [4, 1, -1]."""

    train_end: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def split_bounds(config: SplitConfig, histories: Sequences) -> SplitBounds:
    """Where the histories are split. A target has at least one event before it."""
    if config.kind is SplitKind.leave_one_out:
        return _leave_one_out(histories.lengths)
    return _global_time(histories, config.valid_s(), config.test_s())


def _leave_one_out(n_B: np.ndarray) -> SplitBounds:
    return SplitBounds(
        train_end=np.maximum(n_B - 2, 0),
        valid=np.where(n_B >= 3, n_B - 2, -1),
        test=np.where(n_B >= 2, n_B - 1, -1),
    )


def _global_time(histories: Sequences, valid_s: int, test_s: int) -> SplitBounds:
    train_end = _count_before(histories, valid_s)
    test_start = _count_before(histories, test_s)
    n_B = histories.lengths
    # A target needs an event before it.
    valid = np.where((train_end < test_start) & (train_end > 0), train_end, -1)
    test = np.where((test_start < n_B) & (test_start > 0), test_start, -1)
    return SplitBounds(train_end, valid, test)


def _count_before(histories: Sequences, moment_s: int) -> np.ndarray:
    """(B,) events with time < moment_s; times rise within a user, so these are the user's first ones."""
    before = offsets_of(histories.times < moment_s * histories.units_per_second)
    return np.diff(before[histories.offsets])


_SHARE = re.compile(r"(\d+)%")


class TimeRange(NamedTuple):
    """Times low <= t < high, in the store's unit; None: open."""

    low: int | None
    high: int | None


@dataclass
class ImpressionSplit(Options, prefix="data.impression_split."):
    """Train before valid_time, validate up to test_time, test from there on: one moment for all users.

    Raises ValueError for a time that is neither a share nor a moment.
    """

    valid_time: str = option(
        "80%", "First moment of validation: ISO date (UTC), epoch seconds, or N% of the impressions."
    )
    test_time: str = option("90%", "First moment of the test period, as valid_time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("valid_time", "test_time"):
            if not _SHARE.fullmatch(str(getattr(self, key))):
                parse_time_s(getattr(self, key), key=key)

    def range(self, stage: str, *, percentiles: list[int], time_unit: str) -> TimeRange:
        """When impressions of a stage were shown. percentiles: times of the impressions at 0, 1, ..., 100 %, in the
        store's unit. Raises ValueError for times that make no split."""
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
