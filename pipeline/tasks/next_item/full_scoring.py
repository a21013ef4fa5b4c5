"""Full scoring: the top-k items of every user, from the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import torch
from torch import nn

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.pipeline.config.score import FullScoreConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.next_item.data import NextItemData
from elastic_rec.pipeline.tasks.next_item.evaluation import query_windows
from elastic_rec.pipeline.tasks.next_item.query_time import query_gaps, with_query_gap
from elastic_rec.pipeline.tasks.next_item.top_k import TopKScoring
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder
from elastic_rec.pipeline.tasks.scoring import ALL


class FullScoring(TopKScoring):
    """Every user of the store, whatever was scored before."""

    command, config_type = "full", FullScoreConfig

    def __init__(
        self, task: NextItemData, model: nn.Module, *, step: int, fingerprint: str, config: FullScoreConfig
    ) -> None:
        """As TopKScoring has it."""
        super().__init__(task, model, step=step, fingerprint=fingerprint, config=config)
        self.settings |= {
            "store": task.store.manifest["hash"],
            "max_history": task.config.data.max_history,
            "query_time": self.asked_s,
            "model": fingerprint,
        }

    @staticmethod
    def run_config(run: TrainConfig, config: FullScoreConfig) -> TrainConfig:
        """With as much of a history as is asked for. Raises ConfigError for a model with positions."""
        if config.max_history is not None:
            if run.model.kind.has_positions and config.max_history != run.data.max_history:
                raise ConfigError(
                    f"max_history={config.max_history}, but the run's model has positions for {run.data.max_history} "
                    "events: leave max_history out"
                )
            run.data.max_history = config.max_history or ALL
        return TopKScoring.run_config(run, config)

    def part(self, number: int, known: dict | None) -> FullPart:
        """The users of a bucket."""
        return FullPart(self, self.numbers.index(number))

    def padding_step(self) -> None:
        """Scores a user without events. Collective."""
        self.score(self.task.padding_histories())

    def score(self, histories: Histories) -> pa.Table:
        """Top-k of each user. Collective."""
        with torch.no_grad():
            windows = with_query_gap(self.task.score_windows(histories), query_gaps(histories, self.asked_s))
            query_RD = query_windows(self.model, windows, self.world.device)
        return self.recommend(query_RD, histories)

    def figures(self, *, rows: dict[int, int], scored: list[int], counts: Counter[str], seconds: float) -> dict:
        """Users, and how many a second."""
        num_scored = sum(rows[number] for number in scored)
        return {"users": sum(rows.values()), "users_per_s": round(num_scored / seconds, 1)}


class FullPart:
    """The users of one file of the store."""

    def __init__(self, scoring: FullScoring, file_index: int) -> None:
        self.scoring, self.file_index = scoring, file_index
        self.counts: Counter[str] = Counter()
        self.tables: list[pa.Table] = []

    def batches(self) -> Iterator[Histories]:
        """Users with their histories."""
        return self.scoring.task.file_histories(self.file_index, batch_size=self.scoring.config.batch_size)

    def score(self, histories: Histories) -> None:
        """Adds the users' lists. Collective."""
        self.tables.append(self.scoring.score(histories))

    def commit(self, folder: ScoreFolder) -> None:
        """Writes the lists."""
        folder.commit(self.scoring.numbers[self.file_index], pa.concat_tables(self.tables))
