"""Which files an ingest reads: all of a folder or a glob, none of them twice, and no table of another system."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

HEAD = "user_id,item_id,timestamp\n"


def put(path: Path, user: int = 1, *, rows: int = 1) -> Path:
    """One file of the events (user, item 10 + n, time n), in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{user},{10 + n},{n}\n" for n in range(rows)]
    name = path.name.lower()
    codec = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}.get(name.rsplit(".", 1)[-1])
    if codec or name.endswith((".csv", ".txt")):
        with pa.output_stream(str(path), compression=codec) as file:
            file.write((HEAD + "".join(lines)).encode())
    else:
        columns = {"user_id": [user] * rows, "item_id": range(10, 10 + rows), "timestamp": range(rows)}
        pq.write_table(pa.table({n: pa.array(v, pa.int64()) for n, v in columns.items()}), path)
    return path


def users(tmp_path: Path, *inputs: Path | str, **settings) -> list[int]:
    config = IngestConfig(
        input=[str(i) for i in inputs], out=str(tmp_path / "s"), overwrite=True, threads=1, **settings
    )
    ingest(config)
    return sorted(Store.open(tmp_path / "s").vocabulary("user").ids.to_pylist())


def found(*inputs: Path | str, format: str = "auto") -> list[str]:
    return [str(path) for path in find_inputs([str(i) for i in inputs], format=format)[0]]


def refused(match: str, *inputs: Path | str, format: str = "auto") -> None:
    with pytest.raises(DataError, match=match):
        find_inputs([str(i) for i in inputs], format=format)


def test_a_folder_is_read_whole_whatever_the_suffixes(tmp_path):
    names = ["a.csv", "b.CSV", "c.csv.zst", "d.csv.bz2", "e.CSV.GZ", "deep/er/f.csv"]
    for user, name in enumerate(names):
        put(tmp_path / "in" / name, user)
    for litter in ("_SUCCESS", ".a.csv.crc", "a.csv.crc", "_temporary/0/g.csv", ".hidden.csv"):
        put(tmp_path / "in" / litter).write_text("litter")
    assert users(tmp_path, tmp_path / "in") == list(range(6))
    assert users(tmp_path, tmp_path / "in" / "*") == list(range(6))
    assert users(tmp_path, tmp_path / "in" / "**") == list(range(6))
    put(tmp_path / "in" / "h.txt", 7)
    refused(r"h\.txt: format unknown from its name; set format", tmp_path / "in")
    assert users(tmp_path, tmp_path / "in", format="csv") == [*range(6), 7]


def test_parquet_by_its_content_where_the_name_says_nothing(tmp_path):
    put(tmp_path / "in/dt=2026-01-01/000000_0", 1)
    put(tmp_path / "in/dt=2026-01-02/part-0.PARQUET", 2)
    assert users(tmp_path, tmp_path / "in") == users(tmp_path, tmp_path / "in/dt=*") == [1, 2]
    (tmp_path / "in/dt=2026-01-03").mkdir()
    (tmp_path / "in/dt=2026-01-03/000000_0").write_text("1\x0110\x010\n")
    (tmp_path / "in/dt=2026-01-03/000001_0").write_text("")
    refused(r"dt=2026-01-03/000000_0: format unknown from its name \(1 more such files\)", tmp_path / "in")


def test_a_glob_reads_folders_that_match(tmp_path):
    put(tmp_path / "2026-01.parquet", 1)
    put(tmp_path / "2026-02.parquet/part-1.parquet", 2)
    put(tmp_path / "2026-02.parquet/_temporary/part-1.parquet", 3)
    put(tmp_path / "_2026-03.parquet", 4)
    assert users(tmp_path, tmp_path / "2026-*.parquet") == [1, 2]
    assert users(tmp_path, tmp_path / "2026-02*") == users(tmp_path, f"file://{tmp_path}/2026-02*") == [2]
    assert users(tmp_path, tmp_path / "_2026*") == [4]  # asked for by name
    put(tmp_path / "odd [1]/a.parquet", 5)
    assert found(tmp_path / "odd [1]") == found(tmp_path / "odd [[]1]/*") == [str(tmp_path / "odd [1]/a.parquet")]
    refused(r"no file matches; check the path; \[ begins a wildcard", tmp_path / "odd [1]/*.parquet")


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path / "in/a.csv")
    (tmp_path / "in/b.csv").symlink_to("gone.csv")
    for entry in (tmp_path / "in", tmp_path / "in/*.csv"):
        refused(r"b\.csv: no regular file \(a link to nothing", entry)
    (tmp_path / "in/b.csv").unlink()
    put(tmp_path / "in/c.parquet")
    refused("input mixes formats", tmp_path / "in")
    refused(r"a\.csv: is named csv, but parquet is to be read", tmp_path / "in", format="parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/_SUCCESS").touch()
    refused("no data file in this folder", tmp_path / "empty")
    refused("~ is not expanded here", "~/in")
    refused(r"a name with a comma is quoted for Hydra", "in/a", "b.csv")
    monkeypatch.chdir(tmp_path / "in")
    assert found("*.csv") == found("a.csv") == ["a.csv"]
    refused("input is empty: give", "", "a.csv")  # and not the folder one is in
    put(Path("log-12:00.csv"), 3)  # what Arrow takes for a URL
    assert found("log*") == found("log-12:00.csv") == ["./log-12:00.csv"]
    assert users(tmp_path, "log-12:00.csv") == [3]
    refused(r"input 'file:/a\.csv': no file matches", "file:/a.csv")


def test_tables_with_a_log_are_refused_with_the_way_out(tmp_path):
    for log, kind in (("_delta_log/0.json", "Delta"), (".hoodie/x", "Hudi"), ("metadata/v1.metadata.json", "Iceberg")):
        table = tmp_path / "lake" / kind
        file = put(table / "data/dt=1/part-0.parquet")
        put(table / log)
        for entry in (table, table / "data", table / "data/dt=1", table / "data/*/*.parquet", tmp_path / "lake" / "*"):
            if kind == "Iceberg" or "data" not in str(entry.relative_to(tmp_path)):
                refused(rf"a table of \w+ \({log.split('/')[0]}\).*export the current rows.*or name each file", entry)
        assert found(file) == [str(file)]
        shutil.rmtree(table)
    put(tmp_path / "plain/metadata/a.parquet")
    assert len(found(tmp_path / "plain")) == 1
    put(tmp_path / "table/dt=1/h=2/part-0.parquet")
    put(tmp_path / "table/_delta_log/0.json")
    for entry in ("table/dt=1/h=2", "table/*/*", "table/dt=1/h=2/*.parquet", "tab*"):
        refused(r"delta_scan\('.*/table'\)", tmp_path / entry)


def test_zero_rows_among_others(tmp_path):
    put(tmp_path / "in/a.parquet", rows=0)
    pq.write_table(pa.table({"user_id": pa.nulls(0), "item_id": pa.nulls(0), "timestamp": pa.nulls(0)}), tmp_path / "n")
    shutil.copy(tmp_path / "n", tmp_path / "in/b.parquet")
    shutil.copy(tmp_path / "n", tmp_path / "in/c.parquet")
    refused_all = r"a\.parquet: no rows \(a header at most\), nor in the other 2 files"
    with pytest.raises(DataError, match=refused_all):
        users(tmp_path, tmp_path / "in")
    put(tmp_path / "in/d.parquet", 4)
    assert users(tmp_path, tmp_path / "in") == [4]
    counts = [entry.events for entry in Store.open(tmp_path / "s").manifest.source.files]
    assert counts == [0, 0, 0, 1]
    put(tmp_path / "text/a.csv", rows=0)
    put(tmp_path / "text/b.csv", rows=0)
    put(tmp_path / "text/c.csv", 5)
    assert users(tmp_path, tmp_path / "text") == [5]


def test_the_same_bytes_twice(tmp_path):
    first = put(tmp_path / "in/a.parquet")
    shutil.copy(first, tmp_path / "in/copy.parquet")
    with pytest.raises(DataError, match=r"copy\.parquet: the same bytes as .*a\.parquet; each row would be counted"):
        users(tmp_path, tmp_path / "in")
    (tmp_path / "in/copy.parquet").unlink()
    os.symlink(tmp_path / "in", tmp_path / "link")
    with pytest.raises(DataError, match=r"link/a\.parquet: the same bytes as .*in/a\.parquet"):
        users(tmp_path, tmp_path / "in", tmp_path / "link")
    assert not (tmp_path / "s").exists()
    with pytest.raises(DataError, match="matched twice"):
        users(tmp_path, tmp_path / "in/a*", tmp_path / "in/*.parquet")


def test_an_append_knows_files_by_size_first_and_digest_then(tmp_path, monkeypatch):
    from elastic_rec.feature_store.table.location import Location

    users(tmp_path, put(tmp_path / "a.csv", 1), put(tmp_path / "none.csv", rows=0))
    digested = []
    digest = Location.digest
    monkeypatch.setattr(Location, "digest", lambda self: digested.append(self.name) or digest(self))
    day = AppendConfig(store=str(tmp_path / "s"), threads=1, input=[str(put(tmp_path / "b.csv", 22))])
    append(day)
    assert digested.count("b.csv") == 1  # when it was read, not to compare it
    shutil.copy(tmp_path / "b.csv", tmp_path / "renamed.csv")
    day.input = [str(tmp_path / "renamed.csv")]
    with pytest.raises(DataError, match=r"renamed\.csv: the same bytes were taken before \(.*b\.csv, version 1\)"):
        append(day)
    day.input = [str(put(tmp_path / "c.csv", 3)), str(tmp_path / "none.csv")]  # nothing in it to double
    assert append(day)["appended_events"] == 1
