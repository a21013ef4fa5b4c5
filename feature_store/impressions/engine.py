"""DuckDB's part of an impressions ingest: stage, check, count, sort by (bucket, user, time, input order).

Lists stay lists and ids stay raw: encoding is Arrow's part (ingest.py). Times become the store's unit, rounded down, so
that "events before the impression" never lets one through that came later within a coarser unit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.engine import SQL_TYPES
from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.filesystem import Location
from elastic_rec.feature_store.impressions.config import ImpressionConfig
from elastic_rec.feature_store.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.sources import (
    find_column,
    id_sql,
    is_list,
    kind_of,
    parquet_scan,
    rewrite,
    text_sql,
    time_sql,
    unreadable,
    whole_sql,
)
from elastic_rec.feature_store.sql import bucket_sql, record_batches
from elastic_rec.feature_store.store import Store
from elastic_rec.feature_store.vocabulary import Vocabulary

BATCH_IMPRESSIONS = 1 << 14
SINGLE_COLUMNS = ("user_column", "timestamp_column", "candidates_column")
_IDS = ("int64", "float", "decimal", "text", "binary", "uuid")
# What a column may hold (sources.kind_of), by the setting that names it.
KINDS = {
    "user_column": _IDS,
    "candidates_column": _IDS,
    "timestamp_column": ("int64", "float", "decimal", "text", "time"),
    "label_columns": ("int64", "float", "decimal", "bool"),
    "context_columns": (*_IDS, "bool"),
}


class Column(NamedTuple):
    """A column of one file. sql: its value; type: that of a value, or of one in a list."""

    sql: str
    type: pa.DataType
    is_list: bool

    @property
    def kind(self) -> str:
        return kind_of(self.type)

    def each(self, make: Callable[[str], str]) -> str:
        """SQL of a list: `make` (SQL -> SQL) of each value of the list, or of the single one."""
        return f"list_transform({self.sql}, lambda x: {make('x')})" if self.is_list else f"[{make(self.sql)}]"


class ImpressionEngine:
    """load() each file, then vocabulary, percentiles and sorted_batches."""

    def __init__(self, config: ImpressionConfig, store: Store, *, work: Path, memory_limit: str, threads: int) -> None:
        settings = {"memory_limit": memory_limit, "temp_directory": str(work / "spill")}
        if threads > 0:
            settings["threads"] = threads
        self._db = duckdb.connect(str(work / "impressions.duckdb"), config=settings)
        self._config, self._store, self._memory_limit = config, store, memory_limit
        self._user_type = store.manifest["vocabularies"]["user"]["type"]
        self._item_type = store.manifest["vocabularies"]["item"]["type"]
        self._context_types: dict[str, str] = {}
        self._is_created = False

    def __enter__(self) -> ImpressionEngine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._db.close()
        if isinstance(error, duckdb.OutOfMemoryException):
            raise DataError(f"memory_limit={self._memory_limit} is too small ({error}); raise it") from error

    def load(self, path: Location, local: Path) -> int:
        """Appends one file's impressions; local: the file, or a copy on this disk. Returns their number; DataError
        names the first bad row."""
        try:
            file = pq.ParquetFile(local)
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
            file.close()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not readable as Parquet ({error}); impressions come as Parquet") from error
        if num_rows == 0:
            return 0
        columns = self._columns(path, schema)
        if not self._is_created:
            self._create()
        first = self._one("SELECT coalesce(max(rowid) + 1, 0) FROM raw")
        selected = ", ".join(self._staged(columns))
        try:
            ((count,),) = self._run(f"INSERT INTO raw SELECT {selected} FROM {parquet_scan(local, len(schema.names))}")
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            raise DataError(unreadable(path, error, has_quotes=False)) from error
        self._check(path, first)
        return count

    def vocabulary(self, column: str) -> Vocabulary:
        """Values of a context column by falling count, then by value."""
        sql = (
            f'SELECT id, count(*) AS n FROM (SELECT unnest("{column}") AS id FROM raw) WHERE id IS NOT NULL '
            "GROUP BY id ORDER BY n DESC, id"
        )
        table = record_batches(self._db, sql, BATCH_IMPRESSIONS).read_all()
        ids = table["id"].combine_chunks()
        ids = ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string())
        return Vocabulary(column=column, ids=ids, counts=table["n"].to_numpy())

    def percentiles(self) -> list[int]:
        shares = ", ".join(str(percent / 100) for percent in range(101))
        return self._one(f"SELECT quantile_disc(timestamp, [{shares}]) FROM raw")

    def sorted_batches(self) -> pa.RecordBatchReader:
        """(bucket, user_id, timestamp, candidates list, labels lists, context lists), raw ids."""
        bucket = bucket_sql("user_id", self._user_type, self._store.manifest["num_buckets"])
        names = ", ".join(f'"{n}"' for n in [*self._config.label_columns, *self._config.context_columns])
        return record_batches(
            self._db,
            f"SELECT {bucket} AS bucket, user_id, timestamp, candidates, {names} FROM raw "
            "ORDER BY bucket, user_id, timestamp, rowid",
            BATCH_IMPRESSIONS,
        )

    def _create(self) -> None:
        self._is_created = True
        user, item = SQL_TYPES[self._user_type], SQL_TYPES[self._item_type]
        labels = "".join(f', "{name}" FLOAT[]' for name in self._config.label_columns)
        context = "".join(f', "{name}" {SQL_TYPES[type]}[]' for name, type in self._context_types.items())
        self._run(f"CREATE TABLE raw (user_id {user}, timestamp BIGINT, candidates {item}[]{labels}{context})")

    def _staged(self, columns: dict[str, Column]) -> list[str]:
        config = self._config
        user, time, shown = (columns[getattr(config, setting)] for setting in SINGLE_COLUMNS)
        given, kept = UNITS_PER_SECOND[config.timestamp_unit.value], UNITS_PER_SECOND[self._store.time_unit]
        moment = f"epoch_ns(CAST({time.sql} AS TIMESTAMP_NS))" if time.kind == "time" else time.sql
        moment = time_sql(moment, "float" if time.kind == "decimal" else time.kind, config.timestamp_unit.value)
        moment = f"({moment}) * {kept // given}" if kept >= given else f"({moment}) // {given // kept}"
        candidates = shown.each(lambda item: _stored_id(item, shown.type, self._item_type))
        staged = [_stored_id(user.sql, user.type, self._user_type), moment, candidates]
        for name in config.label_columns:
            staged.append(columns[name].each(lambda label: f"CAST({label} AS FLOAT)"))
        for name in config.context_columns:
            kind, is_text = columns[name].kind, self._context_types[name] == "string"
            staged.append(columns[name].each(lambda v, k=kind, t=is_text: text_sql(v, k) if t else id_sql(v, "int64")))
        return staged

    def _columns(self, path: Location, schema: pa.Schema) -> dict[str, Column]:
        """Input column -> what is in it; DataError where it is missing or odd."""
        config, columns = self._config, {}
        named = [(getattr(config, setting), setting) for setting in SINGLE_COLUMNS]
        named += [(name, "label_columns") for name in config.label_columns]
        named += [(name, "context_columns") for name in config.context_columns]
        for name, setting in named:
            sql = find_column(path, schema.names, name, setting=setting)
            type = schema.field(name).type if name in schema.names else pa.string()
            column = columns[name] = Column(sql, type.value_type if is_list(type) else type, is_list(type))
            if column.is_list and setting in ("user_column", "timestamp_column"):
                raise DataError(f"{path}: impression column '{name}' is {type}; it must hold one value")
            if column.kind not in KINDS[setting]:
                raise DataError(
                    f"{path}: impression column '{name}' is {type}, which cannot be used there; cast it. "
                    + rewrite(path, f'* REPLACE (CAST("{name}" AS TYPE) AS "{name}")')
                )
            if setting == "context_columns":
                kept = "int64" if column.kind == "int64" else "string"
                if self._context_types.setdefault(name, kept) != kept:
                    raise DataError(f"{path}: '{name}' is {type}, but {self._context_types[name]} in the files before")
        return columns

    def _check(self, path: Location, first: int) -> None:
        labels = " OR ".join(
            f'"{name}" IS NULL OR len("{name}") <> len(candidates)' for name in self._config.label_columns
        )
        faults = {
            "user is empty, or no id of the store's type": "user_id IS NULL",
            "timestamp is empty, negative, or no whole number of timestamp_unit": "timestamp IS NULL",
            "there is no candidate": "candidates IS NULL OR len(candidates) = 0",
            "a candidate is empty, or no id of the store's type": "list_count(candidates) <> len(candidates)",
            "a label list is not as long as the candidates'": labels,
        }
        for fault, condition in faults.items():
            row = self._one(f"SELECT min(rowid) FROM raw WHERE rowid >= {first} AND ({condition})")
            if row is not None:
                raise DataError(f"{path}: impression in row {row - first + 1}: {fault}; drop or repair such rows")

    def _one(self, sql: str):
        return self._run(sql)[0][0]

    def _run(self, sql: str) -> list[tuple]:
        return self._db.execute(sql).fetchall()


def _stored_id(sql: str, type: pa.DataType, stored: str) -> str:
    """SQL of an id as the store has it; NULL where it is none: text "7" is one for an int64 store, "7.0" is not."""
    kind = kind_of(type)
    if kind in ("int64", "float", "decimal"):
        whole = whole_sql(sql, type)
        return whole if stored == "int64" else f"CAST(({whole}) AS VARCHAR)"
    text = text_sql(sql, kind)
    if stored == "string":
        return id_sql(text, "text")
    return f"CASE WHEN CAST(TRY_CAST({text} AS BIGINT) AS VARCHAR) = {text} THEN TRY_CAST({text} AS BIGINT) END"
