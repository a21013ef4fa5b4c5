"""The writer: sorted events in, one row per user out. Independent of the engine that sorted them.

    bucket   0 0 0 0 0 1 1 ...          bucket=0000/part-000.parquet
    user_id  a a a b b c c ...    ->      a | [e0 e1 e2]
    events   . . . . . . . ...            b | [e3 e4]
                                        bucket=0001/part-000.parquet ...

A row group takes users while their events fit in row_group_events, and at least one user; a user is never split.
Where groups end depends on the data only, not on how the stream was cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.checks import ChecksConfig, OrderWatch
from elastic_rec.feature_store.ingestion.engines.base import IngestEngine
from elastic_rec.feature_store.table import manifest
from elastic_rec.feature_store.table.schema import EVENTS, TIMESTAMP, USER, leaf_path
from elastic_rec.feature_store.utils.jagged import run_starts
from elastic_rec.feature_store.utils.prefetch import prefetch
from elastic_rec.feature_store.utils.progress import progress

BUCKET = "bucket"
Watch = Callable[[pa.Table, np.ndarray], None]


@dataclass
class WrittenFile:
    """One finished data file; times in the store's unit; row_groups: (num_users, num_events) each."""

    path: Path
    min_time: int
    max_time: int
    row_groups: list[tuple[int, int]] = field(default_factory=list)


def write_histories(
    batches: Iterable[pa.RecordBatch],
    *,
    root: Path,
    schema: pa.Schema,
    row_group_events: int,
    watch: Watch | None = None,
    num_events: int = 0,
) -> list[WrittenFile]:
    """Writes bucket=K/part-000.parquet under root; `batches` are sorted by bucket, user and time.

    watch sees the sorted events of each row group and their users' offsets; num_events is for the progress bar."""
    writer = _Files(root, schema)
    groups = cut_histories(batches, schema=schema, row_group_events=row_group_events, watch=watch)
    bar = progress("write", total=num_events, unit=" events")
    try:
        # Encoding and compression let go of Python's lock: meanwhile the next row group is fetched and cut.
        for written in prefetch(writer.write, groups, workers=1):
            bar.update(written)
    finally:
        bar.close()
        writer.close()
    return writer.written


class _Files:
    """Data files of the buckets, one after the other."""

    def __init__(self, root: Path, schema: pa.Schema) -> None:
        self.written: list[WrittenFile] = []
        self._root, self._schema = root, schema
        self._bucket, self._writer = -1, None

    def write(self, group: tuple[int, pa.Table, tuple[int, int]]) -> int:
        """One row group, as cut_histories yields it; returns its events."""
        bucket, histories, (low, high) = group
        if bucket != self._bucket:
            self.close()
            path = self._root / f"bucket={bucket:04d}" / "part-000.parquet"
            path.parent.mkdir()
            self._bucket, self._writer = bucket, _open_writer(path, self._schema)
            self.written.append(WrittenFile(path, low, high))
        self._writer.write_table(histories, row_group_size=len(histories))
        file, num_events = self.written[-1], len(histories[EVENTS].chunk(0).values)
        file.min_time, file.max_time = min(file.min_time, low), max(file.max_time, high)
        file.row_groups.append((len(histories), num_events))
        return num_events

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def cut_histories(
    batches: Iterable[pa.RecordBatch], *, schema: pa.Schema, row_group_events: int, watch: Watch | None = None
) -> Iterator[tuple[int, pa.Table, tuple[int, int]]]:
    """Yields one row group at a time: (bucket, table in `schema`, (min, max) timestamp)."""
    pending: list[pa.RecordBatch] = []
    num_pending, wait_for = 0, 2 * row_group_events
    for batch in batches:
        if batch.num_rows == 0:
            continue
        pending.append(batch)
        num_pending += batch.num_rows
        if num_pending >= wait_for:
            events = pa.Table.from_batches(pending).combine_chunks()
            done = yield from _cut(events, schema, row_group_events, watch, is_last=False)
            pending = events.slice(done).to_batches()
            num_pending -= done
            # Doubling: a user longer than many batches is looked at a logarithmic number of times, not once per batch.
            wait_for = max(2 * row_group_events, 2 * num_pending)
    if num_pending:
        yield from _cut(pa.Table.from_batches(pending).combine_chunks(), schema, row_group_events, watch, is_last=True)


def _cut(events: pa.Table, schema: pa.Schema, row_group_events: int, watch: Watch | None, *, is_last: bool):
    """Cuts every row group that is sure to be complete; returns the number of events used up."""
    starts_U = run_starts(events[USER].chunk(0))
    ends_U = np.append(starts_U[1:], len(events))
    bucket_U = events[BUCKET].chunk(0).take(pa.array(starts_U)).to_numpy()
    # The last user may go on in the next batch, so only those before it are complete.
    num_complete = len(starts_U) if is_last else len(starts_U) - 1
    user, done = 0, 0
    while user < num_complete:
        fits = int(np.searchsorted(ends_U, done + row_group_events, side="right"))
        same_bucket = int(np.searchsorted(bucket_U, bucket_U[user], side="right"))
        stop = max(user + 1, min(fits, same_bucket))
        if stop > num_complete:
            break  # the unfinished last user fits so far: it may belong in this row group
        end = int(ends_U[stop - 1])
        part = events.slice(done, end - done)
        times = pc.min_max(part[TIMESTAMP])
        offsets = np.append(starts_U[user:stop], end) - done
        if watch is not None:
            watch(part, offsets)
        yield int(bucket_U[user]), build_histories(part, offsets, schema), (times["min"].as_py(), times["max"].as_py())
        user, done = stop, end
    return done


def build_histories(events: pa.Table, offsets: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Flat events (N rows) and user offsets (U+1,) -> table of U rows; one chunk per column."""
    type = schema.field(EVENTS).type
    leaves = list(type.value_type)
    flat = [events[leaf.name].combine_chunks().cast(leaf.type) for leaf in leaves]
    lists = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(flat, fields=leaves), type=type
    )
    users = events[USER].combine_chunks().take(pa.array(offsets[:-1])).cast(schema.field(USER).type)
    return pa.table([users, pa.array(np.diff(offsets), pa.int32()), lists], schema=schema)


def _open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    indices = [leaf.name for leaf in schema.field(EVENTS).type.value_type if leaf.name not in (TIMESTAMP, "event_id")]
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        # Timestamps of one user rise, so their deltas are small; item ids repeat, so a dictionary packs them.
        use_dictionary=[leaf_path(name) for name in indices],
        column_encoding={leaf_path(TIMESTAMP): "DELTA_BINARY_PACKED"},
        write_page_checksum=True,  # the reader checks it: a flipped bit is an error, not a wrong item
    )


def write_sorted(
    batches: Iterable[pa.RecordBatch],
    *,
    root: Path,
    schema: pa.Schema,
    row_group_events: int,
    checks: ChecksConfig,
    unit: str,
    num_events: int = 0,
) -> tuple[list[dict], dict[str, int]]:
    """Sorted events -> data files under root. Returns what the manifest says of each, and counts of the checks that
    look at whole histories. num_events is for the progress bar."""
    watch = OrderWatch(checks, unit)
    written = write_histories(
        batches, root=root, schema=schema, row_group_events=row_group_events, watch=watch, num_events=num_events
    )
    return [_describe_written(root, file) for file in written], watch.counts


def write_vocabularies(engine: IngestEngine, columns: list[str], root: Path) -> dict[str, dict]:
    (root / "vocab").mkdir()
    entries = {}
    for column in columns:
        path = root / "vocab" / f"{column}.parquet"
        vocabulary = engine.vocabulary(column)
        vocabulary.write(path)
        described = manifest.describe_file(root, path)
        entries[column] = {"size": vocabulary.size, "type": engine.id_type(column), **described}
    return entries


def describe_schema(store_schema: pa.Schema) -> dict:
    leaves = store_schema.field(EVENTS).type.value_type
    return {
        USER: str(store_schema.field(USER).type),
        EVENTS: {leaf.name: str(leaf.type) for leaf in leaves},
    }


def _describe_written(root: Path, file: WrittenFile) -> dict:
    return {
        **manifest.describe_data_file(root, file.path),
        "num_users": sum(users for users, _ in file.row_groups),
        "num_events": sum(events for _, events in file.row_groups),
        "row_groups": [list(group) for group in file.row_groups],
        "min_time": file.min_time,
        "max_time": file.max_time,
    }
