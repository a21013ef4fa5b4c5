"""What a power cut may take: at the moment of each commit, all that it vouches for has been synced, names included.

fsync and rename run as ever; a journal keeps what a file's content and a folder's entries were when last synced.
"""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from feature_store_reference import make_store, random_events
from states import fold_store
from store_files_cases import add_day, add_impressions, full_store
from stores import back, clean

from elastic_rec.feature_store.datasets.files import MARKER, commit_folder
from elastic_rec.feature_store.table.store import Store


class Journal:
    """contents: inode of a file -> its time and size when last synced. entries: inode of a folder -> name -> inode."""

    def __init__(self, monkeypatch, folder: Path) -> None:
        self.folder, self.commits = folder, []
        self.contents: dict[int, tuple] = {}
        self.entries: dict[int, dict[str, int]] = {}
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, real):
        def fsync(descriptor):
            real(descriptor)
            about = os.fstat(descriptor)
            self.contents[about.st_ino] = (about.st_mtime_ns, about.st_size)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                self.entries[about.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}

        def rename(source, target):
            self.before_rename(Path(source), Path(target))
            real(source, target)

        return fsync if name == "fsync" else rename

    def before_rename(self, source: Path, target: Path) -> None:
        assert source.is_dir() or self.is_content_safe(source), f"{source} -> {target}: content not synced"
        if source.is_dir() and (source / MARKER).exists():
            files, root = [*json.loads((source / MARKER).read_bytes())["files"], MARKER], source
        elif source.is_dir() and (source / ".work").exists() and ".tmp-" in source.name:
            files, root = [*named(source / "manifest.json"), "manifest.json"], source
        elif target.name.startswith("manifest"):
            files, root = named(source), source.parent
        else:
            return
        unsafe = [path for path in files if not self.is_safe(root / path, root)]
        assert not unsafe, f"{target} is put in place, and these may be lost: {unsafe}"
        self.commits.append(target.name)

    def is_safe(self, path: Path, root: Path) -> bool:
        """Content and every name on the way from `root`."""
        steps = [path, *path.parents]
        steps = steps[: steps.index(root) + 1]
        return self.is_content_safe(path) and all(
            self.entries.get(folder.stat().st_ino, {}).get(inside.name) == inside.stat().st_ino
            for inside, folder in pairwise(steps)
        )

    def is_content_safe(self, path: Path) -> bool:
        about = path.stat()
        return self.contents.get(about.st_ino) == (about.st_mtime_ns, about.st_size)


def named(manifest: Path) -> list[str]:
    content = json.loads(manifest.read_bytes())
    entries = [*content["files"], *content["vocabularies"].values(), content.get("items")]
    return [entry["path"] for entry in entries if entry]


@pytest.fixture
def journal(monkeypatch, tmp_path):
    return Journal(monkeypatch, tmp_path)


def assert_all_safe(journal: Journal, root: Path) -> None:
    """After the call returned: every file of the store and each name up to the folder of the test."""
    files = [path for path in root.rglob("*") if path.is_file()]
    assert [str(path) for path in files if not journal.is_safe(path, journal.folder)] == []


def test_every_write_of_a_store(journal, tmp_path):
    root = tmp_path / "deep" / "er" / "store"
    store = make_store(tmp_path, random_events(300), context_columns=["action"], num_buckets=2, out=str(root))
    assert journal.commits == ["manifest.json", "store"]
    assert_all_safe(journal, root)
    add_impressions(store, tmp_path)
    store = add_day(store, tmp_path)
    assert journal.commits[2:] == [
        "manifest.json",
        "manifest-000000.json",
        "manifest-000001.json",
        "manifest-000000.json",
        "manifest.json",
    ]
    fold_store(store)
    assert len(list(root.glob("states/*/*.parquet"))) == 2
    back(store, 0)
    clean(store)
    assert_all_safe(journal, root)


def test_overwriting_a_store(journal, tmp_path):
    store = full_store(tmp_path)
    make_store(tmp_path, random_events(200), overwrite=True)
    assert journal.commits[-2:] == ["manifest.json", "store"]
    assert_all_safe(journal, Path(store.path))
    assert Store.open(store.path).num_events == 200


def test_states_are_synced_before_they_are_put_in_place(journal, tmp_path):
    """The rename itself is checked in the journal: it says that the events are folded in."""
    store = make_store(tmp_path, random_events(100), context_columns=["action"], num_buckets=1)
    seen = []
    before = journal.before_rename
    journal.before_rename = lambda source, target: (seen.append(target.name), before(source, target))
    fold_store(store)
    assert seen == ["bucket=0000.parquet"]


def test_a_data_set(journal, tmp_path):
    with commit_folder(tmp_path / "cache" / "set", name="x", key={}) as (aside, figures):
        (aside / "events.parquet").write_text("events")
        figures |= {"source": "here", "num_events": 1}
    assert journal.commits == ["set"]
    assert_all_safe(journal, tmp_path / "cache")
