"""DuckDB's part of an impressions ingest: stage, check, count, sort by (bucket, user, time, input order).

Lists stay lists and ids stay raw: encoding is Arrow's part (ingest.py). Times become the store's unit, rounded down, so
that "events before the impression" never lets one through that came later within a coarser unit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from elastic_rec.feature_store.ingestion.checks import NULL_WORDS
from elastic_rec.feature_store.ingestion.engines.session import SQL_TYPES, DuckSession, bucket_sql
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.inputs import check_entries
from elastic_rec.feature_store.ingestion.sources import (
    category_sql,
    find_column,
    kind_of,
    parquet_scan,
    parquet_schema,
    rewrite,
    text_id_sql,
    text_sql,
    whole_sql,
)
from elastic_rec.feature_store.ingestion.time_columns import MOMENTS, stored_time_kind, time_sql, times_factor
from elastic_rec.feature_store.table.format import SourceFile
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.times import iso_time, sensible_range_s, unit_advice
from elastic_rec.feature_store.table.vocabulary import UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.arrow import is_list
from elastic_rec.feature_store.utils.errors import DataError

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
        """What its values are, as sources.kind_of says."""
        return kind_of(self.type)

    def each(self, make: Callable[[str], str]) -> str:
        """SQL of a list: `make` (SQL -> SQL) of each value of the list, or of the single one."""
        return f"list_transform({self.sql}, lambda x: {make('x')})" if self.is_list else f"[{make(self.sql)}]"


class ImpressionEngine(DuckSession):
    """load_inputs, then vocabulary, percentiles and sorted_batches."""

    def __init__(self, config: ImpressionConfig, store: Store, *, work: Path, memory_limit: str, threads: int) -> None:
        super().__init__(work, memory_limit=memory_limit, threads=threads)
        self._config, self._store = config, store
        self._user_type = store.manifest.vocabularies["user"].type
        self._item_type = store.manifest.vocabularies["item"].type
        self._context_types: dict[str, str] = {}
        self._is_created = False

    def load_inputs(self, paths: list[Location]) -> list[SourceFile]:
        """Stages all files in order; one entry for each, whose events are impressions. DataError names the first bad
        row, and a label that no candidate has."""
        entries = []
        for path in paths:
            with self._local(path) as local:
                digest = open_location(local).digest()
                entries.append(SourceFile(path=str(path), sha256=digest, events=self._load(path, local)))
        check_entries(entries)
        self._check_labels()
        return entries

    def _load(self, path: Location, local: Path) -> int:
        """Appends one file's impressions; local: the file, or a copy on this disk. Returns their number."""
        schema, num_rows = parquet_schema(path, local)
        if num_rows == 0:
            return 0
        columns = self._columns(path, schema)
        time_kind = self._time_kind(path, local, columns[self._config.timestamp_column])
        if not self._is_created:
            self._create()
        first = self._one("SELECT coalesce(max(rowid) + 1, 0) FROM raw")
        selected = ", ".join(self._staged(columns, time_kind))
        with self._reading(path, has_quotes=False):
            count = self._one(f"INSERT INTO raw SELECT {selected} FROM {parquet_scan(local, len(schema.names))}")
        self._check(path, first)
        self._check_range(path, first, time_kind)
        return count

    def vocabulary(self, column: str) -> Vocabulary:
        """Values of a context column by falling count, then by value."""
        return self._vocabulary(
            column,
            f'SELECT id, count(*) AS n FROM (SELECT unnest("{column}") AS id FROM raw) WHERE id IS NOT NULL '
            "GROUP BY id ORDER BY n DESC, id",
        )

    def _check_labels(self) -> None:
        """DataError for a label that no candidate has."""
        for name in self._config.label_columns:
            if not self._one(f'SELECT count(*) FROM raw WHERE list_count("{name}") > 0'):
                total = self._one("SELECT count(*) FROM raw")
                raise DataError(
                    f"label '{name}' is null for all candidates of {total} impressions: take it out of label_columns"
                )

    def percentiles(self) -> list[int]:
        """101 times in the store's unit: element 90 is the time before which 90 % of the impressions come."""
        shares = ", ".join(str(percent / 100) for percent in range(101))
        return self._one(f"SELECT quantile_disc(timestamp, [{shares}]) FROM raw")

    def sorted_batches(self) -> pa.RecordBatchReader:
        """(bucket, user_id, timestamp, candidates list, labels lists, context lists), raw ids."""
        bucket = bucket_sql("user_id", self._user_type, self._store.manifest.num_buckets)
        names = ", ".join(f'"{n}"' for n in [*self._config.label_columns, *self._config.context_columns])
        return self._batches(
            f"SELECT {bucket} AS bucket, user_id, timestamp, candidates, {names} FROM raw "
            "ORDER BY bucket, user_id, timestamp, rowid",
        )

    def _create(self) -> None:
        self._is_created = True
        user, item = SQL_TYPES[self._user_type], SQL_TYPES[self._item_type]
        labels = "".join(f', "{name}" FLOAT[]' for name in self._config.label_columns)
        context = "".join(f', "{name}" {SQL_TYPES[type]}[]' for name, type in self._context_types.items())
        self._run(f"CREATE TABLE raw (user_id {user}, timestamp BIGINT, candidates {item}[]{labels}{context})")

    def _staged(self, columns: dict[str, Column], time_kind: str) -> list[str]:
        config = self._config
        user, time, shown = (columns[getattr(config, setting)] for setting in SINGLE_COLUMNS)
        unit = {"time": "us", "date": "us", "time_ns": "ns"}.get(time_kind, config.timestamp_unit.value)
        given, kept = UNITS_PER_SECOND[unit], UNITS_PER_SECOND[self._store.time_unit]
        moment = time_sql(time.sql, time_kind, unit)
        moment = times_factor(moment, kept // given) if kept > given else f"({moment}) // {given // kept}"
        candidates = shown.each(lambda item: _stored_id(item, shown.type, self._item_type))
        staged = [_stored_id(user.sql, user.type, self._user_type), moment, candidates]
        for name in config.label_columns:
            lowest = config.label_thresholds.get(name)
            staged.append(columns[name].each(lambda label, lowest=lowest: _label_sql(label, lowest)))
        for name in config.context_columns:
            kind, is_text = columns[name].kind, self._context_types[name] == "string"
            staged.append(columns[name].each(lambda v, k=kind, t=is_text: text_sql(v, k) if t else category_sql(v)))
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
            if column.kind not in KINDS[setting] and not pa.types.is_null(column.type):
                raise DataError(
                    f"{path}: impression column '{name}' is {type}, which cannot be used there; cast it. "
                    + rewrite(path, f'* REPLACE (CAST("{name}" AS TYPE) AS "{name}")')
                )
            if setting == "context_columns":
                kept = "int64" if column.kind == "int64" else "string"
                if self._context_types.setdefault(name, kept) != kept:
                    raise DataError(f"{path}: '{name}' is {type}, but {self._context_types[name]} in the files before")
        return columns

    def _time_kind(self, path: Location, local: Path, column: Column) -> str:
        """A kind of time_columns.py."""
        if pa.types.is_float32(column.type):
            raise DataError(
                f"{path}: impression column '{self._config.timestamp_column}' is {column.type} of 32 bits, which knows "
                "times to 64 or 128 s; write it as int64 or double, from a source that has every second"
            )
        if column.kind == "time":
            return stored_time_kind(str(path), local, self._config.timestamp_column)
        return "float" if column.kind == "decimal" else column.kind

    def _check(self, path: Location, first: int) -> None:
        labels = " OR ".join(
            f'"{name}" IS NULL OR len("{name}") <> len(candidates)' for name in self._config.label_columns
        )
        faults = {
            "user is empty, or no id of the store's type": "user_id IS NULL",
            "timestamp is empty, negative, no time, or no whole number of timestamp_unit": "timestamp IS NULL",
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
        self._check_null_words(path, first)

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

    def _check_null_words(self, path: Location, first: int) -> None:
        """DataError for text that means a missing id, unless the store has such an id."""
        words = ", ".join(f"'{word}'" for word in NULL_WORDS)
        ids = {
            "user": (self._user_type, f"SELECT rowid AS row, user_id AS id FROM raw WHERE rowid >= {first}"),
            "item": (
                self._item_type,
                "SELECT rowid AS row, unnest(candidates) AS id FROM raw "
                f"WHERE rowid >= {first} AND list_has_any(candidates, [{words}])",
            ),
        }
        for role, (type, rows) in ids.items():
            found = f"SELECT id, min(row), count(*) FROM ({rows}) WHERE id IN ({words}) GROUP BY id ORDER BY 2"
            for word, row, count in self._run(found) if type == "string" else ():
                if self._store.vocabulary(role).encode(pa.array([word]))[0] == UNKNOWN:
                    raise DataError(
                        f"{path}: impression in row {row - first + 1}: {role} {word!r} is what writers put for a "
                        f"missing id, {count} times in this file, and no {role} of the store; drop or repair such rows"
                    )

    def _check_range(self, path: Location, first: int, kind: str) -> None:
        """DataError where a time cannot belong to the store, most likely because it is in another unit."""
        kept, given = self._store.time_unit, self._config.timestamp_unit.value
        low_s, high_s = sensible_range_s(*self._store.time_range_s())
        outside = f"timestamp < {low_s * UNITS_PER_SECOND[kept]}"
        outside += f" OR timestamp > {high_s * UNITS_PER_SECOND[kept]}" if high_s is not None else ""
        ((row, time, count),) = self._run(
            f"SELECT min(rowid), arg_min(timestamp, rowid), count(*) FROM raw WHERE rowid >= {first} AND ({outside})"
        )
        if count:
            written, advice = "", "drop or repair such rows"
            if kind not in MOMENTS:
                number = time * UNITS_PER_SECOND[given] // UNITS_PER_SECOND[kept]
                written = f" ({number} in timestamp_unit={given})"
                advice = unit_advice(number, given, "impressions.timestamp_unit")
            raise DataError(
                f"{path}: impression in row {row - first + 1}: timestamp {iso_time(time // UNITS_PER_SECOND[kept])}"
                f"{written} cannot belong to the events of this store, nor can {count - 1} more in this file; {advice}"
            )


def _label_sql(value: str, lowest: float | None) -> str:
    """FLOAT, with a threshold 0 or 1; NULL and NaN stay what they are."""
    if lowest is None:
        return f"CAST({value} AS FLOAT)"
    return f"CASE WHEN isnan(CAST({value} AS DOUBLE)) THEN 'nan'::FLOAT ELSE CAST({value} >= {lowest!r} AS FLOAT) END"


def _stored_id(sql: str, type: pa.DataType, stored: str) -> str:
    """SQL of an id as the store has it; NULL where it is none: text "7" is one for an int64 store, "7.0" is not."""
    kind = kind_of(type)
    if kind in ("int64", "float", "decimal"):
        whole = whole_sql(sql, type)
        return whole if stored == "int64" else f"CAST(({whole}) AS VARCHAR)"
    text = text_sql(sql, kind)
    if stored == "string":
        return text_id_sql(text)
    return f"CASE WHEN CAST(TRY_CAST({text} AS BIGINT) AS VARCHAR) = {text} THEN TRY_CAST({text} AS BIGINT) END"
