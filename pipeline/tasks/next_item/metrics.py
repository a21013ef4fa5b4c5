"""HR@k, NDCG@k, MRR and coverage from 0-based ranks: overall, by history length and by kind of target.

All are sums over users, so that any number of ranks gives the same figures.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from elastic_rec.pipeline.tasks.base import length_names
from elastic_rec.pipeline.tasks.next_item.targets import KINDS

MISS = torch.iinfo(torch.int64).max  # the rank of a target that no list holds, however long


class RetrievalMetrics:
    """Sums of per-user figures; one target per user, so recall@k = HR@k and ideal DCG = 1.

    length_edges [20, 50] makes the buckets 0-19, 20-49, 50+ (events before the target).
    """

    def __init__(self, *, k: list[int], length_edges: list[int], device: torch.device) -> None:
        self.k, self.edges = sorted(k), torch.tensor(sorted(length_edges), dtype=torch.int64, device=device)
        # bucket x kind x figure: users, reciprocal rank, then HR and NDCG for each k; float64 so that order cannot show
        shape = len(self.edges) + 1, len(KINDS), 2 + 2 * len(self.k)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, rank_R: torch.Tensor, length_R: torch.Tensor, kind_R: torch.Tensor) -> None:
        """(R,) int64 each: 0-based ranks of the targets or MISS, events before the target, index into KINDS."""
        bucket_R = torch.bucketize(length_R, self.edges, right=True)
        found_R = (rank_R < MISS).double()
        columns = [torch.ones_like(found_R), found_R / (rank_R.double() + 1)]
        gain_R = 1.0 / torch.log2(rank_R.double() + 2)
        for k in self.k:
            hit_R = (rank_R < k).double()
            columns += [hit_R, hit_R * gain_R]
        self.sums.flatten(0, 1).index_add_(0, bucket_R * len(KINDS) + kind_R, torch.stack(columns, 1))

    def compute(self) -> dict[str, float | dict]:
        """Collective. {"users", "mrr", "hr@10", "ndcg@10", ..., "by_target": {"new": {"share", "users", ...}, ...},
        "by_length": {"0-19": {...}, ...}}; parts without users are left out."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        names = length_names(self.edges.tolist())
        total = self._means(sums.sum((0, 1)))
        by_length = {name: self._means(row) for name, row in zip(names, sums.sum(1), strict=True) if row[0] > 0}
        by_target = {
            kind: {"share": float(row[0]) / total["users"], **self._means(row)}
            for kind, row in zip(KINDS, sums.sum(0), strict=True)
            if row[0] > 0
        }
        return {**total, "by_target": by_target, "by_length": by_length}

    def _means(self, row: torch.Tensor) -> dict[str, float]:
        users, *rest = row.tolist()
        values = [value / max(users, 1) for value in rest]
        named = {"users": int(users), "mrr": values[0]}
        for i, k in enumerate(self.k):
            named[f"hr@{k}"], named[f"ndcg@{k}"] = values[1 + 2 * i], values[2 + 2 * i]
        return named


class Coverage:
    """Share of the catalogue that appears in anybody's top-k list."""

    def __init__(self, *, num_items: int, first_item: int, device: torch.device) -> None:
        self.hit = torch.zeros(num_items, dtype=torch.int32, device=device)
        self.catalogue = num_items - first_item

    def update(self, ids: torch.Tensor) -> None:
        """ids: item ids of any shape, -1 where a list is short."""
        self.hit[ids[ids >= 0]] = 1

    def compute(self) -> float:
        """Collective."""
        hit = self.hit.clone()
        dist.all_reduce(hit, op=dist.ReduceOp.MAX)
        return float(hit.sum()) / max(1, self.catalogue)
