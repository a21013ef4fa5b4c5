"""One input file of an ingest: checking its columns, and the SQL that reads each of them.

A column has one of two kinds after reading: "int64" (whole numbers in Parquet) or "text" (all of CSV/TSV, names of Hive
folders, and Parquet's strings). Whether text ids are really integers is decided later over the distinct values of ALL
files (engine.py), not by sniffing the first rows.

CSV has quotes, TSV has none: a tab ends a field and a line break a row, whatever else a field holds.
"""

from __future__ import annotations

import csv
import glob
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.inputs import codec, partition_values
from elastic_rec.feature_store.ingestion.time_columns import stored_time_kind
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.schema import ARROW_TYPES
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.limits import copy_unpacked

# Of these the one with which the header has most of the columns; the first where several do.
DELIMITERS = {"csv": (",", ";", "\t", "|"), "tsv": ("\t",)}
QUOTES = {"csv": '"', "tsv": ""}
LINE_BYTES = 1 << 21  # of which DuckDB takes no more
# Whole numbers below this one are exact in a float; above it two ids may have become one.
EXACT_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}
NAMED_ROLES = ("user", "item", "timestamp", "event_id")


@dataclass(frozen=True)
class QuotedText:
    """CSV for DuckDB's serial parser. The parallel one begins in the middle of a file, where it fails in long quoted
    texts with line breaks; the serial one takes them, but loses a last row whose quote is not closed."""

    file: Path
    delimiter: str
    scan: str

    def num_rows(self) -> int | None:
        """As Python counts them; None where a quote is not closed."""
        csv.field_size_limit(LINE_BYTES)
        try:
            with self.file.open(newline="", encoding="utf-8-sig") as file:
                return sum(1 for row in csv.reader(file, delimiter=self.delimiter, strict=True) if row) - 1
        except (csv.Error, UnicodeDecodeError):
            return None


@dataclass(frozen=True)
class Source:
    """One input file. path: as messages name it. scan: SQL table function. raw: column -> SQL of the value as it
    stands in the file. ids: the same as an id, not for times. kinds: column -> "int64" | "text", or of times a kind of
    time_columns.py. is_empty: known to have no rows. quoted: of CSV."""

    path: Location
    scan: str
    raw: dict[str, str]
    ids: dict[str, str]
    kinds: dict[str, str]
    is_empty: bool = False
    quoted: QuotedText | None = None


def column_settings(columns: dict[str, str]) -> dict[str, str]:
    """role -> the config key that names its column, for the remedies of messages."""
    return {role: f"{role}_column" if role in NAMED_ROLES else "context_columns" for role in columns}


def open_source(path: Location, local: Path, *, format: str, columns: dict[str, str], work: Path) -> Source:
    """Checks that `columns` (role -> column name) are there. local: the file itself, or a copy of it on this disk.
    work: a folder for the unpacked text of one file at a time."""
    if local.stat().st_size == 0:
        raise DataError(f"{path}: empty file (0 bytes); remove it from input")
    if format == "parquet":
        return _open_parquet(path, local, columns)
    return _open_text(path, _unpacked(path, local, work), format, columns)


def check_same_kinds(source: Source, kinds: dict[str, str], first: Location | str) -> None:
    """DataError where a file's columns are not of the kinds of the first file's; times may differ."""
    for role, kind in source.kinds.items():
        if role != "timestamp" and kind != kinds[role]:
            raise DataError(
                f"{source.path}: {role} is {kind}, but {kinds[role]} in {first}; all files must agree, cast one of them"
            )


def text_id_sql(value: str) -> str:
    """SQL of an id that is text; NULL for the empty one."""
    return f"nullif({value}, '')"


def category_sql(value: str) -> str:
    """SQL of an integer of a context column as BIGINT. Too big a one is an error: NULL would make it "unknown"."""
    return f"CAST({value} AS BIGINT)"


def whole_sql(value: str, type: pa.DataType) -> str:
    """SQL of a number of Parquet as BIGINT; NULL where it is not whole, too big, or no longer exact as a float."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    if pa.types.is_integer(type):
        return f"TRY_CAST({value} AS BIGINT)"
    exact = ""
    if pa.types.is_floating(type) or pa.types.is_decimal256(type):  # DuckDB reads the latter as DOUBLE
        exact = f" AND abs({value}) < {1 << EXACT_BITS.get(type, 53)}"
    return f"CASE WHEN {value} = floor({value}){exact} THEN TRY_CAST({value} AS BIGINT) END"


def text_sql(value: str, kind: str) -> str:
    """SQL of a value of Parquet as VARCHAR; bytes must be UTF-8."""
    return f"decode({value})" if kind == "binary" else f"CAST({value} AS VARCHAR)"


def kind_of(type: pa.DataType) -> str:
    """What values of an Arrow type are: "int64", "float", "decimal", "bool", "text", "binary" (perhaps text), "uuid",
    "time", or "other"."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    is_type = pa.types
    if is_type.is_integer(type):
        return "int64"
    if is_type.is_floating(type) or is_type.is_decimal(type):
        return "float" if is_type.is_floating(type) else "decimal"
    if is_type.is_string(type) or is_type.is_large_string(type) or is_type.is_string_view(type):
        return "text"
    if is_type.is_null(type) or is_type.is_boolean(type):
        return "text" if is_type.is_null(type) else "bool"
    if is_type.is_binary(type) or is_type.is_large_binary(type) or is_type.is_binary_view(type):
        return "binary"
    if is_type.is_timestamp(type) or is_type.is_date(type):
        return "time"
    return "uuid" if getattr(type, "extension_name", None) == "arrow.uuid" else "other"


def cast_ids(values: pa.Array, stored: str, *, where: str) -> pa.Array:
    """Ids or categories as the store has them ("int64" or "string"): whole numbers of any type; text, true and false.
    DataError."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kinds = ("int64", "float", "decimal") if stored == "int64" else ("text", "binary", "bool")
    if kind_of(values.type) not in kinds and not pa.types.is_null(values.type):
        raise DataError(f"{where} is {values.type}, not of the store's type ({stored}); cast it")
    bits = EXACT_BITS.get(values.type, 64)
    if bits < 64 and np.any(np.abs(values.to_numpy(zero_copy_only=False)) >= 1 << bits):
        raise DataError(f"{where} is {values.type}, no longer exact from {1 << bits} on; write ids as {stored}")
    try:
        return values.cast(ARROW_TYPES[stored])
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: {error}; write ids as {stored}") from error


def parquet_schema(path: Location, local: Path) -> tuple[pa.Schema, int]:
    """(schema, number of rows) of a Parquet file; DataError where it is none."""
    try:
        with pq.ParquetFile(local) as file:
            return file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({error}); truncated? write or copy it again") from error


def parquet_scan(local: Path, num_columns: int) -> str:
    """SQL of a Parquet file with columns c0, c1, ...: names in SQL ignore case, names in files need not."""
    names = ", ".join(f"c{i}" for i in range(num_columns))
    return f"read_parquet({quote(glob.escape(str(local)))}, hive_partitioning=false) AS file({names})"


def find_column(path: Location, names: list[str], name: str, *, setting: str) -> str:
    """SQL of the column that has this very name: one of the file's (`names`), or for context a Hive folder's value."""
    if names.count(name) == 1:
        return f"c{names.index(name)}"
    keys = partition_values(path)
    if name in names or name not in keys:
        what = "not unique" if name in names else "missing"
        folders = f"; its folders: {', '.join(keys)}" if keys else ""
        raise DataError(f"{path}: column '{name}' is {what}; it has: {named(names)}{folders}. Set {setting}")
    if setting != "context_columns":
        raise DataError(
            f"{path}: '{name}' is in the name of a folder, which is read for context_columns only, not for {setting}. "
            "Write it into the file; " + rewrite(path, f"*, {quote(keys[name] or '')} AS {name}")
        )
    return "CAST(NULL AS VARCHAR)" if keys[name] is None else quote(keys[name])


def rewrite(path: Location, columns: str) -> str:
    """One line that mends a file, for messages."""
    return f"DuckDB: COPY (SELECT {columns} FROM '{path}') TO 'mended.parquet'"


def unreadable(path: Location, error: duckdb.Error, *, has_quotes: bool) -> str:
    """What DuckDB says is wrong, without its own options for it and without megabytes of the line at fault; and what
    to do."""
    text, advice = str(error), ""
    if "not utf-8" in text:
        advice = f"\nSave it as UTF-8: iconv -f LATIN1 -t UTF-8 {path}"
    elif "invalid UTF8" in text:
        advice = "\nA column of bytes is read as text; where it holds none, hex() makes text of it. "
        advice += rewrite(path, "* REPLACE (hex(NAME) AS NAME)")
    elif "out of range" in text:
        advice = "\nWrite such a column as text. " + rewrite(path, "* REPLACE (CAST(NAME AS VARCHAR) AS NAME)")
    elif not has_quotes and "Expected Number of Columns" in text:
        advice = "\nTSV has no quotes: where this file has them round its fields, set format=csv"
    lines = [line for line in text.split("\nPossible ")[0].splitlines() if line.strip()][:4]
    short = [line if len(line) <= 200 else f"{line[:200]}... ({len(line):,} characters)" for line in lines]
    return f"{path}: cannot be read: " + "\n".join(short) + advice


def named(columns: list[str]) -> str:
    """Names as messages list them; a file may have thousands."""
    text = ", ".join(columns)
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def quote(text: str) -> str:
    """A text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _unpacked(path: Location, local: Path, work: Path) -> Path:
    """The text of a packed file. DuckDB takes a truncated gzip or zstd for a shorter file, and reads no bz2."""
    if (packing := codec(path)) is None:
        return local
    text = work / "unpacked"
    try:
        with pa.input_stream(str(local), compression=packing) as packed, text.open("wb") as file:
            copy_unpacked(packed, file, name=path, packed_bytes=local.stat().st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read as {packing} ({error}); truncated? write or copy it again") from error
    return text


def _open_text(path: Location, local: Path, format: str, columns: dict[str, str]) -> Source:
    header, delimiter = _read_header(path, local, format, columns)
    settings = column_settings(columns)
    raw = {role: find_column(path, header, name, setting=settings[role]) for role, name in columns.items()}
    # Positional names: SQL names ignore case, headers need not.
    names = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(header)))
    scan = (
        f"read_csv({quote(glob.escape(str(local)))}, delim={quote(delimiter)}, quote='{QUOTES[format]}', "
        f"escape='{QUOTES[format]}', header=true, auto_detect=false, columns={{{names}}}, parallel="
    )
    ids = {role: text_id_sql(value) for role, value in raw.items()}
    quoted = QuotedText(local, delimiter, f"{scan}false)") if QUOTES[format] else None
    return Source(path, f"{scan}true)", raw, ids, dict.fromkeys(columns, "text"), quoted=quoted)


def _read_header(path: Location, local: Path, format: str, columns: dict[str, str]) -> tuple[list[str], str]:
    """(names, delimiter); DataError where no delimiter gives one of the columns."""
    quoting = csv.QUOTE_MINIMAL if QUOTES[format] else csv.QUOTE_NONE
    try:
        with local.open("rb") as file:
            line = file.readline(LINE_BYTES).decode("utf-8-sig")
        headers = {d: next(csv.reader([line], delimiter=d, quoting=quoting), []) for d in DELIMITERS[format]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read the header ({error}); give UTF-8 {format.upper()}") from error
    wanted = set(columns.values()) - set(partition_values(path))
    delimiter = max(headers, key=lambda d: len(wanted & set(headers[d])))
    header = headers[delimiter]
    if wanted & set(header):
        return header, delimiter
    role, name = next((role, name) for role, name in columns.items() if name in wanted)
    advice = f"Set {column_settings(columns)[role]}, or write the names into a first line if the file has none"
    if format == "tsv" and '"' in line:
        advice += "; TSV has no quotes, set format=csv to have them taken off"
    raise DataError(f"{path}: column '{name}' is missing; it has: {named(header)}. {advice}")


def _open_parquet(path: Location, local: Path, columns: dict[str, str]) -> Source:
    schema, num_rows = parquet_schema(path, local)
    settings, scan = column_settings(columns), parquet_scan(local, len(schema.names))
    raw = {role: find_column(path, schema.names, name, setting=settings[role]) for role, name in columns.items()}
    if num_rows == 0:  # its types say nothing: pandas has none for a column without values
        return Source(path, scan, raw, {}, {}, is_empty=True)
    ids, kinds = {}, {}
    for role, name in columns.items():
        if name not in schema.names:
            kinds[role], ids[role] = "text", text_id_sql(raw[role])
            continue
        type = schema.field(name).type
        kind = kinds[role] = _parquet_kind(path, role, name, type, settings)
        if kind == "time":
            kinds[role] = stored_time_kind(str(path), local, name)
        elif kind == "text":
            raw[role] = text_sql(raw[role], kind_of(type))
        whole = whole_sql(raw[role], type) if role in NAMED_ROLES else category_sql(raw[role])
        ids[role] = whole if kind == "int64" else text_id_sql(raw[role])
    return Source(path, scan, raw, ids, kinds)


def _parquet_kind(path: Location, role: str, name: str, type: pa.DataType, settings: dict[str, str]) -> str:
    """The kind of a column as it is staged; DataError for a type that its role cannot have."""
    kind, is_number = kind_of(type), kind_of(type) in ("float", "decimal")
    if role == "timestamp":
        if kind in ("int64", "time", "text") or is_number:
            return "float32" if pa.types.is_float32(type) else "float" if is_number else kind
    elif kind == "int64" or (is_number and role in NAMED_ROLES):
        return "int64"
    elif kind in ("text", "binary", "uuid") or (role not in NAMED_ROLES and (is_number or kind == "bool")):
        return "text"
    wanted = "an integer, a number or a timestamp" if role == "timestamp" else "int64 or string"
    target = "BIGINT" if role == "timestamp" else "VARCHAR"
    cast = f'hex("{name}")' if pa.types.is_fixed_size_binary(type) else f'CAST("{name}" AS {target})'
    raise DataError(
        f"{path}: column '{name}' is {type}, {settings[role]} must be {wanted}; cast it, or name another column. "
        + rewrite(path, f'* REPLACE ({cast} AS "{name}")')
    )
