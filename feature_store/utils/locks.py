"""Folders that one process holds at a time. flock ends with its process, however that ends: what can be locked is
nobody's.

A folder is locked itself, where nothing may lie in it that is not the store's; or by a file in it, which says who holds
it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic_rec.feature_store.utils.atomic_write import make_folder
from elastic_rec.feature_store.utils.errors import DataError

LOCK = ".lock"


@contextmanager
def hold_folder(folder: Path, *, job: str, remedy: str) -> Iterator[None]:
    """Holds `folder`, made if need be, by a file in it. It is removed again if the block leaves it empty.

    job: what is done there, e.g. "training". Raises DataError, which names the holder and then the remedy, where
    another process holds the folder.
    """
    is_new = not folder.exists()
    descriptor = _lock_file(folder / LOCK)
    if descriptor is None:
        raise DataError(f"{folder}: another {job} is at work in it{_holder(folder / LOCK)}: {remedy}")
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before the lock is free: `_lock` looks for that
        os.close(descriptor)
        if is_new:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def only_here(folder: Path, *, busy: str) -> Iterator[None]:
    """Locks a folder itself. Raises DataError with `busy` where another process holds it."""
    descriptor = lock_folder(folder)
    if descriptor is None:
        raise DataError(f"{folder}: {busy}")
    try:
        yield
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> int | None:
    """An open, locked descriptor; None where a living process holds the lock or the folder is gone. Raises DataError
    where its disk has no such locks."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return _lock(folder, os.O_RDONLY | os.O_DIRECTORY)


def _lock_file(path: Path) -> int | None:
    while True:
        make_folder(path.parent)
        with suppress(FileNotFoundError):  # its holder has just removed it: lock the next one
            return _lock(path, os.O_RDWR | os.O_CREAT)


def _lock(path: Path, flags: int) -> int | None:
    """None where another process has the lock. FileNotFoundError where `path` is gone, or was replaced just now."""
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise DataError(f"{path} cannot be locked ({error}): use a disk that has such locks, NFS may not") from error
    with suppress(FileNotFoundError):
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
    os.close(descriptor)
    raise FileNotFoundError(path)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError):
        return ""
