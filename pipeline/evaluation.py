"""Held-out targets ranked against the whole catalogue, by the model and by two baselines, in one pass each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from elastic_rec.feature_store.histories import Histories
from elastic_rec.feature_store.splits import split_bounds
from elastic_rec.feature_store.vocabulary import FIRST
from elastic_rec.models.elastic.memory import slot_usage
from elastic_rec.pipeline.baselines import Baseline
from elastic_rec.pipeline.metrics import Coverage, RankingMetrics
from elastic_rec.pipeline.ranking_task import RankingTask
from elastic_rec.pipeline.retrieval import ShardedCatalogue
from elastic_rec.pipeline.sharding import local_rows
from elastic_rec.pipeline.task import NextItemTask, query_windows
from elastic_rec.pipeline.world import World


def evaluate(
    task: NextItemTask,
    model: nn.Module,
    *,
    stage: str,
    k: list[int],
    length_edges: list[int],
    batch_size: int,
    baselines: list[Baseline] = (),
    min_item_count: int = 0,
) -> dict:
    """Metrics of the model's ranking of each user's held-out item. Collective.

    The main figures rank the target among items the user has not seen; "seen_kept" among all items.
    Every baseline gets the same users, targets and candidates, under its name.
    min_item_count: above 0, "frequent_items" repeats the main figures with only those items in the catalogue that
    occur at least so often; users held out with a rarer one are left out of it.
    """
    world = task.world
    unseen, kept, frequent, frequent_kept, *others = (
        RankingMetrics(k=k, length_edges=length_edges, device=world.device) for _ in range(4 + len(baselines))
    )
    frequent_V = torch.from_numpy(task.store.vocabulary("item").counts >= min_item_count).to(world.device)
    frequent_V[:FIRST] = False
    coverage = Coverage(num_items=task.num_items, first_item=FIRST, device=world.device)
    model.eval()
    with torch.no_grad():
        catalogue = open_catalogue(model, world)
        for histories, windows in task.held_out(stage, batch_size=batch_size):
            query_RD, batch = query_windows(model, windows, world.device)
            real = batch.weights > 0
            seen = seen_pairs(histories, task, stage)
            length_R = torch.from_numpy(positions(histories, task, stage)).to(world.device)
            rank_all, rank_unseen = catalogue.rank_targets(query_RD, batch.targets, seen)
            kept.update(rank_all[real], length_R[real])
            unseen.update(rank_unseen[real], length_R[real])
            if min_item_count:
                narrow = open_catalogue(model, world, frequent_V)
                rank_all, rank_unseen = narrow.rank_targets(query_RD, batch.targets, seen)
                counted = real & frequent_V[batch.targets]
                frequent_kept.update(rank_all[counted], length_R[counted])
                frequent.update(rank_unseen[counted], length_R[counted])
            top_ids, _ = catalogue.top_k(query_RD, 10, seen)
            coverage.update(top_ids[real])
            before_B, target_B = positions(histories, task, stage), batch.targets.cpu().numpy()
            for baseline, metrics in zip(baselines, others, strict=True):
                rank_B = baseline.rank_targets(histories, before_B, target_B, exclude_seen=True)
                metrics.update(torch.from_numpy(rank_B).to(world.device)[real], length_R[real])
    result = {**unseen.compute(), "coverage@10": coverage.compute(), "seen_kept": kept.compute()}
    if min_item_count:
        about = {"min_item_count": min_item_count, "items": int(frequent_V.sum())}
        result["frequent_items"] = {**about, **frequent.compute(), "seen_kept": frequent_kept.compute()}
    result["baselines"] = {b.name: metrics.compute() for b, metrics in zip(baselines, others, strict=True)}
    return result


def validate(task: NextItemTask | RankingTask, model: nn.Module) -> dict:
    """What training is judged by after each epoch. Collective."""
    if isinstance(task, RankingTask):
        figures = task.evaluate(model, stage="valid", length_edges=[50], batch_size=32 * task.world.size)
    else:
        size = 256 * task.world.size
        figures = evaluate(task, model, stage="valid", k=[10], length_edges=[50], batch_size=size)
    return {**figures, **memory_usage(model)}


def open_catalogue(model: nn.Module, world: World, candidates_V: torch.Tensor | None = None) -> ShardedCatalogue:
    """The catalogue over the model's own item rows; items below FIRST are never ranked."""
    first_row, weight_VD = local_rows(model, "item")
    return ShardedCatalogue(
        first_row=first_row, weight_VD=weight_VD.detach(), first_item=FIRST, world=world, candidates_V=candidates_V
    )


def memory_usage(model: nn.Module) -> dict[str, float]:
    """Use of the memory's slots over all ranks since the last call: share hit, effective number. Collective."""
    memory = getattr(model.tower, "memory", None)  # peers, and their absent towers, have none
    if memory is None:
        return {}
    counts_M = memory.select.counts
    dist.all_reduce(counts_M)
    usage = slot_usage(counts_M)
    counts_M.zero_()
    return {f"memory_{name}": value for name, value in usage.items()}


def positions(histories: Histories, task: NextItemTask, stage: str):
    """(B,) how many events each user has before the held-out one (all of them when scoring)."""
    if stage == "score":
        return histories.offsets[1:] - histories.offsets[:-1]
    return getattr(split_bounds(task.config.data.split, histories), stage).clip(min=0)


def seen_pairs(histories: Histories, task: NextItemTask, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(user number in the batch, item) of every event before the held-out one, the whole history."""
    offsets = torch.from_numpy(histories.offsets)
    before = torch.from_numpy(positions(histories, task, stage))
    owner = torch.repeat_interleave(torch.arange(len(before)), offsets.diff())
    place = torch.arange(len(owner)) - offsets[:-1][owner]
    keep = place < before[owner]
    items = torch.from_numpy(histories.columns["item"])
    device = task.world.device
    return owner[keep].to(device), items[keep].to(device)
