"""Long histories cut in windows: the stretch of a user that training or evaluation reads, W events at a time.

    stretch of u0   e0 e1 e2 e3 e4 e5 e6        W = 3      window 0        window 1        window 2
    stretch of u1   f0 f1                                  [e0 e1 e2       [e3 e4 e5       [e6
                                                            f0 f1]          . ]             . ]

Users keep their rows in all windows of a batch; one whose stretch has ended has an empty prefix. A batch is cut out of
the histories when it is asked for: beside them, memory holds one window.
"""

from __future__ import annotations

import numpy as np

from elastic_rec.feature_store.batches.examples import (
    CandidateSampler,
    assemble,
    choose_prefixes,
    loss_weights,
    targets_after,
    targets_at,
)
from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.splits import SplitConfig, Targets
from elastic_rec.feature_store.utils.jagged import offsets_of, span_indices


class HistoryWindows:
    """The windows of one batch of users. stage "train": a target after every event; else one prefix per user.

    Laid end to end, the windows are the batch that make_prefix_batch(targets=Targets.every_event) gives.
    first_B: events of each user that are left out at the start, because a state holds them already.
    """

    def __init__(
        self,
        histories: Histories,
        *,
        size: int,
        split: SplitConfig,
        stage: str,
        max_history: int,
        seed: int,
        epoch: int,
        world_size: int,
        first_B: np.ndarray | None = None,
    ) -> None:
        self.histories, self.size, self.stage, self.world_size = histories, size, stage, world_size
        self.prefixes = choose_prefixes(histories, split, stage, Targets.every_event, 1, max_history, seed, epoch)
        if first_B is not None:
            starts = np.maximum(self.prefixes.starts, histories.offsets[:-1] + first_B)
            self.prefixes = self.prefixes._replace(starts=starts)

    @property
    def count(self) -> int:
        """Windows of the longest stretch here; at least 1. The ranks of a run must agree on the largest."""
        longest = int((self.prefixes.ends - self.prefixes.starts).max(initial=0))
        return max(1, -(-longest // self.size))

    def batch(self, number: int, count: int, candidates: CandidateSampler | None = None) -> PrefixBatch:
        """Window `number` of `count`. Its normaliser in training: this rank's targets, as with make_prefix_batch."""
        begins, rows = self.histories.offsets[:-1], self.histories.rows
        starts = np.minimum(self.prefixes.starts + number * self.size, self.prefixes.ends)
        ends = np.minimum(starts + self.size, self.prefixes.ends)
        if self.stage == "train":
            targets, query_gap_s = targets_after(self.histories, starts, ends)
        else:
            targets, query_gap_s = targets_at(self.histories, self.prefixes.targets)
        weights = loss_weights(self.stage, rows, targets)
        normaliser = weights.sum() if self.stage == "train" else self.histories.num_global_users / self.world_size
        before = np.where(ends > starts, np.maximum(starts - 1, begins), starts)  # for the gap of the first event
        part = _stretch(self.histories, before, ends)
        first, lengths = part.offsets[:-1] + (starts - before), ends - starts
        spans = rows, first, first + lengths
        window = number, count
        return assemble(part, *spans, targets, query_gap_s, weights, normaliser, candidates, window)


def _stretch(histories: Histories, starts: np.ndarray, ends: np.ndarray) -> Histories:
    """The events [starts, ends) of each user."""
    index = span_indices(starts, ends - starts)
    columns = {name: values[index] for name, values in histories.columns.items()}
    offsets, times_s = offsets_of(ends - starts), histories.times_s[index]
    return Histories(histories.rows, offsets, columns, times_s, histories.num_global_users)
