"""One line for what the machine or a file lacks: every error that libraries make of it, by kind."""

from __future__ import annotations

import errno
import os

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from elastic_rec.feature_store.utils.atomic_write import atomic_write
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.runtime.endings import REMEDIES, ending_of, explain
from elastic_rec.pipeline.runtime.errors import ConfigError


def caught(function, *arguments) -> BaseException:
    with pytest.raises(BaseException) as found:
        function(*arguments)
    return found.value


@pytest.mark.parametrize("number", sorted(REMEDIES), ids=errno.errorcode.get)
def test_the_systems_errors_name_the_path_what_happened_and_what_to_do(number):
    ending = ending_of(OSError(number, os.strerror(number), "/data/x.parquet"))
    assert ending.code == 2 and "\n" not in ending.line
    assert ending.line.startswith(f"error: /data/x.parquet: {os.strerror(number)}")
    assert ending.line.endswith(REMEDIES[number])
    # The same as pyarrow, DuckDB and torch say it, in words alone.
    words = f'Could not write file "/data/x.parquet": {os.strerror(number)}'
    for error in (duckdb.IOException(f"IO Error: {words}"), RuntimeError(words), OSError(words)):
        assert explain(error) == ending.line.removeprefix("error: ")


def test_a_full_disk_is_named_by_what_was_being_written(tmp_path):
    def write(path):
        with atomic_write(path) as aside:
            aside.symlink_to("/dev/full")
            pq.write_table(pa.table({"x": list(range(100_000))}), aside)

    line = explain(caught(write, tmp_path / "part.parquet"))
    assert line.startswith(f"{tmp_path}/part.parquet: No space left on device: free space") and not os.listdir(tmp_path)


def test_what_torch_makes_of_a_full_disk():
    def save():
        with open("/dev/full", "wb") as file:
            torch.save(torch.zeros(100_000), file)

    error = caught(save)
    assert explain(error).startswith("No space left on device")
    collective = CheckpointException("save", {1: _wrap_exception(error)})
    collective.add_note("/runs/x/checkpoints/step-00000420")
    assert explain(collective).startswith("/runs/x/checkpoints/step-00000420: No space left on device: free")


def test_an_exhausted_machine_is_the_cause_whatever_it_was_taken_for():
    full = duckdb.IOException('IO Error: Could not write file "/s/staged.duckdb.wal": No space left on device')
    taken = DataError("/in.csv: cannot be read: mend it")
    taken.__cause__ = full
    assert ending_of(taken).line.startswith("error: /s/staged.duckdb.wal: No space left on device: free space")
    gone = DataError("/s/part.parquet: cannot be opened; its version was deleted: open the store again")
    gone.__cause__ = FileNotFoundError(errno.ENOENT, "No such file or directory", "/s/part.parquet")
    assert ending_of(gone).line == f"error: {gone}", "the store knows better than the system"


def test_memory():
    for error in (
        MemoryError(),
        duckdb.OutOfMemoryException("failed to allocate data of size 1.0 GiB"),
        caught(torch.empty, 1 << 50),
        caught(lambda: pa.allocate_buffer(1 << 50)),
    ):
        ending = ending_of(error)
        assert ending.code == 2 and ending.line.startswith("error: out of memory") and "batch_size" in ending.line


def test_real_calls(tmp_path):
    (tmp_path / "file").write_text("a: [1\nb: 2")
    cases = [
        ((tmp_path / "file/below").read_text, "Not a directory"),
        (tmp_path.read_text, "Is a directory"),
        ((tmp_path / "none").read_text, "No such file"),
        ((tmp_path / ("x" * 300)).read_text, "File name too long"),
        (lambda: pq.write_table(pa.table({"x": [1]}), tmp_path / "none/x.parquet"), "No such file"),
        (lambda: pq.read_table(tmp_path / "none"), "none"),
        (lambda: duckdb.connect(str(tmp_path / "none/x.duckdb")), "No such file"),
        (lambda: duckdb.sql(f"FROM read_parquet('{tmp_path}/none/*.parquet')"), "No files found"),
    ]
    for call, what in cases:
        line = explain(caught(call))
        assert line and what in line and str(tmp_path) in line, line
    line = explain(caught(yaml.safe_load, (tmp_path / "file").open()))
    assert line.startswith("not readable as YAML") and f'{tmp_path}/file", line 2' in line


def test_a_fault_of_the_program_is_no_ending():
    for error in (KeyError("x"), ValueError("y"), AssertionError(), RuntimeError("size mismatch"), SystemExit(1)):
        assert ending_of(error) is None
    assert ending_of(ConfigError("k=0: set it")) == (2, "error: k=0: set it")
