"""A folder that appears whole or not at all: built beside its place, moved there by one rename."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.manifest import MANIFEST, sync_folder


class Staging:
    """Context manager over `<out>.tmp-<pid>`. Leaving it without commit() removes the folder.

    root: what will be the store. work: scratch space inside it, gone before the rename.
    The staging folder is locked (flock) while its process lives, so that a later ingest can tell litter from work.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.root = self.out.with_name(f"{self.out.name}.tmp-{os.getpid()}")
        self.work = self.root / ".work"
        self._overwrite = overwrite
        self._lock: int | None = None

    def __enter__(self) -> Staging:
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

    def drop_work(self) -> None:
        shutil.rmtree(self.work)

    def commit(self) -> None:
        """Moves the folder to `out`. With overwrite the old store steps aside first and is deleted last, so a kill
        between leaves it whole as `<out>.old-<pid>`."""
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
        sync_folder(self.out.parent)
        for leftover in self.out.parent.glob(_escape(self.out.name) + ".old-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _check_free(self) -> None:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not (self.out / MANIFEST).is_file():
            raise DataError(f"{self.out}: exists and is not a history store; choose another out or remove it")
        if not self._overwrite:
            raise DataError(f"{self.out}: a store is there already; choose another out or set overwrite=true")

    def _clear_litter(self) -> None:
        for folder in self.out.parent.glob(_escape(self.out.name) + ".tmp-*"):
            lock = lock_folder(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


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
