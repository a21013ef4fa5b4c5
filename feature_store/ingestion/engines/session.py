"""A DuckDB database in a work folder: what every ingest stages its rows in, beside the future store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from elastic_rec.feature_store.ingestion.sources import unreadable
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.vocabulary import Vocabulary
from elastic_rec.feature_store.utils.errors import DataError

BATCH_ROWS = 1 << 14
SQL_TYPES = {"int64": "BIGINT", "string": "VARCHAR"}


class DuckSession:
    """Base of the DuckDB engines, a context manager. In its SQL a time without a zone is UTC.

    work: an empty folder; the sort spills there. threads: 0 for one per core. Raises DataError for settings that DuckDB
    refuses, and where the memory limit is too small.
    """

    def __init__(self, work: Path, *, memory_limit: str, threads: int) -> None:
        config = {
            "memory_limit": memory_limit,
            "temp_directory": str(work / "spill"),
            "preserve_insertion_order": True,
            "force_compression": "uncompressed",  # read a few times only: compressing costs more
        }
        if threads > 0:
            config["threads"] = threads
        try:
            self._db = duckdb.connect(str(work / "staged.duckdb"), config=config)
        except duckdb.Error as error:
            raise DataError(f"DuckDB refused its settings ({error}); check memory_limit and threads") from error
        self._db.execute("SET TimeZone = 'UTC'")
        self._work, self._memory_limit = work, memory_limit

    def __enter__(self):
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._db.close()
        if isinstance(error, duckdb.OutOfMemoryException):
            remedy = "raise it or lower threads"
            raise DataError(f"memory_limit={self._memory_limit} is too small ({error}); {remedy}") from error

    @contextmanager
    def _local(self, path: Location) -> Iterator[Path]:
        """An input file on the local disk; a copy of another is removed after the block."""
        local = path.fetch(self._work / "input")
        yield local
        if not path.is_local:
            local.unlink()

    @contextmanager
    def _reading(self, path: Location, *, has_quotes: bool) -> Iterator[None]:
        """What DuckDB cannot read in the block is a fault of the file."""
        try:
            yield
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            raise DataError(unreadable(path, error, has_quotes=has_quotes)) from error

    def _vocabulary(self, column: str, sql: str) -> Vocabulary:
        """sql: of rows (id, n) in the order of indices."""
        table = self._batches(sql).read_all()
        ids = table["id"].combine_chunks()
        ids = ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string())
        return Vocabulary(column=column, ids=ids, counts=table["n"].to_numpy())

    def _batches(self, sql: str) -> pa.RecordBatchReader:
        relation = self._db.sql(sql)
        # The name changed between DuckDB 1.4 and 2.0.
        if hasattr(relation, "to_arrow_reader"):
            return relation.to_arrow_reader(BATCH_ROWS)
        return relation.fetch_record_batch(BATCH_ROWS)

    def _one(self, sql: str):
        return self._run(sql)[0][0]

    def _run(self, sql: str) -> list[tuple]:
        # DuckDB 2 refuses the next statement while a result is not read to its end.
        return self._db.execute(sql).fetchall()


def bucket_sql(user: str, type: str, num_buckets: int) -> str:
    """Bucket of a user id of type "int64" or "string", the same on every engine: ((id % N) + N) % N for int64 ids; for
    strings the first 15 hex digits of md5(utf-8 bytes) read as an unsigned integer, modulo N."""
    if type == "int64":
        return f"((({user} % {num_buckets}) + {num_buckets}) % {num_buckets})::INTEGER"
    return f"(('0x' || substr(md5({user}), 1, 15))::BIGINT % {num_buckets})::INTEGER"
