"""Batches for a retrieval model, and the model sharded in a process group of one."""

from __future__ import annotations

import torch
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch

NUM_ITEMS, NUM_GAPS, CUTS = 102, 40, 2


LENGTHS = [5, 0, 70, 1]


def make_batch(seed=0, lengths=LENGTHS, negatives=0):
    """CUTS prefixes per user. negatives: 0 for the full softmax, else the number of sampled ones."""
    g = torch.Generator().manual_seed(seed)
    lengths_B, T, R = torch.tensor(lengths), sum(lengths), len(lengths) * CUTS
    item_T = torch.randint(2, NUM_ITEMS, (T,), generator=g)
    gap_T = torch.randint(0, NUM_GAPS, (T,), generator=g)
    starts = (lengths_B.cumsum(0) - lengths_B).repeat_interleave(CUTS)
    ends = starts + (torch.rand(R, generator=g) * lengths_B.repeat_interleave(CUTS)).long()
    targets = torch.randint(2, NUM_ITEMS, (R,), generator=g)
    if negatives:
        candidates = torch.cat([torch.randint(2, NUM_ITEMS, (negatives,), generator=g), targets])
    else:
        candidates = torch.arange(2, NUM_ITEMS)
    in_row_0 = torch.zeros_like(lengths_B)
    in_row_0[0] = candidates.numel()
    features = KeyedJaggedTensor(
        keys=["item", "gap", "candidate"],
        values=torch.cat([item_T, gap_T, candidates]),
        lengths=torch.cat([lengths_B, lengths_B, in_row_0]),
    )
    return PrefixBatch(
        features=features,
        times_s=torch.randint(0, 9999, (T,), generator=g).cumsum(0),
        starts=starts,
        ends=ends,
        targets=targets,
        weights=(ends > starts).float(),
        log_q=torch.zeros(candidates.numel()),
        normaliser=torch.tensor(float(R)),
        rows=torch.arange(R),
        query_gap_s=torch.randint(-1, 10**6, (R,), generator=g),
    )


def shard(model):
    """Row-wise fused tables under DistributedModelParallel, and the optimiser for all of it."""
    _apply_optimizer_in_backward(RowWiseAdagrad, model.embeddings.parameters(), {"lr": 0.1, "eps": 1e-8})
    _apply_optimizer_in_backward(RowWiseAdagrad, model.tower.memory.bank.parameters(), {"lr": 0.5, "eps": 1e-8})
    sharder, plan = EmbeddingCollectionSharder(), {}
    for path in ("embeddings", "tower.memory.bank"):
        tables = model.get_submodule(path)
        kinds = {c.name: row_wise(compute_kernel="fused") for c in tables.embedding_configs()}
        plan[path] = construct_module_sharding_plan(
            tables, kinds, sharder=sharder, local_size=1, world_size=1, device_type="cpu"
        )
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan(plan=plan), sharders=[sharder]
    )
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())), lambda ps: torch.optim.AdamW(ps, lr=1e-3)
    )
    return sharded, CombinedOptimizer([("fused", sharded.fused_optimizer), ("dense", dense)])
