"""Two kinds of optimizer with one step(): row-wise Adagrad fused into the tables' backward, AdamW for the rest."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from elastic_rec.pipeline.config.train import OptimConfig


def attach_table_optimizers(model: nn.Module, config: OptimConfig) -> None:
    """Give every table its fused optimizer, with its own learning rate. Must run before sharding."""
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            tables = module.embeddings
        elif isinstance(module, EmbeddingBagCollection):
            tables = module.embedding_bags
        else:
            continue
        for name, table in tables.items():
            lr = config.bank_lr if name == "bank" else config.table_lr
            apply_optimizer_in_backward(RowWiseAdagrad, [table.weight], {"lr": lr, "eps": config.table_eps})


def build_optimizer(
    model: DistributedModelParallel, config: OptimConfig, *, total_steps: int
) -> tuple[CombinedOptimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The combined optimizer of a sharded model and its schedule.

    The loop is zero_grad(); backward() (tables are updated here); step(); scheduler.step(). zero_grad must be the
    combined one each step: that is when a new learning rate reaches the fused kernels.
    """
    dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense = KeyedOptimizerWrapper(dense_parameters, lambda parameters: _adamw(parameters, config))
    _make_state(dense)
    clipped = GradientClippingOptimizer(dense, clipping=GradientClipping.NORM, max_gradient=config.clip_norm)
    combined = CombinedOptimizer([("fused", model.fused_optimizer), ("dense", clipped)])
    return combined, torch.optim.lr_scheduler.LambdaLR(combined, lambda step: lr_factor(step, config, total_steps))


def _make_state(dense: KeyedOptimizerWrapper) -> None:
    """Create AdamW's state now, as if before the first step: a checkpoint silently loads only state that exists."""
    rates = [group["lr"] for group in dense.param_groups]
    for group in dense.param_groups:
        group["lr"] = 0.0  # init_state takes a step with zero gradients; at rate 0 not even weight decay acts
    dense.init_state()
    for group, rate in zip(dense.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in dense.state.values():
        state["step"].zero_()
    dense.zero_grad()


def set_step(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Put a fresh schedule where it stands after `step` steps. It is a function of the step alone, so nothing else of
    it is saved, and a resumed run may take other learning rates."""
    scheduler.last_epoch = step
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)


def lr_factor(step: int, config: OptimConfig, total_steps: int) -> float:
    """Linear warm-up, then a cosine to final_lr_ratio at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _adamw(parameters: list[torch.Tensor], config: OptimConfig) -> torch.optim.AdamW:
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.dense_weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.dense_lr)
