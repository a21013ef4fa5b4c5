"""Batch scoring for ranking: lists of candidates in, a score per candidate and label out, in the input's order.

    candidates   Parquet: user_id, item_id (a list, or one item), and optionally timestamp (what the user was then: only
                 events before that second count; none: after all his events) and the impressions' context columns
    OUT/job.json               what is being scored, with what; a rerun with other settings is refused
    OUT/part-00003.parquet     user_id, item_id as they came, and a probability per candidate for each label
    OUT/manifest.json          written when all parts are there

A part is a stretch of the input's rows and does not depend on the number of ranks; part p goes to rank p modulo ranks.
Inside a part rows are taken by user, so that a history is read and encoded once however many rows it has there. Ranks
walk in lockstep, since tables are sharded: one that has run out takes part with padding. A restart skips the parts
that are there.
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
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from elastic_rec.feature_store.atomic_write import write_json
from elastic_rec.feature_store.decode import Users
from elastic_rec.feature_store.impressions.batch import Bags, Impressions
from elastic_rec.feature_store.impressions.visits import count_before
from elastic_rec.feature_store.jagged import offsets_of, span_indices
from elastic_rec.feature_store.limits import check_footer
from elastic_rec.feature_store.lookup import HistoryLookup, bucket_of
from elastic_rec.models.heads.ranking import RankingModel
from elastic_rec.pipeline.errors import ConfigError
from elastic_rec.pipeline.ranking_task import RankingBatch, RankingTask
from elastic_rec.pipeline.schema import ScoreConfig
from elastic_rec.pipeline.scoring import commit, lockstep, open_job

MOST_PARTS = 100_000  # part-00000 to part-99999


class Part(NamedTuple):
    """Rows [start, stop) of a row group of a file."""

    number: int
    file: Path
    row_group: int
    start: int
    stop: int

    def path(self, out: Path) -> Path:
        return out / f"part-{self.number:05d}.parquet"


def score_candidates(task: RankingTask, model: RankingModel, *, step: int, config: ScoreConfig) -> dict:
    """Score config.candidates into config.out. Collective. Returns figures."""
    out, world, began = Path(config.out), task.world, time.perf_counter()
    files, parts = _plan(task, config)
    settings = {
        "task": "ranking",
        "run": str(Path(config.run).resolve()),
        "step": step,
        "store": task.store.manifest["hash"],
        "max_history": task.config.data.max_history,
        "candidates": files,
        "part_rows": config.part_rows,
    }
    open_job(out, settings, world)
    todo = [part for part in parts if not part.path(out).exists()]
    world.say(f"{len(todo)} parts to score, {len(parts) - len(todo)} done before")
    lookup, counts = HistoryLookup(task.store, columns=task.columns), np.zeros(3, np.int64)
    for first in range(0, len(todo), world.size):
        mine = todo[first + world.rank] if first + world.rank < len(todo) else None
        rows = None if mine is None else Requests.read(mine, task)
        users = iter(()) if rows is None else rows.by_user(config.batch_size)
        for chosen in lockstep(users, world):
            batch = task.padding_batch() if chosen is None else rows.batch(chosen, task, lookup)
            with torch.no_grad():
                score_CL = torch.sigmoid(model.score(batch.to(world.device))).cpu().numpy()
            if chosen is not None:
                rows.keep(chosen, score_CL)
        if mine is not None:
            commit(mine.path(out), rows.scored(task.table.labels))
            counts += rows.counts()
    total = torch.from_numpy(counts).to(world.device)
    dist.all_reduce(total)
    if world.is_main:
        about = [{"path": part.path(out).name, "rows": part.stop - part.start} for part in parts]
        write_json(out / "manifest.json", {"parts": about, "labels": task.table.labels})
    seconds = time.perf_counter() - began
    num_candidates, num_unknown, num_cold = total.tolist()
    return {
        "out": str(out),
        "rows": sum(part.stop - part.start for part in parts),
        "parts": len(parts),
        "skipped_parts": len(parts) - len(todo),
        "candidates": num_candidates,
        "unknown_candidates": num_unknown,
        "rows_without_history": num_cold,
        "seconds": round(seconds, 2),
        "candidates_per_s": round(num_candidates / seconds, 1),
    }


def _plan(task: RankingTask, config: ScoreConfig) -> tuple[list, list[Part]]:
    """(what is known of the input, its parts)."""
    given = Path(config.candidates)
    paths = sorted(given.glob("*.parquet")) if given.is_dir() else sorted(given.parent.glob(given.name))
    if not config.candidates or not paths:
        raise ConfigError(
            f"candidates={config.candidates!r}: a run with task=ranking scores lists of candidates, give a Parquet "
            "file, a glob or a folder with columns user_id and item_id"
        )
    files, parts = [], []
    for path in paths:
        try:
            footer = pq.ParquetFile(path)
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
        files.append([path.name, path.stat().st_size, footer.metadata.num_rows])
        check_footer(f"candidates: {path}", footer.metadata, size_bytes=path.stat().st_size)
        check_parts(sum(num_rows for *_, num_rows in files), config.part_rows)
        for group in range(footer.metadata.num_row_groups):
            num_rows = footer.metadata.row_group(group).num_rows
            for start in range(0, num_rows, config.part_rows):
                parts.append(Part(len(parts), path, group, start, min(start + config.part_rows, num_rows)))
    return files, parts


@dataclass
class Requests:
    """The rows of a part, N of them, C candidates. users: the distinct ones, by bucket and id; user_N: number in it.
    time_s_N: None, or the moment asked for. score_CL: filled in by `keep`; the C axis is the input's."""

    table: pa.Table
    users: list
    user_N: np.ndarray
    time_s_N: np.ndarray | None
    candidates: Bags
    context: dict[str, Bags]
    score_CL: np.ndarray
    num_cold: int = 0

    @staticmethod
    def read(part: Part, task: RankingTask) -> Requests:
        file = pq.ParquetFile(part.file)
        names = [name for name in ("timestamp", *task.table.context) if name in file.schema_arrow.names]
        table = file.read_row_group(part.row_group, columns=["user_id", "item_id", *names])
        table = table.slice(part.start, part.stop - part.start)
        where = f"candidates: {part.file}, rows {part.start} to {part.stop} of row group {part.row_group}"
        lengths, items = _lists(table["item_id"], where)
        encoded = table["user_id"].combine_chunks().dictionary_encode()
        users = encoded.dictionary.to_pylist()
        if encoded.null_count or (users and isinstance(users[0], str) != _has_string_users(task)):
            raise ConfigError(f"{where}: user_id has nulls, or is not of the store's type")
        num_buckets = task.store.manifest["num_buckets"]
        order = sorted(range(len(users)), key=lambda u: (bucket_of(users[u], num_buckets), users[u]))
        place = np.empty(len(users), np.int64)
        place[order] = np.arange(len(users))
        users, user_N = [users[u] for u in order], place[encoded.indices.to_numpy()]
        candidates = Bags(offsets_of(lengths), task.vocabulary("item").encode(items))
        context = {name: _context(table, name, task, where) for name in task.table.context}
        time_s = _seconds(table["timestamp"], where) if "timestamp" in names else None
        scores = np.zeros((len(items), len(task.table.labels)), np.float32)
        return Requests(table, users, user_N, time_s, candidates, context, scores)

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
        found = lookup.histories(self.users[first_user : first_user + int(visit[-1]) + 1])
        everything = Users(found.rows, found.offsets, found.times_s, found.columns)
        ends = found.offsets[visit + 1]
        times_s = ends * 0 if self.time_s_N is None else self.time_s_N[chosen]
        if self.time_s_N is not None:
            ends = np.maximum(count_before(everything, visit, times_s), found.offsets[visit])
        starts = np.maximum(found.offsets[visit], ends - task.config.data.max_history)
        self.num_cold += int((starts == ends).sum())
        first_B, last_B = np.minimum.reduceat(starts, np.flatnonzero(is_first)), found.offsets[:-1].copy()
        np.maximum.at(last_B, visit, ends)
        seen = everything.stretches(np.arange(len(found.rows)), first_B, last_B)
        shift = seen.offsets[:-1] - first_B
        candidates = self.candidates.take(chosen)
        impressions = Impressions(
            histories=seen.histories(1, num_global_users=len(found.rows)),
            visit=visit,
            starts=starts + shift[visit],
            ends=ends + shift[visit],
            times_s=times_s,
            rows=chosen,
            candidate_offsets=candidates.offsets,
            candidates=candidates.values,
            labels=np.full((len(candidates.values), len(task.table.labels)), np.nan, np.float32),
            context={name: bags.take(chosen) for name, bags in self.context.items()},
            item_context={name: bags.take(candidates.values) for name, bags in task.table.item_bags.items()},
        )
        batch = RankingBatch.of(task.known(impressions))
        if self.time_s_N is None:
            batch.query_gap_s.fill_(-1)
        return batch

    def keep(self, chosen: np.ndarray, score_CL: np.ndarray) -> None:
        offsets = self.candidates.offsets
        self.score_CL[span_indices(offsets[chosen], np.diff(offsets)[chosen])] = score_CL

    def scored(self, labels: list[str]) -> pa.Table:
        columns = {name: self.table[name] for name in ("user_id", "item_id")}
        for number, label in enumerate(labels):
            values = pa.array(np.ascontiguousarray(self.score_CL[:, number]))
            if _is_list(self.table["item_id"].type):
                values = pa.ListArray.from_arrays(pa.array(self.candidates.offsets.astype(np.int32)), values)
            columns[label] = values
        return pa.table(columns)

    def counts(self) -> np.ndarray:
        """Candidates, those the store does not know, rows that see no event."""
        return np.array([len(self.score_CL), (self.candidates.values == 1).sum(), self.num_cold])


def _lists(column: pa.ChunkedArray, where: str) -> tuple[np.ndarray, pa.Array]:
    """(lengths, values) of a column of lists or of single values."""
    column = column.combine_chunks()
    if column.null_count:
        raise ConfigError(f"{where}: {column.null_count} rows without item_id; leave them out")
    if not _is_list(column.type):
        return np.ones(len(column), np.int64), column
    return pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64), column.flatten()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _context(table: pa.Table, name: str, task: RankingTask, where: str) -> Bags:
    """A missing column is an empty bag for each row, a null the unknown category."""
    if name not in table.column_names:
        return Bags(np.zeros(len(table) + 1, np.int64), np.zeros(0, np.int64))
    column = table[name].combine_chunks()
    vocabulary = task.vocabulary(name)
    if not _is_list(column.type):
        return Bags(np.arange(len(table) + 1), vocabulary.encode(column))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return Bags(offsets_of(lengths), vocabulary.encode(column.flatten()))


def _seconds(column: pa.ChunkedArray, where: str) -> np.ndarray:
    column = column.combine_chunks()
    if column.null_count:
        raise ConfigError(f"{where}: {column.null_count} rows without timestamp; fill them in, or leave out the column")
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("s", column.type.tz), safe=False).cast(pa.int64())
    if not pa.types.is_integer(column.type):
        raise ConfigError(f"{where}: timestamp is {column.type}: give timestamps, or whole seconds since 1970")
    return column.to_numpy(zero_copy_only=False).astype(np.int64)


def check_parts(num_rows: int, part_rows: int) -> None:
    if num_rows > MOST_PARTS * part_rows:
        raise ConfigError(
            f"candidates: {num_rows:,} rows are over {MOST_PARTS:,} parts of part_rows={part_rows}: set part_rows to "
            f"at least {-(-num_rows // MOST_PARTS)}, or score fewer files at a time"
        )


def _has_string_users(task: RankingTask) -> bool:
    return task.store.manifest["vocabularies"]["user"]["type"] != "int64"
