"""Batch scoring: one Parquet part per bucket of the store, each committed by a rename, the manifest last.

    OUT/part-00003.parquet    user_id, item_ids list, scores list; best first         (the rest: score_folder.py)

Ranks walk through the parts in lockstep (part p goes to rank p modulo ranks), because the item table is sharded and
every top-k needs all ranks; a rank that has run out of users takes part with an empty batch. A part's content does
not depend on the number of ranks. A restart skips the parts that are there and whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.table.schema import ARROW_TYPES
from elastic_rec.feature_store.table.times import parse_time_s
from elastic_rec.models.towers.elastic.config import Attention, Time
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.config.verbs import ScoreConfig, ScoreMode, TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.finite import require_finite
from elastic_rec.pipeline.tasks.base import lockstep
from elastic_rec.pipeline.tasks.next_item.evaluation import open_catalogue, seen_pairs, user_namer
from elastic_rec.pipeline.tasks.next_item.sharded_topk import ShardedCatalogue
from elastic_rec.pipeline.tasks.next_item.task import ALL, NextItemTask, query_windows
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder, job_of


def scoring_config(run: TrainConfig, config: ScoreConfig) -> TrainConfig:
    """The run's config with what scoring reads of a history: how much of it, and how much at a time."""
    is_causal = run.model.attention is Attention.causal
    if config.max_history is not None:
        if run.model.attention is Attention.full and config.max_history != run.data.max_history:
            raise ConfigError(
                f"max_history={config.max_history}, but the run's model has positions for {run.data.max_history} "
                "events: leave max_history out"
            )
        run.data.max_history = config.max_history or ALL
    if config.mode is ScoreMode.incremental:
        run.data.max_history = ALL
    run.data.window = config.window if is_causal else 0
    return run


def score_store(task: NextItemTask, model: nn.Module, *, step: int, fingerprint: str, config: ScoreConfig) -> dict:
    """Score every user of task.store into config.out. Collective. Returns figures."""
    start = time.perf_counter()
    asked_s = query_time_s(task, config)
    about = {
        **job_settings(config, step=step),
        "store": task.store.manifest.hash,
        "max_history": task.config.data.max_history,
        "query_time": asked_s,
        "model": fingerprint,
    }
    numbers = [file.bucket for file in task.store.files]
    with ScoreFolder(Path(config.out), about, world=task.world).writing(numbers) as folder:
        whole = folder.whole(numbers)
        todo = [i for i, number in enumerate(numbers) if number not in whole]
        task.world.say(f"{len(todo)} parts to score, {len(whole)} done before")
        if todo:
            _score_parts(task, model, folder, todo, asked_s=asked_s, config=config)
        rows = folder.close(numbers, unit="users", k=config.k)
    seconds = time.perf_counter() - start
    return {
        "out": config.out,
        "users": sum(rows.values()),
        "parts": len(rows),
        "skipped_parts": len(whole),
        "seconds": round(seconds, 2),
        "users_per_s": round(sum(rows[numbers[i]] for i in todo) / seconds, 1),
    }


def _score_parts(
    task: NextItemTask,
    model: nn.Module,
    folder: ScoreFolder,
    todo: list[int],
    *,
    asked_s: int | None,
    config: ScoreConfig,
) -> None:
    """todo: indices of store files. Collective."""
    folder.begin()
    files, world = task.store.files, task.world
    catalogue = open_catalogue(model, world)
    for first in range(0, len(todo), world.size):
        mine = todo[first + world.rank] if first + world.rank < len(todo) else None
        users = iter(()) if mine is None else task.file_histories(mine, batch_size=config.batch_size)
        tables = []
        for item in lockstep(users, world):
            histories = task.nobody() if item is None else item
            with torch.no_grad():
                windows = asked_after(task.score_windows(histories), query_gaps(histories, asked_s))
                query_RD, _ = query_windows(model, windows, world.device)
            tables.append(recommend(task, catalogue, query_RD, histories, config))
        if mine is not None:
            folder.commit(files[mine].bucket, pa.concat_tables(tables))


def query_time_s(task: NextItemTask, config: ScoreConfig) -> int | None:
    """The moment, in whole seconds, for which the next item is asked; None for models that do not ask. Collective."""
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


def asked_after(windows: Iterator[PrefixBatch], gap_s_B: np.ndarray) -> Iterator[PrefixBatch]:
    for batch in windows:
        yield replace(batch, query_gap_s=torch.from_numpy(gap_s_B))


def recommend(
    task: NextItemTask, catalogue: ShardedCatalogue, query_RD: torch.Tensor, histories: Histories, config: ScoreConfig
) -> pa.Table:
    """Top-k of each user, padding left out. histories: what they have seen; config.seen: keep or exclude. Collective.

    Raises NonFiniteError for a query or score that is no number.
    """
    require_finite(query_RD, "the query", row_name=user_namer(task, histories))
    seen = None
    if config.seen is Seen.exclude:
        seen = seen_pairs(histories, np.diff(histories.offsets), task.world.device)
    ids_Rk, score_Rk = (found.cpu() for found in catalogue.top_k(query_RD, config.k, seen))
    real = histories.rows >= 0
    ids_Rk, score_Rk = ids_Rk[torch.from_numpy(real)], score_Rk[torch.from_numpy(real)]
    filled = ids_Rk >= 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), filled.sum(1).cumsum(0)]).to(torch.int32).numpy()
    schema = _schema(task)
    lists = (task.store.vocabulary("item").decode(ids_Rk[filled].numpy()), pa.array(score_Rk[filled].numpy()))
    lists = (
        pa.ListArray.from_arrays(pa.array(offsets), values, type=schema.field(name).type)
        for name, values in zip(("item_ids", "scores"), lists, strict=True)
    )
    return pa.table([task.store.user_ids(histories.rows[real]), *lists], schema=schema)


def _schema(task: NextItemTask) -> pa.Schema:
    user, item = (ARROW_TYPES[task.store.manifest.vocabularies[name].type] for name in ("user", "item"))
    lists = {"item_ids": pa.list_(pa.field("element", item)), "scores": pa.list_(pa.field("element", pa.float32()))}
    return pa.schema({"user_id": user, **lists})


def job_settings(config: ScoreConfig, *, step: int) -> dict:
    run = str(Path(config.run).resolve())
    return {"mode": config.mode.value, "run": run, "step": step, "k": config.k, "seen": config.seen.value}
