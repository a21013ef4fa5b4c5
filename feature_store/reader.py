"""Histories batch by batch, in one global order that every rank computes and takes its stride of.

The order is a function of (store, seed, epoch) alone. Row groups are permuted, then dealt into blocks of
ROW_GROUPS_PER_BLOCK, and users are permuted within their block: one block is decoded at a time, and every user still
meets new neighbours each epoch. Global batch g is users order[g*G : (g+1)*G]; rank r of W takes [r::W] of it:

    order    7 2 9 | 4 0 1 | 8          G = 3, W = 2:   rank 0:  7 9 | 4 1 | 8
    batch      0       1     2                          rank 1:  2   | 0   | (padding)

so a run goes on from (seed, epoch, batch) at any world size with nothing lost or repeated. Every rank decodes every
block (its users are spread over all of them): the price of an order that does not depend on the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.batch import Histories
from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.hashing import counter_hash
from elastic_rec.feature_store.jagged import offsets_of, span_indices
from elastic_rec.feature_store.schema import EVENTS, ITEM, TIMESTAMP, UNITS_PER_SECOND, leaf_path
from elastic_rec.feature_store.store import Store, open_data_file, read_row_groups

ROW_GROUPS_PER_BLOCK = 8
# Stores whose decoded leaves fit in this many bytes (per reader) are decoded once and kept for later epochs.
CACHE_BYTES = 1 << 29
_OPEN_FILES = 32
_ORDER_OF_GROUPS, _ORDER_OF_USERS = 1, 2


@dataclass(frozen=True)
class _Users:
    """Decoded users: rows (U,), offsets (U+1,), flat arrays (T,) int64; times in seconds."""

    rows: np.ndarray
    offsets: np.ndarray
    times_s: np.ndarray
    columns: dict[str, np.ndarray]

    def take(self, users: np.ndarray) -> _Users:
        lengths = np.diff(self.offsets)[users]
        index = span_indices(self.offsets[users], lengths)
        columns = {name: values[index] for name, values in self.columns.items()}
        return _Users(self.rows[users], offsets_of(lengths), self.times_s[index], columns)


def _concat(parts: list[_Users]) -> _Users:
    if len(parts) == 1:
        return parts[0]
    offsets = offsets_of(np.concatenate([np.diff(part.offsets) for part in parts]))
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    times_s = np.concatenate([part.times_s for part in parts])
    return _Users(np.concatenate([part.rows for part in parts]), offsets, times_s, columns)


class HistoryReader:
    """One rank's view of a store. columns: event columns to read; "item" is read whether named or not."""

    def __init__(
        self,
        store: Store,
        *,
        columns: list[str],
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool,
        seed: int = 0,
    ) -> None:
        store.check_columns(columns)
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} is outside 0..{world_size - 1}; check the launcher")
        if world_size > store.num_users:
            raise DataError(
                f"store has {store.num_users} users, world size {world_size}: start at most {store.num_users} ranks"
            )
        if global_batch_size < world_size:
            raise DataError(
                f"global_batch_size {global_batch_size} is less than the world size: every rank needs a user in each "
                f"batch, set it to at least {world_size}"
            )
        self.store = store
        self.columns = list(dict.fromkeys([ITEM, *columns]))
        self.global_batch_size = global_batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed = shuffle, seed
        # One entry per row group of the store: (file, group in the file, first row, users, events).
        self._groups: list[tuple[int, int, int, int, int]] = []
        for number, file in enumerate(store.files):
            row = file.first_row
            for group, (num_users, num_events) in enumerate(file.row_groups):
                self._groups.append((number, group, row, num_users, num_events))
                row += num_users
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)
        decoded_bytes = store.num_events * 8 * (len(self.columns) + 1)
        self._cache: dict[int, _Users] | None = {} if decoded_bytes <= CACHE_BYTES else None

    @property
    def num_users(self) -> int:
        return self.store.num_users

    @property
    def num_batches(self) -> int:
        """Global batches in an epoch, the same on every rank; the last may be short."""
        return -(-self.num_users // self.global_batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Histories]:
        """Batches start_batch, start_batch + 1, ... of one epoch. Blocks before the first one needed are not read."""
        if not 0 <= start_batch <= self.num_batches:
            raise DataError(f"start_batch {start_batch} is outside 0..{self.num_batches}; was the store rebuilt?")
        size = self.global_batch_size
        parts: list[_Users] = []
        position, begin = 0, start_batch * size
        for block in self._blocks(epoch):
            block_start, position = position, position + sum(self._groups[group][3] for group in block)
            if position <= begin:
                continue
            users = _concat([self._decode(group) for group in block])
            order = self._order_users(users.rows, epoch)
            at = max(block_start, begin)
            while at < position:
                batch_start = at // size * size
                batch_end = min(batch_start + size, self.num_users)
                stop = min(batch_end, position)
                first = at + (self.rank - (at - batch_start)) % self.world_size  # first of our stride at or after `at`
                mine = order[first - block_start : stop - block_start : self.world_size]
                if len(mine):
                    parts.append(users.take(mine))
                if stop == batch_end:
                    yield self._histories(parts, num_global_users=batch_end - batch_start)
                    parts = []
                at = stop

    def file_histories(self, file_index: int, batch_size: int) -> Iterator[Histories]:
        """All users of one data file in store order, batch_size at a time, whatever the rank; the last may be short."""
        pending: list[_Users] = []
        num_pending = 0
        for group, (file, _, _, num_users, _) in enumerate(self._groups):
            if file != file_index:
                continue
            users, at = self._decode(group), 0
            while at < num_users:
                stop = min(at + batch_size - num_pending, num_users)
                pending.append(users.take(np.arange(at, stop)))
                num_pending += stop - at
                if num_pending == batch_size:
                    yield self._histories(pending, num_global_users=num_pending)
                    pending, num_pending = [], 0
                at = stop
        if pending:
            yield self._histories(pending, num_global_users=num_pending)

    def _blocks(self, epoch: int) -> list[list[int]]:
        groups = np.arange(len(self._groups))
        if self.shuffle:
            keys = counter_hash(_ORDER_OF_GROUPS, self.seed, epoch, groups)
            groups = np.argsort(keys, kind="stable")
        return [groups[i : i + ROW_GROUPS_PER_BLOCK].tolist() for i in range(0, len(groups), ROW_GROUPS_PER_BLOCK)]

    def _order_users(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(rows))
        return np.argsort(counter_hash(_ORDER_OF_USERS, self.seed, epoch, rows), kind="stable")

    def _histories(self, parts: list[_Users], *, num_global_users: int) -> Histories:
        if not parts:  # a rank without users in a short last batch still takes part: one user without events
            empty = np.zeros(0, np.int64)
            return Histories(
                np.array([-1], np.int64),
                np.zeros(2, np.int64),
                dict.fromkeys(self.columns, empty),
                empty,
                num_global_users,
            )
        users = _concat(parts)
        return Histories(users.rows, users.offsets, users.columns, users.times_s, num_global_users)

    def _decode(self, group: int) -> _Users:
        if self._cache is not None and group in self._cache:
            return self._cache[group]
        file, group_in_file, first_row, num_users, num_events = self._groups[group]
        paths = [leaf_path(name) for name in (TIMESTAMP, *self.columns)]
        table = read_row_groups(self._open(file), [group_in_file], paths, self.store.files[file].path)
        users = _decode_events(table[EVENTS], first_row, self.columns, UNITS_PER_SECOND[self.store.time_unit])
        if (len(users.rows), len(users.times_s)) != (num_users, num_events):
            raise DataError(
                f"{self.store.files[file].path}: row group {group_in_file} has {len(users.rows)} users with "
                f"{len(users.times_s)} events, the manifest says {num_users} with {num_events}; changed, rerun ingest"
            )
        for name, values in users.columns.items():
            self._check_ids(name, values, users, where=f"{self.store.files[file].path}: row group {group_in_file}")
        if self._cache is not None:
            self._cache[group] = users
        return users

    def _check_ids(self, name: str, values: np.ndarray, users: _Users, *, where: str) -> None:
        """An id outside its table would be looked up in a stranger's row; ingest never writes one."""
        size = self.store.manifest["vocabularies"][name]["size"]
        if len(values) and not 0 <= values.min() <= values.max() < size:
            at = int(np.flatnonzero((values < 0) | (values >= size))[0])
            row = users.rows[np.searchsorted(users.offsets, at, side="right") - 1]
            raise DataError(
                f"{where}, user row {row}: {name} id {values[at]} is outside its vocabulary (0..{size - 1}); "
                "the file was not written by ingest, rerun it"
            )

    def _open_file(self, file: int) -> pq.ParquetFile:
        return open_data_file(self.store.files[file].path)


def _decode_events(events: pa.ChunkedArray, first_row: int, names: list[str], units_per_second: int) -> _Users:
    """list<struct> -> flat arrays. No copy for one chunk: children of the struct are the Parquet reader's buffers."""
    lists = events.chunk(0) if events.num_chunks == 1 else events.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    flat = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    columns = {name: flat.field(name).to_numpy(zero_copy_only=True) for name in names}
    times = flat.field(TIMESTAMP).to_numpy(zero_copy_only=True)
    times_s = times if units_per_second == 1 else times // units_per_second
    rows = np.arange(first_row, first_row + len(lists))
    return _Users(rows, offsets - offsets[0], times_s, columns)
