"""Incremental scoring: the states of a store's users, continued with what has happened since, and their new top-k.

    bucket 3    STORE/bucket=0003/part-e40f….parquet     its histories today
                STORE/states/MODEL/bucket=0003.parquet   its users' states, some days old
                OUT/part-00003.parquet                   their top-k, as old

A bucket's part lasts before its states do (score_folder.py). A kill in between leaves the states as they were,
so that a rerun folds the same events into the same states and writes the same part again. A bucket whose states and
part reflect today's data file is left alone. Users without new events keep their row of the part, unless the part
is missing, or the moment that is asked for has moved (model.time=query). Damaged states are made from the histories
again.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn

from elastic_rec.feature_store.states.files import DamagedStates, StateFolder
from elastic_rec.feature_store.states.increments import Increments, Span
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.store import StoreFile
from elastic_rec.models.towers.elastic.config import Attention
from elastic_rec.models.towers.elastic.state import StateError, UserState
from elastic_rec.pipeline.config.verbs import ScoreConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.base import lockstep
from elastic_rec.pipeline.tasks.next_item.evaluation import open_catalogue
from elastic_rec.pipeline.tasks.next_item.scoring import asked_after, job_settings, query_time_s, recommend
from elastic_rec.pipeline.tasks.next_item.sharded_topk import ShardedCatalogue
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder

COUNTS = (
    "users", "new_users", "users_with_new_events", "late_users", "late_events", "reencoded_users", "folded_events",
    "decoded_events", "read_bytes", "remade_buckets",
)  # fmt: skip


class Job:
    """What all buckets share."""

    def __init__(
        self, task: NextItemTask, model: nn.Module, *, step: int, fingerprint: str, config: ScoreConfig
    ) -> None:
        attention = task.config.model.attention
        if attention is not Attention.causal:
            raise ConfigError(
                f"mode=incremental, but the run was trained with model.attention={attention.value}, whose users have "
                "no state to continue: set mode=full, or train with model.attention=causal"
            )
        self.task, self.model, self.config = task, model, config
        settings = {
            **job_settings(config, step=step),
            "store": str(task.store.path.resolve()),
            "model": fingerprint,
        }
        self.scores = ScoreFolder(Path(config.out), settings, world=task.world)
        self.asked_s = query_time_s(task, config)
        self.dtype = getattr(torch, config.state_dtype.value)
        self.empty_1S = model.tower.init_state(1, dtype=self.dtype).to_bytes()
        self.folder = StateFolder(
            task.store,
            fingerprint=settings["model"],
            dtype=config.state_dtype.value,
            state_bytes=self.empty_1S.shape[1],
        )

    def fold(self, span: Span, states_US: np.ndarray) -> torch.Tensor:
        """Steps the active users' states over their new events, in place; their queries (A, D). Collective."""
        active_U, first_A = span.active_U, span.first_U[span.active_U]
        histories, tower = self.task.known(span.histories), self.model.tower
        try:
            state = UserState.from_bytes(states_US[active_U], tower)
        except StateError as error:
            raise ConfigError(f"{self.folder.path}: {error}") from error
        if not np.array_equal(state.count_B.cpu().numpy(), first_A):
            raise ConfigError(f"{self.folder.path}: clocks and states disagree on what is folded in; remove the folder")
        query_AD, state = self._step(self.task.score_windows(histories, first_A), self._gaps(span), state)
        states_US[active_U] = state.to_bytes()
        return query_AD

    def take_part(self) -> torch.Tensor:
        """What a rank with nobody to score does while the others fold. Collective."""
        windows = self.task.score_windows(self.task.nobody(), np.zeros(1, np.int64))
        return self._step(windows, np.full(1, -1), self.model.tower.init_state(1, dtype=self.dtype))[0]

    def _step(self, windows, gap_s_A: np.ndarray, state: UserState) -> tuple[torch.Tensor, UserState]:
        with torch.no_grad():
            for batch in asked_after(windows, gap_s_A):
                query_AD, state = self.model.step(batch.to(self.task.world.device), state)
        return query_AD, state

    def _gaps(self, span: Span) -> np.ndarray:
        if self.asked_s is None:
            return np.full(int(span.active_U.sum()), -1)
        return self.asked_s - span.clocks.time[span.active_U] // UNITS_PER_SECOND[self.task.store.time_unit]


class Bucket:
    """One bucket's way from old states and an old part to new ones."""

    def __init__(self, job: Job, file: StoreFile, was: dict | None) -> None:
        """was: what is known of its part, None where there is no whole one of this job."""
        self.job, self.file = job, file
        self.states, self.damage = None, None
        try:
            self.states = job.folder.open(file)
        except DamagedStates as error:
            self.damage = error
        self.about = {"data": file.sha256, "query_time": job.asked_s}
        self.has_states = self.states is not None and self.states.about["data"] == file.sha256
        self.is_done = self.has_states and was is not None and self.about.items() <= was.items()
        fitting = {file.sha256, self.states.about["data"] if self.states else file.sha256}
        self.keeps_rows = was is not None and was["data"] in fitting and was["query_time"] == job.asked_s
        self.tables: list[pa.Table] = []

    def spans(self) -> Iterator[tuple[Span, np.ndarray]]:
        """Spans with their users' states (U, S). Where states turn out to be damaged it starts over without them."""
        try:
            if self.damage is None:
                yield from self._spans()
        except DamagedStates as error:
            self.damage = error
        if self.damage is not None:
            print(f"{self.damage}: the bucket's users are encoded again", file=sys.stderr, flush=True)
            self.states, self.has_states, self.tables = None, False, []
            yield from self._spans()
            self.increments.counts["remade_buckets"] += 1

    def _spans(self) -> Iterator[tuple[Span, np.ndarray]]:
        self.increments = Increments(
            self.job.task.store,
            self.file,
            columns=self.job.task.columns,
            states=self.states,
            late_events=self.job.config.late_events,
            rescore=not self.keeps_rows,
            batch_size=self.job.config.batch_size,
        )
        self.writer = None if self.has_states else self.job.folder.writer(self.file)
        for span in self.increments:
            states_US, is_known = np.repeat(self.job.empty_1S, len(span), axis=0), span.state_row_U >= 0
            if is_known.any():
                states_US[is_known] = self.states.read(span.state_row_U[is_known])
            yield span, states_US

    def score(self, span: Span, states_US: np.ndarray, catalogue: ShardedCatalogue) -> None:
        """Collective."""
        if span.active_U.any():
            query_AD = self.job.fold(span, states_US)
            histories = self.job.task.known(span.histories)
            self.tables.append(recommend(self.job.task, catalogue, query_AD, histories, self.job.config))
        else:
            sit_out(self.job, catalogue)
        if self.writer is not None:
            self.writer.add(span.user_ids, span.clocks, states_US)

    def commit(self) -> None:
        """The part, then the states."""
        scored = self.tables
        if self.keeps_rows:
            old = pq.read_table(self.job.scores.path(self.file.bucket)).replace_schema_metadata(None)
            changed = pa.chunked_array([c for t in scored for c in t["user_id"].chunks], old.schema.field(0).type)
            scored = [*scored, old.filter(pc.invert(pc.is_in(old["user_id"], value_set=changed)))]
        table = pa.concat_tables(scored).combine_chunks()
        order = pc.index_in(self.increments.user_ids, value_set=table["user_id"])
        self.job.scores.commit(self.file.bucket, table.take(order), **self.about)
        if self.writer is not None:
            self.writer.commit()


def score_increment(task: NextItemTask, model: nn.Module, *, step: int, fingerprint: str, config: ScoreConfig) -> dict:
    """Bring states and top-k of every user up to task.store. Collective. Returns figures."""
    start, world = time.perf_counter(), task.world
    shared = Job(task, model, step=step, fingerprint=fingerprint, config=config)
    numbers = [file.bucket for file in task.store.files]
    with shared.scores.writing(numbers) as scores, shared.folder.writing() if world.is_main else nullcontext():
        dist.barrier()
        counts = _update_buckets(shared, open_catalogue(model, world))
        about = {"k": config.k, "generation": task.store.version, "query_time": shared.asked_s}
        rows = scores.close(numbers, unit="users", **about)
    return {
        "out": config.out,
        "states": str(shared.folder.path),
        "version": task.store.version,
        **counts,
        "users": sum(rows.values()),
        "store_events": task.store.num_events,
        "store_bytes": sum(entry.bytes for entry in task.store.manifest.files),
        "bytes_per_state": shared.folder.state_bytes,
        "parts": len(rows),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _update_buckets(shared: Job, catalogue: ShardedCatalogue) -> dict[str, int]:
    """Counts over all ranks. Collective."""
    files, world, counts = shared.task.store.files, shared.task.world, Counter()
    whole = shared.scores.whole([file.bucket for file in files])
    todo = [file for file in files if not Bucket(shared, file, whole.get(file.bucket)).is_done]
    world.say(f"{len(todo)} buckets to bring up to date, {len(files) - len(todo)} are")
    if todo:
        shared.scores.begin()
    for first in range(0, len(todo), world.size):
        mine = todo[first + world.rank] if first + world.rank < len(todo) else None
        bucket = None if mine is None else Bucket(shared, mine, whole.get(mine.bucket))
        for item in lockstep(iter(()) if bucket is None else bucket.spans(), world):
            if item is None:
                sit_out(shared, catalogue)
            else:
                bucket.score(*item, catalogue)
        if bucket is not None:
            bucket.commit()
            counts += bucket.increments.counts
    of_ranks = world.of_all(counts)
    return {name: sum(each[name] for each in of_ranks) for name in COUNTS} | {"skipped_parts": len(files) - len(todo)}


def sit_out(shared: Job, catalogue: ShardedCatalogue) -> None:
    recommend(shared.task, catalogue, shared.take_part(), shared.task.nobody(), shared.config)
