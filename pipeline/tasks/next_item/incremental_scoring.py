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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from elastic_rec.feature_store.states.files import DamagedStates, StateFolder
from elastic_rec.feature_store.states.increments import Increments, Span
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.store import StoreFile
from elastic_rec.models.towers.elastic.state import StateError, UserState
from elastic_rec.pipeline.config.score import IncrementalScoreConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.next_item.scoring import TopKScoring, with_query_gap
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder
from elastic_rec.pipeline.tasks.scoring import ALL, Part

COUNTS = (
    "users", "new_users", "users_with_new_events", "late_users", "late_events", "reencoded_users", "folded_events",
    "decoded_events", "read_bytes", "remade_buckets",
)  # fmt: skip


class IncrementalScoring(TopKScoring):
    """States and lists of every user, brought up to date with the store."""

    command, config_type = "incremental", IncrementalScoreConfig

    def open(self) -> dict[str, Any]:
        """The states are of one model and store, whatever its version."""
        settings, store = super().open(), self.task.store
        self.manifest |= {"generation": store.version, "query_time": self.asked_s}
        self.dtype = getattr(torch, self.config.state_dtype.value)
        self.empty_1S = self.model.tower.init_state(1, dtype=self.dtype).to_bytes()
        self.folder = StateFolder(
            store,
            fingerprint=self.fingerprint,
            dtype=self.config.state_dtype.value,
            state_bytes=self.empty_1S.shape[1],
        )
        return settings | {"store": str(store.path.resolve())}

    @staticmethod
    def run_config(run: TrainConfig, config: IncrementalScoreConfig) -> TrainConfig:
        """With all events of a history. Raises ConfigError for a tower without a state."""
        if not run.model.kind.has_states:
            raise ConfigError(
                f"incremental scoring, but the run was trained with model.tower={run.model.tower}, whose "
                "users have no state to continue: use score.py full, or train with model.tower=elastic_causal "
                "(or another tower with user states)"
            )
        run.data.max_history = ALL
        return TopKScoring.run_config(run, config)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the folder of states."""
        with self.folder.writing() if self.world.is_main else nullcontext():
            dist.barrier()
            yield

    def is_done(self, number: int, known: dict[str, Any]) -> bool:
        """Whether states and part reflect today's data file."""
        return self.part(number, known).is_done

    def part(self, number: int, known: dict[str, Any] | None) -> Bucket:
        """A bucket's states and lists."""
        return Bucket(self, self.task.store.files[self.files[number]], known)

    def padding_step(self) -> None:
        """Steps and scores a user without events. Collective."""
        padding = self.task.padding_histories()
        windows = self.task.score_windows(padding, np.zeros(1, np.int64))
        query_AD, _ = self._step(windows, np.full(1, -1), self.model.tower.init_state(1, dtype=self.dtype))
        self.recommend(query_AD, padding)

    def fold(self, span: Span, states_US: np.ndarray) -> torch.Tensor:
        """Steps the active users' states over their new events, in place; their queries (A, D). Collective."""
        active_U, first_A = span.active_U, span.first_U[span.active_U]
        histories = self.task.mask_new_ids(span.histories)
        try:
            state = UserState.from_bytes(states_US[active_U], self.model.tower)
        except StateError as error:
            raise ConfigError(f"{self.folder.path}: {error}") from error
        if not np.array_equal(state.count_B.cpu().numpy(), first_A):
            raise ConfigError(
                f"{self.folder.path}: watermarks and states disagree on what is folded in; remove the folder"
            )
        query_AD, state = self._step(self.task.score_windows(histories, first_A), self._gaps(span), state)
        states_US[active_U] = state.to_bytes()
        return query_AD

    def _step(self, windows, gap_s_A: np.ndarray, state: UserState) -> tuple[torch.Tensor, UserState]:
        with torch.no_grad():
            for batch in with_query_gap(windows, gap_s_A):
                query_AD, state = self.model.step(batch.to(self.world.device), state)
        return query_AD, state

    def _gaps(self, span: Span) -> np.ndarray:
        if self.asked_s is None:
            return np.full(int(span.active_U.sum()), -1)
        return self.asked_s - span.watermarks.time[span.active_U] // UNITS_PER_SECOND[self.task.store.time_unit]

    def figures(self, *, rows: dict[int, int], scored: list[int], counts: Counter[str], seconds: float) -> dict:
        """What was new, and what it cost."""
        store = self.task.store
        return {
            "states": str(self.folder.path),
            "version": store.version,
            **{name: counts[name] for name in COUNTS},
            "users": sum(rows.values()),
            "store_events": store.num_events,
            "store_bytes": sum(entry.bytes for entry in store.manifest.files),
            "bytes_per_state": self.folder.state_bytes,
        }


class Bucket(Part):
    """One bucket's way from old states and an old part to new ones."""

    def __init__(self, scoring: IncrementalScoring, file: StoreFile, was: dict[str, Any] | None) -> None:
        """was: what is known of its part, None where there is no whole one of this job."""
        super().__init__()
        self.scoring, self.file = scoring, file
        self.states, self.damage = None, None
        try:
            self.states = scoring.folder.open(file)
        except DamagedStates as error:
            self.damage = error
        self.about = {"data": file.sha256, "query_time": scoring.asked_s}
        self.has_states = self.states is not None and self.states.about["data"] == file.sha256
        self.is_done = self.has_states and was is not None and self.about.items() <= was.items()
        fitting = {file.sha256, self.states.about["data"] if self.states else file.sha256}
        self.keeps_rows = was is not None and was["data"] in fitting and was["query_time"] == scoring.asked_s
        self.tables: list[pa.Table] = []

    def batches(self) -> Iterator[tuple[Span, np.ndarray]]:
        """Spans with their users' states (U, S). Where states turn out to be damaged it starts over without them."""
        try:
            if self.damage is None:
                yield from self._batches()
        except DamagedStates as error:
            self.damage = error
        if self.damage is not None:
            print(f"{self.damage}: the bucket's users are encoded again", file=sys.stderr, flush=True)
            self.states, self.has_states, self.tables = None, False, []
            yield from self._batches()
            self.increments.counts["remade_buckets"] += 1

    def _batches(self) -> Iterator[tuple[Span, np.ndarray]]:
        self.increments = Increments(
            self.scoring.task.store,
            self.file,
            columns=self.scoring.task.columns,
            states=self.states,
            late_events=self.scoring.config.late_events,
            rescore=not self.keeps_rows,
            batch_size=self.scoring.config.batch_size,
        )
        self.writer = None if self.has_states else self.scoring.folder.writer(self.file)
        for span in self.increments:
            states_US, is_known = np.repeat(self.scoring.empty_1S, len(span), axis=0), span.state_row_U >= 0
            if is_known.any():
                states_US[is_known] = self.states.read(span.state_row_U[is_known])
            yield span, states_US

    def score(self, batch: tuple[Span, np.ndarray]) -> None:
        """Folds what is new into the states, and adds the lists of those who have it. Collective."""
        span, states_US = batch
        if span.active_U.any():
            query_AD = self.scoring.fold(span, states_US)
            self.tables.append(self.scoring.recommend(query_AD, self.scoring.task.mask_new_ids(span.histories)))
        else:
            self.scoring.padding_step()
        if self.writer is not None:
            self.writer.add(span.user_ids, span.watermarks, states_US)

    def commit(self, folder: ScoreFolder) -> None:
        """Writes the part, then the states."""
        scored = self.tables
        if self.keeps_rows:
            old = pq.read_table(folder.path(self.file.bucket)).replace_schema_metadata(None)
            changed = pa.chunked_array([c for t in scored for c in t["user_id"].chunks], old.schema.field(0).type)
            scored = [*scored, old.filter(pc.invert(pc.is_in(old["user_id"], value_set=changed)))]
        table = pa.concat_tables(scored).combine_chunks()
        order = pc.index_in(self.increments.user_ids, value_set=table["user_id"])
        folder.commit(self.file.bucket, table.take(order), **self.about)
        if self.writer is not None:
            self.writer.commit()
        self.counts = self.increments.counts
