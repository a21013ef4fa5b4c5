"""What is looked at in an event log, and what becomes of events that fail: a count, and a policy for each check.

| check        | an event fails when                                          | policies         |
|--------------|--------------------------------------------------------------|------------------|
| null_ids     | user, item or event id is empty, or no int64 in a typed file | fail, drop       |
| bad_times    | its time is empty, no number, negative, fractional, too big  | fail, drop       |
| future_times | its time is after `future_after`                             | fail, drop, keep |
| duplicates   | user, time and event id are those of an earlier event        | fail, drop, keep |
| out_of_order | it stands in the input behind a newer event of its user      | fail, drop, keep |
| gaps         | more than `max_gap_days` lie between it and the user's next  | fail, drop, keep |

drop, for a gap: what lies before it, so the newest stretch stays. Every event is sorted in any case; out_of_order only
says how the log was written. Checks run in the order of the table; what one drops the next does not see.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import pyarrow as pa

from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.schema import TIMESTAMP, UNITS_PER_SECOND, USER
from elastic_rec.feature_store.times import parse_time_s

SEQ = "seq"
# Places of events that a store holds already count up from here, so each is less than any row of the input.
BEFORE_ALL_INPUT = -(1 << 62)
DAY_S = 24 * 3600


class Policy(Enum):
    fail = "fail"
    drop = "drop"
    keep = "keep"


CHECKS = ("null_ids", "bad_times", "future_times", "duplicates", "out_of_order", "gaps")


@dataclass
class ChecksConfig:
    """A policy per check; also as strings."""

    null_ids: Policy = field(
        default=Policy.fail, metadata={"help": "Empty user, item or event id, or one beyond int64: fail or drop."}
    )
    bad_times: Policy = field(
        default=Policy.fail,
        metadata={"help": "Time empty, no number, negative, fractional or beyond int64: fail or drop."},
    )
    future_times: Policy = field(
        default=Policy.fail, metadata={"help": "Time after future_after (often a wrong unit): fail, drop or keep."}
    )
    future_after: str | None = field(
        default=None, metadata={"help": "ISO date or epoch seconds; none: one day from now."}
    )
    duplicates: Policy = field(
        default=Policy.drop,
        metadata={"help": "User, time and event id of an earlier event (needs event_id_column): fail, drop or keep."},
    )
    out_of_order: Policy = field(
        default=Policy.keep,
        metadata={"help": "Stands in the input behind a newer event of its user: fail, drop or keep (sorted in)."},
    )
    gaps: Policy = field(
        default=Policy.keep,
        metadata={"help": "Over max_gap_days between neighbours of a user: fail, drop (what lies before it) or keep."},
    )
    max_gap_days: float = field(default=3650.0, metadata={"help": "Days between two events that no user can have."})

    def __post_init__(self) -> None:
        for name in CHECKS:
            setattr(self, name, Policy(getattr(self, name)))
        for name in ("null_ids", "bad_times"):
            if getattr(self, name) is Policy.keep:
                raise ValueError(f"checks.{name}=keep: such events cannot be stored; set fail or drop")
        if self.max_gap_days <= 0:
            raise ValueError(f"checks.max_gap_days={self.max_gap_days}: must be positive")
        self.future_after_s()

    def future_after_s(self) -> int:
        return int(time.time()) + DAY_S if self.future_after is None else parse_time_s(self.future_after)

    def named(self, policy: Policy) -> list[str]:
        return [name for name in CHECKS if getattr(self, name) is policy]

    def row_conditions(self, roles: list[str], unit: str) -> dict[str, str]:
        """Checks that one event alone decides, as SQL over the staged columns."""
        ids = " OR ".join(f'"{role}" IS NULL' for role in roles if role in ("user", "item", "event_id"))
        latest = self.future_after_s() * UNITS_PER_SECOND[unit]
        return {"null_ids": ids, "bad_times": "timestamp IS NULL", "future_times": f"timestamp > {latest}"}

    def max_gap(self, unit: str) -> int:
        return int(self.max_gap_days * DAY_S * UNITS_PER_SECOND[unit])


def duplicates_found(count: int, user: int | str, time: int, event_id: int | str) -> DataError:
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
    shifted = place + users * span  # of any two users the former has the smaller numbers: the minimum starts anew
    least = np.minimum.accumulate(shifted[::-1])[::-1]
    new_run = np.append(np.flatnonzero((np.diff(times) != 0) | (np.diff(users) != 0)) + 1, len(times))
    behind = np.repeat(new_run, np.diff(np.append(0, new_run)))  # the first event after those of equal time
    has_newer = behind < len(times)
    behind = np.minimum(behind, len(times) - 1)
    return has_newer & (users[behind] == users) & (least[behind] < shifted)
