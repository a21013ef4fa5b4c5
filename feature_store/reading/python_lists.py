"""Histories from Python lists: one user's flat list, or a list per user, of raw ids and times.

    items=["a", "b", "a"]          one user, three events
    items=[["a", "b"], [], ["c"]]  three users with 2, 0 and 1 events

Legend: B users, N values end to end, T events end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.ingestion.sources import cast_ids
from elastic_rec.feature_store.table.times import YEAR_2200_S, iso_time
from elastic_rec.feature_store.table.vocabulary import FIRST, PAD, UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import offsets_of, span_indices


class Lists(NamedTuple):
    """flat: N values of all users end to end. lengths_B: (B,) int64. is_one_user: they came as one flat list."""

    flat: Sequence[Any] | pa.Array
    lengths_B: np.ndarray
    is_one_user: bool

    @staticmethod
    def of(values: Sequence[Any] | np.ndarray, what: str, *, like: tuple[bool, int] | None = None) -> Lists:
        """like: (is_one_user, how many users) that are wanted. ValueError where `values` has others."""
        is_one_user = not len(values) or not isinstance(values[0], list | tuple | np.ndarray | pa.Array)
        if is_one_user and like is not None and not len(values):
            is_one_user = like[0]  # [] is no event of one user, or no user
        found = is_one_user, 1 if is_one_user else len(values)
        if like is not None and found != like:
            given, wanted = ("one flat list" if one else f"lists of {size} users" for one, size in (found, like))
            raise ValueError(f"{what}: {given}, where {wanted} is wanted, as for the other arguments")
        if is_one_user:
            return Lists(values, np.array([len(values)]), True)
        return Lists(list(chain.from_iterable(values)), np.array([len(each) for each in values], np.int64), False)

    @property
    def offsets_B1(self) -> np.ndarray:
        return offsets_of(self.lengths_B)

    @property
    def users(self) -> tuple[bool, int]:
        return self.is_one_user, len(self.lengths_B)


class IdIndex:
    """Raw ids -> rows of a table of `size` rows: UNKNOWN for ids that are not in it, or are newer than the table.

    A hash table in Python, made once: 0.1 µs per id whatever the vocabulary, where Vocabulary.encode makes a new one
    for each call. About 150 bytes per id.
    """

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        self.type = vocabulary.type
        ids = vocabulary.ids.slice(0, size - FIRST).to_pylist()
        self._rows = dict(zip(ids, range(FIRST, size), strict=True))

    def encode(self, raw: Sequence[Any] | np.ndarray | pa.Array, *, where: str) -> np.ndarray:
        """(N,) int64. DataError for ids of another type than the store's, or of several types."""
        try:
            values = pa.array(raw)
        except (pa.ArrowException, TypeError) as error:
            raise DataError(f"{where}: give ids of one type ({error})") from error
        ids, rows = cast_ids(values, self.type, where=where).to_pylist(), self._rows
        return np.fromiter((rows.get(each, UNKNOWN) for each in ids), np.int64, len(ids))


def seconds_of(values: Sequence[Any] | np.ndarray | pa.Array, what: str) -> np.ndarray:
    """Seconds since 1970, or datetimes -> (N,) int64 seconds, rounded down.

    ValueError for what is no time, or lies before 1970 or after 2200 (milliseconds do).
    """
    try:
        array = pa.array(values)
        if pa.types.is_timestamp(array.type):
            array = array.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_numpy() // 1_000_000
        elif not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or not len(array)):
            raise TypeError(f"they are {array.type}")
        seconds = np.floor(np.asarray(array, None if len(array) else np.int64))
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{what}: give seconds since 1970, or datetimes ({error})") from error
    if len(seconds) and not (seconds.min() >= 0 and seconds.max() <= YEAR_2200_S):
        raise ValueError(
            f"{what}: from {seconds.min():g} to {seconds.max():g}, but they are seconds since 1970, up to the year "
            "2200: convert them"
        )
    return seconds.astype(np.int64)


def histories_after(
    newest_s_B: np.ndarray, lengths_B: np.ndarray, columns: dict[str, np.ndarray], times_s: np.ndarray
) -> Sequences:
    """Users' new events, after an event without ids at newest_s_B for those who have one (-1: they have none).

        newest 50, -1    new [60 61] [7]    ->    [50 60 61] [7]        the first gap is then 10 s

    lengths_B: new events of each user. columns, times_s: of the new events end to end, as Sequences has them.
    ValueError for an event that comes after a newer one.
    """
    has_B = newest_s_B >= 0
    offsets = offsets_of(lengths_B + has_B)
    new, old, size = span_indices(offsets[:-1] + has_B, lengths_B), offsets[:-1][has_B], int(offsets[-1])
    times = np.empty(size, np.int64)
    times[new], times[old] = times_s, newest_s_B[has_B]
    owner = np.repeat(np.arange(len(lengths_B)), np.diff(offsets))
    back = np.flatnonzero((np.diff(times) < 0) & (np.diff(owner) == 0))
    if len(back):
        place = int(back[0])
        raise ValueError(
            f"user {owner[place]} of the call: an event of {iso_time(int(times[place + 1]))} comes after one of "
            f"{iso_time(int(times[place]))}. Give events oldest first, and none older than the state: for those, start "
            "from the whole history"
        )
    full = {name: np.full(size, PAD, np.int64) for name in columns}
    for name, ids in columns.items():
        full[name][new] = ids
    return Sequences(np.arange(len(lengths_B)), offsets, times, full, num_global_rows=len(lengths_B))


def no_events(num_users: int, columns: list[str]) -> Sequences:
    """Users without events."""
    none = np.zeros(0, np.int64)
    return histories_after(np.full(num_users, -1), np.zeros(num_users, np.int64), dict.fromkeys(columns, none), none)


def newest_events(histories: Sequences, most: int) -> Sequences:
    """The newest `most` events of each user."""
    ends = histories.offsets[1:]
    return histories.spans(ends - np.minimum(histories.lengths, most), ends)
