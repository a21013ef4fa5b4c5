"""Held-out targets ranked against the whole catalogue, by the model and by counting baselines (docs/explanation/
evaluation.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.table.vocabulary import FIRST
from elastic_rec.feature_store.utils.jagged import span_indices
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.runtime.finite import require_finite
from elastic_rec.pipeline.runtime.sharding import local_rows
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.next_item.baselines import Baseline
from elastic_rec.pipeline.tasks.next_item.data import NextItemData
from elastic_rec.pipeline.tasks.next_item.metrics import MISS, Coverage, RetrievalMetrics
from elastic_rec.pipeline.tasks.next_item.sharded_topk import ShardedCatalogue
from elastic_rec.pipeline.tasks.next_item.targets import KINDS, HeldOut, held_out_targets

NEW = KINDS.index("new")


def evaluate(
    task: NextItemData,
    model: nn.Module,
    *,
    stage: str,
    k: list[int],
    length_edges: list[int],
    batch_size: int,
    seen: Seen,
    min_item_count: int = 0,
) -> dict[str, Any]:
    """Metrics of the model's ranking of each user's held-out item. Collective.

    seen: keep or exclude. The main figures are of this policy, those of the other are under its name.
    min_item_count: above 0, "frequent_items" repeats the main figures with only those items in the catalogue that
    occur at least so often; users held out with a rarer one are left out of it.
    Raises NonFiniteError for a query or score that is no number.
    """
    world = task.world
    settings = {"k": k, "length_edges": length_edges, "device": world.device}
    whole, narrow = ByPolicy(**settings), ByPolicy(**settings)
    coverage = Coverage(num_items=task.num_items, first_item=FIRST, device=world.device)
    unknown = torch.zeros(1, dtype=torch.int64, device=world.device)
    model.eval()
    with torch.no_grad():
        catalogue = open_catalogue(model, world)
        if min_item_count:
            frequent_V = frequent_items(task, min_item_count)
            frequent = open_catalogue(model, world, frequent_V)
        for histories, windows in task.held_out(stage, batch_size=batch_size):
            query_RD = query_windows(model, windows, world.device)
            require_finite(query_RD, "the query", row_name=user_namer(task, histories))
            held = held_out_targets(histories, task.config.data.split, stage)
            target_R = torch.from_numpy(held.item).to(world.device)
            pairs = seen_pairs(histories, held.before, world.device)
            whole.update(*catalogue.rank_targets(query_RD, target_R, pairs), held)
            if min_item_count:
                counted = held._replace(ranked=held.ranked & frequent_V[target_R].cpu().numpy())
                narrow.update(*frequent.rank_targets(query_RD, target_R, pairs), counted)
            top_ids, _ = catalogue.top_k(query_RD, 10, pairs if seen is Seen.exclude else None)
            coverage.update(top_ids[torch.from_numpy(held.ranked).to(world.device)])
            unknown += held.num_unknown
    dist.all_reduce(unknown)
    result = {"seen": seen.value, **whole.compute(seen), "coverage@10": coverage.compute()}
    result["unknown_targets"] = int(unknown)
    if min_item_count:
        about = {"min_item_count": min_item_count, "items": int(frequent_V.sum())}
        result["frequent_items"] = {**about, **narrow.compute(seen)}
    return result


def measure_baselines(
    task: NextItemData,
    baselines: list[Baseline],
    *,
    stage: str,
    k: list[int],
    length_edges: list[int],
    batch_size: int,
    seen: Seen,
) -> dict[str, dict[str, Any]]:
    """The main figures of each baseline by its name: the users, targets and candidates of `evaluate`. Collective."""
    device = task.world.device
    of_each = [RetrievalMetrics(k=k, length_edges=length_edges, device=device) for _ in baselines]
    for histories in task.histories(batch_size=batch_size):
        held = held_out_targets(histories, task.config.data.split, stage)
        for baseline, metrics in zip(baselines, of_each, strict=True):
            exclude = seen is Seen.exclude
            rank_B = baseline.rank_targets(histories, held.before, held.item, exclude_seen=exclude)
            if exclude:
                rank_B = np.where(held.kind == NEW, rank_B, MISS)
            metrics.update(*_ranked(held, device, rank_B, held.before, held.kind))
    found = zip(baselines, of_each, strict=True)
    return {baseline.name: {**metrics.compute(), "settings": baseline.settings} for baseline, metrics in found}


def below_baseline(value: float | None, baselines: dict[str, dict[str, Any]], metric: str) -> str | None:
    """Name of the best baseline where the model's value is less than its; None where it is not, or is undefined."""
    best = max(baselines, key=lambda name: baselines[name][metric], default=None)
    return best if best and value is not None and value < baselines[best][metric] else None


class ByPolicy:
    """The figures of one ranking under seen=keep and under seen=exclude."""

    def __init__(self, **settings) -> None:
        self.metrics = {seen: RetrievalMetrics(**settings) for seen in (Seen.keep, Seen.exclude)}

    def update(self, rank_all_R: torch.Tensor, rank_unseen_R: torch.Tensor, held: HeldOut) -> None:
        """(R,) int64 ranks on the device, as ShardedCatalogue.rank_targets gives them."""
        device = rank_all_R.device
        ranked_R = torch.from_numpy(held.ranked).to(device)
        before_R, kind_R = _ranked(held, device, held.before, held.kind)
        delivered_R = rank_unseen_R[ranked_R].masked_fill(kind_R != NEW, MISS)  # no list holds an item already seen
        self.metrics[Seen.keep].update(rank_all_R[ranked_R], before_R, kind_R)
        self.metrics[Seen.exclude].update(delivered_R, before_R, kind_R)

    def compute(self, seen: Seen) -> dict[str, Any]:
        """Collective. seen_targets: share of targets that the user has met before, misses under seen=exclude."""
        figures = {each: metrics.compute() for each, metrics in self.metrics.items()}
        met = sum(part["share"] for kind, part in figures[seen]["by_target"].items() if kind != "new")
        both = {"seen_kept": figures[Seen.keep], "seen_excluded": figures[Seen.exclude]}
        return {**figures[seen], "seen_targets": met, **both}


def _ranked(held: HeldOut, device: torch.device, *values_B: np.ndarray) -> list[torch.Tensor]:
    """The values of the users whose target is ranked."""
    return [torch.from_numpy(value_B[held.ranked]).to(device) for value_B in values_B]


def query_windows(model: nn.Module, windows: Iterator[PrefixBatch], device: torch.device) -> torch.Tensor:
    """(R, D) the users' queries after all windows, one of which is on the device at a time. Collective."""
    for batch in windows:
        query_RD = model.query(batch.to(device))
    return query_RD


def frequent_items(task: NextItemData, min_item_count: int) -> torch.Tensor:
    """(V,) bool: the items that occur in the store at least so often."""
    counts_V = task.store.vocabulary("item").counts[: task.num_items]
    frequent_V = torch.from_numpy(counts_V >= min_item_count).to(task.world.device)
    frequent_V[:FIRST] = False
    return frequent_V


def user_namer(task: NextItemData, histories: Sequences) -> Callable[[int], str]:
    """Names the user of a query, for an error."""
    return lambda row: f"the row of user {task.store.user_ids(histories.rows[row : row + 1])[0].as_py()!r}"


def open_catalogue(model: nn.Module, world: World, candidates_V: torch.Tensor | None = None) -> ShardedCatalogue:
    """The catalogue over the model's own item rows; items below FIRST are never ranked."""
    first_row, weight_VD = local_rows(model, "item")
    return ShardedCatalogue(
        first_row=first_row, weight_VD=weight_VD.detach(), first_item=FIRST, world=world, candidates_V=candidates_V
    )


def seen_pairs(histories: Sequences, before_B: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(user number in the batch, item) of each user's first before_B events."""
    owner = np.repeat(np.arange(len(before_B)), before_B)
    items = histories.columns["item"][span_indices(histories.offsets[:-1], before_B)]
    return torch.from_numpy(owner).to(device), torch.from_numpy(items).to(device)
