"""Files written whole or not at all, on a local disk: write beside the target, sync, rename, sync the folder.

    with atomic_write(path) as aside:      OUT/.part-00003.parquet.tmp     being written
        pq.write_table(table, aside)
                                           OUT/part-00003.parquet          after the block

After the block a reader sees the new file, also after a power cut. After an exception, a kill or a power cut inside
the block a reader sees the old file, or none. pandas, PyArrow, DuckDB and Spark pass over names that begin with a dot,
so a leftover does no harm. The next write of the same file replaces it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on leaving the block it becomes `path`.

    After an exception the file beside is removed and `path` stays as it was.
    """
    aside = aside_of(path)
    try:
        with at_place(path):
            yield aside
            sync(aside)
            aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def at_place(path: Any) -> Iterator[None]:
    """Notes on an error inside what was being written: the system names no path where a write fails."""
    try:
        yield
    except BaseException as error:
        error.add_note(str(path))
        raise


def aside_of(path: Path) -> Path:
    """Where `path` is written before it is complete: `part.parquet` -> `.part.parquet.tmp`."""
    return path.with_name(f".{path.name}.tmp")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file, as atomic_write does."""
    with atomic_write(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file of UTF-8, as atomic_write does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a value as to_json has it, as atomic_write does."""
    write_text(path, to_json(value, indent=1) + "\n")


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, so that they last through a power cut."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writes left in a folder. No process may be writing there."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_file():
            leftover.unlink()


def to_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON, with null for NaN and infinities: JSON has no words for them, and most readers refuse them."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def sync(path: Path) -> None:
    """Makes a file's content, or the renames and deletions in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Makes everything in a folder last through a power cut, but not the folder's own name."""
    for inside, _, names in os.walk(folder):
        for name in names:
            sync(Path(inside, name))
        sync(Path(inside))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
