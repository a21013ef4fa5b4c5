"""Row groups of a store, decoded into flat arrays of the leaves asked for."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import elastic_rec.feature_store.batches.torchrec_types  # noqa: F401 - registers torch.ops.fbgemm
from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.table.schema import EVENTS, NUM_EVENTS, TIMESTAMP, UNITS_PER_SECOND, USER, leaf_path
from elastic_rec.feature_store.table.store import Store, StoreFile, read_row_groups
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import offsets_of, span_indices

# Stores whose decoded leaves fit in this many bytes (per decoder) are decoded once and kept for later epochs.
CACHE_BYTES = 1 << 29
_OPEN_FILES = 32


class RowGroup(NamedTuple):
    """file: number in Store.files; number: of the group in its file; first_row: row number of its first user."""

    file: int
    number: int
    first_row: int
    num_users: int
    num_events: int


@dataclass(frozen=True)
class Users:
    """Decoded users: rows (U,), offsets (U+1,), flat arrays (T,) int64; times in the store's unit."""

    rows: np.ndarray
    offsets: np.ndarray
    times: np.ndarray
    columns: dict[str, np.ndarray]

    def take(self, users: np.ndarray) -> Users:
        """`users` in that order. FBGEMM copies whole stretches: half the time of gathering event by event."""
        lengths = np.diff(self.offsets)
        order, lengths_U1 = torch.from_numpy(users.astype(np.int32)), torch.from_numpy(lengths).unsqueeze(1)
        offsets = offsets_of(lengths[users])

        def permuted(values: np.ndarray) -> np.ndarray:
            source = torch.from_numpy(np.require(values, requirements="W"))  # torch warns of Arrow's read-only memory
            return torch.ops.fbgemm.permute_2D_sparse_data(order, lengths_U1, source, None, offsets[-1])[1].numpy()

        columns = {name: permuted(values) for name, values in self.columns.items()}
        return Users(self.rows[users], offsets, permuted(self.times), columns)

    def stretches(self, users: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Users:
        """The events [starts, ends) (on the T axis) of each of `users`."""
        index = span_indices(starts, ends - starts)
        columns = {name: values[index] for name, values in self.columns.items()}
        return Users(self.rows[users], offsets_of(ends - starts), self.times[index], columns)

    def slice(self, begin: int, end: int) -> Users:
        """Users [begin, end) without a copy of their events."""
        span = slice(self.offsets[begin], self.offsets[end])
        columns = {name: values[span] for name, values in self.columns.items()}
        offsets = self.offsets[begin : end + 1] - self.offsets[begin]
        return Users(self.rows[begin:end], offsets, self.times[span], columns)

    def histories(self, units_per_second: int, *, num_global_users: int) -> Histories:
        times_s = self.times if units_per_second == 1 else self.times // units_per_second
        return Histories(self.rows, self.offsets, self.columns, times_s, num_global_users)


def no_users(columns: list[str]) -> Users:
    empty = np.zeros(0, np.int64)
    return Users(empty, np.zeros(1, np.int64), empty, dict.fromkeys(columns, empty))


def padding_user(columns: list[str]) -> Users:
    """One user without events, row -1: what a rank without users brings to a batch."""
    empty = np.zeros(0, np.int64)
    return Users(np.full(1, -1, np.int64), np.zeros(2, np.int64), empty, dict.fromkeys(columns, empty))


def concat_users(parts: list[Users]) -> Users:
    if len(parts) == 1:
        return parts[0]
    offsets = offsets_of(np.concatenate([np.diff(part.offsets) for part in parts]))
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    times = np.concatenate([part.times for part in parts])
    return Users(np.concatenate([part.rows for part in parts]), offsets, times, columns)


class Decoder:
    """columns: event columns to read beside the times. groups: all row groups of the store, in the order of its rows.
    cache: keep what is decoded, where all of it fits in CACHE_BYTES; for those who read a store more than once.

    num_decoded_events counts what decode() has read from files, repeats included. Safe to use from several threads.
    """

    def __init__(self, store: Store, columns: list[str], *, cache: bool = True) -> None:
        store.check_columns(columns)
        self.store, self.columns = store, columns
        self.units_per_second = UNITS_PER_SECOND[store.time_unit]
        self.groups: list[RowGroup] = []
        for number, file in enumerate(store.files):
            row = file.first_row
            for group, (num_users, num_events) in enumerate(file.row_groups):
                self.groups.append(RowGroup(number, group, row, num_users, num_events))
                row += num_users
        self.num_decoded_events = 0
        self._counting = threading.Lock()
        self._thread = threading.local()  # each thread has its own open files: Arrow's are not for sharing
        decoded_bytes = store.num_events * 8 * (len(columns) + 1)
        self._cache: dict[int, Users] | None = {} if cache and decoded_bytes <= CACHE_BYTES else None

    def decode(self, group: int) -> Users:
        """All users of a row group; DataError where it does not hold what the manifest says."""
        if self._cache is not None and group in self._cache:
            return self._cache[group]
        file, number, first_row, num_users, num_events = self.groups[group]
        where = f"{self.store.files[file].path}: row group {number}"
        paths = [leaf_path(name) for name in (TIMESTAMP, *self.columns)]
        table = read_row_groups(self._open(file), [number], paths, self.store.files[file].path)
        users = _decode_events(table[EVENTS], first_row, self.columns)
        if (len(users.rows), len(users.times)) != (num_users, num_events):
            raise DataError(
                f"{where} has {len(users.rows)} users with {len(users.times)} events, the manifest says {num_users} "
                f"with {num_events}; changed, rerun ingest"
            )
        for name, values in users.columns.items():
            self._check_ids(name, values, users, where=where)
        with self._counting:
            self.num_decoded_events += num_events
        if self._cache is not None:
            self._cache[group] = users
        return users

    def lengths(self, group: int) -> np.ndarray:
        """(U,) events of each user of a row group, without decoding them."""
        file, number, *_ = self.groups[group]
        path, opened = self.store.files[file].path, self._open(file)
        if NUM_EVENTS in opened.schema_arrow.names:
            lengths = read_row_groups(opened, [number], [NUM_EVENTS], path)[NUM_EVENTS].to_numpy()
            if lengths.sum() != self.groups[group].num_events:
                raise DataError(f"{path}: row group {number} has lengths that do not add up; changed, rerun ingest")
            return lengths
        return np.diff(self.decode(group).offsets)  # a store from before lengths were kept

    def user_ids(self, group: int) -> pa.Array:
        file, number, *_ = self.groups[group]
        table = read_row_groups(self._open(file), [number], [USER], self.store.files[file].path)
        return table[USER].combine_chunks()

    def _check_ids(self, name: str, values: np.ndarray, users: Users, *, where: str) -> None:
        """An id outside its table would be looked up in a stranger's row; ingest never writes one."""
        size = self.store.manifest.vocabularies[name].size
        if len(values) and values.view(np.uint64).max() >= size:  # a negative id is a huge one
            at = int(np.flatnonzero((values < 0) | (values >= size))[0])
            row = users.rows[np.searchsorted(users.offsets, at, side="right") - 1]
            raise DataError(
                f"{where}, user row {row}: {name} id {values[at]} is outside its vocabulary (0..{size - 1}); "
                "the file was not written by ingest, rerun it"
            )

    def _open(self, file: int) -> pq.ParquetFile:
        if not hasattr(self._thread, "open"):
            self._thread.open = lru_cache(maxsize=_OPEN_FILES)(StoreFile.open)
        return self._thread.open(self.store.files[file])


def _decode_events(events: pa.ChunkedArray, first_row: int, names: list[str]) -> Users:
    """list<struct> -> flat arrays. No copy for one chunk: children of the struct are the Parquet reader's buffers."""
    lists = events.chunk(0) if events.num_chunks == 1 else events.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    flat = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    columns = {name: flat.field(name).to_numpy(zero_copy_only=True) for name in names}
    times = flat.field(TIMESTAMP).to_numpy(zero_copy_only=True)
    rows = np.arange(first_row, first_row + len(lists))
    return Users(rows, offsets - offsets[0], times, columns)
