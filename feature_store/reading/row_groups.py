"""Row groups of a store, decoded into flat arrays of the columns asked for."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.table.schema import EVENTS, NUM_EVENTS, TIMESTAMP, UNITS_PER_SECOND, USER, leaf_path
from elastic_rec.feature_store.table.store import Store, StoreFile, read_row_groups
from elastic_rec.feature_store.utils.errors import DAMAGED, DataError
from elastic_rec.feature_store.utils.jagged import flat_structs

# Stores whose decoded columns fit in this many bytes (per decoder) are decoded once and kept for later epochs.
CACHE_BYTES = 1 << 29
_OPEN_FILES = 32


class RowGroup(NamedTuple):
    """Where a row group is. file: its number in Store.files. number: of the group in its file. first_row: row number of
    its first user; row groups of 3 and 2 users have 0 and 3."""

    file: int
    number: int
    first_row: int
    num_users: int
    num_events: int


class Decoder:
    """Decodes row groups of a store. Safe to use from several threads.

    columns: event columns to read beside the times. cache: keep what is decoded, where all of it fits in CACHE_BYTES;
    for those who read a store more than once. DataError for a column that the store does not have.
    groups: all row groups of the store, in the order of its rows. padding: a user without events, with the columns and
    the unit of the decoded ones. first_groups: bucket -> number of its first group. num_decoded_events: what decode()
    has read from files, repeats included.
    """

    def __init__(self, store: Store, columns: list[str], *, cache: bool = True) -> None:
        store.check_columns(columns)
        self.store, self.columns = store, columns
        self.padding = Sequences.padding(columns, UNITS_PER_SECOND[store.time_unit])
        self.groups: list[RowGroup] = []
        for number, file in enumerate(store.files):
            row = file.first_row
            for group, (num_users, num_events) in enumerate(file.row_groups):
                self.groups.append(RowGroup(number, group, row, num_users, num_events))
                row += num_users
        numbers = reversed(range(len(self.groups)))
        self.first_groups = {store.files[self.groups[number].file].bucket: number for number in numbers}
        self.num_decoded_events = 0
        self._counting = threading.Lock()
        self._thread = threading.local()  # each thread has its own open files: Arrow's are not for sharing
        decoded_bytes = store.num_events * 8 * (len(columns) + 1)
        self._cache: dict[int, Sequences] | None = {} if cache and decoded_bytes <= CACHE_BYTES else None

    def decode(self, group: int) -> Sequences:
        """All users of a row group; DataError where it does not hold what the manifest says."""
        if self._cache is not None and group in self._cache:
            return self._cache[group]
        file, number, first_row, num_users, num_events = self.groups[group]
        where = f"{self.store.files[file].path}: row group {number}"
        paths = [leaf_path(name) for name in (TIMESTAMP, *self.columns)]
        table = read_row_groups(self._open(file), [number], paths, self.store.files[file].path)
        offsets, events = flat_structs(table[EVENTS])
        users = replace(
            self.padding,
            rows=np.arange(first_row, first_row + len(offsets) - 1),
            offsets=offsets,
            times=events.field(TIMESTAMP).to_numpy(),
            columns={name: events.field(name).to_numpy() for name in self.columns},
        )
        if (len(users.rows), len(users.times)) != (num_users, num_events):
            raise DataError(
                f"{where} has {len(users.rows)} users with {len(users.times)} events, the manifest says {num_users} "
                f"with {num_events}; {DAMAGED}"
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
                raise DataError(f"{path}: row group {number} has lengths that do not add up; {DAMAGED}")
            return lengths
        return self.decode(group).lengths  # a store from before lengths were kept

    def user_ids(self, group: int) -> pa.Array:
        """(U,) the id of each user of a row group."""
        file, number, *_ = self.groups[group]
        table = read_row_groups(self._open(file), [number], [USER], self.store.files[file].path)
        return table[USER].combine_chunks()

    def _check_ids(self, name: str, values: np.ndarray, users: Sequences, *, where: str) -> None:
        """An id outside its table would be looked up in a stranger's row; ingest never writes one."""
        size = self.store.manifest.vocabularies[name].size
        if len(values) and values.view(np.uint64).max() >= size:  # a negative id is a huge one
            at = int(np.flatnonzero((values < 0) | (values >= size))[0])
            row = users.rows[np.searchsorted(users.offsets, at, side="right") - 1]
            raise DataError(
                f"{where}, user row {row}: {name} id {values[at]} is outside its vocabulary (0..{size - 1}); "
                "the file was not written by ingest: run the ingest again"
            )

    def _open(self, file: int) -> pq.ParquetFile:
        if not hasattr(self._thread, "open"):
            self._thread.open = lru_cache(maxsize=_OPEN_FILES)(StoreFile.open)
        return self._thread.open(self.store.files[file])
