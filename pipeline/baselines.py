"""Two baselines no model may lose to: popularity, and what followed the user's last item most often.

Both count training events only, rank the same candidates as the model, and break ties by the smaller id.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from elastic_rec.feature_store.histories import Histories
from elastic_rec.feature_store.splits import split_bounds
from elastic_rec.feature_store.vocabulary import FIRST
from elastic_rec.pipeline.task import NextItemTask


class Baseline(ABC):
    """Scores a chunk of users against all items, and ranks targets by it."""

    name: str

    @abstractmethod
    def scores(self, last_R: torch.Tensor) -> torch.Tensor:
        """(R, V) float64 scores given each user's newest item."""

    def rank_targets(
        self, histories: Histories, before_B: np.ndarray, target_B: np.ndarray, *, exclude_seen: bool
    ) -> np.ndarray:
        """(B,) int64: 0-based rank of each user's target, given the user's first before_B events. Not collective.

        exclude_seen: items among these events are no candidates, but the target always is one.
        """
        offsets = histories.offsets
        items = np.append(histories.columns["item"], 0)
        last_B = np.where(before_B > 0, items[offsets[:-1] + before_B - 1], 0)
        owner = np.repeat(np.arange(len(before_B)), before_B)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(before_B) - before_B, before_B) + offsets[:-1][owner]
        seen = torch.from_numpy(owner), torch.from_numpy(items[place])
        return self._ranks(torch.from_numpy(last_B), torch.from_numpy(target_B), seen if exclude_seen else None).numpy()

    def _ranks(
        self, last_R: torch.Tensor, target_R: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        score_RV = self.scores(last_R)
        score_R = score_RV.gather(1, target_R[:, None])
        ids = torch.arange(score_RV.shape[1], device=score_RV.device)
        above = (score_RV > score_R) | ((score_RV == score_R) & (ids < target_R[:, None]))
        above[:, :FIRST] = False
        if seen is not None:
            above[seen] = False
        return above.sum(1)


class Popularity(Baseline):
    """Items by their number of training events."""

    name = "popularity"

    def __init__(self, counts_V: torch.Tensor) -> None:
        self.counts_V = counts_V

    def scores(self, last_R: torch.Tensor) -> torch.Tensor:
        return self.counts_V.expand(len(last_R), -1)


class LastItem(Baseline):
    """First-order Markov: how often an item came right after the user's newest one, popularity breaking ties.

    The V x V count matrix is kept sparse (sorted pairs), and unrolled for one batch of users at a time.
    """

    name = "last_item"

    def __init__(self, counts_V: torch.Tensor, pair_P: torch.Tensor, pair_count_P: torch.Tensor) -> None:
        self.num_items = len(counts_V)
        self.tie_break_V = counts_V / (counts_V.max() + 1)
        self.next_P, self.pair_count_P = pair_P % self.num_items, pair_count_P
        starts = torch.searchsorted(pair_P, torch.arange(self.num_items + 1, device=pair_P.device) * self.num_items)
        self.starts_V1 = starts

    def scores(self, last_R: torch.Tensor) -> torch.Tensor:
        score_RV = self.tie_break_V.repeat(len(last_R), 1)
        first_R, count_R = self.starts_V1[last_R], self.starts_V1[last_R + 1] - self.starts_V1[last_R]
        row = torch.repeat_interleave(torch.arange(len(last_R), device=last_R.device), count_R)
        within = torch.arange(len(row), device=row.device) - (count_R.cumsum(0) - count_R)[row]
        place = first_R[row] + within
        score_RV[row, self.next_P[place]] += self.pair_count_P[place].double()
        return score_RV


def fit_baselines(task: NextItemTask, *, batch_size: int) -> list[Baseline]:
    """Count training events and their successions; every rank reads the whole store, so all hold the same counts."""
    alone = NextItemTask(task.config, world=type(task.world)(rank=0, size=1, device=task.world.device))
    counts_V = torch.zeros(task.num_items, dtype=torch.float64)
    pairs: list[torch.Tensor] = []
    for histories, _ in alone.held_out("test", batch_size=batch_size):
        offsets = torch.from_numpy(histories.offsets)
        train_end = torch.from_numpy(split_bounds(task.config.data.split, histories).train_end)
        owner = torch.repeat_interleave(torch.arange(len(train_end)), offsets.diff())
        place = torch.arange(len(owner)) - offsets[:-1][owner]
        items = torch.from_numpy(histories.columns["item"])
        training = place < train_end[owner]
        counts_V += torch.bincount(items[training], minlength=task.num_items)
        followed = (training & (place > 0)).nonzero().flatten()
        pairs.append(items[followed - 1] * task.num_items + items[followed])
    pair_P, pair_count_P = torch.unique(torch.cat(pairs), return_counts=True)
    counts_V[:FIRST] = 0
    return [Popularity(counts_V), LastItem(counts_V, pair_P, pair_count_P)]
