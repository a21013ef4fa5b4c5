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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.checks import ChecksConfig, OrderWatch
from elastic_rec.feature_store.table.format import HistoryFile, VocabularyFile
from elastic_rec.feature_store.table.manifest import describe_data_file, describe_file
from elastic_rec.feature_store.table.schema import EVENT_ID, EVENTS, TIMESTAMP, USER, leaf_path
from elastic_rec.feature_store.table.vocabulary import Vocabulary
from elastic_rec.feature_store.utils.jagged import run_starts
from elastic_rec.feature_store.utils.prefetch import prefetch
from elastic_rec.feature_store.utils.progress import progress

BUCKET = "bucket"
Watch = Callable[[pa.Table, np.ndarray], None]


class BucketFiles:
    """Data files of a table, bucket after bucket: root/bucket=0000/part-000.parquet, a row group for each write.

    written: (bucket, path, [[rows, what they hold], ...]) of each file.
    """

    def __init__(self, root: Path, schema: pa.Schema, **options: Any) -> None:
        """options: of ParquetWriter."""
        self.written: list[tuple[int, Path, list[list[int]]]] = []
        self._root, self._schema = root, schema
        # Page checksums: the reader compares them, so that a flipped bit is an error and not a wrong item.
        self._options = {"compression": "zstd", "write_page_checksum": True, **options}
        self._writer: pq.ParquetWriter | None = None

    def write(self, bucket: int, rows: pa.Table, num_values: int) -> None:
        """rows: of one row group, in the schema. num_values: what their lists hold together."""
        if not self.written or self.written[-1][0] != bucket:
            self.close()
            path = self._root / f"bucket={bucket:04d}" / "part-000.parquet"
            path.parent.mkdir()
            self._writer = pq.ParquetWriter(path, self._schema, **self._options)
            self.written.append((bucket, path, []))
        self._writer.write_table(rows, row_group_size=len(rows))
        self.written[-1][2].append([len(rows), num_values])

    def close(self) -> None:
        """Ends the last file. Call it after the last write, and after an error."""
        if self._writer is not None:
            self._writer.close()


def write_sorted(
    batches: Iterable[pa.RecordBatch],
    *,
    root: Path,
    schema: pa.Schema,
    row_group_events: int,
    checks: ChecksConfig,
    unit: str,
    num_events: int = 0,
) -> tuple[list[HistoryFile], dict[str, int]]:
    """Events sorted by bucket, user and time -> data files under root. Returns their entries, and counts of the checks
    that look at whole histories. num_events is for the progress bar."""
    watch = OrderWatch(checks, unit)
    indices = [leaf.name for leaf in schema.field(EVENTS).type.value_type if leaf.name not in (TIMESTAMP, EVENT_ID)]
    files = BucketFiles(
        root,
        schema,
        # Timestamps of one user rise, so their deltas are small; item ids repeat, so a dictionary packs them.
        use_dictionary=[leaf_path(name) for name in indices],
        column_encoding={leaf_path(TIMESTAMP): "DELTA_BINARY_PACKED"},
    )
    times: dict[int, tuple[int, int]] = {}

    def write(group: tuple[int, pa.Table, tuple[int, int]]) -> int:
        bucket, histories, (low, high) = group
        files.write(bucket, histories, written := len(histories[EVENTS].chunk(0).values))
        known = times.get(bucket, (low, high))
        times[bucket] = min(known[0], low), max(known[1], high)
        return written

    groups = cut_histories(batches, schema=schema, row_group_events=row_group_events, watch=watch)
    bar = progress("write", total=num_events, unit=" events")
    try:
        # Encoding and compression let go of Python's lock: meanwhile the next row group is fetched and cut.
        for written in prefetch(write, groups, workers=1):
            bar.update(written)
    finally:
        bar.close()
        files.close()
    entries = [
        HistoryFile(
            **describe_data_file(root, path),
            num_users=sum(users for users, _ in row_groups),
            num_events=sum(events for _, events in row_groups),
            row_groups=row_groups,
            min_time=times[bucket][0],
            max_time=times[bucket][1],
        )
        for bucket, path, row_groups in files.written
    ]
    return entries, watch.counts


def write_vocabularies(vocabularies: Iterable[Vocabulary], root: Path) -> dict[str, VocabularyFile]:
    """Writes root/vocab/COLUMN.parquet for each; returns their entries."""
    (root / "vocab").mkdir()
    entries = {}
    for vocabulary in vocabularies:
        path = root / "vocab" / f"{vocabulary.column}.parquet"
        vocabulary.write(path)
        described = describe_file(root, path)
        entries[vocabulary.column] = VocabularyFile(size=vocabulary.size, type=vocabulary.type, **described)
    return entries


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
