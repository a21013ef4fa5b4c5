"""Which files an ingest reads: the entries of `input` -> data files, none left out without a word and none taken twice.

    a file               that file
    a folder             every file in it and below, sorted by path
    a glob               every file that matches; a matching folder stands for all files in it and below

Names that begin with "_" or "." and *.crc files are what Spark, Hadoop and editors leave beside data: they are passed
over below a folder and where a wildcard meets them. Every other file is read, or the ingest ends with its name.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from urllib.parse import unquote

from elastic_rec.feature_store.table.format import SourceFile
from elastic_rec.feature_store.table.location import WILDCARD, Location, open_location
from elastic_rec.feature_store.utils.credentials import refuse_credentials
from elastic_rec.feature_store.utils.errors import DataError

SUFFIXES = {"csv": (".csv",), "tsv": (".tsv",), "parquet": (".parquet", ".pq")}
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # suffix -> Arrow's name of the codec, for text files
PARTITION = re.compile(r"([^/=]+)=([^/]*)")  # a folder of a Hive table: dt=2024-01-01
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def find_inputs(inputs: list[str], *, format: str) -> tuple[list[Location], str]:
    """Files in the order of `inputs`, and their format: "csv", "tsv" or "parquet".

    The order matters: it breaks ties between equal timestamps. format: "auto" goes by the names, and by the content of
    files whose name says nothing; any other is taken for all files. Raises DataError for an entry without files, a file
    of unknown or another format, a file that is named twice, and a folder that is a Delta, Hudi or Iceberg table.
    """
    if not inputs or "" in inputs:
        raise DataError("input is empty: give at least one file, glob or folder")
    paths: list[Location] = []
    for entry in inputs:
        place, found = _files_of(os.fspath(entry))
        if not found:
            raise DataError(f"input '{entry}': {_nothing_found(entry, place, inputs)}")
        if place is not None:
            _refuse_tables(place, found)
            if format != "auto" and not WILDCARD.search(entry):
                _refuse_named_otherwise(found, format)
        paths += found
    if twice := sorted(str(path) for path, count in Counter(paths).items() if count > 1):
        raise DataError(f"{twice[0]}: matched twice by input; each event would be counted twice")
    return paths, _common_format(paths) if format == "auto" else format


def check_entries(entries: list[SourceFile]) -> None:
    """entries: of all files read. DataError where none has a row, or two have the same bytes: a copy or a link under
    another name. Files without rows say nothing twice."""
    if not any(entry.events for entry in entries):
        others = f", nor in the other {len(entries) - 1} files" if len(entries) > 1 else ""
        raise DataError(f"{entries[0].path}: no rows (a header at most){others}; check input")
    first: dict[str, SourceFile] = {}
    for entry in entries:
        if entry.events and (same := first.setdefault(entry.sha256, entry)) is not entry:
            raise DataError(
                f"{entry.path}: the same bytes as {same.path}; each row would be counted twice, leave one of them out "
                "of input"
            )


def partition_values(path: Location) -> dict[str, str | None]:
    """Key -> value of the Hive folders in a path (dt=2024-01-01); None for Hive's name of null. Both are unescaped."""
    found = [PARTITION.fullmatch(part) for part in path.url.split("/")[:-1]]
    values = {unquote(match[1]): unquote(match[2]) for match in found if match}
    return {key: None if value == NULL_PARTITION else value for key, value in values.items()}


def codec(path: Location) -> str | None:
    """How a text file is packed, by its name: "gzip", "bz2", "zstd", or None."""
    return PACKED.get(os.path.splitext(path.name.lower())[1])


def _files_of(entry: str) -> tuple[Location | None, list[Location]]:
    """(the folder that was looked through, None for a file named as such; the files). A local name with wildcards may
    be a file's or folder's own."""
    refuse_credentials(entry)
    entry = entry.removeprefix("file://")
    if "://" not in entry or not WILDCARD.search(entry):
        place = open_location(entry)
        if place.is_file():
            return None, [place]
        if place.is_dir():
            return place, _below(place)
        if not WILDCARD.search(entry):
            return None, []
    parts = entry.rstrip("/").split("/")
    wild = next(i for i, part in enumerate(parts) if WILDCARD.search(part))
    root = open_location("/".join(parts[:wild]) or ("/" if entry.startswith("/") else "."))
    if not root.is_local:
        return root, [file for file in root.files() if _matches(file.below(root).split("/"), parts[wild:])]
    found: dict[Location, None] = {}
    for path in sorted(glob.glob(entry.rstrip("/"), recursive=True), key=lambda path: path.split("/")):
        if _matches(path.split("/")[wild:], parts[wild:]):
            match = open_location(path)
            found |= dict.fromkeys(_below(match) if match.is_dir() else [_regular(path)])
    return root, list(found)


def _below(folder: Location) -> list[Location]:
    """The data files in a folder and below. Arrow lists no link that leads nowhere; on the local disk they count."""
    if folder.is_local:
        paths = [os.path.join(at, name) for at, _, names in _walk(folder.path) for name in names]
        shown = [path for path in paths if _is_shown(path.removeprefix(folder.path).lstrip("/").split("/"))]
        return [_regular(path) for path in sorted(shown, key=lambda path: path.split("/"))]
    return [file for file in folder.files() if _is_shown(file.below(folder).split("/"))]


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); its files would be left out")

    return os.walk(folder, onerror=unreadable, followlinks=True)


def _regular(path: str) -> Location:
    if not os.path.isfile(path):
        raise DataError(f"{path}: no regular file (a link to nothing, or a pipe); remove it, or name the files to read")
    return open_location(path)


def _is_shown(parts: list[str]) -> bool:
    return not any(part.startswith(("_", ".")) for part in parts) and not parts[-1].endswith(".crc")


def _matches(path: list[str], pattern: list[str]) -> bool:
    """Does a glob match the path, or a folder that it is below?"""
    if not pattern:
        return not path or _is_shown(path)
    if not path:
        return pattern == ["**"]
    if pattern[0] == "**":
        return _matches(path, pattern[1:]) or (_is_shown(path[:1]) and _matches(path[1:], pattern))
    is_hidden = not _is_shown(path[:1]) and WILDCARD.match(pattern[0])
    return fnmatch.fnmatchcase(path[0], pattern[0]) and not is_hidden and _matches(path[1:], pattern[1:])


def _nothing_found(entry: str, place: Location | None, inputs: list[str]) -> str:
    if place is not None and not WILDCARD.search(entry):
        return "no data file in this folder (names that begin with _ or . and *.crc are passed over)"
    advice = "check the path"
    if entry.startswith("~"):
        advice = "~ is not expanded here, write the whole path"
    elif "[" in entry:
        advice += "; [ begins a wildcard, [[] is the bracket itself"
    elif len(inputs) > 1:
        advice += "; a name with a comma is quoted for Hydra: 'data.ingest.input=[\"/logs/a,b.csv\"]'"
    return f"no file matches; {advice}"


def _refuse_tables(place: Location, files: list[Location]) -> None:
    """A table's log says which of its files count; reading all of them brings deleted and replaced rows back."""
    folders = {place: None} | dict.fromkeys(_table_folder(file.parent) for file in files)
    for folder in list(folders):
        if folder.name == "data" and (folder.is_local or "/" in folder.path):  # where Iceberg keeps the files
            folders[folder.parent] = None
    logs = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata": "Iceberg"}
    for folder in folders:
        for name, kind in logs.items():
            log = folder / name
            if log.is_dir() and (
                kind != "Iceberg" or any(file.name.endswith(".metadata.json") for file in log.files(recursive=False))
            ):
                raise DataError(
                    f"{folder}: a table of {kind} ({name}), whose files also hold rows that were deleted or replaced; "
                    f"{_export(folder, kind)}, or name each file to read"
                )


def _export(folder: Location, kind: str) -> str:
    if kind == "Hudi":
        return "export the current rows as Parquet with Spark"
    scan = f"{kind.lower()}_scan('{folder}')"
    return f"export the current rows, with DuckDB: COPY (FROM {scan}) TO 'events.parquet'"


def _table_folder(folder: Location) -> Location:
    """The folder of the table that a data file's folder belongs to."""
    while PARTITION.fullmatch(folder.name):
        folder = folder.parent
    return folder


def _refuse_named_otherwise(files: list[Location], format: str) -> None:
    for file in files:
        if (named := _named_format(file)) not in (None, format):
            raise DataError(f"{file}: is named {named}, but {format} is to be read; move it away, or name the files")


def _common_format(paths: list[Location]) -> str:
    formats = {path: _named_format(path) or _parquet_inside(path) for path in paths}
    if unknown := [path for path, format in formats.items() if format is None]:
        more = f" ({len(unknown) - 1} more such files)" if len(unknown) > 1 else ""
        raise DataError(
            f"{unknown[0]}: format unknown from its name{more}; set format to csv, tsv or parquet (for all files), or "
            "give what is no data a name that begins with _"
        )
    if len(set(formats.values())) > 1:
        one, *_, other = sorted(formats, key=lambda p: formats[p])
        raise DataError(f"input mixes formats: {one} is {formats[one]}, {other} is {formats[other]}; ingest one")
    return formats[paths[0]]


def _named_format(path: Location) -> str | None:
    name = path.name.lower()
    stem, suffix = os.path.splitext(name)
    for format, suffixes in SUFFIXES.items():
        if name.endswith(suffixes) or (format != "parquet" and suffix in PACKED and stem.endswith(suffixes)):
            return format
    return None


def _parquet_inside(path: Location) -> str | None:
    """Hive names files 000000_0."""
    with path.open() as file:
        return "parquet" if file.read(4) == b"PAR1" else None
