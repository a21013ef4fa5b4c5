"""What is looked at in an event log, and what becomes of events that fail: a count, and a policy for each check.

| check        | an event fails when                                          | policies         |
|--------------|--------------------------------------------------------------|------------------|
| null_ids     | user, item or event id is empty, or no int64 in a typed file | fail, drop       |
| null_words   | one of them is text that means empty: nan, None, null, ...   | fail, drop, keep |
| bad_times    | its time is empty, no time, negative, fractional, too big    | fail, drop       |
| future_times | its time is after `future_after`                             | fail, drop, keep |
| wrong_clock  | all times of its file look like another unit (file_clock.py) | fail, keep       |
| duplicates   | user, time and event id are those of an earlier event        | fail, drop, keep |
| out_of_order | in the input it comes after a newer event of its user        | fail, drop, keep |
| gaps         | more than `max_gap_days` lie between it and the user's next  | fail, drop, keep |

drop, for a gap: what lies before it, so the newest stretch stays. Every event is sorted in any case; out_of_order only
says how the log was written. Checks run in the order of the table; what one drops the next does not see.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pyarrow as pa

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.table.schema import TIMESTAMP, UNITS_PER_SECOND, USER
from elastic_rec.feature_store.table.times import parse_time_s
from elastic_rec.feature_store.utils.errors import DataError

SEQ = "seq"
# Places of events that a store holds already count up from here, so each is less than any row of the input.
BEFORE_ALL_INPUT = -(1 << 62)
DAY_S = 24 * 3600
ID_ROLES = ("user", "item", "event_id")


class Policy(Enum):
    """What becomes of events that fail a check: the ingest ends, they are dropped, or they stay and are counted."""

    fail = "fail"
    drop = "drop"
    keep = "keep"


CHECKS = (
    "null_ids", "null_words", "bad_times", "future_times", "wrong_clock", "duplicates", "out_of_order", "gaps"
)  # fmt: skip
# What pandas, Python, Java, Hive and SQL write for a missing value. "NA" is not among them: it is Namibia.
NULL_WORDS = ("nan", "NaN", "None", "none", "null", "NULL", "Null", "<NA>", "NaT", "\\N")


@dataclass
class ChecksConfig(Options, prefix="checks."):
    """A policy per check; also as strings."""

    null_ids: Policy = option(Policy.fail, "Empty user, item or event id, or one beyond int64: fail or drop.")
    null_words: Policy = option(
        Policy.fail, "Id that is text for a missing one (nan, NaN, None, null, <NA>, ...): fail, drop or keep."
    )
    bad_times: Policy = option(Policy.fail, "Time empty, no time, negative, fractional or beyond int64: fail or drop.")
    future_times: Policy = option(Policy.fail, "Time after future_after (often a wrong unit): fail, drop or keep.")
    future_after: str | None = option(None, "ISO date or epoch seconds; none: one day from now.")
    wrong_clock: Policy = option(
        Policy.fail,
        "All times of a file look like another unit (seconds read as milliseconds), like YYYYMMDD or like float32: "
        "fail or keep.",
    )
    duplicates: Policy = option(
        Policy.drop, "User, time and event id of an earlier event (needs event_id_column): fail, drop or keep."
    )
    out_of_order: Policy = option(
        Policy.keep, "Comes in the input after a newer event of its user: fail, drop or keep (sorted in)."
    )
    gaps: Policy = option(
        Policy.keep,
        "More than max_gap_days between two consecutive events of a user: fail, drop (the events before the gap) or "
        "keep.",
    )
    max_gap_days: float = option(3650.0, "Days between two events that no user can have.", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("null_ids", "bad_times"):
            if getattr(self, name) is Policy.keep:
                raise ValueError(f"checks.{name}=keep: such events cannot be stored; set fail or drop")
        if self.wrong_clock is Policy.drop:
            raise ValueError("checks.wrong_clock=drop: it is about whole files; set fail or keep, or leave files out")
        self.future_after_s()

    def future_after_s(self) -> int:
        """Seconds since 1970 after which a time is in the future."""
        if self.future_after is None:
            return int(time.time()) + DAY_S
        return parse_time_s(self.future_after, key="checks.future_after")

    def named(self, policy: Policy) -> list[str]:
        """Names of the checks with a policy, in the order in which they run."""
        return [name for name in CHECKS if getattr(self, name) is policy]

    def row_conditions(self, kinds: dict[str, str], unit: str) -> dict[str, str]:
        """Checks that one event alone decides, as SQL over the staged columns. kinds: role -> "int64" | "text" | ..."""
        ids = [role for role in kinds if role in ID_ROLES]
        words = ", ".join(f"'{word}'" for word in NULL_WORDS)
        texts = [f'"{role}" IN ({words})' for role in ids if kinds[role] == "text"]
        return {
            "null_ids": " OR ".join(f'"{role}" IS NULL' for role in ids),
            "null_words": " OR ".join(texts) or "false",
            "bad_times": "timestamp IS NULL",
            "future_times": f"timestamp > {self.latest(unit)}",
        }

    def latest(self, unit: str) -> int:
        """The last moment that is not in the future, in `unit`."""
        return self.future_after_s() * UNITS_PER_SECOND[unit]

    def max_gap(self, unit: str) -> int:
        """max_gap_days in `unit`."""
        return int(self.max_gap_days * DAY_S * UNITS_PER_SECOND[unit])


def duplicates_found(count: int, user: int | str, time: int, event_id: int | str) -> DataError:
    """The error for `count` duplicates, with the first of them as example."""
    return DataError(
        f"{count} duplicate events (same user, time and event id), the first of user {user!r}, time {time}, "
        f"event id {event_id!r}; set checks.duplicates=drop or keep"
    )


class OrderWatch:
    """Counts out_of_order and gaps in sorted histories as they pass; DataError where their policy is fail."""

    def __init__(self, config: ChecksConfig, unit: str) -> None:
        self.counts = {"out_of_order": 0, "gaps": 0}
        self._config, self._unit, self._max_gap = config, unit, config.max_gap(unit)

    def __call__(self, events: pa.Table, offsets: np.ndarray) -> None:
        """events: flat, N rows of whole users; offsets: (U+1,) of their users."""
        times, place = events[TIMESTAMP].to_numpy(), events[SEQ].to_numpy()
        users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        self._take("out_of_order", late_events(times, place, users), events, "sorting mends it")
        same_user = users[1:] == users[:-1]
        gaps = np.append((np.diff(times) > self._max_gap) & same_user, False)
        self._take("gaps", gaps, events, f"more than {self._config.max_gap_days} days before the next; a wrong unit?")

    def _take(self, check: str, found: np.ndarray, events: pa.Table, what: str) -> None:
        self.counts[check] += (count := int(np.count_nonzero(found)))
        if count and getattr(self._config, check) is Policy.fail:
            row = int(np.flatnonzero(found)[0])
            user, at = events[USER][row].as_py(), events[TIMESTAMP][row].as_py()
            raise DataError(
                f"user {user!r}, event at {at} ({self._unit}): {check} ({what}), and {count - 1} more among "
                f"{len(events)} events; set checks.{check}=keep or drop"
            )


def late_events(times: np.ndarray, place: np.ndarray, users: np.ndarray) -> np.ndarray:
    """(N,) bool: does a strictly newer event of the same user stand before this one in the input?

    times rise within a user, users rise; place: position in the input (old events of a store count from
    BEFORE_ALL_INPUT). One pass from the end: the least place of all newer events of the user so far.
    """
    old = place < 0
    place = np.where(old, place - BEFORE_ALL_INPUT, place)
    place = np.where(old, place, place + (place[old].max(initial=-1) + 1))
    span = place.max(initial=0) + 1
    shifted = place + users * span  # of any two users the former has the smaller numbers, so none of its is the minimum
    least = np.minimum.accumulate(shifted[::-1])[::-1]
    new_run = np.append(np.flatnonzero((np.diff(times) != 0) | (np.diff(users) != 0)) + 1, len(times))
    after = np.repeat(new_run, np.diff(np.append(0, new_run)))  # the first event after those of equal time
    has_newer = after < len(times)
    after = np.minimum(after, len(times) - 1)
    return has_newer & (users[after] == users) & (least[after] < shifted)
