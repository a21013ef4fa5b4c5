"""One contract, three places: the local disk, fsspec's memory, and S3 (a mock server that is spoken to over HTTP)."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from feature_store_reference import (
    pick,
    random_events,
    reference_histories,
    stored_histories,
    write_events,
)

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.table import manifest, staging
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.versions import publish, restore, vacuum
from elastic_rec.feature_store.utils.errors import DataError

NAMES = ["timestamp", "item"]
SETTINGS = {"num_buckets": 3, "row_group_events": 60, "threads": 1}


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path, monkeypatch):
    """A folder's URL, empty."""
    if request.param == "local":
        return str(tmp_path / "place")
    name = f"{request.node.name}-{time.monotonic_ns()}".replace("[", "-").replace("]", "")
    if request.param == "memory":
        return f"memory://{name}"
    for key, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(key, value)
    return f"s3://bucket/{name}"


def histories(url, version=None):
    return pick(stored_histories(Store.open(url, version=version), ["item"]), NAMES)


def epoch(url):
    reader = HistoryReader(Store.open(url), columns=[], global_batch_size=16, shuffle=True)
    return [(b.rows.tolist(), b.columns["item"].tolist(), b.times_s.tolist()) for b in reader.epoch(0)]


def test_ingest_append_vacuum_and_restore(place, tmp_path):
    events = random_events(700)
    days = [write_events(tmp_path / f"{n}.parquet", events[n * 300 :][:300]) for n in range(3)]
    local, out = str(tmp_path / "plain"), f"{place}/store"
    for url in (local, out):
        os.makedirs(tmp_path / "place", exist_ok=True)
        ingest(IngestConfig(input=[days[0]], out=url, **SETTINGS))
    Store.open(out).verify()
    assert epoch(out) == epoch(local)
    assert Store.open(out).user_ids([3, -1, 0]).to_pylist() == Store.open(local).user_ids([3, -1, 0]).to_pylist()
    for number, day in enumerate(days[1:], 1):
        figures = append(AppendConfig(input=[day], store=out, threads=1))
        assert figures["version"] == number
    with pytest.raises(DataError, match="the same bytes were taken before"):
        append(AppendConfig(input=[days[1]], store=out))
    assert histories(out) == pick(reference_histories(events), NAMES)
    assert histories(out, 1) == pick(reference_histories(events[:600]), NAMES)
    assert restore(out, version=1)["was"] == 2
    assert vacuum(out, retention_hours=24)["dropped_versions"] == []  # all within the retention
    figures = vacuum(out, retention_hours=0)
    assert figures["dropped_versions"] == [0, 2] and figures["freed_bytes"] > 0
    assert histories(out) == pick(reference_histories(events[:600]), NAMES)
    Store.open(out).verify()
    named = {e.path for e in Store.open(out).manifest.files}
    assert {f.below(open_location(out)) for f in open_location(out).files()} >= named


def test_input_comes_from_there_too(place, tmp_path):
    events = random_events(300)
    for number in range(3):
        file = write_events(tmp_path / f"p{number}.csv", events[number * 100 :][:100])
        os.makedirs(tmp_path / "place" / "in" / "deep", exist_ok=True)
        (open_location(place) / "in" / "deep" / f"p{number}.csv").replace(Path(file).read_bytes())
    (open_location(place) / "in" / "deep" / "_SUCCESS").replace(b"")
    want = pick(reference_histories(events), NAMES)
    for entry in (f"{place}/in", f"{place}/in/deep/p[0-2].csv", f"{place}/**/p*.csv"):
        ingest(IngestConfig(input=[entry], out=str(tmp_path / "s"), overwrite=True, **SETTINGS))
        assert histories(tmp_path / "s") == want
    names = [entry.path for entry in Store.open(tmp_path / "s").manifest.source.files]
    assert names == [f"{place}/in/deep/p{n}.csv" for n in range(3)]
    (open_location(place) / "bad.csv").replace(b"user_id,item_id,timestamp\n1,2,x\n")
    with pytest.raises(DataError, match=rf"{place}/bad\.csv: row 1: timestamp 'x' is not a number"):
        ingest(IngestConfig(input=[f"{place}/bad.csv"], out=str(tmp_path / "t")))
    with pytest.raises(DataError, match="no file matches"):
        ingest(IngestConfig(input=[f"{place}/none-*.csv"], out=str(tmp_path / "t")))
    assert [f.name for f in find_inputs([f"{place}/*.csv"], format="auto")[0]] == ["bad.csv"]


def put(url: str) -> None:
    file, content = open_location(url), b"user_id,item_id,timestamp\n1,2,3\n"
    if file.is_local:
        os.makedirs(file.parent.path, exist_ok=True)
    file.replace(pa.compress(content, "zstd", asbytes=True) if url.endswith(".zst") else content)
    assert file.size() != 0


def test_no_input_is_left_out_there_either(place, tmp_path):
    data = ["B.CSV", "a.csv", "day.csv/part-0.csv.zst", "dt=2026-01-01/größe (1), ~x.csv"]
    litter = ["_SUCCESS", ".a.csv.crc", "a.csv.crc", "day.csv/_temporary/0.csv", ".spark/x.csv"]
    for name in [*data, *litter]:
        put(f"{place}/in/{name}")

    def found(entry):
        files, _ = find_inputs([f"{place}/{entry}"], format="auto")
        return [file.below(open_location(f"{place}/in")) for file in files]

    assert found("in") == found("in/*") == found("in/**") == found("i*") == data
    assert found("in/d*") == data[2:] and found("in/*.csv") == data[1:3] and found("in/*/p*") == data[2:3]
    entry = f"{place}/in/dt=*"
    ingest(IngestConfig(input=[entry], out=str(tmp_path / "s"), context_columns=["dt"], **SETTINGS))
    assert Store.open(tmp_path / "s").vocabulary("dt").ids.to_pylist() == ["2026-01-01"]
    with pytest.raises(DataError, match=r"a\.csv: the same bytes as .*B\.CSV"):
        ingest(IngestConfig(input=[f"{place}/in/*.*"], out=str(tmp_path / "t"), **SETTINGS))
    put(f"{place}/in/notes.txt")
    with pytest.raises(DataError, match=rf"{place}/in/notes\.txt: format unknown"):
        found("in")
    put(f"{place}/t/dt=1/part-0.parquet")
    put(f"{place}/t/_delta_log/0.json")
    for entry in ("t", "t/*/*.parquet", "t/dt=1"):
        with pytest.raises(DataError, match=rf"{place}/t: a table of Delta"):
            found(entry)


def test_an_overwrite_cut_off_before_its_manifest_leaves_the_old_store(place, tmp_path, monkeypatch):
    os.makedirs(tmp_path / "place", exist_ok=True)
    old, new = (write_events(tmp_path / f"{s}.parquet", random_events(300, seed=s)) for s in (0, 1))
    out = f"{place}/store"
    config = IngestConfig(input=[new], out=out, overwrite=True, **SETTINGS)
    with monkeypatch.context() as patch:

        def cut_off(*arguments):
            raise KeyboardInterrupt

        patch.setattr(manifest, "write_manifest", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ingest(config)
        with pytest.raises(DataError, match="unfinished or not a history store"):
            Store.open(out)
    ingest(IngestConfig(input=[old], out=out, **SETTINGS))  # what the one before left is no hindrance
    before = histories(out)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_manifest", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ingest(config)
    assert histories(out) == before
    with pytest.raises(DataError, match=r"a store is there already.*overwrite=true"):
        ingest(IngestConfig(input=[new], out=out, **SETTINGS))
    ingest(config)
    assert histories(out) == pick(reference_histories(random_events(300, seed=1)), NAMES)
    found = Store.open(out)
    named = len(found.manifest.files) + len(found.manifest.vocabularies) + 1
    assert len(open_location(out).files()) == named  # the old store's files and the litter are gone


def test_a_second_writer_is_noticed_where_nothing_locks(tmp_path):
    out = f"memory://second-writer-{time.monotonic_ns()}"
    events = random_events(200)
    first, day = (write_events(tmp_path / f"{n}.parquet", events[n * 100 :][:100]) for n in range(2))
    ingest(IngestConfig(input=[first], out=out, **SETTINGS))
    base = Store.open(out).manifest
    append(AppendConfig(input=[day], store=out, threads=1))
    with pytest.raises(DataError, match="another writer changed the store meanwhile; nothing was appended"):
        publish(open_location(out), replace(base, version=2, parent=base.hash), work=tmp_path)
    assert histories(out) == pick(reference_histories(events), NAMES)


def test_it_never_replaces_what_is_no_store():
    out = open_location(f"memory://thesis-{time.monotonic_ns()}")
    (out / "thesis.txt").replace(b"dear")
    with pytest.raises(DataError, match="exists and is not a history store"), staging.stage(str(out), overwrite=True):
        pass
    assert (out / "thesis.txt").read_bytes() == b"dear"


def test_a_scheme_without_a_client():
    with pytest.raises(DataError, match=r"nosuch://x: no file system for it"):
        Store.open("nosuch://x")
