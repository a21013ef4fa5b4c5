"""Counting baselines no model may lose to. They count training events only and rank the same candidates as a model.

    popularity        occurrences of the item in the training events
    last_item         how often the item came right after the user's newest one (first-order Markov)
    recent            the user's own items, most recent first
    frequency         the user's own items, an event counts 2^(-age / half-life), age in events from the newest
    markov_frequency  sum over lags l = 1..5 of 1/l * P(item follows the l-th newest item) + weight * frequency

In the last, P and frequency are shares that sum to one. Half-life and weight are fitted on validation targets. Equal
scores are ordered by popularity, equal popularity by a hash of the id (sharded_topk.tie_order). Sources: the counting
rules of the field; the combination is ours.

Legend: B users of a batch, R users of a tile, T their events end to end, V items, S (user, item) pairs of a tile with a
score. All other items score 0, and are never listed: a rank among them follows from the order of popularity. So memory
is flat in users, items and history (a tile has about TILE_PAIRS pairs), and cost does not grow with the catalogue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.table.vocabulary import FIRST, PAD, UNKNOWN
from elastic_rec.feature_store.utils.jagged import span_indices
from elastic_rec.pipeline.tasks.next_item.data import NextItemData
from elastic_rec.pipeline.tasks.next_item.sharded_topk import tie_order
from elastic_rec.pipeline.tasks.next_item.targets import held_out_targets
from elastic_rec.pipeline.tasks.next_item.transition_counts import TransitionCounts, count_transitions

TILE_PAIRS = 1 << 21
LAGS = 5
HALF_LIVES, WEIGHTS = (5, 20, 80, 320), (0.1, 0.3, 1.0, 3.0, 10.0)
DEFAULT_HALF_LIFE, DEFAULT_WEIGHT = 20, 3.0  # where there is no validation target
FIT_USERS = 2048  # the two numbers are fitted on about so many users, spread over the store


@dataclass(frozen=True)
class Tile:
    """Some users of a batch and their events before the target.

    users: slice of the batch. owner_T: (T,) row in the tile; item_T: (T,) items; age_T: (T,) 0 for the newest event.
    last_RL: (R, LAGS) newest items, newest first, 0 where there is none. num_items: V.
    """

    users: slice
    owner_T: torch.Tensor
    item_T: torch.Tensor
    age_T: torch.Tensor
    last_RL: torch.Tensor
    num_items: int

    @property
    def cell_T(self) -> torch.Tensor:
        """(T,) a number per (user, item): row * V + item."""
        return self.owner_T * self.num_items + self.item_T


def tiles(histories: Sequences, before_B: np.ndarray, counts: TransitionCounts) -> Iterator[Tile]:
    """The users in order, with their first before_B events each."""
    device, offsets, start = counts.counts_V.device, histories.offsets, 0
    back_BL = before_B[:, None] - 1 - np.arange(LAGS)
    newest_BL = np.where(back_BL >= 0, offsets[:-1, None] + back_BL, -1)
    last_BL = torch.from_numpy(np.append(histories.columns["item"], 0)[newest_BL]).to(device)
    pairs_B = before_B + counts.starts_V1.diff()[last_BL].sum(1).cpu().numpy()
    ends_B = np.cumsum(pairs_B)
    while start < len(before_B):
        fits = int(np.searchsorted(ends_B, ends_B[start] - pairs_B[start] + TILE_PAIRS, side="right"))
        users = slice(start, max(start + 1, fits))
        n_R = before_B[users]
        owner_T = np.repeat(np.arange(len(n_R)), n_R)
        item_T = histories.columns["item"][span_indices(offsets[:-1][users], n_R)]
        age_T = np.cumsum(n_R)[owner_T] - 1 - np.arange(len(owner_T))
        arrays = (torch.from_numpy(array).to(device) for array in (owner_T, item_T, age_T))
        yield Tile(users, *arrays, last_BL[users], len(counts.counts_V))
        start = users.stop


@dataclass(frozen=True)
class Scores:
    """Pairs with a score, (S,) each: cell_S as Tile.cell_T, rising, each once; score_S float64, at least 0."""

    cell_S: torch.Tensor
    score_S: torch.Tensor

    @staticmethod
    def summed(cell_N: torch.Tensor, value_N: torch.Tensor) -> Scores:
        """Values of the same cell are added up."""
        cell_S, index_N = cell_N.unique(return_inverse=True)
        return Scores(cell_S, torch.zeros_like(cell_S, dtype=torch.float64).index_add_(0, index_N, value_N))

    def at(self, cell: torch.Tensor) -> torch.Tensor:
        """The score of each cell, 0 where there is none."""
        place = torch.searchsorted(self.cell_S, cell)
        padded_S, score_S = (torch.nn.functional.pad(each, (0, 1), value=-1) for each in (self.cell_S, self.score_S))
        return torch.where(padded_S[place] == cell, score_S[place], 0.0)


class Baseline(ABC):
    """Scores a tile of users against all items, and ranks targets by it. settings: what was fitted, for the report."""

    name: str

    def __init__(self, counts: TransitionCounts) -> None:
        self.counts, self.settings = counts, {}
        self.place_V = places(counts.counts_V)

    @abstractmethod
    def scores(self, tile: Tile) -> Scores:
        """The greatest is recommended first."""

    def rank_targets(
        self, histories: Sequences, before_B: np.ndarray, target_B: np.ndarray, *, exclude_seen: bool
    ) -> np.ndarray:
        """(B,) int64: 0-based rank of each user's target, given their first before_B events. Not collective.

        exclude_seen: items among these events are no candidates, but the target always is one.
        """
        target_B = torch.from_numpy(target_B).to(self.place_V.device)
        ranks = [
            rank_tile(self.scores(tile), tile, target_B[tile.users], self.place_V, exclude_seen=exclude_seen)
            for tile in tiles(histories, before_B, self.counts)
        ]
        return torch.cat(ranks).cpu().numpy()


def places(counts_V: torch.Tensor) -> torch.Tensor:
    """(V,) int64: each item's place in the order of popularity, 0 for the first; PAD and UNKNOWN come after all."""
    ids_V = torch.arange(len(counts_V), device=counts_V.device)
    by_hash = tie_order(ids_V).argsort()
    key_V = torch.where(by_hash < FIRST, -1.0, counts_V[by_hash])
    return torch.empty_like(ids_V).scatter_(0, by_hash[key_V.argsort(descending=True, stable=True)], ids_V)


def rank_tile(
    scores: Scores, tile: Tile, target_R: torch.Tensor, place_V: torch.Tensor, *, exclude_seen: bool
) -> torch.Tensor:
    """(R,) int64 0-based ranks of the targets by `scores`, equal ones by place_V.

    Pairs with a score are compared one by one. A target without a score also has before it all items without one that
    are more popular: all more popular items, less those with a score and those excluded.
    """
    num_users, V = len(target_R), tile.num_items
    score_R = scores.at(torch.arange(num_users, device=target_R.device) * V + target_R)
    place_R = place_V[target_R]
    rival_S = (scores.cell_S % V) >= FIRST
    if exclude_seen:
        seen_S = tile.cell_T.unique()
        rival_S &= ~torch.isin(scores.cell_S, seen_S, assume_unique=True)
    owner_S, is_ahead_S = scores.cell_S // V, place_V[scores.cell_S % V] < place_R[scores.cell_S // V]
    equal_S = scores.score_S == score_R[owner_S]
    above_S = rival_S & ((scores.score_S > score_R[owner_S]) | (equal_S & is_ahead_S))
    rank_R = torch.bincount(owner_S[above_S], minlength=num_users)
    others_R = place_R - torch.bincount(owner_S[rival_S & is_ahead_S], minlength=num_users)
    if exclude_seen:
        seen_S = seen_S[seen_S % V >= FIRST]
        owner_S = seen_S // V
        others_R -= torch.bincount(owner_S[place_V[seen_S % V] < place_R[owner_S]], minlength=num_users)
    return rank_R + torch.where(score_R == 0, others_R, 0)


class Popularity(Baseline):
    """Items by their number of training events."""

    name = "popularity"

    def scores(self, tile: Tile) -> Scores:
        """No pairs: all items score alike, and popularity orders them."""
        return Scores(tile.cell_T[:0], torch.zeros(0, dtype=torch.float64, device=tile.cell_T.device))


class LastItem(Baseline):
    """First-order Markov."""

    name = "last_item"

    def scores(self, tile: Tile) -> Scores:
        """Transitions from the newest item."""
        cell_S, place_S = successors(self.counts, tile, 0)
        return Scores(cell_S, self.counts.pair_count_P[place_S])


class Recent(Baseline):
    """The user's items by their newest event."""

    name = "recent"

    def scores(self, tile: Tile) -> Scores:
        """1 / (1 + age) of the newest event with the item."""
        cell_S, index_T = tile.cell_T.unique(return_inverse=True)
        score_S = torch.zeros_like(cell_S, dtype=torch.float64)
        return Scores(cell_S, score_S.scatter_reduce_(0, index_T, 1 / (1 + tile.age_T.double()), "amax"))


class Frequency(Baseline):
    """The user's items by how often they occur; an event counts half as much as one half_life events newer."""

    name = "frequency"

    def __init__(self, counts: TransitionCounts, *, half_life: float) -> None:
        super().__init__(counts)
        self.settings = {"half_life": half_life}

    def scores(self, tile: Tile) -> Scores:
        """Decayed counts, as shares."""
        return Scores.summed(tile.cell_T, shares(tile, self.settings["half_life"]))


class MarkovFrequency(Baseline):
    """Five lags of transitions, and the user's own items."""

    name = "markov_frequency"

    def __init__(self, counts: TransitionCounts, *, half_life: float, weight: float) -> None:
        super().__init__(counts)
        self.settings = {"half_life": half_life, "weight": weight}
        first_P = torch.repeat_interleave(counts.starts_V1.diff())
        self.share_P = counts.pair_count_P / counts.total_V[first_P]

    def scores(self, tile: Tile) -> Scores:
        """Transitions of five lags, plus the weighted shares."""
        cells, values = self.markov(tile)
        own_T = self.settings["weight"] * shares(tile, self.settings["half_life"])
        return Scores.summed(torch.cat([*cells, tile.cell_T]), torch.cat([*values, own_T]))

    def markov(self, tile: Tile) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per lag l: cells, and 1/l * share of the l-th newest item's transitions."""
        found = [successors(self.counts, tile, lag) for lag in range(LAGS)]
        return [cell for cell, _ in found], [self.share_P[place] / (l + 1) for l, (_, place) in enumerate(found)]


def successors(counts: TransitionCounts, tile: Tile, lag: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cells, places in counts.next_P) of all that followed each user's newest item but `lag`; cells rise."""
    item_R = tile.last_RL[:, lag]
    first_R = counts.starts_V1[item_R]
    count_R = counts.starts_V1[item_R + 1] - first_R
    row = torch.repeat_interleave(count_R)
    place = first_R[row] + torch.arange(len(row), device=row.device) - (count_R.cumsum(0) - count_R)[row]
    return row * tile.num_items + counts.next_P[place], place


def shares(tile: Tile, half_life: float) -> torch.Tensor:
    """(T,) each event's decayed count, as a share of its user's sum."""
    weight_T = torch.exp2(-tile.age_T.double() / half_life)
    sum_R = weight_T.new_zeros(len(tile.last_RL)).index_add_(0, tile.owner_T, weight_T)
    return weight_T / sum_R[tile.owner_T]


def fit_baselines(task: NextItemData, *, batch_size: int, exclude_seen: bool) -> list[Baseline]:
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
    task: NextItemData, counts: TransitionCounts, *, batch_size: int, exclude_seen: bool
) -> torch.Tensor:
    """(half-lives, weights + 1) float64: sum of NDCG@10 over validation targets; the last column is frequency alone."""
    model, device = MarkovFrequency(counts, half_life=1, weight=1), task.world.device
    gain_hw = torch.zeros(len(HALF_LIVES), len(WEIGHTS) + 1, dtype=torch.float64, device=device)
    every = -(-task.store.num_users // FIT_USERS)
    for histories in task.histories(batch_size=batch_size, what="baselines"):
        held = held_out_targets(histories, task.config.data.split, "valid")
        chosen_B = held.ranked & (histories.rows % every == 0)
        target_B = torch.from_numpy(np.where(chosen_B, held.item, PAD)).to(device)
        for tile in tiles(histories, np.where(chosen_B, held.before, 0), counts):
            gain_hw += _tile_gain(model, tile, target_B[tile.users], exclude_seen=exclude_seen)
    dist.all_reduce(gain_hw)
    return gain_hw


def _tile_gain(model: MarkovFrequency, tile: Tile, target_R: torch.Tensor, *, exclude_seen: bool) -> torch.Tensor:
    """_validation_gain of one tile."""
    cells, values = model.markov(tile)
    markov = Scores.summed(torch.cat([*cells, tile.cell_T]), torch.cat([*values, 0.0 * tile.age_T]))
    place_T = torch.searchsorted(markov.cell_S, tile.cell_T)
    gain_hw = markov.score_S.new_zeros(len(HALF_LIVES), len(WEIGHTS) + 1)
    for h, half_life in enumerate(HALF_LIVES):
        own_S = torch.zeros_like(markov.score_S).index_add_(0, place_T, shares(tile, half_life))
        for w, weight in enumerate((*WEIGHTS, None)):
            score_S = own_S if weight is None else markov.score_S + weight * own_S
            ranked = Scores(markov.cell_S, score_S)
            rank_R = rank_tile(ranked, tile, target_R, model.place_V, exclude_seen=exclude_seen)
            gain_R = ((rank_R < 10) & (target_R > UNKNOWN)) / torch.log2(rank_R.double() + 2)
            gain_hw[h, w] = gain_R.sum()
    return gain_hw
