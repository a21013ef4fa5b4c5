"""Versions of one store: who may write, how a new one becomes current, how old ones go.

    manifest-000006.json   names bucket=0000/part-<digest>.parquet, vocab/item-<digest>.parquet, ...
    manifest-000007.json   shares the files it did not touch
    manifest.json          a copy of the current one, replaced by one rename: readers see one version or the other

Files are named by their digest and never change, so no version can spoil another. The modification time of a
manifest-N.json is the moment its version was last current; the retention of a vacuum counts from there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_rec.feature_store.table.format import HistoryManifest
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.manifest import (
    MANIFEST,
    commit,
    filed_versions,
    read_manifest,
    version_path,
)
from elastic_rec.feature_store.table.own_files import SCRATCH, WORK, data_files, delete_leftovers
from elastic_rec.feature_store.table.staging import clear_litter
from elastic_rec.feature_store.utils.atomic_write import at_place, sync
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.locks import only_here
from elastic_rec.feature_store.utils.scratch import scratch_folder


@contextmanager
def writing(store: str) -> Iterator[Location]:
    """The store's folder, locked against other writers (flock: it ends with the process). Readers take no lock.
    Object stores have no lock: publish() refuses where another writer was faster. Leftovers of killed writers go."""
    if not store:
        raise DataError("store is empty: say which store")
    root = open_location(store).resolve()
    if root.is_local:
        clear_litter(Path(root))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; make the store first")
    if not root.is_local:
        with at_place(root):
            yield root
        return
    folder, busy = Path(root), "another append, vacuum or restore is at work there; run again when it has finished"
    with at_place(root), only_here(folder, busy=busy):
        for name in (SCRATCH, WORK):  # of a killed append or ingest: nobody else holds the lock
            if (folder / name).is_symlink():
                raise DataError(f"{folder / name}: a link, which no store writes; remove it and run again")
            shutil.rmtree(folder / name, ignore_errors=True)
        delete_leftovers(root)
        yield root


@contextmanager
def append_folder(root: Location) -> Iterator[Path]:
    """Local space for what an append builds: inside a local store, so that a rename puts it in place."""
    if not root.is_local:
        with scratch_folder() as folder:
            yield folder
        return
    folder = Path(root) / SCRATCH
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def next_version(root: Location) -> int:
    """The number of the version that the next append makes. None is used twice."""
    return max(filed_versions(root), default=0) + 1


def publish(root: Location, manifest: HistoryManifest, *, work: Path) -> HistoryManifest:
    """Commits a manifest with the files of `work` as its version, and makes that the current one."""
    if read_manifest(root).hash != manifest.parent:
        raise DataError(f"{root}: another writer changed the store meanwhile; nothing was appended, run again")
    if not filed_versions(root):  # a store that was never appended to has manifest.json alone
        version_path(root, 0).replace((root / MANIFEST).read_bytes())
    manifest = commit(manifest, work=work, root=root, name=version_path(root, manifest.version).name)
    _make_current(root, manifest.version)
    return manifest


def restore(store: str, *, version: int) -> dict:
    """Makes `version` the current one; later ones stay until a vacuum. Returns figures."""
    with writing(store) as root:
        manifest = read_manifest(root, version)
        before = _current(root)
        if before != manifest.version:
            _make_current(root, version)
        counts = {"users": manifest.num_users, "events": manifest.num_events, "hash": manifest.hash}
        return {"store": store, "version": version, "was": before, **counts}


def vacuum(store: str, *, retention_hours: float) -> dict:
    """Deletes versions that were last current over retention_hours ago, then every file that no other names.

    Within a version there is nothing to merge: an append rewrites the buckets it touches. The current version
    and its hash stay as they are, so runs trained on it go on. Returns figures.
    """
    began = time.perf_counter()
    with writing(store) as root:
        current = read_manifest(root).version
        latest = time.time() - retention_hours * 3600
        old = [v for v in filed_versions(root) if v != current and version_path(root, v).modified() <= latest]
        for number in old:  # manifests first: at no moment does one name a file that is gone
            version_path(root, number).delete()
        if root.is_local:
            sync(Path(root))
        named = _named_files(root)
        deleted = [path for path in data_files(root) if path.below(root) not in named]
        freed = sum(root.sizes([path.below(root) for path in deleted]))
        for path in deleted:
            path.delete()
        return {
            "store": store,
            "version": current,
            "kept_versions": filed_versions(root) or [current],
            "dropped_versions": old,
            "deleted_files": len(deleted),
            "freed_bytes": freed,
            "seconds": round(time.perf_counter() - began, 3),
        }


def _make_current(root: Location, number: int) -> None:
    before = _current(root)
    if before is not None and (left := version_path(root, before)).is_file():
        left.replace(left.read_bytes())  # its time is now
    (root / MANIFEST).replace(version_path(root, number).read_bytes())


def _current(root: Location) -> int | None:
    """What manifest.json says, None where it cannot be read: a restore is the way out of that."""
    try:
        return json.loads((root / MANIFEST).read_bytes()).get("generation", 0)
    except (OSError, ValueError, AttributeError):
        return None


def _named_files(root: Location) -> set[str]:
    manifests = [read_manifest(root), *(read_manifest(root, number) for number in filed_versions(root))]
    return {entry.path for manifest in manifests for entry in manifest.named_files()}
