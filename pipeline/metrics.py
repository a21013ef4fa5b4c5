"""HR@k, NDCG@k, MRR and coverage from 0-based ranks, overall and by history length; summed over ranks exactly."""

from __future__ import annotations

import torch
import torch.distributed as dist


class RankingMetrics:
    """Sums of per-user figures; one target per user, so recall@k = HR@k and ideal DCG = 1.

    length_edges [20, 50] makes the buckets 0-19, 20-49, 50+ (events before the target).
    """

    def __init__(self, *, k: list[int], length_edges: list[int], device: torch.device) -> None:
        self.k, self.edges = sorted(k), torch.tensor(sorted(length_edges), device=device)
        # one row per bucket: users, reciprocal rank, then HR and NDCG for each k; float64 so that order cannot show
        self.sums = torch.zeros(len(self.edges) + 1, 2 + 2 * len(self.k), dtype=torch.float64, device=device)

    def update(self, rank_R: torch.Tensor, length_R: torch.Tensor) -> None:
        """rank_R: (R,) int64 0-based ranks of the targets; length_R: (R,) int64 events before the target."""
        bucket_R = torch.bucketize(length_R, self.edges, right=True)
        columns = [torch.ones_like(rank_R, dtype=torch.float64), 1.0 / (rank_R + 1).double()]
        gain_R = 1.0 / torch.log2(rank_R.double() + 2)
        for k in self.k:
            hit_R = (rank_R < k).double()
            columns += [hit_R, hit_R * gain_R]
        self.sums.index_add_(0, bucket_R, torch.stack(columns, 1))

    def compute(self) -> dict[str, float | dict]:
        """Collective. {"users", "mrr", "hr@10", "ndcg@10", ..., "by_length": {"0-19": {...}, ...}}."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        edges = self.edges.tolist()
        names = [f"{low}-{high - 1}" for low, high in zip([0, *edges], edges, strict=False)] + [f"{edges[-1]}+"]
        by_length = {name: self._means(row) for name, row in zip(names, sums, strict=True) if row[0] > 0}
        return {**self._means(sums.sum(0)), "by_length": by_length}

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
