"""What Spark's executors run in Python: read one input file, write the buckets of one partition.

Both are the code that an ingest on one machine runs, DuckDB's reader and the writer, so parsing, messages and bytes
are the same. Neither needs PySpark or torch: Arrow batches in, Arrow batches out.

A fault of the data is an answer, not an exception, which Spark would retry and then wrap: the last row a task yields
has a JSON text in the column ABOUT, of what was done, or of the error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from elastic_rec.feature_store.ingestion.checks import SEQ, ChecksConfig
from elastic_rec.feature_store.ingestion.engines.duckdb import DuckEngine
from elastic_rec.feature_store.ingestion.writer import write_sorted
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.table.manifest import put_in_place
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.scratch import scratch_folder

ABOUT = "about this"  # no input column can be called so
FILE, STAGED, FOUND, ERROR = "file", "staged", "found", "error"
ROW_BITS = 40
_ROW_MASK = (1 << ROW_BITS) - 1


@dataclass(frozen=True)
class ReadJob:
    """files: the input as (name for messages, URL that all machines understand); columns: role -> input column; kinds:
    those of `first`, the first file with rows (sources.py)."""

    files: list[tuple[str, str]]
    format: str
    columns: dict[str, str]
    first: str
    kinds: dict[str, str]
    schema: pa.Schema
    unit: str
    memory_limit: str
    threads: int
    checks: ChecksConfig


@dataclass(frozen=True)
class WriteJob:
    """target: URL that all machines see; scratch: a folder on the same disk, where the target is a local one.
    first_rows: (files,) events of all files before each."""

    target: str
    scratch: str | None
    schema: pa.Schema
    row_group_events: int
    checks: ChecksConfig
    unit: str
    first_rows: np.ndarray


def read_files(numbers: Iterable[pa.RecordBatch], job: ReadJob) -> Iterator[pa.RecordBatch]:
    """Numbers of files (one int64 column) -> their checked events in `job.schema`, each file's ABOUT row after them.

    seq is (file << ROW_BITS) + row: the order of the input, whatever order the tasks run in.
    """
    for batch in numbers:
        for number in batch.column(0).to_pylist():
            try:
                yield from _read_file(number, job)
            except DataError as error:
                yield _about({ERROR: str(error)}, job.schema, seq=number << ROW_BITS)


def _read_file(number: int, job: ReadJob) -> Iterator[pa.RecordBatch]:
    with (
        scratch_folder() as work,
        DuckEngine(
            work=work,
            roles=list(job.columns),
            unit=job.unit,
            memory_limit=job.memory_limit,
            threads=job.threads,
            checks=job.checks,
        ) as engine,
    ):
        engine.expect_kinds(job.kinds, first=job.first)
        name, url = job.files[number]
        entry = engine.load_input(replace(open_location(url), url=name), format=job.format, columns=job.columns)
        about = {FILE: asdict(entry), FOUND: engine.drop_bad_rows(), STAGED: engine.num_staged()}
        for batch in engine.staged_batches():
            columns = [batch.column(name) for name in batch.schema.names]
            columns[0] = pa.array(columns[0].to_numpy() + (number << ROW_BITS))
            arrays = [column.cast(field.type) for column, field in zip(columns, job.schema, strict=False)]
            yield pa.record_batch([*arrays, pa.nulls(len(batch), pa.string())], schema=job.schema)
        yield _about(about, job.schema, seq=number << ROW_BITS)


def write_buckets(batches: Iterable[pa.RecordBatch], job: WriteJob) -> Iterator[pa.RecordBatch]:
    """Sorted events of whole buckets -> data files in place, and one ABOUT row: their manifest entries.

    Run twice (a retry, speculation) it puts the same bytes under the same names.
    """
    try:
        with scratch_folder(job.scratch and Path(job.scratch)) as folder:
            files, found = write_sorted(
                (_with_dense_seq(batch, job.first_rows) for batch in batches),
                root=folder,
                schema=job.schema,
                row_group_events=job.row_group_events,
                checks=job.checks,
                unit=job.unit,
            )
            placed = put_in_place(files, folder, open_location(job.target))
            about = {FILE: [asdict(entry) for entry in placed], FOUND: found}
    except DataError as error:
        about = {ERROR: str(error)}
    yield _about(about, pa.schema([pa.field(ABOUT, pa.string())]))


def _with_dense_seq(batch: pa.RecordBatch, first_rows: np.ndarray) -> pa.RecordBatch:
    """seq as one count over all files, which is what OrderWatch takes."""
    place = batch.schema.get_field_index(SEQ)
    seq = batch.column(place).to_numpy()
    return batch.set_column(place, SEQ, pa.array(first_rows[seq >> ROW_BITS] + (seq & _ROW_MASK)))


def _about(content: dict, schema: pa.Schema, *, seq: int = 0) -> pa.RecordBatch:
    row = {SEQ: seq, ABOUT: json.dumps(content)}
    return pa.RecordBatch.from_pylist([{name: row.get(name) for name in schema.names}], schema=schema)
