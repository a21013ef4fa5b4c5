"""Batch scoring for ranking: lists of candidates in, a score per candidate and label out, in the input's order.

    candidates   Parquet: user_id, item_id (a list, or one item), and optionally timestamp (what the user was then: only
                 events before it count; none: after all their events; numbers are in timestamp_unit) and the
                 impressions' context columns
    OUT/part-00003.parquet     user_id, item_id as they came, and a probability per candidate for each label
                               (the rest: score_folder.py)

A part has consecutive rows of the input. Inside a part rows are taken by user, so that a history is read and encoded
once however many rows it has there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from elastic_rec.feature_store.batches.impression_batch import Impressions
from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.ingestion.sources import cast_ids
from elastic_rec.feature_store.reading.impression_groups import count_before
from elastic_rec.feature_store.reading.lookup import HistoryLookup, bucket_of
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.vocabulary import UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.arrow import flat_bags, is_list
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import Bags, offsets_of, span_indices
from elastic_rec.feature_store.utils.limits import check_footer
from elastic_rec.pipeline.config.score import RankingScoreConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.ranking.candidate_times import read_times
from elastic_rec.pipeline.tasks.ranking.data import RankingBatch, RankingData
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder
from elastic_rec.pipeline.tasks.scoring import ALL, Part, Scoring

MOST_PARTS = 100_000  # part-00000 to part-99999


class RowRange(NamedTuple):
    """Rows [start, stop) of a row group of a file: what is in one part of the output."""

    number: int
    file: Location
    row_group: int
    start: int
    stop: int


class RankingScoring(Scoring):
    """A score for each candidate of config.candidates."""

    command, config_type = "ranking", RankingScoreConfig

    def open(self) -> dict[str, Any]:
        """Finds the rows of each part. Raises ConfigError for candidates that cannot be read."""
        task, config = self.task, self.config
        files, ranges = _plan(task, config)
        self.ranges = {rows.number: rows for rows in ranges}
        self.lookup = HistoryLookup(task.store, columns=task.columns)
        self.numbers, self.manifest = list(self.ranges), {"labels": task.table.labels}
        return {
            "task": "ranking",
            "store": task.store.manifest.hash,
            "impressions": task.table.manifest.hash,
            "max_history": task.config.data.max_history,
            "candidates": _described(files, task.world),
            "part_rows": config.part_rows,
            "timestamp_unit": config.timestamp_unit.value,
        }

    @staticmethod
    def run_config(run: TrainConfig, config: RankingScoreConfig) -> TrainConfig:
        """With as much of a history as is asked for."""
        if config.max_history is not None:
            run.data.max_history = config.max_history or ALL
        return run

    def part(self, number: int, known: dict | None) -> Requests:
        """Some rows of the candidates."""
        return Requests.read(self, self.ranges[number])

    def padding_step(self) -> None:
        """Scores no candidates. Collective."""
        self.probabilities(self.task.padding_batch())

    def probabilities(self, batch: RankingBatch) -> np.ndarray:
        """(C, L) float32 of the batch's candidates. Raises NonFiniteError. Collective."""
        with torch.no_grad():
            return torch.sigmoid(torch.from_numpy(self.task.finite_logits(self.model, batch))).numpy()

    def figures(self, *, rows: dict[int, int], scored: list[int], counts: Counter[str], seconds: float) -> dict:
        """Candidates, and how many a second; those the store does not know, and rows that see no event."""
        return {
            "rows": sum(rows.values()),
            **{name: counts[name] for name in ("candidates", "unknown_candidates", "rows_without_history")},
            "candidates_per_s": round(counts["candidates"] / seconds, 1),
        }


def _plan(task: RankingData, config: RankingScoreConfig) -> tuple[list, list[RowRange]]:
    """(path, bytes and rows of each input file; the ranges of all). Raises ConfigError."""
    if not config.candidates:
        raise ConfigError(
            f"candidates={config.candidates!r}: a run with task=ranking scores lists of candidates, give a Parquet "
            "file, a glob or a folder with columns user_id and item_id"
        )
    try:
        paths, _ = find_inputs([config.candidates], format="parquet")
    except DataError as error:
        raise ConfigError(f"candidates: {error}") from error
    files, ranges = [], []
    for path in paths:
        try:
            footer = pq.ParquetFile(path.open())
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"candidates: {path} is no Parquet file: {error}") from error
        missing = {"user_id", "item_id"} - set(footer.schema_arrow.names)
        if missing:
            raise ConfigError(
                f"candidates: {path} has no column {sorted(missing)[0]!r}; it has {footer.schema_arrow.names}"
            )
        absent = sorted(set(task.table.context) - set(footer.schema_arrow.names))
        if absent:
            task.world.log(f"candidates: {path.name} has no context column {', '.join(absent)}: scored without")
        files.append([path, path.size(), footer.metadata.num_rows])
        check_footer(f"candidates: {path}", footer.metadata, size_bytes=path.size())
        check_parts(sum(num_rows for *_, num_rows in files), config.part_rows)
        for group in range(footer.metadata.num_row_groups):
            num_rows = footer.metadata.row_group(group).num_rows
            for start in range(0, num_rows, config.part_rows):
                stop = min(start + config.part_rows, num_rows)
                ranges.append(RowRange(len(ranges), path, group, start, stop))
    return files, ranges


def _described(files: list[list], world: World) -> list[list]:
    """The input files by name, with the sha256 of each; each rank reads its share. Collective."""
    everyone = world.of_all([path.digest() for path, *_ in files[world.rank :: world.size]])
    return [[f[0].name, *f[1:], everyone[i % world.size][i // world.size]] for i, f in enumerate(files)]


@dataclass
class Requests(Part):
    """The rows of a part, N of them, C candidates. users: the distinct ones, by bucket and id; user_N: index into them.
    time_N: None, or the moment asked for, in the store's unit. score_CL: filled in by `score`, in the input's order."""

    scoring: RankingScoring
    number: int
    table: pa.Table
    users: list
    user_N: np.ndarray
    time_N: np.ndarray | None
    candidates: Bags
    context: dict[str, Bags]
    score_CL: np.ndarray
    num_cold: int = 0

    @staticmethod
    def read(scoring: RankingScoring, part: RowRange) -> Requests:
        """Raises ConfigError or DataError, naming file and rows, for what is no request."""
        task = scoring.task
        file = pq.ParquetFile(part.file.open())
        names = [name for name in ("timestamp", *task.table.context) if name in file.schema_arrow.names]
        table = file.read_row_group(part.row_group, columns=["user_id", "item_id", *names])
        table = table.slice(part.start, part.stop - part.start)
        where = f"candidates: {part.file}, rows {part.start} to {part.stop} of row group {part.row_group}"
        if missing := table["item_id"].null_count:
            raise ConfigError(f"{where}: {missing} rows without item_id; leave them out")
        lengths, items = flat_bags(table["item_id"])
        types = {name: about.type for name, about in task.store.manifest.vocabularies.items()}
        items = cast_ids(items, types["item"], where=f"{where}: item_id")
        users = cast_ids(table["user_id"].combine_chunks(), types["user"], where=f"{where}: user_id")
        encoded = users.dictionary_encode()
        users = encoded.dictionary.to_pylist()
        if encoded.null_count:
            raise ConfigError(f"{where}: user_id has nulls; leave such rows out")
        num_buckets = task.store.manifest.num_buckets
        order = sorted(range(len(users)), key=lambda u: (bucket_of(users[u], num_buckets), users[u]))
        place = np.empty(len(users), np.int64)
        place[order] = np.arange(len(users))
        users, user_N = [users[u] for u in order], place[encoded.indices.to_numpy()]
        candidates = Bags(offsets_of(lengths), task.vocabulary("item").encode(items))
        context = {name: _context(table, task.vocabulary(name), where) for name in task.table.context}
        time_N = None
        if "timestamp" in names:
            place = f"candidates: {part.file}, row group {part.row_group}"
            about = {
                "unit": scoring.config.timestamp_unit.value,
                "store": task.store,
                "where": place,
                "first_row": part.start + 1,
            }
            time_N = read_times(table["timestamp"], **about)
        scores = np.zeros((len(items), len(task.table.labels)), np.float32)
        return Requests(scoring, part.number, table, users, user_N, time_N, candidates, context, scores)

    def batches(self) -> Iterator[np.ndarray]:
        """Indices of rows, of batch_size users at a time, those of a user side by side."""
        num_users = self.scoring.config.batch_size
        order_N = np.argsort(self.user_N, kind="stable")
        edges = np.searchsorted(self.user_N[order_N], np.arange(0, len(self.users) + num_users, num_users))
        for start, stop in pairwise(edges):
            yield order_N[start:stop]

    def batch(self, chosen: np.ndarray) -> RankingBatch:
        """chosen: rows, as `batches` gives them."""
        task, lookup = self.scoring.task, self.scoring.lookup
        first_user = int(self.user_N[chosen[0]])
        group = self.user_N[chosen] - first_user
        is_first = np.append(True, group[1:] != group[:-1])
        found = lookup.histories(self.users[first_user : first_user + int(group[-1]) + 1])
        ends, times = found.offsets[group + 1], np.zeros(len(group), np.int64)
        if self.time_N is not None:
            times = self.time_N[chosen]
            ends = count_before(found, group, times)
        starts = np.maximum(found.offsets[group], ends - task.config.data.max_history)
        self.num_cold += int((starts == ends).sum())
        first_B, last_B = np.minimum.reduceat(starts, np.flatnonzero(is_first)), found.offsets[:-1].copy()
        np.maximum.at(last_B, group, ends)
        seen = found.spans(first_B, last_B)
        shift = seen.offsets[:-1] - first_B
        candidates = self.candidates.take(chosen)
        impressions = Impressions(
            histories=seen,
            group=group,
            starts=starts + shift[group],
            ends=ends + shift[group],
            times=times,
            rows=chosen,
            owners=group,
            owner_candidates=np.zeros_like(group),
            candidates=candidates,
            labels=np.full((len(candidates.values), len(task.table.labels)), np.nan, np.float32),
            context={name: bags.take(chosen) for name, bags in self.context.items()},
            item_context={name: bags.take(candidates.values) for name, bags in task.table.item_bags.items()},
        )
        batch = RankingBatch.of(task.mask_impressions(impressions))
        if self.time_N is None:
            batch.query_gap_s.fill_(-1)
        return batch

    def score(self, chosen: np.ndarray) -> None:
        """Scores the candidates of these rows. Collective."""
        offsets = self.candidates.offsets
        places_C = span_indices(offsets[chosen], np.diff(offsets)[chosen])
        self.score_CL[places_C] = self.scoring.probabilities(self.batch(chosen))

    def commit(self, folder: ScoreFolder) -> None:
        """Writes ids and scores, in the input's order."""
        columns = {name: self.table[name] for name in ("user_id", "item_id")}
        for number, label in enumerate(self.scoring.task.table.labels):
            values = pa.array(np.ascontiguousarray(self.score_CL[:, number]))
            if is_list(self.table["item_id"].type):
                values = pa.ListArray.from_arrays(pa.array(self.candidates.offsets.astype(np.int32)), values)
            columns[label] = values
        folder.commit(self.number, pa.table(columns))

    @property
    def counts(self) -> Counter[str]:
        """Complete after the last batch."""
        num_unknown = int((self.candidates.values == UNKNOWN).sum())
        num = {"candidates": len(self.score_CL), "unknown_candidates": num_unknown}
        return Counter(num, rows_without_history=self.num_cold)


def _context(table: pa.Table, vocabulary: Vocabulary, where: str) -> Bags:
    """A missing column is an empty bag for each row, a null the unknown category."""
    name = vocabulary.column
    if name not in table.column_names:
        return Bags(np.zeros(len(table) + 1, np.int64), np.zeros(0, np.int64))
    lengths, values = flat_bags(table[name])
    return Bags(offsets_of(lengths), vocabulary.encode(cast_ids(values, vocabulary.type, where=f"{where}: {name}")))


def check_parts(num_rows: int, part_rows: int) -> None:
    """Raises ConfigError for more parts than their names can number."""
    if num_rows > MOST_PARTS * part_rows:
        raise ConfigError(
            f"candidates: {num_rows:,} rows are over {MOST_PARTS:,} parts of part_rows={part_rows}: set part_rows to "
            f"at least {-(-num_rows // MOST_PARTS)}, or score fewer files at a time"
        )
