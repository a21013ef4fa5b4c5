"""Batch scoring for ranking: lists of candidates in, a score per candidate and label out, in the input's order.

    candidates   Parquet: user_id, item_id (a list, or one item), and optionally timestamp (what the user was then: only
                 events before it count; none: after all his events; numbers are in timestamp_unit) and the
                 impressions' context columns
    OUT/part-00003.parquet     user_id, item_id as they came, and a probability per candidate for each label
                               (the rest: score_folder.py)

A part is a stretch of the input's rows and does not depend on the number of ranks; part p goes to rank p modulo ranks.
Inside a part rows are taken by user, so that a history is read and encoded once however many rows it has there. Ranks
walk in lockstep, since tables are sharded: one that has run out takes part with padding. A restart skips the parts
that are there and whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from elastic_rec.feature_store.batches.impression_batch import Impressions
from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.ingestion.sources import cast_ids
from elastic_rec.feature_store.reading.lookup import HistoryLookup, bucket_of
from elastic_rec.feature_store.reading.visits import count_before
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.vocabulary import Vocabulary
from elastic_rec.feature_store.utils.arrow import flat_bags, is_list
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import Bags, offsets_of, span_indices
from elastic_rec.feature_store.utils.limits import check_footer
from elastic_rec.models.ranking.model import RankingModel
from elastic_rec.pipeline.config.verbs import ScoreConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.base import lockstep
from elastic_rec.pipeline.tasks.ranking.candidate_times import read_times
from elastic_rec.pipeline.tasks.ranking.task import RankingBatch, RankingTask
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder

MOST_PARTS = 100_000  # part-00000 to part-99999


class Part(NamedTuple):
    """Rows [start, stop) of a row group of a file."""

    number: int
    file: Location
    row_group: int
    start: int
    stop: int


def score_candidates(
    task: RankingTask, model: RankingModel, *, step: int, fingerprint: str, config: ScoreConfig
) -> dict:
    """Score config.candidates into config.out. Collective. Returns figures."""
    world, began = task.world, time.perf_counter()
    files, parts = _plan(task, config)
    settings = {
        "task": "ranking",
        "run": str(Path(config.run).resolve()),
        "step": step,
        "store": task.store.manifest.hash,
        "impressions": task.table.manifest.hash,
        "max_history": task.config.data.max_history,
        "candidates": _described(files, world),
        "part_rows": config.part_rows,
        "timestamp_unit": config.timestamp_unit.value,
        "model": fingerprint,
    }
    numbers = [part.number for part in parts]
    with ScoreFolder(Path(config.out), settings, world=world).writing(numbers) as folder:
        whole = folder.whole(numbers)
        todo = [part for part in parts if part.number not in whole]
        world.say(f"{len(todo)} parts to score, {len(whole)} done before")
        counts = _score_parts(task, model, folder, todo, config)
        folder.close(numbers, labels=task.table.labels)
    seconds = time.perf_counter() - began
    num_candidates, num_unknown, num_cold = counts
    return {
        "out": config.out,
        "rows": sum(part.stop - part.start for part in parts),
        "parts": len(parts),
        "skipped_parts": len(whole),
        "candidates": num_candidates,
        "unknown_candidates": num_unknown,
        "rows_without_history": num_cold,
        "seconds": round(seconds, 2),
        "candidates_per_s": round(num_candidates / seconds, 1),
    }


def _score_parts(
    task: RankingTask, model: RankingModel, folder: ScoreFolder, todo: list[Part], config: ScoreConfig
) -> list[int]:
    """Counts of candidates, unknown ones, and rows without history, over all ranks. Collective."""
    if todo:
        folder.begin()
    world = task.world
    lookup, counts = HistoryLookup(task.store, columns=task.columns), np.zeros(3, np.int64)
    for first in range(0, len(todo), world.size):
        mine = todo[first + world.rank] if first + world.rank < len(todo) else None
        rows = None if mine is None else Requests.read(mine, task, timestamp_unit=config.timestamp_unit.value)
        users = iter(()) if rows is None else rows.by_user(config.batch_size)
        for chosen in lockstep(users, world):
            batch = task.padding_batch() if chosen is None else rows.batch(chosen, task, lookup)
            with torch.no_grad():
                score_CL = torch.sigmoid(torch.from_numpy(task.finite_logits(model, batch))).numpy()
            if chosen is not None:
                rows.keep(chosen, score_CL)
        if mine is not None:
            folder.commit(mine.number, rows.scored(task.table.labels))
            counts += rows.counts()
    total = torch.from_numpy(counts).to(world.device)
    dist.all_reduce(total)
    return total.tolist()


def _plan(task: RankingTask, config: ScoreConfig) -> tuple[list, list[Part]]:
    """(what is known of the input, its parts)."""
    if not config.candidates:
        raise ConfigError(
            f"candidates={config.candidates!r}: a run with task=ranking scores lists of candidates, give a Parquet "
            "file, a glob or a folder with columns user_id and item_id"
        )
    try:
        paths, _ = find_inputs([config.candidates], format="parquet")
    except DataError as error:
        raise ConfigError(f"candidates: {error}") from error
    files, parts = [], []
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
            task.world.say(f"candidates: {path.name} has no context column {', '.join(absent)}: scored without")
        files.append([path, path.size(), footer.metadata.num_rows])
        check_footer(f"candidates: {path}", footer.metadata, size_bytes=path.size())
        check_parts(sum(num_rows for *_, num_rows in files), config.part_rows)
        for group in range(footer.metadata.num_row_groups):
            num_rows = footer.metadata.row_group(group).num_rows
            for start in range(0, num_rows, config.part_rows):
                parts.append(Part(len(parts), path, group, start, min(start + config.part_rows, num_rows)))
    return files, parts


def _described(files: list[list], world: World) -> list[list]:
    """The input files by name, with the sha256 of each; each rank reads its share. Collective."""
    everyone = world.of_all([path.digest() for path, *_ in files[world.rank :: world.size]])
    return [[f[0].name, *f[1:], everyone[i % world.size][i // world.size]] for i, f in enumerate(files)]


@dataclass
class Requests:
    """The rows of a part, N of them, C candidates. users: the distinct ones, by bucket and id; user_N: number in it.
    time_N: None, or the moment asked for, in the store's unit. score_CL: filled in by `keep`, in the input's order."""

    table: pa.Table
    users: list
    user_N: np.ndarray
    time_N: np.ndarray | None
    candidates: Bags
    context: dict[str, Bags]
    score_CL: np.ndarray
    num_cold: int = 0

    @staticmethod
    def read(part: Part, task: RankingTask, *, timestamp_unit: str) -> Requests:
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
            about = {"unit": timestamp_unit, "store": task.store, "where": place, "first_row": part.start + 1}
            time_N = read_times(table["timestamp"], **about)
        scores = np.zeros((len(items), len(task.table.labels)), np.float32)
        return Requests(table, users, user_N, time_N, candidates, context, scores)

    def by_user(self, num_users: int) -> Iterator[np.ndarray]:
        """Rows of so many users at a time, those of a user side by side."""
        order_N = np.argsort(self.user_N, kind="stable")
        edges = np.searchsorted(self.user_N[order_N], np.arange(0, len(self.users) + num_users, num_users))
        for start, stop in pairwise(edges):
            yield order_N[start:stop]

    def batch(self, chosen: np.ndarray, task: RankingTask, lookup: HistoryLookup) -> RankingBatch:
        """chosen: rows, as by_user gives them."""
        first_user = int(self.user_N[chosen[0]])
        visit = self.user_N[chosen] - first_user
        is_first = np.append(True, visit[1:] != visit[:-1])
        found = lookup.users(self.users[first_user : first_user + int(visit[-1]) + 1])
        ends, times = found.offsets[visit + 1], np.zeros(len(visit), np.int64)
        if self.time_N is not None:
            times = self.time_N[chosen]
            ends = np.maximum(count_before(found, visit, times), found.offsets[visit])
        starts = np.maximum(found.offsets[visit], ends - task.config.data.max_history)
        self.num_cold += int((starts == ends).sum())
        first_B, last_B = np.minimum.reduceat(starts, np.flatnonzero(is_first)), found.offsets[:-1].copy()
        np.maximum.at(last_B, visit, ends)
        seen = found.stretches(np.arange(len(found.rows)), first_B, last_B)
        shift, units_per_second = seen.offsets[:-1] - first_B, UNITS_PER_SECOND[task.store.time_unit]
        candidates = self.candidates.take(chosen)
        impressions = Impressions(
            histories=seen.histories(units_per_second, num_global_users=len(found.rows)),
            visit=visit,
            starts=starts + shift[visit],
            ends=ends + shift[visit],
            times_s=times // units_per_second,
            rows=chosen,
            owners=visit,
            owner_candidates=np.zeros_like(visit),
            candidate_offsets=candidates.offsets,
            candidates=candidates.values,
            labels=np.full((len(candidates.values), len(task.table.labels)), np.nan, np.float32),
            context={name: bags.take(chosen) for name, bags in self.context.items()},
            item_context={name: bags.take(candidates.values) for name, bags in task.table.item_bags.items()},
        )
        batch = RankingBatch.of(task.known(impressions))
        if self.time_N is None:
            batch.query_gap_s.fill_(-1)
        return batch

    def keep(self, chosen: np.ndarray, score_CL: np.ndarray) -> None:
        offsets = self.candidates.offsets
        self.score_CL[span_indices(offsets[chosen], np.diff(offsets)[chosen])] = score_CL

    def scored(self, labels: list[str]) -> pa.Table:
        columns = {name: self.table[name] for name in ("user_id", "item_id")}
        for number, label in enumerate(labels):
            values = pa.array(np.ascontiguousarray(self.score_CL[:, number]))
            if is_list(self.table["item_id"].type):
                values = pa.ListArray.from_arrays(pa.array(self.candidates.offsets.astype(np.int32)), values)
            columns[label] = values
        return pa.table(columns)

    def counts(self) -> np.ndarray:
        """Candidates, those the store does not know, rows that see no event."""
        return np.array([len(self.score_CL), (self.candidates.values == 1).sum(), self.num_cold])


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
