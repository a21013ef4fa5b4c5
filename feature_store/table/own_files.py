"""What in a store's folder was written by the store. Nothing else is deleted, and no link is followed to delete.

A manifest may name files of these forms only, so that no path leads out of the store's folder.
"""

from __future__ import annotations

import os
import re

from elastic_rec.feature_store.table.location import Location

_DIGEST = r"[0-9a-f]{16}"
# Stores from before digests in all names have part-000.parquet and vocab/item.parquet.
DATA_FILE = re.compile(rf"bucket=(\d{{4,}})/part-(?:{_DIGEST}|000)\.parquet")  # [1]: the bucket
VOCABULARY_FILE = re.compile(rf"vocab/(\w+)(?:-{_DIGEST})?\.parquet")  # [1]: the column
ITEMS_FILE = re.compile(rf"items/part-{_DIGEST}\.parquet")
IMPRESSIONS, STATES, SCRATCH, WORK = "impressions", "states", ".append", ".work"
_TABLE = rf"{DATA_FILE.pattern}|{VOCABULARY_FILE.pattern}"
STATE_FILE = re.compile(rf"{STATES}/{_DIGEST}-\w+/bucket=\d{{4,}}\.parquet")
_LEFTOVER = re.compile(
    rf"({IMPRESSIONS}/)?\.manifest(-\d{{6,}})?\.json\.tmp|{STATES}/{_DIGEST}-\w+/\.?bucket=\d{{4,}}(\.parquet)?\.tmp"
)
_OURS = re.compile(
    rf"manifest(-\d{{6,}})?\.json|{_TABLE}|{STATE_FILE.pattern}|{_LEFTOVER.pattern}|({SCRATCH}|{WORK})/.*"
    rf"|{IMPRESSIONS}/(manifest\.json|{_TABLE}|{ITEMS_FILE.pattern})",
    re.DOTALL,
)


def data_files(root: Location, *, folder: str = "") -> list[Location]:
    """Data files, vocabularies and item attributes that a manifest of the store (or, with folder=IMPRESSIONS, of its
    impressions) could name."""
    prefix = f"{folder}/" if folder else ""
    table = re.compile(f"{prefix}({_TABLE}{f'|{ITEMS_FILE.pattern}' if folder else ''})")
    return [root / path for path in _walk(root)[0] if table.fullmatch(path)]


def state_files(root: Location) -> list[Location]:
    """Files of user states, of all models."""
    return [root / path for path in _walk(root)[0] if STATE_FILE.fullmatch(path)]


def foreign_paths(root: Location) -> list[str]:
    """Files below `root` that no store wrote, and links, which none writes either; paths within `root`, sorted."""
    files, links = _walk(root)
    return sorted([path for path in files if not _OURS.fullmatch(path)] + links)


def delete_leftovers(root: Location) -> None:
    """Removes what killed writes left half-written. The caller holds the store's lock."""
    for path in _walk(root)[0]:
        if _LEFTOVER.fullmatch(path) and not path.startswith(f"{STATES}/"):  # states have locks of their own
            (root / path).delete()


def _walk(root: Location) -> tuple[list[str], list[str]]:
    """(files, links) below a folder, as sorted paths within it. Links are not followed; object stores have none."""
    if not root.is_local:
        return [file.below(root) for file in root.files()], []
    files, links = [], []
    for folder, folders, names in os.walk(root):
        within = os.path.relpath(folder, root)
        for name in [*folders, *names]:
            path = name if within == "." else f"{within}/{name}"
            if os.path.islink(os.path.join(folder, name)):
                links.append(path)
            elif name in names:
                files.append(path)
    return sorted(files, key=lambda path: path.split("/")), sorted(links)
