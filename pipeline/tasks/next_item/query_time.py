"""The moment for which the next item is asked, for models that see how long ago the newest event was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.table.times import parse_time_s
from elastic_rec.models.towers.config import Time
from elastic_rec.pipeline.config.score import TopKConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.next_item.data import NextItemData
from elastic_rec.pipeline.tasks.score_folder import job_of


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


def query_gaps(histories: Histories, asked_s: int | None) -> np.ndarray:
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
