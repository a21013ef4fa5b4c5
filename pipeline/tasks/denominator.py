"""What the loss is divided by: the number of targets of the global batch, shared between ranks.

    targets        rank 0: 30    rank 1: 34    global batch: 64
    denominator    rank 0: 32    rank 1: 32    64 / 2 ranks, because DDP takes the mean of the ranks' gradients
    loss           (sum of rank 0 / 32 + sum of rank 1 / 32) / 2 = sum of both / 64

A batch carries it as `normaliser`, and the model divides by that. A batch with a fixed number of targets per user
(data.targets=sampled) has its share from the reader already.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from elastic_rec.pipeline.runtime.world import World


def over_ranks(own: torch.Tensor, world: World) -> torch.Tensor:
    """This rank's denominator from its own number of targets, () or (L,) float32. Collective."""
    total = own.to(world.device)
    dist.all_reduce(total)
    return total.clamp_min(1) / world.size


def mean_over_windows(losses: list[torch.Tensor], denominators: list[torch.Tensor]) -> torch.Tensor:
    """() the loss of a batch from those of its windows, each divided by its own denominator: as if in one pass."""
    weights = torch.stack(denominators)
    return (torch.stack(losses) * (weights / weights.sum()).to(losses[0].device)).sum()
