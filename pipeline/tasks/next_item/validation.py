"""What training is judged by after each epoch: the figures of score.py's lists, beside what counting alone reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from elastic_rec.feature_store.utils.checked_json import read_checked, write_checked
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.tasks.base import Validation
from elastic_rec.pipeline.tasks.next_item.baselines import fit_baselines
from elastic_rec.pipeline.tasks.next_item.data import NextItemData
from elastic_rec.pipeline.tasks.next_item.evaluation import below_baseline, evaluate, measure_baselines
from elastic_rec.pipeline.tasks.next_item.targets import FEW_REPEATS

USERS = 256  # per batch and rank
SHOWN = ("hr@10", "ndcg@10", "mrr")  # of a baseline, in training's report


class NextItemValidation(Validation):
    """Counting baselines are fitted and measured once per run, before the first validation; RUN/baselines.json keeps
    them."""

    def __init__(self, task: NextItemData, run_dir: Path) -> None:
        self.task, self.path = task, run_dir / "baselines.json"
        self.baselines: dict[str, dict[str, Any]] | None = None
        self.has_warned = False
        self.settings = {"stage": "valid", "k": [10], "length_edges": [50], "batch_size": USERS * task.world.size}
        self.settings["seen"] = task.config.data.seen

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """As evaluation.evaluate gives them, and the name of a baseline that the model is below. Collective."""
        task = self.task
        if self.baselines is None:
            self.baselines = self._known() or self._measure()
        figures = evaluate(task, model, **self.settings)
        if not self.has_warned:
            self.has_warned = warn_of_misses(task, figures)
        return figures | {"below_baseline": below_baseline(figures.get(task.metric), self.baselines, task.metric)}

    def verdict(self, best: float | None) -> dict[str, Any]:
        """The baselines, and the name of the best of them where `best`, the run's metric, is below it. Collective."""
        task = self.task
        baselines = (self._known() if self.baselines is None else self.baselines) or {}  # a finished run validates none
        below = warn_below(task, best, baselines)
        shown = {name: {key: figures[key] for key in SHOWN} for name, figures in baselines.items()}
        return {"seen": task.config.data.seen.value, "baselines": shown, "below_baseline": below}

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
            self.task.world.log(f"{error}: counting baselines are measured again")
            return None

    def _measure(self) -> dict[str, dict[str, Any]]:
        task, exclude = self.task, self.settings["seen"] is Seen.exclude
        if not task.config.run.baselines:
            return {}
        baselines = fit_baselines(task, batch_size=self.settings["batch_size"], exclude_seen=exclude)
        figures = measure_baselines(task, baselines, **self.settings)
        best = max(figures, key=lambda name: figures[name][task.metric])
        task.world.log(f"best counting baseline on validation: {best}, {task.metric} {figures[best][task.metric]:.4f}")
        if task.world.is_main:
            write_checked(self.path, figures)
        return figures


def warn_below(task: NextItemData, value: float | None, baselines: dict[str, dict[str, Any]]) -> str | None:
    """As below_baseline, and says so."""
    below = below_baseline(value, baselines, task.metric)
    if below:
        task.world.log(
            f"warning: {task.metric} {value:.4f} is below that of the counting baseline {below!r}, "
            f"{baselines[below][task.metric]:.4f}: a model that does not beat counting is not worth serving"
        )
    return below


def warn_of_misses(task: NextItemData, figures: dict[str, Any]) -> bool:
    """Says so where seen=exclude makes many targets misses."""
    many = figures["seen"] == Seen.exclude and figures["seen_targets"] > FEW_REPEATS
    if many:
        task.world.log(
            f"warning: {figures['seen_targets']:.1%} of the targets are items that their user has met before, which "
            "seen=exclude never recommends; data.seen=keep would"
        )
    return many
