"""Folders for work in progress that outlive no process: locked while it lives, swept by the next one when it is dead.

flock ends with the process, whatever kills it, so a folder that can be locked is nobody's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    living process holds. Links are left alone."""
    for folder in place.iterdir() if place.is_dir() else ():
        if folder.name.startswith(prefix) and not folder.is_symlink() and (not mark or _has_mark(folder, mark)):
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


def lock_folder(folder: Path) -> int | None:
    """An open, locked descriptor; None where a living process holds the lock or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == folder.stat().st_ino:  # else: removed or replaced just now
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
