"""One job at a time in a folder: a lock that ends with its process, however that ends, and says whose it is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic_rec.feature_store.atomic_write import make_folder
from elastic_rec.feature_store.errors import DataError

LOCK = ".lock"


@contextmanager
def hold_folder(folder: Path, *, job: str, remedy: str) -> Iterator[None]:
    """Holds `folder`, made if need be, for this process. It is removed again if the block leaves it empty.

    job: what is done there, e.g. "training". Raises DataError, which names the holder and then the remedy, where
    another process holds the folder.
    """
    is_new = not folder.exists()
    make_folder(folder)
    descriptor = _lock(folder / LOCK)
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


def _lock(path: Path) -> int | None:
    """A locked descriptor of the file; None where another process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its holder has just removed the file: lock the next one


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError):
        return ""
