"""A folder of scores: a Parquet dataset for pandas, PyArrow, Spark and DuckDB ('OUT/*.parquet'), and its side files.

    OUT/_job.json             what is being scored, with which model; a rerun with other settings is refused
    OUT/part-00003.parquet    synced, then renamed into place; its metadata name the job, the rows and the columns
    OUT/_manifest.json        rows, bytes and sha256 of each part; written when all parts are there
    OUT/.lock                 who is scoring into it, while they do

A rerun checks the parts that are there: by their sha256 where the manifest has it, else by reading them through. What
is broken, or was made by another job, is scored again, and a line says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from elastic_rec.feature_store.utils.atomic_write import atomic_write, remove_leftovers, sync
from elastic_rec.feature_store.utils.checked_json import describe_file, fault_in, read_checked, write_checked
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.locks import LOCK, hold_folder
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World

JOB, MANIFEST = "_job.json", "_manifest.json"
ABOUT = b"elastic-rec-scores"


class ScoreFolder:
    """The parts of one job, by number. settings: what their content depends on, JSON-able."""

    def __init__(self, out: Path, settings: dict[str, Any], *, world: World) -> None:
        self.out, self.world = out, world
        self.settings = json.loads(json.dumps(settings, default=str))
        self.job = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self._known: dict[int, dict[str, Any]] = {}  # whole parts that this rank has checked or written

    @contextmanager
    def writing(self, numbers: Iterable[int]) -> Iterator[ScoreFolder]:
        """Holds the folder, made if need be, for a job with these parts. Collective.

        Raises ConfigError where the folder holds anything but this job; DataError where another job is at work in it.
        """
        with ExitStack() as held:
            if self.world.is_main:
                self._check(numbers)
                remedy = "wait until it has ended, or give another out=DIR"
                held.enter_context(hold_folder(self.out, job="scoring", remedy=remedy))
                self._check(numbers)  # again: another may have begun and ended since
                remove_leftovers(self.out)
                if not (self.out / JOB).exists():
                    write_checked(self.out / JOB, self.settings)
            dist.barrier()
            yield self

    def path(self, number: int) -> Path:
        """Of a part, there or not."""
        return self.out / f"part-{number:05d}.parquet"

    def whole(self, numbers: list[int]) -> dict[int, dict[str, Any]]:
        """What is known of the parts that are there and whole: rows, bytes, sha256 and what `commit` was told. Broken
        ones are named. Each rank checks its share. Collective."""
        manifest = self._manifest()
        mine = {number: self._read(number, manifest) for number in numbers[self.world.rank :: self.world.size]}
        found = dict(sorted(item for each in self.world.of_all(mine) for item in each.items()))
        for fault in found.values():
            if isinstance(fault, str):
                self.world.log(f"{fault}: scored again")
        whole = {number: about for number, about in found.items() if isinstance(about, dict)}
        self._known |= {number: about for number, about in whole.items() if number in mine}
        return whole

    def begin(self) -> None:
        """Says that parts will change: the manifest of an earlier state of them goes. Collective."""
        if self.world.is_main and (self.out / MANIFEST).exists():
            (self.out / MANIFEST).unlink()
            sync(self.out)
        dist.barrier()

    def commit(self, number: int, table: pa.Table, **about: Any) -> None:
        """Writes a part; after it the part lasts, through a power cut too. about: kept in its metadata."""
        table = table.replace_schema_metadata(None)
        about |= {"job": self.job, "rows": len(table), "columns": _columns(_as_read(table.schema))}
        with atomic_write(self.path(number)) as aside:
            table = table.replace_schema_metadata({ABOUT: json.dumps(about)})
            pq.write_table(table, aside, compression="zstd", write_page_checksum=True)
        self._known[number] = {**about, **describe_file(self.path(number))}

    def close(self, numbers: list[int], *, unit: str = "rows", **about: Any) -> dict[int, int]:
        """Writes the manifest when all ranks have committed their parts. Returns rows by part. Collective.

        unit: what a row is, the name of the manifest's total.
        """
        known = {number: each for part in self.world.of_all(self._known) for number, each in part.items()}
        if self.world.is_main:
            keys = ("rows", "bytes", "sha256")
            parts = [{"path": self.path(n).name, **{key: known[n][key] for key in keys}} for n in numbers]
            manifest = {"parts": parts, unit: sum(part["rows"] for part in parts), "job": self.job, **about}
            if manifest != self._manifest():
                write_checked(self.out / MANIFEST, manifest)
        return {number: known[number]["rows"] for number in numbers}

    def _check(self, numbers: Iterable[int]) -> None:
        there = {path.name for path in self.out.iterdir()} - {LOCK} if self.out.exists() else set()
        there = {name for name in there if not (name.startswith(".") and name.endswith(".tmp"))}  # of killed writes
        if JOB in there:
            check_settings(self.out, self.settings)
            strange = {name for name in there if name.startswith("part-")} - {self.path(n).name for n in numbers}
            strange = {name for name in strange if name.endswith(".parquet")}
            if strange:
                raise ConfigError(f"{self.out / sorted(strange)[0]} is no part of this job: remove it")
        elif there:
            raise ConfigError(f"{self.out} is not empty and holds no scores (no {JOB}): give another out=DIR")

    def _manifest(self) -> dict[str, Any]:
        try:
            return read_checked(self.out / MANIFEST)
        except (FileNotFoundError, DataError):
            return {}  # then parts are read through

    def _read(self, number: int, manifest: dict[str, Any]) -> dict[str, Any] | str | None:
        """What is known of a part, what is wrong with it, or None where there is none."""
        path = self.path(number)
        if not path.exists():
            return None
        entries = {entry["path"]: entry for entry in manifest.get("parts", ()) if manifest["job"] == self.job}
        if path.name in entries and (fault := fault_in(self.out, {path.name: entries[path.name]})):
            return fault
        try:
            about = about_part(path, read=path.name not in entries)
        except DataError as error:
            return str(error)
        if about.get("job") != self.job:
            return f"{path} was made by another job (by another model, or from another store or other settings)"
        return {**about, **describe_file(path)}


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError where the scores in `out` were made with others."""
    was = job_of(out)
    key = next((key for key in settings if was.get(key) != settings[key]), None)
    if key == "model":
        raise ConfigError(
            f"{out} holds scores of another model (fingerprint {str(was.get(key))[:12]}, this one's is "
            f"{settings[key][:12]}), though of the same run and step; give another out=DIR, or remove that folder"
        )
    if key is not None:
        raise ConfigError(
            f"{out} holds scores made with {key}={was.get(key)!r}, asked for now: {settings[key]!r}; "
            "give another out=DIR, or remove that folder"
        )


def job_of(out: Path) -> dict[str, Any]:
    """The settings of the scores in a folder; empty where there are none."""
    try:
        return read_checked(out / JOB)
    except FileNotFoundError:
        return {}
    except DataError as error:
        raise ConfigError(f"{error}: give another out=DIR, or remove that folder") from error


def about_part(path: Path, *, read: bool) -> dict[str, Any]:
    """What a part's metadata say. Raises DataError where the file is not what they say. read: all of it, too."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            about = json.loads((schema.metadata or {}).get(ABOUT, b"{}"))
            rows = sum(len(batch) for batch in file.iter_batches()) if read else file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if about and (rows, _columns(schema)) != (about.get("rows"), about.get("columns")):
        raise DataError(f"{path} is damaged: it has not the rows and columns that it was written with")
    return about


def _columns(schema: pa.Schema) -> str:
    return schema.to_string(show_field_metadata=False, show_schema_metadata=False)


def _as_read(schema: pa.Schema) -> pa.Schema:
    """What a reader of the Parquet file sees: writing renames the fields of lists, for one."""
    written = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), written)
    return pq.read_schema(pa.BufferReader(written.getvalue()))
