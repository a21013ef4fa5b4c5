"""Exact ranking of the whole catalogue against an item table that stays sharded.

Every rank holds the rows [first, first + rows) of the item table. Queries travel (all-gather), the table does not:
each rank scores all queries against its own rows in chunks, keeps counts or a running top-k, and the small results
are merged. The largest intermediate is queries-in-flight x CHUNK, never users x items.

Legend: R queries of this rank, Q queries of all ranks, D width, k list length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from elastic_rec.pipeline.world import World

CHUNK = 16384  # item rows scored at a time
LOW_32 = (1 << 32) - 1
NOTHING = torch.iinfo(torch.int64).min  # sorts below every real key


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
        self.world = world
        self.candidates_V = candidates_V

    @torch.no_grad()
    def rank_targets(
        self, query_RD: torch.Tensor, target_R: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """0-based rank of each target among all items, and among the items the user has not seen.

        seen: (query number, item id) pairs, each (S,); a seen target still counts as a candidate.
        Ties are broken by the smaller id. Returns two (R,) int64 tensors.
        """
        queries = Gathered(query_RD, self.world)
        target_Q, owner_S, item_S = queries.same(target_R), *queries.pairs(*seen)
        score_Q = self._target_scores(queries.all, target_Q)
        above_all = torch.zeros_like(target_Q)
        above_unseen = torch.zeros_like(target_Q)
        for ids, score_QC in self._chunks(queries.all):
            above = (score_QC > score_Q[:, None]) | ((score_QC == score_Q[:, None]) & (ids < target_Q[:, None]))
            above &= ids != target_Q[:, None]
            if self.candidates_V is not None:
                above &= self.candidates_V[ids]
            above_all += above.sum(1)
            above[_inside(owner_S, item_S, ids)] = False
            above_unseen += above.sum(1)
        both = torch.stack([above_all, above_unseen])
        dist.all_reduce(both)
        return queries.mine(both[0]), queries.mine(both[1])

    @torch.no_grad()
    def top_k(
        self, query_RD: torch.Tensor, k: int, seen: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best items of each query, best first, ties to the smaller id; seen items left out if given.

        Returns ids (R,k) int64, -1 where fewer than k items are left, and scores (R,k) float32.
        """
        queries = Gathered(query_RD, self.world)
        owner_S, item_S = queries.pairs(*seen) if seen is not None else (None, None)
        best_Qk = torch.full((len(queries.all), k), NOTHING, dtype=torch.int64, device=query_RD.device)
        for ids, score_QC in self._chunks(queries.all):
            key_QC = sort_key(score_QC, ids)
            if owner_S is not None:
                key_QC[_inside(owner_S, item_S, ids)] = NOTHING
            best_Qk = torch.cat([best_Qk, key_QC], 1).topk(k, dim=1).values
        parts = [torch.empty_like(best_Qk) for _ in range(self.world.size)]
        dist.all_gather(parts, best_Qk)
        best_Rk = torch.cat([queries.mine(part) for part in parts], 1).topk(k, dim=1).values
        return from_sort_key(best_Rk)

    def _chunks(self, query_QD: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.weight_VD), CHUNK):
            rows_CD = self.weight_VD[start : start + CHUNK]
            first = self.first + start
            ids = torch.arange(first, first + len(rows_CD), device=query_QD.device)
            yield ids, query_QD @ rows_CD.T.to(query_QD.dtype)

    def _target_scores(self, query_QD: torch.Tensor, target_Q: torch.Tensor) -> torch.Tensor:
        score_Q = torch.zeros(len(target_Q), dtype=query_QD.dtype, device=query_QD.device)
        for ids, score_QC in self._chunks(query_QD):  # from the same product as its rivals, so that ties are ties
            (inside,) = torch.where((target_Q >= ids[0]) & (target_Q <= ids[-1]))
            score_Q[inside] = score_QC[inside, target_Q[inside] - ids[0]]
        dist.all_reduce(score_Q)
        return score_Q


def tie_order(ids: torch.Tensor) -> torch.Tensor:
    """int64 ids -> int64 in [0, 2^32), a bijection on them (MurmurHash3's 32-bit finaliser): the order among equal
    scores. Ids are in order of falling count, so the ids' own order would favour popular items."""
    h = ids & LOW_32
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & LOW_32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & LOW_32
    return h ^ (h >> 16)


def sort_key(score: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(score float32, id < 2^31) -> int64 that sorts by score, then by smaller id: a top-k without ties."""
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0 here, too
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE floats as integers, made monotone for negatives
    return (ordered.long() << 32) | (LOW_32 - ids.long())


def from_sort_key(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of sort_key; ids are -1 and scores -inf where the key is NOTHING."""
    ordered = (key >> 32).int()
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    empty = key == NOTHING
    ids = (LOW_32 - (key & LOW_32)).masked_fill(empty, -1)
    return ids, score.masked_fill(empty, -torch.inf)


class Gathered:
    """A tensor's rows from all ranks, one stretch of equal length per rank (padded to the longest)."""

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


def _inside(owner_S: torch.Tensor, item_S: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs whose item is in this chunk, as an index into (Q, C)."""
    keep = (item_S >= ids[0]) & (item_S <= ids[-1])
    return owner_S[keep], item_S[keep] - ids[0]
