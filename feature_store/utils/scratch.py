"""Folders for work in progress that outlive no process: locked while it lives, swept by the next one when it is
dead."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.locks import lock_folder

PREFIX = "elastic-rec-scratch-"


@contextmanager
def scratch_folder(place: Path | None = None, *, prefix: str = PREFIX) -> Iterator[Path]:
    """A new folder in `place` (None: $TMPDIR), removed at the end. Those of dead processes are removed first."""
    place = Path(tempfile.gettempdir()) if place is None else place
    sweep(place, prefix)
    lock = None
    while lock is None:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        lock = lock_folder(folder)  # None: another process's sweep was faster
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(place: Path, prefix: str, *, mark: str = "") -> None:
    """Removes the folders in `place` whose names begin with `prefix`, which have an entry `mark` inside and which no
    living process holds. Links are left alone, and folders that cannot be locked, as those of other users."""
    for folder in place.iterdir() if place.is_dir() else ():
        with suppress(OSError, DataError):
            if not folder.name.startswith(prefix) or folder.is_symlink() or (mark and not _has_mark(folder, mark)):
                continue
            lock = lock_folder(folder)
            if lock is not None:
                remove_marked(folder, mark)
                os.close(lock)


def remove_marked(folder: Path, mark: str) -> None:
    """Removes a folder, its entry `mark` last: a sweep finds what a killed removal leaves."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name == mark:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _has_mark(folder: Path, mark: str) -> bool:
    """Or is empty: a removal was killed between its last two steps."""
    return (folder / mark).is_dir() or (folder.is_dir() and not any(folder.iterdir()))
