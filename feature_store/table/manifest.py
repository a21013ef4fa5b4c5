"""manifest.json: what a store holds, and the mark that it is finished (it is written last).

    {format, version, name, time_unit, num_users, num_events, num_buckets, bucket_hash, schema,
     files: [{path, bytes, sha256, footer, num_users, num_events, row_groups: [[users, events], ...], min_time,
              max_time}],
     vocabularies: {column: {path, size, type, bytes, sha256}}, source, filters, checks, generation, hash}

`footer` is the sha256 of a Parquet file's footer, which has no checksum of its own as the pages have.
`checks` counts what was found in the events that came with this version (checks.py).
`hash` covers all the rest, file digests included, so two stores with one hash hold the same bytes. No date and no
path of the store itself is inside: the same input gives the same manifest. Every append makes a version with a
manifest of its own, manifest-000007.json; manifest.json is a copy of the current one's (versions.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from elastic_rec.feature_store.table.footer import footer_digest
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.manifest_checks import check_history
from elastic_rec.feature_store.utils import checked_json as checked
from elastic_rec.feature_store.utils.atomic_write import sync
from elastic_rec.feature_store.utils.errors import DataError

MANIFEST = "manifest.json"
FORMAT = "elastic-rec-history-store"
VERSION = 1
_GONE = "if the store was overwritten, or a vacuum deleted this version, just now: open the store again"


def describe_file(root: Path, path: Path) -> dict:
    """Path within the store, size and digest; syncs the file to disk, since the manifest will vouch for it."""
    sync(path)
    return {"path": path.relative_to(root).as_posix(), **checked.describe_file(path)}


def describe_data_file(root: Path, path: Path) -> dict:
    """describe_file() of a Parquet file that is read in parts, with the digest of its footer."""
    described = describe_file(root, path)
    with open_location(path).open() as file:
        return {**described, "footer": footer_digest(file)}


def put_in_place(entries: list[dict], work: Path, root: Location) -> list[dict]:
    """Moves finished files into the store under names made of their digests, so that none replaces another's bytes.
    Those with such a name are there already. All of it lasts through a power cut before this returns."""
    moved = []
    for entry in entries:
        folder, name = entry["path"].split("/")
        stem = "part" if folder != "vocab" else Path(name).stem
        path = f"{folder}/{stem}-{entry['sha256'][:16]}.parquet"
        if path != entry["path"]:
            (root / path).receive(work / entry["path"])
        moved.append({**entry, "path": path})
    if root.is_local:
        sync(Path(root))
    return moved


def write_manifest(path: Location, content: dict) -> dict:
    """Adds format, version and hash. Returns what was written."""
    content = {key: value for key, value in content.items() if key not in ("format", "version", "hash")}
    manifest = {"format": FORMAT, "version": VERSION, **content}
    manifest["hash"] = content_hash(manifest)
    path.replace(json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    return manifest


def version_path(root: Location, version: int) -> Location:
    return root / f"manifest-{version:06d}.json"


def filed_versions(root: Location) -> list[int]:
    """Versions with a manifest of their own, ascending; version 0 gets one when the first append leaves it."""
    names = (re.fullmatch(r"manifest-(\d{6,})\.json", path.name) for path in root.files(recursive=False))
    return sorted(int(name[1]) for name in names if name)


def read_manifest(root: Location, version: int | None = None) -> dict:
    """Reads and checks the manifest of a version (None: the current one, manifest.json) and that every file it
    names is there with the recorded size (DataError)."""
    manifest = load_manifest(root, version)
    check_sizes(root, named_files(manifest))
    return manifest


def load_manifest(root: Location, version: int | None = None) -> dict:
    """As read_manifest, whether or not the files are there."""
    filed = filed_versions(root)
    remedy = f"take one of {_listed(filed)}, with ingest.py restore version=N" if filed else "rerun ingest"
    if version is None or (version == 0 and not filed):
        manifest = _load(root, root / MANIFEST, remedy)
        current = manifest.get("generation", 0)
        if current > 0 and current not in filed:
            raise DataError(
                f"{root / MANIFEST}: names version {current}, but {version_path(root, current).name} is missing; "
                f"copy the store whole, or {remedy}"
            )
    elif version in filed:
        manifest = _load(root, version_path(root, version), remedy)
        if manifest.get("generation", 0) != version:
            raise DataError(f"{version_path(root, version)}: is of version {manifest['generation']}; {remedy}")
    else:
        raise DataError(f"{root}: no version {version}; there are {_listed(filed) or '0 only'}")
    return manifest


def named_files(manifest: dict) -> list[dict]:
    """Entries of the files that a manifest, of a store or of impressions, names."""
    items = manifest.get("items")
    return [*manifest["files"], *manifest["vocabularies"].values(), *([items] if items else [])]


def check_sizes(root: Location, entries: list[dict]) -> None:
    """Raises DataError where a file is missing or has another size than the manifest says."""
    for entry, size in zip(entries, root.sizes([entry["path"] for entry in entries]), strict=True):
        if size is None:
            raise DataError(f"{root / entry['path']}: missing, though the manifest names it; {_GONE}, or rerun ingest")
        if size != entry["bytes"]:
            raise DataError(
                f"{root / entry['path']}: {size} bytes, the manifest says {entry['bytes']}; truncated or changed, "
                "rerun ingest"
            )


def _listed(versions: list[int]) -> str:
    return ", ".join(map(str, versions))


def _load(root: Location, path: Location, remedy: str) -> dict:
    """A manifest that could have been written by ingest, whether or not its files are there."""
    if not path.is_file():
        there = f"it has no {path.name}" if root.is_dir() else "no such folder"
        raise DataError(f"{root}: unfinished or not a history store ({there}); {remedy}")
    try:
        manifest = json.loads(path.read_bytes())
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
    check_history(manifest, str(path))
    return manifest


def check_digest(root: Location, entry: dict, *, copy: Path | None = None) -> None:
    """Raises DataError where a file's bytes (or those of a local copy of it) are not those that ingest wrote."""
    path = root / entry["path"]
    try:
        digest = (path if copy is None else open_location(copy)).digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {_GONE}, or rerun ingest") from error
    if digest != entry["sha256"]:
        raise DataError(f"{path}: changed since ingest (sha256 differs from the manifest's); rerun ingest")


def content_hash(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
