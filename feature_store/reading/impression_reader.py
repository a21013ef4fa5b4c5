"""Impressions batch by batch, each with its user's history as of its time, in one global order (epoch_order.py).

A unit of the order is an impression group (impression_groups.py): a user's history is read and embedded once for
several impressions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from elastic_rec.feature_store.batches.impression_batch import Impressions
from elastic_rec.feature_store.batches.splits import ImpressionSplit
from elastic_rec.feature_store.ingestion.impressions.config import STAGES
from elastic_rec.feature_store.ingestion.impressions.writer import group_edges
from elastic_rec.feature_store.reading.cursor import Cursor
from elastic_rec.feature_store.reading.epoch_order import Order, Share, epoch_blocks
from elastic_rec.feature_store.reading.impression_groups import (
    ImpressionGroups,
    concat_impressions,
    group_impressions,
    groups_per_user,
    in_range,
    padding_impressions,
    take_groups,
)
from elastic_rec.feature_store.reading.row_groups import Decoder
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.schema import ITEM
from elastic_rec.feature_store.table.store import Store, first_users
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import offsets_of, run_starts


class GroupRows(NamedTuple):
    """Rows [begin, end) of a file of impressions belong to a row group of histories (-1: their bucket has none).

    num_groups: impression groups that they make."""

    row_group: int
    file: int
    begin: int
    end: int
    num_groups: int


class ImpressionReader:
    """One rank's view of the impressions of a stage: "train", "valid" or "test".

    columns: event columns of the histories; "item" is read whether named or not. global_batch_size: impression
    groups per batch, over all ranks. max_impressions_per_user: impressions of a user in one group, at most. Every
    impression of the stage comes once per epoch, and every rank yields the same number of batches.
    Raises ValueError for settings out of bounds, DataError where the stage has no impressions.
    """

    def __init__(
        self,
        store: Store,
        *,
        columns: list[str],
        split: ImpressionSplit,
        stage: str,
        global_batch_size: int,
        max_impressions_per_user: int,
        max_history: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool,
        seed: int = 0,
    ) -> None:
        sizes = global_batch_size, max_impressions_per_user, max_history
        if stage not in STAGES or min(sizes) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"stage={stage!r}, global_batch_size={global_batch_size}, "
                f"max_impressions_per_user={max_impressions_per_user}, max_history={max_history}, rank={rank} of "
                f"{world_size}: stage is one of {', '.join(STAGES)}, sizes are at least 1"
            )
        self.table = ImpressionTable(store)
        self.columns = list(dict.fromkeys([ITEM, *columns]))
        self.decoder = Decoder(store, self.columns)
        self.range = split.range(stage, percentiles=self.table.percentiles, time_unit=store.time_unit)
        self.global_batch_size, self.max_impressions_per_user, self.max_history = sizes
        self.rank, self.world_size, self.shuffle, self.seed = rank, world_size, shuffle, seed
        self.groups = self._count_groups(store)
        self._num_groups_G = np.array([group.num_groups for group in self.groups], np.int64)
        self.num_groups = int(self._num_groups_G.sum())
        if not self.num_groups:
            raise DataError(f"{store.path}: no impressions in stage {stage}: {self._stages(split)}")

    @property
    def num_batches(self) -> int:
        """Global batches in an epoch, the same on every rank; the last may be short."""
        return -(-self.num_groups // self.global_batch_size)

    def cursor(self, epoch: int, batches: int) -> Cursor:
        """Where reading stands after so many batches of an epoch; its rows are impression groups."""
        rows = min(batches * self.global_batch_size, self.num_groups)
        return Cursor(self.seed, epoch, rows, self.table.store.manifest.hash)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Impressions]:
        """Batches start_batch, start_batch + 1, ... of one epoch."""
        if not 0 <= start_batch <= self.num_batches:
            raise DataError(
                f"start_batch {start_batch} is outside 0..{self.num_batches}; were the impressions ingested again?"
            )
        size, parts = self.global_batch_size, []
        counts, order = self._num_groups_G, Order(self.seed, epoch, self.shuffle)
        for block in epoch_blocks(counts, counts, order=order, rank=self.rank, world_size=self.world_size):
            at = max(block.start, start_batch * size)
            if at >= block.stop:
                continue
            loaded = [(share, *self._load(share, order)) for share in block.shares]
            while at < block.stop:
                end = min(at // size * size + size, block.stop)
                for share, group, drawn in loaded:
                    first, last = np.searchsorted(share.positions, [at, end])
                    if first < last:
                        parts.append(take_groups(group, drawn[share.picks[first:last]], self.table.item_bags))
                if end % size == 0 or end == self.num_groups:
                    yield self._batch(parts, end - (end - 1) // size * size)
                    parts = []
                at = end

    def _batch(self, parts: list[Impressions], num_global_rows: int) -> Impressions:
        table = self.table
        if not parts:  # a rank without impressions in a batch still takes part
            columns = {"context": table.context, "item_context": table.item_context}
            parts = [padding_impressions(self.columns, num_labels=len(table.labels), **columns)]
        batch = concat_impressions(parts)
        return replace(batch, histories=replace(batch.histories, num_global_rows=num_global_rows))

    def _load(self, share: Share, order: Order) -> tuple[ImpressionGroups, np.ndarray]:
        group, file, begin, end, num_groups = self.groups[share.group]
        rows = self.table.read(file, begin, end)
        users = self.decoder.decode(group) if group >= 0 else self.decoder.padding.slice(0, 0)
        groups = group_impressions(
            users,
            self.decoder.user_ids(group) if group >= 0 else rows.users[:0],
            rows,
            range=self.range,
            max_impressions_per_user=self.max_impressions_per_user,
            max_history=self.max_history,
            order=order,
        )
        if len(groups.user) != num_groups:
            raise DataError(f"{self.table.path}: file {file} was changed while it was read; ingest impressions again")
        return groups, order.of_units(groups.keys)

    def _stages(self, split: ImpressionSplit) -> str:
        """How many impressions each stage has, when they were, and what to set."""
        table, unit = self.table, self.table.store.time_unit
        counts = dict.fromkeys(STAGES, 0)
        for file in range(len(table.manifest.files)):
            _, times = table.users_and_times(file)
            for name in STAGES:
                moments = split.range(name, percentiles=table.percentiles, time_unit=unit)
                counts[name] += int(in_range(times, moments).sum())
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        first, last = (
            np.datetime64(table.percentiles[at] // self.decoder.padding.units_per_second, "s") for at in (0, -1)
        )
        return (
            f"{each} of {table.num_rows}, which were shown from {first} to {last} (UTC); set "
            f"data.impression_split.valid_time={split.valid_time} and test_time={split.test_time} to moments in between"
        )

    def _count_groups(self, store: Store) -> list[GroupRows]:
        """Scans users and times of the impressions, a file at a time."""
        firsts, groups = first_users(store), []
        for file, entry in enumerate(self.table.manifest.files):
            users, times = self.table.users_and_times(file)
            edges = group_edges(users, firsts.get(entry.bucket, [None]))
            starts = run_starts(users)
            before = offsets_of(groups_per_user(starts, in_range(times, self.range), self.max_impressions_per_user))
            num_groups = np.diff(before[np.searchsorted(starts, edges)]).tolist()
            group = self.decoder.first_groups.get(entry.bucket, -1)
            for number, count in enumerate(num_groups):
                numbered = group + number if group >= 0 else -1
                groups.append(GroupRows(numbered, file, edges[number], edges[number + 1], count))
        return groups
