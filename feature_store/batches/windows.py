"""Long histories cut in windows: the part of each user that training or evaluation reads, W events at a time.

    part of u0   e0 e1 e2 e3 e4 e5 e6        W = 3      window 0        window 1        window 2
    part of u1   f0 f1                                  [e0 e1 e2       [e3 e4 e5       [e6
                                                         f0 f1]          . ]             . ]

Users keep their rows in all windows of a batch; one whose part has ended has an empty prefix. A batch is cut out of
the histories when it is asked for: beside them, memory holds one window.
"""

from __future__ import annotations

import numpy as np

from elastic_rec.feature_store.batches.examples import CandidateSampler, assemble, choose_prefixes, target_events
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import SplitConfig


class HistoryWindows:
    """The windows of one batch of users. stage "train": a target after every event; else one prefix per user.

    Laid end to end, the windows are the batch that make_prefix_batch(targets=Targets.every_event) gives.
    size: W, events of a user in a window. first_B: (B,) events of each user that are left out at the start, because a
    state holds them already. The others are those of make_prefix_batch.
    """

    def __init__(
        self,
        histories: Sequences,
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
        drawn = {"max_history": max_history, "seed": seed, "epoch": epoch}
        self.prefixes = choose_prefixes(histories, split=split, stage=stage, **drawn)
        if first_B is not None:
            starts = np.maximum(self.prefixes.starts, histories.offsets[:-1] + first_B)
            self.prefixes = self.prefixes._replace(starts=starts)

    @property
    def count(self) -> int:
        """Windows of the longest part here; at least 1. The ranks of a run must agree on the largest."""
        longest = int((self.prefixes.ends - self.prefixes.starts).max(initial=0))
        return max(1, -(-longest // self.size))

    def batch(self, number: int, count: int, candidates: CandidateSampler | None = None) -> PrefixBatch:
        """Window `number` of `count`. Its normaliser in training: this rank's targets, as with make_prefix_batch."""
        histories, is_training = self.histories, self.stage == "train"
        starts = np.minimum(self.prefixes.starts + number * self.size, self.prefixes.ends)
        ends = np.minimum(starts + self.size, self.prefixes.ends)
        prefixes = self.prefixes._replace(starts=starts, ends=ends)
        found = target_events(histories, prefixes, stage=self.stage, after_every=is_training)
        normaliser = found.weights.sum() if is_training else histories.num_global_rows / self.world_size
        before = np.where(ends > starts, np.maximum(starts - 1, histories.offsets[:-1]), starts)  # for its first gap
        part = histories.spans(before, ends)
        first = part.offsets[:-1] + (starts - before)
        prefixes = prefixes._replace(starts=first, ends=first + (ends - starts))
        return assemble(part, prefixes, found, normaliser, candidates, (number, count))
