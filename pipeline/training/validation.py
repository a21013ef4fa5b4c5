"""What training is judged by after each epoch: the figures of score.py's lists, beside what counting alone reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from elastic_rec.feature_store.utils.checked_json import read_checked, write_checked
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.models.towers.elastic.memory import slot_usage
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.tasks.next_item.baselines import fit_baselines
from elastic_rec.pipeline.tasks.next_item.evaluation import below_baseline, evaluate, measure_baselines
from elastic_rec.pipeline.tasks.next_item.targets import FEW_REPEATS, require_targets, resolve_seen, survey
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask
from elastic_rec.pipeline.tasks.ranking.task import RankingTask
from elastic_rec.pipeline.tasks.registry import AnyTask

USERS = 256  # per batch and rank
SHOWN = ("hr@10", "ndcg@10", "mrr")  # of a baseline, in training's report


def prepare(task: AnyTask) -> None:
    """Before a model is built: refuse stages without targets, and put what data.seen=auto comes to into the config.

    A run that goes on keeps its policy, and its store has been looked at. Collective.
    """
    data, run = task.config.data, task.config.run
    is_begun = run.resume and (Path(run.dir) / "config.yaml").exists()
    if isinstance(task, RankingTask) or (is_begun and data.seen is not Seen.auto):
        return
    found = survey(task)
    require_targets(task, found, ["train", "valid"])
    data.seen = resolve_seen(task, data.seen, found)


class Validation:
    """Called after each epoch, it returns the model's figures on validation targets. Collective.

    Counting baselines are fitted and measured once per run, before the first validation; RUN/baselines.json keeps them.
    """

    def __init__(self, task: AnyTask, model: nn.Module, *, run_dir: Path) -> None:
        self.task, self.model, self.path = task, model, run_dir / "baselines.json"
        self.baselines: dict[str, dict[str, Any]] | None = None
        self.has_warned = False

    def __call__(self) -> dict[str, Any]:
        task, model = self.task, self.model
        if isinstance(task, RankingTask):
            figures = task.evaluate(model, stage="valid", length_edges=[50], batch_size=32 * task.world.size)
        else:
            if self.baselines is None:
                self.baselines = self._known() or self._measure()
            figures = evaluate(task, model, **self._settings(task))
            if not self.has_warned:
                self.has_warned = warn_of_misses(task, figures)
            figures["below_baseline"] = below_baseline(figures.get(task.metric), self.baselines, task.metric)
        return {**figures, **memory_usage(model)}

    def verdict(self, best: float | None) -> dict[str, Any]:
        """The baselines, and the name of the best of them where `best`, the run's metric, is below it. Collective."""
        task = self.task
        if isinstance(task, RankingTask):
            return {}
        baselines = (self._known() if self.baselines is None else self.baselines) or {}  # a finished run validates none
        below = below_baseline(best, baselines, task.metric)
        if below:
            warn_below(task, best, below, baselines[below])
        shown = {name: {key: figures[key] for key in SHOWN} for name, figures in baselines.items()}
        return {"seen": task.config.data.seen.value, "baselines": shown, "below_baseline": below}

    def _settings(self, task: NextItemTask) -> dict[str, Any]:
        size = USERS * task.world.size
        return {"stage": "valid", "k": [10], "length_edges": [50], "batch_size": size, "seen": task.config.data.seen}

    def _known(self) -> dict[str, dict[str, Any]] | None:
        """What was measured before this run was resumed."""
        world = self.task.world
        return world.agreed(self._read() if world.is_main else None)

    def _read(self) -> dict[str, dict[str, Any]] | None:
        try:
            return read_checked(self.path)
        except FileNotFoundError:
            return None
        except DataError as error:
            self.task.world.say(f"{error}: counting baselines are measured again")
            return None

    def _measure(self) -> dict[str, dict[str, Any]]:
        task, config = self.task, self.task.config
        if not config.run.baselines:
            return {}
        exclude = config.data.seen is Seen.exclude
        baselines = fit_baselines(task, batch_size=USERS * task.world.size, exclude_seen=exclude)
        figures = measure_baselines(task, baselines, **self._settings(task))
        best = max(figures, key=lambda name: figures[name][task.metric])
        task.world.say(f"best counting baseline on validation: {best}, {task.metric} {figures[best][task.metric]:.4f}")
        if task.world.is_main:
            write_checked(self.path, figures)
        return figures


def warn_below(task: NextItemTask, value: float, name: str, figures: dict[str, Any]) -> None:
    task.world.say(
        f"warning: {task.metric} {value:.4f} is below that of the counting baseline {name!r}, "
        f"{figures[task.metric]:.4f}: a model that does not beat counting is not worth serving"
    )


def warn_of_misses(task: NextItemTask, figures: dict[str, Any]) -> bool:
    """Says so where seen=exclude makes many targets misses."""
    many = figures["seen"] == Seen.exclude and figures["seen_targets"] > FEW_REPEATS
    if many:
        task.world.say(
            f"warning: {figures['seen_targets']:.1%} of the targets are items that their user has met before, which "
            "seen=exclude never recommends; data.seen=keep would"
        )
    return many


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
