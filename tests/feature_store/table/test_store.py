"""A store opens whole or not at all: killed ingests, changed files, overwriting, litter."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_reference import make_store, random_events, write_events

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.table.manifest import content_hash
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

INGEST = """
import sys
from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
ingest(IngestConfig(input=[sys.argv[1]], out=sys.argv[2], row_group_events=500, num_buckets=64, threads=1))
"""


def vocabulary_path(store: Store, column: str) -> Path:
    return Path(store.path / store.manifest.vocabularies[column].path)


@pytest.mark.parametrize("moment", ["staged.duckdb", "bucket=0003"])
def test_sigkill_leaves_no_store_and_the_next_ingest_clears_up(tmp_path, moment):
    n = 1_500_000
    rng = np.random.default_rng(0)
    table = pa.table(
        {"user_id": rng.integers(0, 20000, n), "item_id": rng.integers(0, 500, n), "timestamp": rng.integers(0, 99, n)}
    )
    source, out = tmp_path / "e.parquet", tmp_path / "store"
    pq.write_table(table, source)
    process = subprocess.Popen([sys.executable, "-c", INGEST, str(source), str(out)])
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"store.tmp-*/**/{moment}*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    (litter,) = tmp_path.glob("store.tmp-*")
    assert not out.exists()
    for path in (out, litter):
        with pytest.raises(DataError, match=r"unfinished or not a history store.*run the ingest again"):
            Store.open(path)
    small = write_events(tmp_path / "small.csv", random_events(50))
    ingest(IngestConfig(input=[small], out=str(out)))
    assert Store.open(out).num_events == 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.parquet", "small.csv", "store"]


def test_litter_of_a_living_ingest_is_left_alone(tmp_path):
    living = tmp_path / "store.tmp-1"
    (living / ".work").mkdir(parents=True)
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    make_store(tmp_path, random_events(20))
    assert living.is_dir()
    os.close(descriptor)
    make_store(tmp_path, random_events(20), overwrite=True)
    assert not living.exists()


def test_overwrite(tmp_path):
    store = make_store(tmp_path, random_events(60))
    with pytest.raises(DataError, match=r"a store is there already.*overwrite=true"):
        make_store(tmp_path, random_events(30))
    assert Store.open(store.path).num_events == 60
    with pytest.raises(DataError, match="no users left"):  # a failed overwrite keeps the old store
        make_store(tmp_path, random_events(30), overwrite=True, min_user_events=1000)
    assert Store.open(store.path).num_events == 60
    assert make_store(tmp_path, random_events(30), overwrite=True).num_events == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.parquet", "store"]


def test_overwrite_never_removes_what_is_no_store(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("dear")
    with pytest.raises(DataError, match="exists and is not a history store"):
        make_store(tmp_path, random_events(30), overwrite=True)
    assert (tmp_path / "store" / "thesis.txt").read_text() == "dear"
    (tmp_path / "store" / "thesis.txt").unlink()
    assert make_store(tmp_path, random_events(30)).num_events == 30  # an empty folder may be filled


def test_changed_stores_are_refused(tmp_path):
    store = make_store(tmp_path, random_events(300), context_columns=["action"])
    data, vocab, manifest = map(
        Path, (store.files[1].path, vocabulary_path(store, "item"), store.path / "manifest.json")
    )

    def refused(path: Path, content: bytes | None, match: str) -> None:
        original = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=match):
            Store.open(store.path)
        path.write_bytes(original)
        Store.open(store.path).verify()

    refused(data, data.read_bytes()[:-1], rf"{data}: \d+ bytes, the manifest says")
    refused(data, None, rf"{data}: missing")
    refused(vocab, vocab.read_bytes() + b"x", rf"{vocab}: \d+ bytes")
    refused(manifest, None, "unfinished or not a history store")
    refused(manifest, manifest.read_bytes()[:100], "not readable as JSON")
    refused(manifest, manifest.read_bytes().replace(b'"num_users": ', b'"num_users": 1'), "hash does not match")
    refused(manifest, b"{}", "not the manifest of a history store")
    newer = {**json.loads(manifest.read_bytes()), "version": 2}
    newer["hash"] = content_hash(newer)
    refused(manifest, json.dumps(newer).encode(), "store format version 2, this code reads version 1")


def test_a_flipped_bit_is_found_when_read(tmp_path):
    """Same size, so open() lets it pass: page checksums and the vocabulary's digest must not."""
    store = make_store(tmp_path, random_events(300))
    path = Path(store.files[0].path)
    content = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(3)  # items
    content[chunk.dictionary_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    store = Store.open(store.path)
    with pytest.raises(DataError, match=path.name):
        store.verify()
    with pytest.raises(DataError, match=rf"{path.name}: row groups \[0\] cannot be decoded"):
        list(HistoryReader(store, columns=["item"], global_batch_size=8, shuffle=False).epoch(0))
    vocab = vocabulary_path(store, "item")
    content = bytearray(vocab.read_bytes())
    content[20] ^= 1
    vocab.write_bytes(content)
    with pytest.raises(DataError, match=rf"{vocab.name}: its sha256 is not the manifest's"):
        Store.open(store.path).vocabulary("item")


def test_an_id_outside_its_vocabulary_is_found_when_read(tmp_path):
    """A store whose files and manifest agree with each other, but not with the vocabulary: made by other hands."""
    store = make_store(tmp_path, random_events(300))
    smaller = json.loads((store.path / "manifest.json").read_bytes())
    smaller["vocabularies"]["item"]["size"] = 5
    smaller["hash"] = content_hash(smaller)
    (store.path / "manifest.json").replace(json.dumps(smaller).encode())
    with pytest.raises(DataError, match=r"part-\w+\.parquet: row group 0, user row \d+: item id \d+ is outside"):
        list(HistoryReader(Store.open(store.path), columns=["item"], global_batch_size=8, shuffle=False).epoch(0))


def test_manifest_says_what_is_there(tmp_path):
    events = random_events(300)
    store = make_store(tmp_path, events, context_columns=["action"], timestamp_unit="ms")
    for file, entry in zip(store.files, store.manifest.files, strict=True):
        parquet = pq.ParquetFile(file.path)
        assert parquet.num_row_groups == len(file.row_groups) > 1
        for number, (num_users, num_events) in enumerate(file.row_groups):
            lists = parquet.read_row_group(number)["events"].chunk(0)
            assert (len(lists), len(lists.values)) == (num_users, num_events)
            assert num_events <= 60 or num_users == 1
        times = [e["timestamp"] for h in parquet.read()["events"].to_pylist() for e in h]
        assert (min(times), max(times)) == (entry.min_time, entry.max_time)
    assert store.columns == ["item", "action"] and store.time_unit == "ms"
    assert store.manifest.vocabularies["action"].size == store.vocabulary("action").size == 5
    assert sum(f.num_events for f in store.files) == 300
    with pytest.raises(DataError, match="no event column 'rating'; the store has: item, action"):
        store.vocabulary("rating")
