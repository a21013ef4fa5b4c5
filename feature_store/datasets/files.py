"""What a data set is once it is ready: a few Parquet files in one folder, committed as a whole.

    FOLDER/events.parquet   one row per event, in the source's own row order
    FOLDER/items.parquet    one row per item      (not every data set has it)
    FOLDER/users.parquet    one row per user      (not every data set has it)
    FOLDER/complete.json    the commit marker: bytes and sha256 of every other file

A folder is written aside and renamed into place, so it is there whole or not at all. A folder whose
marker is missing or does not fit its files is never read; it is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from elastic_rec.feature_store.utils.atomic_write import make_folder, sync, sync_tree, write_json
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.scratch import scratch_folder

MARKER = "complete.json"
FORMAT = 1  # raise it when the converted files change, so that older caches are made anew
EVENTS = "events.parquet"
OPTIONAL = {"items": "items.parquet", "users": "users.parquet", "bayes": "bayes.json"}
OURS = {MARKER, EVENTS, *OPTIONAL.values()}


@dataclass(frozen=True)
class EventFiles:
    """A data set ready for ingest.

    events: Parquet with user_id (int64), item_id (int64 or string), timestamp (int64 seconds), and the set's own
        columns ("rating" or "action"), in the source's row order: ties in time are kept as they came.
    items, users: Parquet with attributes by item_id / user_id, or None.
    bayes: JSON with the best hit rate that any model can reach, for synthetic data; else None.
    source: where the data came from, for people.
    """

    name: str
    events: Path
    items: Path | None
    users: Path | None
    bayes: Path | None
    source: str
    num_events: int


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_folder(folder: Path, *, key: dict) -> EventFiles | None:
    """The data set in `folder`, or None unless it is complete, unharmed and was made from `key`."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        if marker["format"] != FORMAT or marker["key"] != key:
            return None
        for name, recorded in marker["files"].items():
            path = folder / name
            if path.stat().st_size != recorded["bytes"] or sha256_of(path) != recorded["sha256"]:
                return None
        there = {field: folder / file if file in marker["files"] else None for field, file in OPTIONAL.items()}
        figures = {field: marker[field] for field in ("name", "source", "num_events")}
        return EventFiles(events=folder / EVENTS, **there, **figures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # unfinished, cut off, or not ours: the caller makes it anew


@contextmanager
def commit_folder(folder: Path, *, name: str, key: dict) -> Iterator[tuple[Path, dict]]:
    """Gives (an empty folder to write in, a dict to fill with source and num_events); on a clean exit the folder
    becomes `folder`, on an error nothing is left. Refuses to replace a folder that we did not write."""
    folder = Path(os.path.realpath(folder))
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - OURS):
        raise DataError(f"{folder}: is there already and holds other things than a data set; choose another folder")
    with ExitStack() as stack:
        try:
            make_folder(folder.parent)
            aside = stack.enter_context(scratch_folder(folder.parent, prefix=f".{folder.name}.tmp-"))
        except OSError as error:
            raise DataError(
                f"{folder.parent}: cannot be written ({error}); set another cache_dir or out_dir"
            ) from error
        figures: dict = {}
        yield aside, figures
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(aside.iterdir())}
        marker = {"format": FORMAT, "name": name, "key": key, **figures, "files": files}
        sync_tree(aside)
        write_json(aside / MARKER, marker)
        aside.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        shutil.rmtree(folder, ignore_errors=True)
        try:
            aside.rename(folder)
        except OSError:
            # Another process committed the same data set between the two lines above; its copy is as good as ours.
            if open_folder(folder, key=key) is None:
                raise
        sync(folder.parent)


def default_cache_dir() -> Path:
    """$ELASTIC_REC_CACHE, else ~/.cache/elastic-rec."""
    return Path(os.environ.get("ELASTIC_REC_CACHE") or Path.home() / ".cache" / "elastic-rec")
