"""SQL that every ingest shares."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa


def open_database(path: Path, settings: dict[str, str | int | bool]) -> duckdb.DuckDBPyConnection:
    """A database in whose SQL a time without a zone is UTC, whatever the machine's zone."""
    db = duckdb.connect(str(path), config=settings)
    db.execute("SET TimeZone = 'UTC'")
    return db


def bucket_sql(user: str, type: str, num_buckets: int) -> str:
    """Bucket of a user id of type "int64" or "string", the same on every engine (see engine.py)."""
    if type == "int64":
        return f"((({user} % {num_buckets}) + {num_buckets}) % {num_buckets})::INTEGER"
    return f"(('0x' || substr(md5({user}), 1, 15))::BIGINT % {num_buckets})::INTEGER"


def record_batches(db: duckdb.DuckDBPyConnection, sql: str, batch_rows: int) -> pa.RecordBatchReader:
    relation = db.sql(sql)
    # The name changed between DuckDB 1.4 and 2.0.
    if hasattr(relation, "to_arrow_reader"):
        return relation.to_arrow_reader(batch_rows)
    return relation.fetch_record_batch(batch_rows)
