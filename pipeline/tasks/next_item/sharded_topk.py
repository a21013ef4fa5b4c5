"""Exact ranking of the whole catalogue against an item table that stays sharded.

Every rank holds the rows [first, first + rows) of the item table. Queries travel (all-gather), the table does not:
each rank scores all queries against its own rows, a tile at a time, keeps counts or a running top-k, and the small
results are merged. No intermediate is larger than a tile, whatever the numbers of queries, users and items.

Equal scores are told apart by `tie_order`, in ranks and in lists alike.

Legend: R queries of this rank, Q queries of all ranks, D width, C items of a tile, k list length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from elastic_rec.pipeline.runtime.errors import NonFiniteError
from elastic_rec.pipeline.runtime.world import World

CHUNK = 16384  # item rows scored at a time, at most
TILE = 1 << 22  # scores held at a time, at most
LOW_32 = (1 << 32) - 1
NOTHING = torch.iinfo(torch.int64).min  # sorts below every real key

Ids = TypeVar("Ids", torch.Tensor, np.ndarray)


class ShardedCatalogue:
    """Ranks and top-k over items [first_item, num_items). All methods are collective.

    first_row, weight_VD: this rank's part of the item table (sharding.local_rows).
    first_item: ids below it (padding, unknown) are never ranked.
    candidates_V: bool over all ids: the only rivals `rank_targets` counts; None: every item.
    """

    def __init__(
        self,
        *,
        first_row: int,
        weight_VD: torch.Tensor,
        first_item: int,
        world: World,
        candidates_V: torch.Tensor | None = None,
    ) -> None:
        skip = min(max(0, first_item - first_row), len(weight_VD))
        self.first = first_row + skip
        self.weight_VD = weight_VD[skip:]
        self.largest_weight = largest(self.weight_VD)
        self.world = world
        self.candidates_V = candidates_V

    @torch.no_grad()
    def rank_targets(
        self, query_RD: torch.Tensor, target_R: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """0-based rank of each target among all items, and among the items the user has not seen.

        seen: (query number, item id) pairs, each (S,); a seen target still counts as a candidate.
        Returns two (R,) int64 tensors. Raises NonFiniteError for scores that are no numbers.
        """
        queries = Gathered(query_RD, self.world)
        target_Q, seen = queries.same(target_R), SeenPairs(*queries.pairs(*seen))
        score_Q, tie_Q = self._target_scores(queries.all, target_Q)[:, None], tie_order(target_Q)[:, None]
        above_all = torch.zeros_like(target_Q)
        above_unseen = torch.zeros_like(target_Q)
        watch = ScoreWatch(queries.all, self.largest_weight)
        for ids, score_QC in self._tiles(queries.all, watch):
            # What the target does not beat is above it, so that a NaN could only make a rank worse.
            above = ((score_QC < score_Q) | ((score_QC == score_Q) & (tie_order(ids) >= tie_Q))).logical_not_()
            if self.candidates_V is not None:
                above &= self.candidates_V[ids]
            above_all += above.sum(1)
            above[seen.inside(ids)] = False
            above_unseen += above.sum(1)
        watch.check(self.world)
        both = torch.stack([above_all, above_unseen])
        dist.all_reduce(both)
        return queries.mine(both[0]), queries.mine(both[1])

    @torch.no_grad()
    def top_k(
        self, query_RD: torch.Tensor, k: int, seen: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best items of each query, best first; seen items left out if given.

        Returns ids (R,k) int64, -1 where fewer than k items are left, and scores (R,k) float32.
        Raises NonFiniteError for scores that are no numbers.
        """
        queries = Gathered(query_RD, self.world)
        seen = SeenPairs(*queries.pairs(*seen)) if seen is not None else None
        best_Qk = torch.full((len(queries.all), k), NOTHING, dtype=torch.int64, device=query_RD.device)
        watch = ScoreWatch(queries.all, self.largest_weight)
        for ids, score_QC in self._tiles(queries.all, watch):
            key_QC = sort_key(score_QC, ids)
            if seen is not None:
                key_QC[seen.inside(ids)] = NOTHING
            best_Qk = torch.cat([best_Qk, key_QC], 1).topk(k, dim=1).values
        watch.check(self.world)
        parts = [torch.empty_like(best_Qk) for _ in range(self.world.size)]
        dist.all_gather(parts, best_Qk)
        best_Rk = torch.cat([queries.mine(part) for part in parts], 1).topk(k, dim=1).values
        return from_sort_key(best_Rk)

    def _tiles(
        self, query_QD: torch.Tensor, watch: ScoreWatch | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(C,) ids, rising by 1, and the scores (Q, C) of this rank's items."""
        size = max(1, min(CHUNK, TILE // len(query_QD)))
        for start in range(0, len(self.weight_VD), size):
            rows_CD = self.weight_VD[start : start + size]
            first = self.first + start
            score_QC = query_QD @ rows_CD.T.to(query_QD.dtype)
            if watch is not None:
                watch.look(score_QC)
            yield torch.arange(first, first + len(rows_CD), device=query_QD.device), score_QC

    def _target_scores(self, query_QD: torch.Tensor, target_Q: torch.Tensor) -> torch.Tensor:
        score_Q = torch.zeros(len(target_Q), dtype=query_QD.dtype, device=query_QD.device)
        for ids, score_QC in self._tiles(query_QD):  # from the same product as its rivals, so that ties are ties
            (inside,) = torch.where((target_Q >= ids[0]) & (target_Q <= ids[-1]))
            score_Q[inside] = score_QC[inside, target_Q[inside] - ids[0]]
        dist.all_reduce(score_Q)
        return score_Q


class SeenPairs:
    """(query, item) pairs, ordered so that those of a tile are found without reading the others."""

    def __init__(self, owner_S: torch.Tensor, item_S: torch.Tensor) -> None:
        self.item_S, order_S = item_S.sort()
        self.owner_S = owner_S[order_S]

    def inside(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs whose item is in a tile, as an index into (Q, C)."""
        low, high = torch.searchsorted(self.item_S, torch.stack([ids[0], ids[-1] + 1])).tolist()
        return self.owner_S[low:high], self.item_S[low:high] - ids[0]


class ScoreWatch:
    """Notices scores that are NaN or infinite. Tiles are read for it only where the largest numbers could overflow."""

    def __init__(self, query_QD: torch.Tensor, largest_weight: float) -> None:
        bound = query_QD.shape[1] * largest(query_QD) * largest_weight
        self.is_needed = not bound < torch.finfo(torch.float32).max  # NaN: needed
        self.extremes: list[torch.Tensor] = []

    def look(self, score_QC: torch.Tensor) -> None:
        """Keeps the extremes of a tile."""
        if self.is_needed:
            self.extremes.append(torch.stack(torch.aminmax(score_QC)))  # a NaN goes into both

    def check(self, world: World) -> None:
        """Raises NonFiniteError on every rank where one has seen such a score. Collective."""
        bad = torch.zeros(1, dtype=torch.int64, device=world.device)
        if self.extremes:
            bad += ~torch.stack(self.extremes).isfinite().all()
        dist.all_reduce(bad)
        if bad:
            raise NonFiniteError(
                "a score is NaN or infinite: the product of a query and an item overflows float32. Lower the learning "
                "rates and train again"
            )


def largest(value: torch.Tensor) -> float:
    """The largest absolute number; NaN where there is one."""
    return float(torch.stack(torch.aminmax(value)).abs().max()) if value.numel() else 0.0


def tie_order(ids: Ids) -> Ids:
    """Where equal scores put each id: the smaller value first. A bijection on 0 .. 2^32 - 1 (murmur3's finaliser).

    ids: int64, torch or NumPy, and so is the result. Vocabularies number items by frequency, so that an order by id
    would give a model that tells nothing apart the figures of popularity.
    """
    mixed = (ids ^ (ids >> 16)) * 0x85EBCA6B & LOW_32
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 & LOW_32
    return mixed ^ (mixed >> 16)


def from_tie_order(mixed: Ids) -> Ids:
    """Inverse of tie_order."""
    ids = (mixed ^ (mixed >> 16)) * pow(0xC2B2AE35, -1, 1 << 32) & LOW_32
    ids = (ids ^ (ids >> 13) ^ (ids >> 26)) * pow(0x85EBCA6B, -1, 1 << 32) & LOW_32
    return ids ^ (ids >> 16)


def sort_key(score: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(score float32, id < 2^31) -> int64 that sorts by score, then by tie_order: a top-k without ties."""
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0 here, too
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE floats as integers, made monotone for negatives
    return (ordered.long() << 32) | (LOW_32 - tie_order(ids.long()))


def from_sort_key(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of sort_key; ids are -1 and scores -inf where the key is NOTHING."""
    ordered = (key >> 32).int()
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    empty = key == NOTHING
    ids = from_tie_order(LOW_32 - (key & LOW_32)).masked_fill(empty, -1)
    return ids, score.masked_fill(empty, -torch.inf)


class Gathered:
    """A tensor's rows from all ranks, equally many per rank (padded to the most)."""

    def __init__(self, value_RD: torch.Tensor, world: World) -> None:
        self.world = world
        count = torch.tensor([len(value_RD)], device=value_RD.device)
        counts = [torch.empty_like(count) for _ in range(world.size)]
        dist.all_gather(counts, count)
        self.counts = torch.cat(counts)
        self.stride = int(self.counts.max())
        self.all = self.same(value_RD)

    def same(self, value_R: torch.Tensor) -> torch.Tensor:
        """Gather another tensor with as many rows."""
        padded = value_R.new_zeros(self.stride, *value_R.shape[1:])
        padded[: len(value_R)] = value_R
        parts = [torch.empty_like(padded) for _ in range(self.world.size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)

    def pairs(self, owner_S: torch.Tensor, item_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather (row number, item) pairs, their count differing by rank; row numbers become global."""
        gathered = Gathered(torch.stack([owner_S + self.world.rank * self.stride, item_S], 1), self.world)
        place = torch.arange(gathered.stride, device=owner_S.device)
        real = (place < gathered.counts[:, None]).flatten()
        return gathered.all[real, 0], gathered.all[real, 1]

    def mine(self, value_Q: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a result with one row per gathered row."""
        start = self.world.rank * self.stride
        return value_Q[start : start + int(self.counts[self.world.rank])]
