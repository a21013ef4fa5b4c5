"""Full scoring: the top-k items of every user, from the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.models.towers.elastic.config import Attention
from elastic_rec.pipeline.config.score import FullScoreConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.next_item.evaluation import query_windows
from elastic_rec.pipeline.tasks.next_item.topk_scoring import TopKScoring, with_query_gap
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder
from elastic_rec.pipeline.tasks.scoring import ALL, Part


class FullScoring(TopKScoring):
    """Every user of the store, whatever was scored before."""

    command, config_type = "full", FullScoreConfig

    def open(self) -> dict[str, Any]:
        """The lists depend on the store, and on how much of it reaches the model."""
        data, store = self.task.config.data, self.task.store.manifest["hash"]
        return super().open() | {"store": store, "max_history": data.max_history, "query_time": self.asked_s}

    @staticmethod
    def run_config(run: TrainConfig, config: FullScoreConfig) -> TrainConfig:
        """With as much of a history as is asked for. Raises ConfigError for a model with positions."""
        if config.max_history is not None:
            if run.model.attention is Attention.full and config.max_history != run.data.max_history:
                raise ConfigError(
                    f"max_history={config.max_history}, but the run's model has positions for {run.data.max_history} "
                    "events: leave max_history out"
                )
            run.data.max_history = config.max_history or ALL
        return TopKScoring.run_config(run, config)

    def part(self, number: int, known: dict | None) -> FullPart:
        """The users of a bucket."""
        return FullPart(self, number)

    def padding_step(self) -> None:
        """Scores a user without events. Collective."""
        self.top_k(self.task.padding_histories())

    def top_k(self, histories: Histories) -> pa.Table:
        """The lists of these users. Collective."""
        with torch.no_grad():
            windows = with_query_gap(self.task.score_windows(histories), query_gaps(histories, self.asked_s))
            query_RD = query_windows(self.model, windows, self.world.device)
        return self.recommend(query_RD, histories)

    def figures(self, *, rows: dict[int, int], scored: list[int], counts: Counter[str], seconds: float) -> dict:
        """Users, and how many a second."""
        num_scored = sum(rows[number] for number in scored)
        return {"users": sum(rows.values()), "users_per_s": round(num_scored / seconds, 1)}


class FullPart(Part):
    """The users of one file of the store."""

    def __init__(self, scoring: FullScoring, bucket: int) -> None:
        super().__init__()
        self.scoring, self.bucket = scoring, bucket
        self.tables: list[pa.Table] = []

    def batches(self) -> Iterator[Histories]:
        """Users with their histories."""
        scoring = self.scoring
        return scoring.task.file_histories(scoring.files[self.bucket], batch_size=scoring.config.batch_size)

    def score(self, histories: Histories) -> None:
        """Adds the users' lists. Collective."""
        self.tables.append(self.scoring.top_k(histories))

    def commit(self, folder: ScoreFolder) -> None:
        """Writes the lists."""
        folder.commit(self.bucket, pa.concat_tables(self.tables))


def query_gaps(histories: Histories, asked_s: int | None) -> np.ndarray:
    """(B,) seconds from each user's newest event to asked_s; -1: unknown, or no event."""
    gap_s_B = np.full(len(histories.rows), -1, np.int64)
    if asked_s is not None:
        some_B = np.diff(histories.offsets) > 0
        gap_s_B[some_B] = asked_s - histories.times_s[histories.offsets[1:][some_B] - 1]
    return gap_s_B
