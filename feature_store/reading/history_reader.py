"""Histories batch by batch, in one global order. Every rank computes it and reads its own row groups (epoch_order.py).

    order    7 2 9 | 4 0 1 | 8          G = 3, users 7 4 1 8 in row groups of rank 0, the others of rank 1
    batch      0       1     2          rank 0:  7   | 4 1 | 8
                                        rank 1:  2 9 | 0   | (padding)

The order is a function of (store, seed, epoch) alone, and so is what a global batch holds: a run goes on from a Cursor
at any world size with nothing lost or repeated. Threads decode the next blocks in the background; neither their number
nor that of ranks shows in the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.reading.cursor import Cursor
from elastic_rec.feature_store.reading.epoch_order import ROW_GROUPS_PER_BLOCK, Block, Order, epoch_blocks
from elastic_rec.feature_store.reading.row_groups import Decoder
from elastic_rec.feature_store.table.schema import ITEM
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import offsets_of
from elastic_rec.feature_store.utils.prefetch import prefetch


class Loaded(NamedTuple):
    """A block, and this rank's users of it in the global order, with their positions in the epoch, (U,) rising."""

    block: Block
    users: Sequences
    positions: np.ndarray

    def between(self, begin: int, end: int) -> Sequences:
        """The users at positions begin to end - 1 of the epoch that are here."""
        return self.users.slice(*np.searchsorted(self.positions, [begin, end]).tolist())


class HistoryReader:
    """One rank's view of a store: its share of each global batch, as Sequences with times in the store's unit.

    columns: event columns to read; "item" is read whether named or not. global_batch_size: users, over all ranks.
    workers: threads that decode the next blocks, one each; 0: none.
    row_groups_per_block: part of the order. More of them shuffle more widely and balance more ranks (a block has
    several groups for each rank). They take more memory: a rank holds its share of workers + 2 blocks.
    events_per_batch: token budget of a global batch; 0: none. A user counts with at most max_history events. A batch
    then ends before the user who would exceed it, at global_batch_size users, or with its block. A user who alone
    exceeds it is a batch of their own. Epochs differ in their number of batches: num_batches_in(epoch).
    bucket_lengths: users of like length (factors of two) stand together, the lengths of a block in a drawn order.
    Raises DataError for more ranks than users, and for batches of fewer users than ranks.
    """

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
        workers: int = 1,
        row_groups_per_block: int = ROW_GROUPS_PER_BLOCK,
        events_per_batch: int = 0,
        max_history: int = 1 << 31,
        bucket_lengths: bool = False,
    ) -> None:
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
        self.decoder = Decoder(store, self.columns)
        self.global_batch_size = global_batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed = shuffle, seed
        self.workers, self.row_groups_per_block = workers, row_groups_per_block
        self.events_per_batch, self.max_history, self.bucket_lengths = events_per_batch, max_history, bucket_lengths
        self._lengths: dict[int, np.ndarray] = {}
        self._users_G = np.array([group.num_users for group in self.decoder.groups], np.int64)
        self._events_G = np.array([group.num_events for group in self.decoder.groups], np.int64)

    @property
    def num_users(self) -> int:
        """Users of the store, each of whom comes once per epoch."""
        return self.store.num_users

    @property
    def num_batches(self) -> int:
        """Global batches in an epoch, the same on every rank; the last may be short. Not with a budget of events."""
        if self.events_per_batch:
            raise ValueError("with events_per_batch epochs differ in their batches: ask num_batches_in(epoch)")
        return -(-self.num_users // self.global_batch_size)

    def num_batches_in(self, epoch: int) -> int:
        """Global batches in this epoch, the same on every rank."""
        return len(self._all_ends(epoch)) if self.events_per_batch else self.num_batches

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Sequences]:
        """Batches start_batch, start_batch + 1, ... of one epoch. Blocks before the first one needed are not read."""
        return self._batches(epoch, self._rows_after(epoch, start_batch))

    def cursor(self, epoch: int, batches: int) -> Cursor:
        """Where reading stands after so many batches of an epoch."""
        return Cursor(self.seed, epoch, self._rows_after(epoch, batches), self.store.manifest.hash)

    def resume(self, cursor: Cursor) -> Iterator[Sequences]:
        """The rest of a cursor's epoch, in the order it would have had. DataError where store or seed are others."""
        cursor.check(self.store, rank=self.rank, world_size=self.world_size)
        if cursor.seed != self.seed or not 0 <= cursor.rows <= self.num_users:
            raise DataError(f"{cursor} does not fit seed {self.seed} and {self.num_users} users; give its own seed")
        return self._batches(cursor.epoch, cursor.rows)

    def _batches(self, epoch: int, begin: int) -> Iterator[Sequences]:
        """Batches from position `begin` on."""
        parts: list[Sequences] = []
        for loaded in self._loaded(epoch, begin):
            for end in self._ends(loaded.block, begin, epoch).tolist():
                parts.append(loaded.between(begin, end))
                if end > loaded.block.stop:
                    break  # the batch goes on in the next block
                yield self._batch(parts, end - begin)
                parts, begin = [], end

    def _ends(self, block: Block, begin: int, epoch: int) -> np.ndarray:
        """Where the batch that starts at `begin` and those after it end, up to the first to reach the block's end."""
        size = self.global_batch_size
        if not self.events_per_batch:
            return np.minimum(np.arange(begin + size, block.stop + size, size), self.num_users)
        costs = np.empty(len(block.places), np.int64)
        costs[block.places] = np.concatenate([self._drawn_lengths(group, epoch) for group in block.members])
        before = offsets_of(np.minimum(costs, self.max_history))
        ends, at = [], 0
        while at < len(costs):
            fits = int(np.searchsorted(before, before[at] + self.events_per_batch, side="right")) - 1
            at = min(max(fits, at + 1), at + size, len(costs))
            ends.append(block.start + at)
        return np.array([end for end in ends if end > begin], np.int64)

    def _rows_after(self, epoch: int, batches: int) -> int:
        num_batches = self.num_batches_in(epoch)
        if not 0 <= batches <= num_batches:
            raise DataError(f"start_batch {batches} is outside 0..{num_batches}; was the store rebuilt?")
        if self.events_per_batch:
            return int(self._all_ends(epoch)[batches - 1]) if batches else 0
        return min(batches * self.global_batch_size, self.num_users)

    def _all_ends(self, epoch: int) -> np.ndarray:
        return np.concatenate([self._ends(block, 0, epoch) for block in self._blocks(epoch)])

    def _drawn_lengths(self, group: int, epoch: int) -> np.ndarray:
        """Events of each user of a row group, in the order drawn for it; every rank needs those of all."""
        if group not in self._lengths:
            self._lengths[group] = self.decoder.lengths(group).astype(np.int32)
        lengths = self._lengths[group]
        rows = self.decoder.groups[group].first_row + np.arange(len(lengths))
        return lengths[self._order(epoch).of_units(rows)]

    def _order(self, epoch: int) -> Order:
        return Order(self.seed, epoch, self.shuffle)

    def _blocks(self, epoch: int) -> Iterator[Block]:
        def classes_of(group: int) -> np.ndarray:
            return np.frexp(self._drawn_lengths(group, epoch))[1]

        return epoch_blocks(
            self._users_G,
            self._events_G,
            order=self._order(epoch),
            rank=self.rank,
            world_size=self.world_size,
            row_groups_per_block=self.row_groups_per_block,
            classes_of=classes_of if self.bucket_lengths else None,
        )

    def _loaded(self, epoch: int, begin: int) -> Iterator[Loaded]:
        """Blocks from the one with position `begin` on; threads decode the next ones meanwhile."""
        order = self._order(epoch)

        def decode(block: Block) -> tuple[Block, list[Sequences]]:
            return block, [self.decoder.decode(share.group) for share in block.shares]

        blocks = (block for block in self._blocks(epoch) if block.stop > begin)
        for block, parts in prefetch(decode, blocks, workers=self.workers):
            if not parts:
                yield Loaded(block, self.decoder.padding.slice(0, 0), np.zeros(0, np.int64))
                continue
            firsts = offsets_of(np.array([len(users.rows) for users in parts]))[:-1]
            shares = zip(firsts, parts, block.shares, strict=True)
            picks = [first + order.of_units(users.rows)[share.picks] for first, users, share in shares]
            positions = np.concatenate([share.positions for share in block.shares])
            in_order = np.argsort(positions)
            users = Sequences.concat(parts).take(np.concatenate(picks)[in_order])
            yield Loaded(block, users, positions[in_order])

    def _batch(self, parts: list[Sequences], num_global_rows: int) -> Sequences:
        users = Sequences.concat(parts)
        if not len(users.rows):  # a rank without users in a batch still takes part
            users = self.decoder.padding
        return replace(users, num_global_rows=num_global_rows)

    def file_histories(self, file_index: int, batch_size: int) -> Iterator[Sequences]:
        """All users of one data file in store order, batch_size at a time, whatever the rank; the last may be short."""
        groups = [number for number, group in enumerate(self.decoder.groups) if group.file == file_index]
        pending: list[Sequences] = []
        num_pending = 0
        for users in prefetch(self.decoder.decode, groups, workers=self.workers):
            at = 0
            while at < len(users.rows):
                stop = min(at + batch_size - num_pending, len(users.rows))
                pending.append(users.slice(at, stop))
                num_pending += stop - at
                if num_pending == batch_size:
                    yield self._batch(pending, num_pending)
                    pending, num_pending = [], 0
                at = stop
        if pending:
            yield self._batch(pending, num_pending)
