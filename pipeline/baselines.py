"""Counting baselines no model may lose to. They count training events only and rank the same candidates as a model.

    popularity        occurrences of the item in the training events
    last_item         how often the item came right after the user's newest one (first-order Markov)
    recent            the user's own items, most recent first
    frequency         the user's own items, an event counts 2^(-age / half-life), age in events from the newest
    markov_frequency  sum over lags l = 1..5 of 1/l * P(item follows the l-th newest item) + weight * frequency

In the last, P and frequency are shares that sum to one. Half-life and weight are fitted on validation targets. Equal
scores are ordered by popularity, equal popularity by a hash of the id (retrieval.tie_order). Sources: the counting
rules of the field; the combination is ours.

Legend: B users of a batch, R users of a tile, T their events end to end, V items. A tile has at most TILE_CELLS scores
and about TILE_EVENTS events, so memory is flat in users, items and history.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from elastic_rec.feature_store.examples import targets_at
from elastic_rec.feature_store.histories import Histories
from elastic_rec.feature_store.splits import split_bounds
from elastic_rec.feature_store.vocabulary import FIRST, UNKNOWN
from elastic_rec.pipeline.retrieval import tie_order
from elastic_rec.pipeline.task import NextItemTask
from elastic_rec.pipeline.transition_counts import TransitionCounts, count_transitions

TILE_CELLS, TILE_EVENTS = 1 << 22, 1 << 22
LAGS = 5
HALF_LIVES, WEIGHTS = (5, 20, 80, 320), (0.1, 0.3, 1.0, 3.0, 10.0)
DEFAULT_HALF_LIFE, DEFAULT_WEIGHT = 20, 3.0  # where there is no validation target
FIT_USERS = 4096  # validation users the two numbers are fitted on


@dataclass(frozen=True)
class Tile:
    """Some users of a batch and their events before the target.

    users: slice of the batch. owner_T: (T,) row in the tile; item_T: (T,) items; age_T: (T,) 0 for the newest event.
    last_RL: (R, LAGS) newest items, newest first, 0 where there is none.
    """

    users: slice
    owner_T: torch.Tensor
    item_T: torch.Tensor
    age_T: torch.Tensor
    last_RL: torch.Tensor


def tiles(histories: Histories, before_B: np.ndarray, num_items: int, device: torch.device) -> Iterator[Tile]:
    """The users in order, with their first before_B events each."""
    items, offsets, start = histories.columns["item"], histories.offsets, 0
    ends_B = np.cumsum(before_B)
    while start < len(before_B):
        fits = int(np.searchsorted(ends_B, ends_B[start] - before_B[start] + TILE_EVENTS, side="right"))
        stop = max(start + 1, min(start + max(1, TILE_CELLS // num_items), fits))
        n_R, first_R = before_B[start:stop], offsets[start:stop]
        owner_T = np.repeat(np.arange(stop - start), n_R)
        place_T = np.arange(len(owner_T)) - np.repeat(np.cumsum(n_R) - n_R, n_R)
        back_RL = n_R[:, None] - 1 - np.arange(LAGS)
        newest_RL = np.append(items, 0)[np.where(back_RL >= 0, first_R[:, None] + back_RL, len(items))]
        arrays = owner_T, items[first_R[owner_T] + place_T], n_R[owner_T] - 1 - place_T, newest_RL
        yield Tile(slice(start, stop), *(torch.from_numpy(array).to(device) for array in arrays))
        start = stop


class Baseline(ABC):
    """Scores a tile of users against all items, and ranks targets by it. settings: what was fitted, for the report."""

    name: str

    def __init__(self, counts: TransitionCounts) -> None:
        self.counts, self.settings = counts, {}
        ids_V = torch.arange(len(counts.counts_V), device=counts.counts_V.device)
        by_hash = tie_order(ids_V).argsort()
        by_count = by_hash[counts.counts_V[by_hash].argsort(descending=True, stable=True)]
        self.place_V = torch.empty_like(ids_V).scatter_(0, by_count, ids_V)  # 0 for the most popular item

    @abstractmethod
    def scores(self, tile: Tile) -> torch.Tensor:
        """(R, V) float64, all at least 0; the greatest is recommended first."""

    def rank_targets(
        self, histories: Histories, before_B: np.ndarray, target_B: np.ndarray, *, exclude_seen: bool
    ) -> np.ndarray:
        """(B,) int64: 0-based rank of each user's target, given their first before_B events. Not collective.

        exclude_seen: items among these events are no candidates, but the target always is one.
        """
        target_B = torch.from_numpy(target_B).to(self.place_V.device)
        ranks = [
            self.rank_tile(self.scores(tile), tile, target_B[tile.users], exclude_seen=exclude_seen)
            for tile in tiles(histories, before_B, len(self.place_V), self.place_V.device)
        ]
        return torch.cat(ranks).cpu().numpy()

    def rank_tile(
        self, score_RV: torch.Tensor, tile: Tile, target_R: torch.Tensor, *, exclude_seen: bool
    ) -> torch.Tensor:
        """(R,) int64 0-based ranks of the targets by score_RV."""
        target_R1 = target_R[:, None]
        score_R1 = score_RV.gather(1, target_R1)
        above_RV = (score_RV == score_R1) & (self.place_V < self.place_V[target_R1])
        above_RV |= score_RV > score_R1
        above_RV[:, :FIRST] = False
        if exclude_seen:
            above_RV[tile.owner_T, tile.item_T] = False
        return above_RV.sum(1)

    def nothing(self, tile: Tile) -> torch.Tensor:
        """(R, V) zeros."""
        shape = len(tile.last_RL), len(self.place_V)
        return torch.zeros(shape, dtype=torch.float64, device=self.place_V.device)


class Popularity(Baseline):
    """Items by their number of training events."""

    name = "popularity"

    def scores(self, tile: Tile) -> torch.Tensor:
        return self.counts.counts_V.expand(len(tile.last_RL), -1)


class LastItem(Baseline):
    """First-order Markov."""

    name = "last_item"

    def scores(self, tile: Tile) -> torch.Tensor:
        return add_successors(self.nothing(tile), self.counts, tile.last_RL[:, 0], self.counts.pair_count_P)


class Recent(Baseline):
    """The user's items by their newest event."""

    name = "recent"

    def scores(self, tile: Tile) -> torch.Tensor:
        score_RV = self.nothing(tile)
        cell_T = tile.owner_T * score_RV.shape[1] + tile.item_T
        score_RV.view(-1).scatter_reduce_(0, cell_T, 1 / (1 + tile.age_T.double()), "amax")
        return score_RV


class Frequency(Baseline):
    """The user's items by how often they occur; an event counts half as much as one half_life events newer."""

    name = "frequency"

    def __init__(self, counts: TransitionCounts, *, half_life: float) -> None:
        super().__init__(counts)
        self.settings = {"half_life": half_life}

    def scores(self, tile: Tile) -> torch.Tensor:
        return frequency(self.nothing(tile), tile, self.settings["half_life"])


class MarkovFrequency(Baseline):
    """Five lags of transitions, and the user's own items."""

    name = "markov_frequency"

    def __init__(self, counts: TransitionCounts, *, half_life: float, weight: float) -> None:
        super().__init__(counts)
        self.settings = {"half_life": half_life, "weight": weight}
        first_P = torch.repeat_interleave(counts.starts_V1.diff())
        self.share_P = counts.pair_count_P / counts.total_V[first_P]

    def scores(self, tile: Tile) -> torch.Tensor:
        own_RV = frequency(self.nothing(tile), tile, self.settings["half_life"])
        return self.markov(tile) + self.settings["weight"] * own_RV

    def markov(self, tile: Tile) -> torch.Tensor:
        """(R, V): sum over lags l of 1/l * share of the l-th newest item's transitions."""
        score_RV = self.nothing(tile)
        for lag in range(LAGS):
            add_successors(score_RV, self.counts, tile.last_RL[:, lag], self.share_P / (lag + 1))
        return score_RV


def add_successors(
    score_RV: torch.Tensor, counts: TransitionCounts, item_R: torch.Tensor, value_P: torch.Tensor
) -> torch.Tensor:
    """Adds value_P of every transition out of each row's item, in place."""
    first_R = counts.starts_V1[item_R]
    count_R = counts.starts_V1[item_R + 1] - first_R
    row = torch.repeat_interleave(count_R)
    within = torch.arange(len(row), device=row.device) - (count_R.cumsum(0) - count_R)[row]
    place = first_R[row] + within
    score_RV.view(-1).index_add_(0, row * score_RV.shape[1] + counts.next_P[place], value_P[place])
    return score_RV


def frequency(score_RV: torch.Tensor, tile: Tile, half_life: float) -> torch.Tensor:
    """Adds each user's decayed counts, as shares of their sum, in place."""
    weight_T = torch.exp2(-tile.age_T.double() / half_life)
    score_RV.view(-1).index_add_(0, tile.owner_T * score_RV.shape[1] + tile.item_T, weight_T)
    return score_RV.div_(score_RV.sum(1, keepdim=True).clamp_min(1e-300))


def fit_baselines(task: NextItemTask, *, batch_size: int, exclude_seen: bool) -> list[Baseline]:
    """Counts the training events and fits half-life and weight on validation targets. Collective; the same on every
    rank. batch_size: users read at a time, over all ranks. exclude_seen: as in Baseline.rank_targets."""
    counts = count_transitions(task, batch_size=batch_size)
    gain_hw = _validation_gain(task, counts, batch_size=batch_size, exclude_seen=exclude_seen)
    half_life, own, weight = DEFAULT_HALF_LIFE, DEFAULT_HALF_LIFE, DEFAULT_WEIGHT
    if gain_hw.any():
        own = HALF_LIVES[int(gain_hw[:, -1].argmax())]
        best = int(gain_hw[:, :-1].argmax())
        half_life, weight = HALF_LIVES[best // len(WEIGHTS)], WEIGHTS[best % len(WEIGHTS)]
    return [
        Popularity(counts),
        LastItem(counts),
        Recent(counts),
        Frequency(counts, half_life=own),
        MarkovFrequency(counts, half_life=half_life, weight=weight),
    ]


def _validation_gain(
    task: NextItemTask, counts: TransitionCounts, *, batch_size: int, exclude_seen: bool
) -> torch.Tensor:
    """(half-lives, weights + 1) float64: sum of NDCG@10 over validation targets; the last column is frequency alone."""
    model, device = MarkovFrequency(counts, half_life=1, weight=1), task.world.device
    gain_hw = torch.zeros(len(HALF_LIVES), len(WEIGHTS) + 1, dtype=torch.float64, device=device)
    for number, histories in enumerate(task.histories(batch_size=batch_size)):
        if number * batch_size >= FIT_USERS:
            break
        before_B = split_bounds(task.config.data.split, histories).valid
        target_B, _ = targets_at(histories, np.where(before_B >= 0, histories.offsets[:-1] + before_B, -1))
        counted_B = torch.from_numpy(target_B > UNKNOWN).to(device)
        targets_B = torch.from_numpy(target_B).to(device)
        for tile in tiles(histories, before_B.clip(min=0), len(model.place_V), device):
            target_R, counted_R, markov_RV = targets_B[tile.users], counted_B[tile.users], model.markov(tile)
            for h, half_life in enumerate(HALF_LIVES):
                own_RV = frequency(model.nothing(tile), tile, half_life)
                for w, weight in enumerate((*WEIGHTS, None)):
                    score_RV = own_RV if weight is None else markov_RV + weight * own_RV
                    rank_R = model.rank_tile(score_RV, tile, target_R, exclude_seen=exclude_seen)
                    gain_R = ((rank_R < 10) & counted_R) / torch.log2(rank_R.double() + 2)
                    gain_hw[h, w] += gain_R.sum()
    dist.all_reduce(gain_hw)
    return gain_hw
