"""A reader of a store that is overwritten reads what it opened, or fails; leftovers of killed writers are swept."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from feature_store_reference import make_store, pick, random_events, reference_histories, stored_histories
from states import expected, fold_store, folder_of, states_of
from store_files_cases import add_day, add_impressions
from stores import change, clean

from elastic_rec.feature_store.reading import row_groups as decode
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.reading.lookup import HistoryLookup
from elastic_rec.feature_store.states.files import DamagedStates
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.manifest import content_hash
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.scratch import scratch_folder

NAMES = ["timestamp", "item"]


def overwrite(tmp_path: Path) -> Store:
    """Other items of the same users, in as many files."""
    events = [{**e, "item": e["item"] + 1000} for e in random_events(300, seed=5)]
    return make_store(tmp_path, events, context_columns=["action"], num_buckets=8, overwrite=True)


def test_a_reader_of_an_overwritten_store_never_mixes(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "CACHE_BYTES", 0)  # a store too large to be kept decoded
    events = random_events(300)
    store = make_store(tmp_path, events, context_columns=["action"], num_buckets=8)
    add_impressions(store, tmp_path)
    settings = {"global_batch_size": 5, "shuffle": True, "workers": 0, "row_groups_per_block": 1}
    reader = HistoryReader(store, columns=["item"], **settings)
    lookup, table = HistoryLookup(store, columns=["item"]), ImpressionTable(store)
    late = Store.open(store.path)  # opened, nothing of it read yet
    batches = reader.epoch(0)
    first = next(batches)
    overwrite(tmp_path)
    read = [first]
    with pytest.raises(DataError, match=r"cannot be opened \(.*the store was overwritten: open the store again"):
        for batch in [*batches, *reader.epoch(1), *reader.epoch(2)]:
            read.append(batch)
    with pytest.raises(DataError, match="the store was overwritten"):
        lookup.histories([e["user"] for e in events])
    with pytest.raises(DataError, match="the store was overwritten"):
        table.read(0, 0, 1)
    for vocabulary in (lambda: late.vocabulary("item"), lambda: table.vocabulary("device"), lambda: table.item_bags):
        with pytest.raises(DataError, match=r"cannot be read \(.*if the store was overwritten"):
            vocabulary()
    items = {e["item"] for e in events}
    decoded = store.vocabulary("item").decode(np.concatenate([batch.columns["item"] for batch in read])).to_pylist()
    assert set(decoded) <= items and len(decoded) > 0


def test_a_reader_with_everything_in_memory_reads_on(tmp_path):
    store = make_store(tmp_path, random_events(300))
    reader = HistoryReader(store, columns=["item"], global_batch_size=5, shuffle=False, workers=0)
    before = [batch.columns["item"].tolist() for batch in reader.epoch(0)]
    overwrite(tmp_path)
    assert [batch.columns["item"].tolist() for batch in reader.epoch(0)] == before


def as_before_digests(store: Store) -> Store:
    """The same store as earlier versions wrote it: no digests in names, no digests of footers."""
    root = Path(store.path)
    manifest = json.loads((root / "manifest.json").read_bytes())
    for entry in manifest["files"]:
        old, entry["path"] = entry["path"], f"{entry['path'].split('/')[0]}/part-000.parquet"
        (root / old).rename(root / entry["path"])
        del entry["footer"]
    for column, entry in manifest["vocabularies"].items():
        old, entry["path"] = entry["path"], f"vocab/{column}.parquet"
        (root / old).rename(root / entry["path"])
    (root / "manifest.json").write_text(json.dumps({**manifest, "hash": content_hash(manifest)}))
    return Store.open(root)


def test_stores_from_before_digests_in_names(tmp_path):
    events = random_events(300)
    store = as_before_digests(make_store(tmp_path, events, context_columns=["action"]))
    store.verify()
    assert pick(stored_histories(store, ["item"]), NAMES) == pick(reference_histories(events), NAMES)
    fold_store(store)
    store = add_day(store, tmp_path)
    fold_store(store, "fold")
    clean(store)
    assert not list(Path(store.path).rglob("part-000.parquet"))
    assert pick(stored_histories(store, ["item"]), NAMES) == pick(
        reference_histories([*events, *random_events(60, seed=9)]), NAMES
    )
    reader = HistoryReader(
        store := as_before_digests(overwrite(tmp_path)), columns=[], global_batch_size=5, shuffle=False
    )
    make_store(tmp_path, events, overwrite=True)
    with pytest.raises(DataError, match="the store was overwritten"):
        next(reader.epoch(0))


def damage(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["a page", "the footer", "version 1"])
def test_damaged_states_are_never_folded(tmp_path, where):
    store = make_store(tmp_path, random_events(300), context_columns=["action"], num_buckets=1)
    fold_store(store)
    folder, (file,) = folder_of(store), store.files
    path = Path(folder.file_path(file))
    if where == "version 1":
        content = path.read_bytes()
        path.write_bytes(content.replace(b"elastic-rec-states-crc32", b"elastic-rec-states-CRC32"))
    else:
        states = pq.read_metadata(path).row_group(0).column(4)
        page_end = states.data_page_offset + states.total_compressed_size
        damage(path, page_end - 8 if where == "a page" else path.stat().st_size - 300)
    with pytest.raises(DamagedStates, match=r"bucket=0000\.parquet: "):
        folder.open(file).verify()
    with pytest.raises(DamagedStates):
        fold_store(store)


def test_states_whose_checksums_fit_but_whose_content_does_not(tmp_path):
    """Parquet's own checksums pass where a row group was replaced by another one; those in the metadata do not."""
    store = make_store(tmp_path, random_events(300), context_columns=["action"], num_buckets=1)
    fold_store(store, batch_size=1)
    path = Path(folder_of(store).file_path(store.files[0]))
    table, metadata = pq.read_table(path), pq.read_metadata(path).metadata
    swapped = table.take(list(range(len(table)))[::-1])
    groups = folder_of(store).open(store.files[0]).about["group_users"]
    with pq.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
        for start, size in zip(np.cumsum([0, *groups]).tolist(), groups, strict=False):
            writer.write_table(swapped.slice(start, size), row_group_size=size)
        writer.add_key_value_metadata({k: v for k, v in metadata.items() if k.startswith(b"elastic")})
    with pytest.raises(DamagedStates, match=r"users of row group 0 are not as they were written \(CRC-32"):
        folder_of(store).open(store.files[0]).find(store.user_ids(np.arange(1)))


def test_late_events_and_a_data_file_that_is_not_what_the_states_were_made_from(tmp_path):
    """Which events are late is read in it: with a damaged one the user is encoded again."""
    store = make_store(tmp_path, random_events(300), context_columns=["action"], num_buckets=1)
    fold_store(store)
    old = Path(store.files[0].path)
    store = add_day(store, tmp_path)
    damage(old, old.stat().st_size // 2)
    assert fold_store(store, "fold")["reencoded_users"] > 0
    assert states_of(store) == expected(store)


KILLED = """
import os, sys
from pathlib import Path
from elastic_rec.feature_store.utils.scratch import scratch_folder
from elastic_rec.feature_store.states.files import StateFolder
from elastic_rec.feature_store.table.store import Store
store = Store.open(sys.argv[1])
folder = StateFolder(store, fingerprint="a" * 32, dtype="float32", state_bytes=24)
with scratch_folder() as scratch, folder.writing():
    writer = folder.writer(store.files[0])
    (scratch / "work").write_text("half")
    for name in (".append/half.parquet", ".work/half", ".manifest-000001.json.tmp", "impressions/.manifest.json.tmp"):
        Path(sys.argv[1], name).parent.mkdir(exist_ok=True)
        Path(sys.argv[1], name).write_text("half")
    print(scratch, flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_a_killed_process_are_swept_by_the_next_write(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    store = make_store(tmp_path, random_events(100), context_columns=["action"], num_buckets=1)
    root = Path(store.path)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(root)], stdin=-1, stdout=-1, text=True)
    scratch = Path(process.stdout.readline().strip())
    with scratch_folder() as mine:
        assert scratch.is_dir() and mine != scratch, "a living process keeps its own"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    litter = [path for path in root.rglob(".*") if path.name not in (".", "..")]
    assert len(litter) == 5
    staging = tmp_path / "store.tmp-1"
    shutil.copytree(root, staging)
    add_day(store, tmp_path)
    with scratch_folder():
        pass
    store = Store.open(root)
    fold_store(store)
    assert list(root.rglob(".*")) == [] and not scratch.exists() and not staging.exists()
    assert states_of(store) == expected(store)


def test_a_store_that_had_stepped_aside_comes_back(tmp_path):
    """A kill between the two renames of an overwrite: the store is `store.old-PID`, and has the mark of that."""
    store = make_store(tmp_path, random_events(100))
    (Path(store.path) / ".work").mkdir()
    Path(store.path).rename(tmp_path / "store.old-123")
    with pytest.raises(DataError, match=r"a store is there already.*overwrite=true"):
        make_store(tmp_path, random_events(50))
    assert Store.open(store.path).manifest == store.manifest
    assert sorted(os.listdir(tmp_path)) == ["events.parquet", "store"]


def test_a_vocabulary_is_checked_before_an_append_carries_it_on(tmp_path):
    store = make_store(tmp_path, random_events(100), context_columns=["action"])
    vocabulary = Path(store.path) / store.manifest.vocabularies["item"].path
    damage(vocabulary, 30)
    with pytest.raises(DataError, match=rf"{vocabulary.name}: its sha256 is not the manifest's"):
        add_day(store, tmp_path)
    assert Store.open(store.path).version == 0


def test_credentials_in_an_old_manifest_are_not_carried_on(tmp_path):
    store = make_store(tmp_path, random_events(100), context_columns=["action"])
    path = Path(store.path) / "manifest.json"
    written = change(json.loads(path.read_bytes()), "source.files.0.path", "s3://KEY:SECRET@bucket/day.parquet")
    path.write_text(json.dumps(written))
    store = add_day(store, tmp_path)
    assert store.manifest.source.files[0].path == "s3://***@bucket/day.parquet"
