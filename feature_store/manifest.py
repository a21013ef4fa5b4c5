"""manifest.json: what a store holds, and the mark that it is finished (it is written last).

    {format, version, name, time_unit, num_users, num_events, num_buckets, bucket_hash, schema,
     files: [{path, bytes, sha256, num_users, num_events, row_groups: [[users, events], ...], min_time, max_time}],
     vocabularies: {column: {path, size, type, bytes, sha256}}, source, filters, hash}

`hash` covers all the rest, file digests included, so two stores with one hash hold the same bytes. No date and no
path of the store itself is inside: the same input gives the same manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from elastic_rec.feature_store.errors import DataError

MANIFEST = "manifest.json"
FORMAT = "elastic-rec-history-store"
VERSION = 1


def describe_file(root: Path, path: Path) -> dict:
    """Path within the store, size and digest; syncs the file to disk, since the manifest will vouch for it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": digest}


def write_manifest(root: Path, content: dict) -> dict:
    """Adds format, version and hash, writes, syncs. Returns what was written."""
    manifest = {"format": FORMAT, "version": VERSION, **content}
    manifest["hash"] = content_hash(manifest)
    with (root / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def read_manifest(root: Path) -> dict:
    """Reads and checks manifest.json and that every file it names is there with the recorded size (DataError)."""
    path = root / MANIFEST
    if not path.is_file():
        there = "it has no manifest.json" if root.is_dir() else "no such folder"
        raise DataError(f"{root}: unfinished or not a history store ({there}); rerun ingest")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); rerun ingest") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a history store (format is not '{FORMAT}'); rerun ingest")
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path}: store format version {manifest.get('version')}, this code reads version {VERSION}; rerun ingest"
        )
    if manifest.get("hash") != content_hash(manifest):
        raise DataError(f"{path}: its hash does not match its content; the manifest was changed, rerun ingest")
    for entry in [*manifest["files"], *manifest["vocabularies"].values()]:
        _check_size(root / entry["path"], entry["bytes"])
    return manifest


def check_digest(root: Path, entry: dict) -> None:
    """Raises DataError where a file's bytes are not those that ingest wrote."""
    path = root / entry["path"]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise DataError(f"{path}: changed since ingest (sha256 differs from the manifest's); rerun ingest")


def content_hash(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_size(path: Path, recorded: int) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing, though the manifest names it; restore it or rerun ingest")
    if (size := path.stat().st_size) != recorded:
        raise DataError(f"{path}: {size} bytes, the manifest says {recorded}; truncated or changed, rerun ingest")
