"""Full scoring: the top-k items of every user, from the history; and what incremental scoring shares with it.

OUT/part-00003.parquet    the users of the store's bucket 3: user_id, item_ids list, scores list; best first
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.table.schema import ARROW_TYPES
from elastic_rec.feature_store.table.times import parse_time_s
from elastic_rec.models.towers.config import Time
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.config.score import FullScoreConfig, TopKConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.finite import require_finite
from elastic_rec.pipeline.tasks.next_item.data import NextItemData
from elastic_rec.pipeline.tasks.next_item.evaluation import open_catalogue, query_windows, seen_pairs, user_namer
from elastic_rec.pipeline.tasks.next_item.sharded_topk import ShardedCatalogue
from elastic_rec.pipeline.tasks.next_item.targets import resolve_seen
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder, job_of
from elastic_rec.pipeline.tasks.scoring import ALL, Part, Scoring


class TopKScoring(Scoring):
    """A part per bucket of the store; its number is the bucket's."""

    def open(self) -> dict[str, Any]:
        """Settles the moment that is asked for, and the policy for items already seen. Collective."""
        self.asked_s = query_time_s(self.task, self.config)
        self.seen = resolve_seen(self.task, self.config.seen or self.task.config.data.seen)
        self.files = {file.bucket: index for index, file in enumerate(self.task.store.files)}
        self.numbers = list(self.files)
        self.manifest = {"unit": "users", "k": self.config.k}
        return {"mode": self.command, "k": self.config.k, "seen": self.seen.value}

    @staticmethod
    def run_config(run: TrainConfig, config: TopKConfig) -> TrainConfig:
        """With histories in windows, where the tower can carry a state."""
        run.data.window = config.window if run.model.kind.has_states else 0
        return run

    @cached_property
    def catalogue(self) -> ShardedCatalogue:
        """All items, over this model's item table."""
        return open_catalogue(self.model, self.world)

    def recommend(self, query_RD: torch.Tensor, histories: Sequences) -> pa.Table:
        """Top-k of each user, padding left out. histories: what they have seen. Collective.

        Raises NonFiniteError for a query or score that is no number.
        """
        require_finite(query_RD, "the query", row_name=user_namer(self.task, histories))
        seen = None
        if self.seen is Seen.exclude:
            seen = seen_pairs(histories, np.diff(histories.offsets), self.world.device)
        ids_Rk, score_Rk = (found.cpu() for found in self.catalogue.top_k(query_RD, self.config.k, seen))
        real = histories.rows >= 0
        ids_Rk, score_Rk = ids_Rk[torch.from_numpy(real)], score_Rk[torch.from_numpy(real)]
        filled = ids_Rk >= 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), filled.sum(1).cumsum(0)]).to(torch.int32).numpy()
        item_ids = self.task.store.vocabulary("item").decode(ids_Rk[filled].numpy())
        user, item = (ARROW_TYPES[self.task.store.manifest.vocabularies[name].type] for name in ("user", "item"))
        columns = {
            "item_ids": (item_ids, pa.list_(pa.field("element", item))),
            "scores": (pa.array(score_Rk[filled].numpy()), pa.list_(pa.field("element", pa.float32()))),
        }
        lists = [pa.ListArray.from_arrays(pa.array(offsets), values, type=kind) for values, kind in columns.values()]
        schema = pa.schema({"user_id": user, **{name: kind for name, (_, kind) in columns.items()}})
        return pa.table([self.task.store.user_ids(histories.rows[real]), *lists], schema=schema)


class FullScoring(TopKScoring):
    """Every user of the store, whatever was scored before."""

    command, config_type = "full", FullScoreConfig

    def open(self) -> dict[str, Any]:
        """The lists depend on the store, and on how much of it reaches the model."""
        data, store = self.task.config.data, self.task.store.manifest.hash
        return super().open() | {"store": store, "max_history": data.max_history, "query_time": self.asked_s}

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
        return FullPart(self, number)

    def padding_step(self) -> None:
        """Scores a user without events. Collective."""
        self.top_k(self.task.padding_histories())

    def top_k(self, histories: Sequences) -> pa.Table:
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

    def batches(self) -> Iterator[Sequences]:
        """Users with their histories."""
        scoring = self.scoring
        return scoring.task.file_histories(scoring.files[self.bucket], batch_size=scoring.config.batch_size)

    def score(self, histories: Sequences) -> None:
        """Adds the users' lists. Collective."""
        self.tables.append(self.scoring.top_k(histories))

    def commit(self, folder: ScoreFolder) -> None:
        """Writes the lists."""
        folder.commit(self.bucket, pa.concat_tables(self.tables))


def query_time_s(task: NextItemData, config: TopKConfig) -> int | None:
    """Seconds since 1970, whole; None for models that do not ask. Collective.

    Raises ConfigError for a moment before the store's newest event, one that is missing, and one that is too much.
    """
    asks = task.config.model.time is Time.query
    if asks and not config.query_time:
        raise ConfigError(
            "the run was trained with model.time=query, its scores depend on when they are asked for: set query_time "
            "to an ISO time, seconds since 1970, or now"
        )
    if not asks:
        if config.query_time:
            raise ConfigError(
                f"query_time={config.query_time}, but the run was trained with "
                f"model.time={task.config.model.time.value}: it does not know of a query's time, leave query_time out"
            )
        return None
    if config.query_time == "now":
        before = job_of(Path(config.out)).get("query_time")  # a restart asks for the same moment
        asked_s = task.world.agreed(int(time.time()) if before is None else before)
    else:
        try:
            asked_s = parse_time_s(config.query_time, key="query_time")
        except ValueError as error:
            raise ConfigError(str(error)) from error
    _, newest_s = task.store.time_range_s()
    if asked_s < newest_s:
        raise ConfigError(
            f"query_time={config.query_time} ({asked_s}) is before the store's newest event ({newest_s}): what was "
            "wanted then can't be asked of histories that go on; set a later time"
        )
    return asked_s


def query_gaps(histories: Sequences, asked_s: int | None) -> np.ndarray:
    """(B,) seconds from each user's newest event to asked_s; -1: unknown, or no event."""
    gap_s_B = np.full(len(histories.rows), -1, np.int64)
    if asked_s is not None:
        some_B = np.diff(histories.offsets) > 0
        gap_s_B[some_B] = asked_s - histories.times_s[histories.offsets[1:][some_B] - 1]
    return gap_s_B


def with_query_gap(windows: Iterator[PrefixBatch], gap_s_B: np.ndarray) -> Iterator[PrefixBatch]:
    """The windows, asked gap_s_B seconds after each user's newest event; (B,) int64, -1: at no particular time."""
    for batch in windows:
        yield replace(batch, query_gap_s=torch.from_numpy(gap_s_B))
