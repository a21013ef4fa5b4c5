"""The ranking task: labels of the candidates that were shown, given the history before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_rec.models.ranking.config import History
from elastic_rec.models.ranking.model import RankingModel
from elastic_rec.models.retrieval.model import EventTable
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.tasks.base import Validation
from elastic_rec.pipeline.tasks.ranking.data import RankingData
from elastic_rec.pipeline.tasks.ranking.metrics import RankingMetrics
from elastic_rec.pipeline.tasks.ranking.scoring import RankingScoring


class RankingTask(RankingData):
    """Trains on labelled impressions, and scores lists of candidates."""

    metric = "auc"
    evaluate_keys = ("max_history",)
    scorings = (RankingScoring,)

    def _model(self, **settings: Any) -> RankingModel:
        history, table = self.config.ranking.history, self.table
        if history is not History.tower:
            counts = "width, dropout, moments and chunk" if history is History.moments else "width and dropout"
            self.world.log(f"ranking.history={history.value}: no tower; of model.* only {counts} count")
        return RankingModel(
            context=[EventTable(name, self.rows[name]) for name in table.context],
            item_context=[EventTable(name, self.rows[name]) for name in table.item_context],
            num_labels=len(table.labels),
            ranking=self.config.ranking,
            **settings,
        )

    def validation(self, run_dir: Path) -> Validation:
        """AUC and its kin over the impressions of the validation period."""
        return RankingValidation(self)

    def evaluate(self, model: nn.Module, config: EvaluateConfig) -> dict[str, Any]:
        """AUC and its kin over the impressions of a stage."""
        settings = {"length_edges": config.length_edges, "batch_size": config.batch_size}
        return self.measure(model, stage=config.stage, max_history=config.max_history, **settings)

    def measure(
        self, model: nn.Module, *, stage: str, length_edges: list[int], batch_size: int, max_history: int = 0
    ) -> dict[str, Any]:
        """Figures of the first label, by length of the history seen, and of each further label under "labels".
        max_history: as held_out. Collective."""
        model.eval()
        metrics = RankingMetrics(labels=self.table.labels, length_edges=length_edges, world=self.world)
        with torch.no_grad():
            for batch in self.held_out(stage, batch_size=batch_size, max_history=max_history):
                metrics.update(batch, self.finite_logits(model, batch))
        return metrics.compute()


class RankingValidation(Validation):
    """The figures of the validation period."""

    def __init__(self, task: RankingTask) -> None:
        self.task = task

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """As RankingTask.measure gives them. Collective."""
        return self.task.measure(model, stage="valid", length_edges=[50], batch_size=32 * self.task.world.size)
