"""DuckDB's part of an impressions ingest: stage, check, count, sort by (bucket, user, time, input order).

Lists stay lists and ids stay raw: encoding is Arrow's part (ingest.py). Times become the store's unit, rounded down, so
that "events before the impression" never lets one through that came later within a coarser unit.
"""

from __future__ import annotations

import glob
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.engine import SQL_TYPES
from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.filesystem import Location
from elastic_rec.feature_store.impressions.config import ImpressionConfig
from elastic_rec.feature_store.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.sources import id_sql, quote, time_sql
from elastic_rec.feature_store.sql import bucket_sql, record_batches
from elastic_rec.feature_store.store import Store
from elastic_rec.feature_store.vocabulary import Vocabulary

BATCH_IMPRESSIONS = 1 << 14


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

    def __enter__(self) -> ImpressionEngine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._db.close()
        if isinstance(error, duckdb.OutOfMemoryException):
            raise DataError(f"memory_limit={self._memory_limit} is too small ({error}); raise it") from error

    def load(self, path: Location, local: Path) -> int:
        """Appends one file's impressions; local: the file, or a copy on this disk. Returns their number; DataError
        names the first bad row."""
        columns = self._columns(path, local)
        if not self._context_types:
            self._context_types = {name: columns[name][1] for name in self._config.context_columns}
            self._create()
        first = self._one("SELECT coalesce(max(rowid) + 1, 0) FROM raw")
        selected = ", ".join(self._staged(columns))
        scan = f"read_parquet({quote(glob.escape(str(local)))}, hive_partitioning=false)"
        try:
            ((count,),) = self._run(f"INSERT INTO raw SELECT {selected} FROM {scan}")
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            raise DataError(f"{path}: cannot be read: {str(error).strip()}") from error
        if not count:
            raise DataError(f"{path}: no impressions (0 rows); remove it from input")
        self._check(path, first)
        return count

    def context_type(self, column: str) -> str:
        return self._context_types[column]

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

    def check_labels(self) -> None:
        """DataError for a label that no candidate has."""
        for name in self._config.label_columns:
            if not self._one(f'SELECT count(*) FROM raw WHERE list_count("{name}") > 0'):
                total = self._one("SELECT count(*) FROM raw")
                raise DataError(
                    f"label '{name}' is null for all candidates of {total} impressions: take it out of label_columns"
                )

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
        user, item = SQL_TYPES[self._user_type], SQL_TYPES[self._item_type]
        labels = "".join(f', "{name}" FLOAT[]' for name in self._config.label_columns)
        context = "".join(f', "{name}" {SQL_TYPES[type]}[]' for name, type in self._context_types.items())
        self._run(f"CREATE TABLE raw (user_id {user}, timestamp BIGINT, candidates {item}[]{labels}{context})")

    def _staged(self, columns: dict[str, tuple[str, str, bool]]) -> list[str]:
        config = self._config
        sql, kind, _ = columns[config.user_column]
        staged = [_cast_id(sql, kind, self._user_type)]
        sql, kind, _ = columns[config.timestamp_column]
        given, kept = UNITS_PER_SECOND[config.timestamp_unit.value], UNITS_PER_SECOND[self._store.time_unit]
        time = time_sql(sql, kind, config.timestamp_unit.value)
        staged.append(f"({time}) * {kept // given}" if kept >= given else f"({time}) // {given // kept}")
        sql, kind, is_list = columns[config.candidates_column]
        item = _cast_id("x", kind, self._item_type)
        one = f"list_transform({sql}, lambda x: {item})" if is_list else f"[{_cast_id(sql, kind, self._item_type)}]"
        staged.append(one)
        for name in config.label_columns:
            sql, _, is_list = columns[name]
            label = _label_sql("x" if is_list else sql, config.label_thresholds.get(name))
            staged.append(f"list_transform({sql}, lambda x: {label})" if is_list else f"[{label}]")
        for name, type in self._context_types.items():
            sql, _, is_list = columns[name]
            staged.append(f"CAST({sql} AS {SQL_TYPES[type]}[])" if is_list else f"[CAST({sql} AS {SQL_TYPES[type]})]")
        return staged

    def _columns(self, path: Location, local: Path) -> dict[str, tuple[str, str, bool]]:
        """Input column -> (SQL of its raw value, kind, whether it is a list); DataError where it is missing or odd."""
        try:
            schema = pq.read_schema(local)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not readable as Parquet ({error}); impressions come as Parquet") from error
        config, columns = self._config, {}
        scalars = (config.user_column, config.timestamp_column)
        for name in [*scalars, config.candidates_column, *config.label_columns, *config.context_columns]:
            if schema.names.count(name) != 1:
                raise DataError(f"{path}: impression column '{name}' is missing or not unique; it has: {schema.names}")
            type = schema.field(name).type
            is_list = pa.types.is_list(type) or pa.types.is_large_list(type)
            kind = _kind(type.value_type if is_list else type)
            if is_list and name in scalars:
                raise DataError(f"{path}: impression column '{name}' is {type}; it must hold one value")
            wrong = kind == "other" or (kind == "time" and name != config.timestamp_column)
            if wrong or (name in config.label_columns and kind == "text"):
                raise DataError(f"{path}: impression column '{name}' is {type}, which cannot be used there; cast it")
            sql = '"' + name.replace('"', '""') + '"'
            if kind == "time":
                sql = f"epoch_ns(CAST({sql} AS TIMESTAMP_NS))"
            if name in config.context_columns:
                kind = "int64" if kind == "int64" else "string"
                if self._context_types.get(name, kind) != kind:
                    raise DataError(f"{path}: '{name}' is {type}, but {self._context_types[name]} in the files before")
            columns[name] = (sql, kind, is_list)
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
        for name in self._config.label_columns:
            self._check_label(path, name, first)

    def _check_label(self, path: Location, name: str, first: int) -> None:
        outside = f'list_filter("{name}", lambda x: x < 0 OR x > 1)'  # NaN counts as greater than all else
        where = f"rowid >= {first} AND len({outside}) > 0"
        found = self._run(f"SELECT rowid, ({outside})[1] FROM raw WHERE {where} ORDER BY rowid LIMIT 1")
        for row, value in found:
            remedy = (
                "write null where there is no label"
                if value != value
                else f"scale it, or set +data.impressions.label_thresholds.{name}=4 for 1 at 4 or more, else 0"
            )
            raise DataError(
                f"{path}: impression in row {row - first + 1}: label '{name}' is {value:g}, not from 0 to 1; {remedy}"
            )

    def _one(self, sql: str):
        return self._run(sql)[0][0]

    def _run(self, sql: str) -> list[tuple]:
        return self._db.execute(sql).fetchall()


def _kind(type: pa.DataType) -> str:
    if pa.types.is_dictionary(type):
        type = type.value_type
    if pa.types.is_integer(type):
        return "int64"
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return "text"
    if pa.types.is_floating(type) or pa.types.is_decimal(type) or pa.types.is_boolean(type):
        return "float"
    return "time" if pa.types.is_timestamp(type) or pa.types.is_date(type) else "other"


def _label_sql(value: str, lowest: float | None) -> str:
    """FLOAT, with a threshold 0 or 1; NULL and NaN stay what they are."""
    if lowest is None:
        return f"CAST({value} AS FLOAT)"
    return f"CASE WHEN isnan(CAST({value} AS DOUBLE)) THEN 'nan'::FLOAT ELSE CAST({value} >= {lowest!r} AS FLOAT) END"


def _cast_id(sql: str, kind: str, type: str) -> str:
    """NULL where the value is no id of the store's type: text "7" for an int64 store is, "x" is not."""
    return id_sql(sql, "int64") if type == "int64" else id_sql(f"CAST({sql} AS VARCHAR)", "text")
