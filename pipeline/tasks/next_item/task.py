"""The next-item task: which item follows a history, of the whole catalogue."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from elastic_rec.feature_store.batches.splits import SplitKind
from elastic_rec.models.retrieval.model import RetrievalModel
from elastic_rec.pipeline.config.data import DataConfig, Seen
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.next_item.baselines import fit_baselines
from elastic_rec.pipeline.tasks.next_item.data import NextItemData
from elastic_rec.pipeline.tasks.next_item.evaluation import evaluate, measure_baselines
from elastic_rec.pipeline.tasks.next_item.incremental_scoring import IncrementalScoring
from elastic_rec.pipeline.tasks.next_item.scoring import FullScoring
from elastic_rec.pipeline.tasks.next_item.targets import Survey, require_targets, resolve_seen, survey
from elastic_rec.pipeline.tasks.next_item.validation import NextItemValidation, warn_below, warn_of_misses


class NextItemTask(NextItemData):
    """Trains on targets after events, and ranks the whole catalogue. Beside it stand counting baselines."""

    metric = "ndcg@10"
    evaluate_keys = ("seen", "min_item_count")
    scorings = (FullScoring, IncrementalScoring)

    @cached_property
    def survey(self) -> Survey:
        """Counts over the store; made once. Collective."""
        return survey(self)

    def prepare(self) -> None:
        """Refuses stages without targets, and puts what data.seen=auto comes to into the config. A run that goes on
        keeps its policy, and its store has been looked at."""
        data, run = self.config.data, self.config.run
        is_begun = run.resume and (Path(run.dir) / "config.yaml").exists()
        if is_begun and data.seen is not Seen.auto:
            return
        require_targets(self, self.survey, ["train", "valid"])
        data.seen = resolve_seen(self, data.seen, self.survey)

    def _model(self, **settings: Any) -> RetrievalModel:
        return RetrievalModel(
            softmax=self.config.loss.softmax,
            every_position=self.every_position,
            windows=self.config.data.window > 0,
            **settings,
        )

    def validation(self, run_dir: Path) -> NextItemValidation:
        """Lists like those of score.py, beside what counting alone reaches."""
        return NextItemValidation(self, run_dir)

    def require_evaluable(self, config: EvaluateConfig, *, trained_on: DataConfig) -> None:
        """Leave-one-out: the last events of an earlier version of what a run was trained on were training events."""
        now, last = self.store.version, trained_on.version
        is_same = str(self.store.path.resolve()) == trained_on.store
        if self.config.data.split.kind is SplitKind.leave_one_out and is_same and now < last:
            raise ConfigError(
                f"version {now} of {trained_on.store} is earlier than the run's, {last}: with data.split.kind="
                f"leave_one_out its targets are among the events the run was trained on; set version={last} or later"
            )
        require_targets(self, self.survey, [config.stage])

    def evaluate(self, model: nn.Module, config: EvaluateConfig) -> dict[str, Any]:
        """Of each held-out item among the whole catalogue, and of counting baselines. Collective."""
        seen = resolve_seen(self, config.seen or self.config.data.seen, self.survey)
        settings = {"stage": config.stage, "k": config.k, "length_edges": config.length_edges}
        settings |= {"batch_size": config.batch_size, "seen": seen}
        figures = evaluate(self, model, min_item_count=config.min_item_count, **settings)
        warn_of_misses(self, figures)
        baselines = fit_baselines(self, batch_size=config.batch_size, exclude_seen=seen is Seen.exclude)
        found = measure_baselines(self, baselines, **settings)
        return {**figures, "baselines": found, "below_baseline": warn_below(self, figures[self.metric], found)}
