"""Input files of an ingest: finding them, checking their columns, and the SQL that reads each as (text | int64).

A column has one of two kinds after reading: "int64" (integer Parquet columns) or "text" (all of CSV/TSV, and Parquet
strings). Whether text ids are really integers is decided later over the distinct values of ALL files (engine.py), not
by sniffing the first rows.
"""

from __future__ import annotations

import csv
import glob
import gzip
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.filesystem import WILDCARD, Location, find_files, open_location
from elastic_rec.feature_store.limits import copy_unpacked
from elastic_rec.feature_store.schema import UNITS_PER_SECOND

SUFFIXES = {
    "csv": (".csv", ".csv.gz"),
    "tsv": (".tsv", ".tsv.gz"),
    "parquet": (".parquet", ".pq"),
}
DELIMITERS = {"csv": ",", "tsv": "\\t"}


@dataclass(frozen=True)
class Source:
    """One input file. path: as messages name it. scan: SQL table function. raw: column -> SQL of the value as it
    stands in the file. kinds: column -> "int64" | "text" | "float" | "time" (the last two in Parquet only)."""

    path: Location
    scan: str
    raw: dict[str, str]
    kinds: dict[str, str]


def column_settings(columns: dict[str, str]) -> dict[str, str]:
    """role -> the config key that names its column, for the remedies of messages."""
    named = ("user", "item", "timestamp", "event_id")
    return {role: f"{role}_column" if role in named else "context_columns" for role in columns}


def find_inputs(inputs: list[str], *, format: str) -> tuple[list[Location], str]:
    """Files in the order of `inputs`; a folder (recursively) or a glob gives its files sorted by path.

    Returns (paths, "csv" | "tsv" | "parquet"). The order matters: it breaks ties between equal timestamps.
    """
    known = [suffix for name, suffixes in SUFFIXES.items() if format in ("auto", name) for suffix in suffixes]
    paths: list[Location] = []
    for entry in inputs:
        found = _files_of(os.fspath(entry), tuple(known))
        if not found:
            raise DataError(f"input '{entry}': no file matches (looked for {', '.join(known)}); check the path")
        paths += found
    if not paths:
        raise DataError("input is empty: give at least one file, glob or folder")
    if twice := sorted(str(path) for path, count in Counter(paths).items() if count > 1):
        raise DataError(f"{twice[0]}: matched twice by input; each event would be counted twice")
    if format == "auto":
        formats = {p: _format_of(p) for p in paths}
        if len(set(formats.values())) > 1:
            one, *_, other = sorted(formats, key=lambda p: formats[p])
            raise DataError(f"input mixes formats: {one} is {formats[one]}, {other} is {formats[other]}; ingest one")
        format = formats[paths[0]]
    return paths, format


def open_source(path: Location, local: Path, *, format: str, columns: dict[str, str]) -> Source:
    """Checks that `columns` (role -> column name) are there. local: the file itself, or a copy of it on this disk."""
    if local.stat().st_size == 0:
        raise DataError(f"{path}: empty file (0 bytes); remove it from input")
    return (_open_parquet if format == "parquet" else _open_text)(
        path, local, format, columns, column_settings(columns)
    )


def check_same_kinds(source: Source, kinds: dict[str, str], first: Location | str) -> None:
    """DataError where a file's columns are not of the kinds of the first file's; times may differ."""
    for role, kind in source.kinds.items():
        if role != "timestamp" and kind != kinds[role]:
            raise DataError(
                f"{source.path}: {role} is {kind}, but {kinds[role]} in {first}; all files must agree, cast one of them"
            )


def time_sql(value: str, kind: str, unit: str) -> str:
    """SQL of a timestamp as BIGINT in `unit`; NULL where it is null, not a number, negative, fractional or too big."""
    if kind == "time":
        factor = 10**9 // UNITS_PER_SECOND[unit]
        return f"CASE WHEN {value} >= 0 AND {value} % {factor} = 0 THEN {value} // {factor} END"
    if kind == "int64":
        return f"CASE WHEN {value} >= 0 THEN TRY_CAST({value} AS BIGINT) END"
    number = f"TRY_CAST({value} AS DOUBLE)"  # NaN counts as greater than all else, hence isfinite
    return (
        f"CASE WHEN isfinite({number}) AND {number} >= 0 AND {number} = floor({number}) "
        f"THEN TRY_CAST({value} AS BIGINT) END"
    )


def id_sql(value: str, kind: str) -> str:
    """SQL of an id: BIGINT, or VARCHAR with the empty string as NULL."""
    return f"TRY_CAST({value} AS BIGINT)" if kind == "int64" else f"nullif({value}, '')"


def _files_of(entry: str, known: tuple[str, ...]) -> list[Location]:
    """What one entry of `input` stands for. A local name with brackets may be a file's own."""
    place = open_location(entry) if "://" not in entry or not WILDCARD.search(entry) else None
    if place is not None and place.is_dir():
        return [file for file in place.files() if file.name.endswith(known) and _is_data(file, place)]
    if place is not None and place.is_file():
        return [place]
    return find_files(entry)


def _is_data(file: Location, folder: Location) -> bool:
    # Spark and friends leave _SUCCESS, _temporary/ and .crc files beside the data.
    return not any(part.startswith(("_", ".")) for part in file.below(folder).split("/"))


def _format_of(path: Location) -> str:
    for name, suffixes in SUFFIXES.items():
        if path.name.endswith(suffixes):
            return name
    raise DataError(f"{path}: format unknown from its name; set format to csv, tsv or parquet")


def _open_text(path: Location, local: Path, format: str, columns: dict[str, str], settings: dict[str, str]) -> Source:
    opener = gzip.open if path.name.endswith(".gz") else open
    delimiter = "\t" if format == "tsv" else ","
    try:
        with opener(local, "rb") as file:
            header = next(csv.reader([file.readline().decode("utf-8-sig")], delimiter=delimiter), [])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read the header ({error}); give UTF-8 {format.upper()}") from error
    if opener is gzip.open:
        _check_gzip(path, local)
    _require(path, header, columns, settings)
    # Positional names: SQL names ignore case, headers need not.
    names = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(header)))
    scan = (
        f"read_csv({quote(glob.escape(str(local)))}, delim='{DELIMITERS[format]}', quote='\"', escape='\"', "
        f"header=true, auto_detect=false, columns={{{names}}})"
    )
    raw = {role: f"c{header.index(name)}" for role, name in columns.items()}
    return Source(path, scan, raw, dict.fromkeys(columns, "text"))


def _open_parquet(
    path: Location, local: Path, format: str, columns: dict[str, str], settings: dict[str, str]
) -> Source:
    try:
        file = pq.ParquetFile(local)
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
        file.close()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({error}); truncated? write or copy it again") from error
    _require(path, schema.names, columns, settings)
    if num_rows == 0:
        raise DataError(f"{path}: no events (0 rows); remove it from input")
    scan = f"read_parquet({quote(glob.escape(str(local)))}, hive_partitioning=false)"
    raw, kinds = {}, {}
    for role, name in columns.items():
        kinds[role] = _parquet_kind(path, role, name, schema.field(name).type, settings)
        sql = '"' + name.replace('"', '""') + '"'
        if kinds[role] == "time":
            sql = f"epoch_ns(CAST({sql} AS TIMESTAMP_NS))"
        elif kinds[role] == "text":
            sql = f"CAST({sql} AS VARCHAR)"
        raw[role] = sql
    return Source(path, scan, raw, kinds)


def _check_gzip(path: Location, local: Path) -> None:
    """Unpacks to the end: DuckDB 1.4 takes a truncated gzip for a shorter file and loses events without a word."""
    try:
        with gzip.open(local, "rb") as file, open(os.devnull, "wb") as nowhere:
            copy_unpacked(file, nowhere, name=path, packed_bytes=local.stat().st_size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as gzip ({error}); truncated? write or copy it again") from error


def _parquet_kind(path: Location, role: str, name: str, type: pa.DataType, settings: dict[str, str]) -> str:
    if pa.types.is_dictionary(type):
        type = type.value_type
    is_text = pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_null(type)
    is_number = pa.types.is_floating(type) or pa.types.is_decimal(type)
    if pa.types.is_integer(type):
        return "int64"
    if is_text or (role not in ("user", "item", "timestamp", "event_id") and (is_number or pa.types.is_boolean(type))):
        return "text"
    if role == "timestamp" and is_number:
        return "float"
    if role == "timestamp" and (pa.types.is_timestamp(type) or pa.types.is_date(type)):
        return "time"
    wanted = "an integer, a number or a timestamp" if role == "timestamp" else "int64 or string"
    raise DataError(
        f"{path}: column '{name}' is {type}, {settings[role]} must be {wanted}; cast it, or name another column"
    )


def _require(path: Location, names: list[str], columns: dict[str, str], settings: dict[str, str]) -> None:
    for role, name in columns.items():
        if names.count(name) != 1:
            what = "missing" if name not in names else "not unique"
            raise DataError(f"{path}: column '{name}' is {what}; it has: {', '.join(names)}. Set {settings[role]}")


def quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
