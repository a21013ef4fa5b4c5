"""How often each item occurs in the training events, and how often each item comes right after each other one.

    one user's training items   7 3 7 3 9
    occurrences                 7: 2, 3: 2, 9: 1
    transitions                 7->3: 2, 3->7: 1, 3->9: 1

Counted in one pass over the store, each rank its own users; then every rank holds the sum. V items, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import split_bounds
from elastic_rec.feature_store.table.vocabulary import FIRST
from elastic_rec.pipeline.runtime.world import World, of_each_rank
from elastic_rec.pipeline.tasks.next_item.data import NextItemData

MAX_PAIRS = 1 << 24  # 256 MiB of keys and counts
MERGE_AT = 1 << 22  # new transitions that wait for being merged


@dataclass(frozen=True)
class TransitionCounts:
    """Counts as tensors on the rank's device.

    counts_V: (V,) float64 occurrences. starts_V1, next_P, pair_count_P: item i was followed by next_P[s:e], each
    pair_count_P[s:e] times, with s, e = starts_V1[i], starts_V1[i + 1]. total_V: (V,) float64 transitions out of i.
    """

    counts_V: torch.Tensor
    starts_V1: torch.Tensor
    next_P: torch.Tensor
    pair_count_P: torch.Tensor
    total_V: torch.Tensor

    @staticmethod
    def of(counts_V: torch.Tensor, pair_P: torch.Tensor, pair_count_P: torch.Tensor) -> TransitionCounts:
        """pair_P: (P,) int64, rising: first item * V + second item."""
        V = len(counts_V)
        first_P, next_P = pair_P // V, pair_P % V
        starts_V1 = torch.searchsorted(first_P, torch.arange(V + 1, device=pair_P.device))
        total_V = torch.zeros_like(counts_V).index_add_(0, first_P, pair_count_P.double())
        return TransitionCounts(counts_V, starts_V1, next_P, pair_count_P.double(), total_V)


class PairCounter:
    """Counts of pairs (int64 keys) in bounded memory: above max_pairs the rarest are dropped, all of one count.

    lost_up_to: a count may be so much too low. A pair that is dropped, and comes again, begins at 0.
    """

    def __init__(self, max_pairs: int) -> None:
        self.max_pairs = max_pairs
        self.keys, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.lost_up_to = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_waiting = 0

    def add(self, keys: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Counts each key once, or `counts` times."""
        self._waiting.append((keys, np.ones(len(keys), np.int64) if counts is None else counts))
        self._num_waiting += len(keys)
        if self._num_waiting >= MERGE_AT:
            self.merge()

    def merge(self) -> None:
        """Puts what was added into keys and counts, and drops the rarest pairs above max_pairs."""
        parts = [(self.keys, self.counts), *self._waiting]
        keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.keys, index = np.unique(keys, return_inverse=True)
        self.counts = np.bincount(index, weights=counts, minlength=len(self.keys)).astype(np.int64)
        self._waiting, self._num_waiting = [], 0
        rarest = 0
        while len(self.keys) > self.max_pairs:
            rarest = int(self.counts.min())
            keep = self.counts > rarest
            self.keys, self.counts = self.keys[keep], self.counts[keep]
        self.lost_up_to += rarest


def count_transitions(task: NextItemData, *, batch_size: int, max_pairs: int = MAX_PAIRS) -> TransitionCounts:
    """Counts of the training part of task's store. Collective: the same on every rank, for any number of ranks.

    Says so where pairs were dropped for memory; then the counts depend on the number of ranks.
    """
    V, world = task.num_items, task.world
    counts_V, pairs = torch.zeros(V, dtype=torch.float64), PairCounter(max_pairs)
    for histories in task.histories(batch_size=batch_size):
        items, follows = training_items(task, histories)
        counts_V += torch.from_numpy(np.bincount(items, minlength=V))
        second = np.flatnonzero(follows & (items >= FIRST))
        second = second[items[second - 1] >= FIRST]
        pairs.add(items[second - 1] * V + items[second])
    pairs.merge()
    counts_V[:FIRST] = 0
    counts_V = counts_V.to(world.device)
    dist.all_reduce(counts_V)
    if world.size > 1:
        pairs = _from_all_ranks(pairs, world)
    if pairs.lost_up_to:
        world.log(
            f"baselines: more than {max_pairs} different transitions; rare ones are left out, and a count may be up to "
            f"{pairs.lost_up_to} too low"
        )
    return TransitionCounts.of(
        counts_V, torch.from_numpy(pairs.keys).to(world.device), torch.from_numpy(pairs.counts).to(world.device)
    )


def training_items(task: NextItemData, histories: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """(items of the training events end to end, whether each has a training event of the same user before it)."""
    train_end_B = split_bounds(task.config.data.split, histories).train_end
    owner = np.repeat(np.arange(len(train_end_B)), np.diff(histories.offsets))
    place = np.arange(len(owner)) - histories.offsets[owner]
    training = place < train_end_B[owner]
    return histories.columns["item"][training], place[training] > 0


def _from_all_ranks(pairs: PairCounter, world: World) -> PairCounter:
    """The sum of all ranks' counts, on every rank."""
    total = PairCounter(pairs.max_pairs)
    for table, lost in of_each_rank(world, np.stack([pairs.keys, pairs.counts]), pairs.lost_up_to):
        total.add(*table)
        total.lost_up_to += lost
    total.merge()
    return total
