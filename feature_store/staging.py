"""A store that appears whole or not at all.

On the local disk it is built beside its place and moved there by one rename. Object stores have no rename: there it is
built in a local scratch folder ($TMPDIR), files go up under names made of their digests, and the manifest, last, is the
commit; a reader of the store that was there before keeps its manifest, and its files until the commit.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from elastic_rec.feature_store.atomic_write import sync
from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.filesystem import Location, open_location
from elastic_rec.feature_store.manifest import MANIFEST, put_in_place, write_manifest

_OURS = re.compile(r"(bucket=\d+|vocab)/[^/]+\.parquet|manifest(-\d{6,})?\.json")


def stage(out: str, *, overwrite: bool) -> LocalStaging | RemoteStaging:
    place = open_location(out)
    return LocalStaging(Path(place), overwrite=overwrite) if place.is_local else RemoteStaging(place, overwrite)


class LocalStaging:
    """Context manager over `<out>.tmp-<pid>`. Leaving it without commit() removes the folder.

    root: what will be the store. work: scratch space inside it, gone before the rename. target: where an engine that
    writes from several machines puts finished data files.
    The staging folder is locked (flock) while its process lives, so that a later ingest can tell litter from work.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.root = self.out.with_name(f"{self.out.name}.tmp-{os.getpid()}")
        self.work = self.root / ".work"
        self.target = open_location(self.root)
        self._overwrite = overwrite
        self._lock: int | None = None

    def __enter__(self) -> LocalStaging:
        self._check_free()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._clear_litter()
        try:
            self.work.mkdir(parents=True)
        except FileExistsError as error:
            raise DataError(f"{self.root}: in use by another ingest of this process") from error
        self._lock = lock_folder(self.root)
        return self

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)  # gone already after a commit
        if self._lock is not None:
            os.close(self._lock)

    def commit(self, content: dict) -> None:
        """Writes the manifest and moves the folder to `out`. With overwrite the old store steps aside first and is
        deleted last, so a kill between leaves it whole as `<out>.old-<pid>`."""
        shutil.rmtree(self.work)
        write_manifest(open_location(self.root) / MANIFEST, content)
        self._check_free()
        old = self.out.with_name(f"{self.out.name}.old-{os.getpid()}")
        replaces = self.out.exists() and any(self.out.iterdir())
        # Held to the end: an append that begins now must not write into a folder on its way out.
        old_lock = lock_folder(self.out) if replaces else None
        if replaces and old_lock is None:
            raise DataError(f"{self.out}: an append or compaction is at work in it; wait for it and run again")
        if replaces:
            self.out.rename(old)
        try:
            self.root.rename(self.out)
        except OSError as error:
            if replaces:
                old.rename(self.out)
            raise DataError(f"{self.out}: cannot be put in place ({error}); another ingest to the same out?") from error
        finally:
            if old_lock is not None:
                os.close(old_lock)
        sync(self.out.parent)
        for leftover in self.out.parent.glob(_escape(self.out.name) + ".old-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _check_free(self) -> None:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        _check_replaceable(self.out, (self.out / MANIFEST).is_file(), self._overwrite)

    def _clear_litter(self) -> None:
        for folder in self.out.parent.glob(_escape(self.out.name) + ".tmp-*"):
            lock = lock_folder(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


class RemoteStaging:
    """The same, for a store that is not on the local disk. One ingest to an `out` at a time: nothing locks it."""

    def __init__(self, out: Location, overwrite: bool) -> None:
        self.out = self.target = out
        self._overwrite = overwrite

    def __enter__(self) -> RemoteStaging:
        there = self.out.files()
        is_store = any(file.below(self.out) == MANIFEST for file in there)
        if is_store or not all(_OURS.fullmatch(file.below(self.out)) for file in there):
            _check_replaceable(self.out, is_store, self._overwrite)
        self.root = Path(tempfile.mkdtemp(prefix="elastic-rec-"))
        self.work = self.root / ".work"
        self.work.mkdir()
        return self

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def commit(self, content: dict) -> None:
        """Uploads what `content` names, then the manifest; then deletes what the new store does not name."""
        shutil.rmtree(self.work)
        files = put_in_place(content["files"], self.root, self.out)
        vocabularies = put_in_place(list(content["vocabularies"].values()), self.root, self.out)
        vocabularies = dict(zip(content["vocabularies"], vocabularies, strict=True))
        write_manifest(self.out / MANIFEST, {**content, "files": files, "vocabularies": vocabularies})
        named = {MANIFEST, *(entry["path"] for entry in [*files, *vocabularies.values()])}
        for file in self.out.files():  # of a killed ingest, or of the store that this one replaces
            if file.below(self.out) not in named:
                file.delete()


def _check_replaceable(out: Path | Location, is_store: bool, overwrite: bool) -> None:
    if not is_store:
        raise DataError(f"{out}: exists and is not a history store; choose another out or remove it")
    if not overwrite:
        raise DataError(f"{out}: a store is there already; choose another out or set overwrite=true")


def lock_folder(folder: Path) -> int | None:
    """An open, locked descriptor; None where a living process holds the lock or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
