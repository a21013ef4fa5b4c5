"""manifest.json: what a table of a store holds, and the mark that it is finished: it is written last.

STORE/manifest.json               HistoryManifest: the histories, in their current version (versions.py)
STORE/manifest-000007.json        one for each version, once there are appends
STORE/impressions/manifest.json   ImpressionManifest
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from elastic_rec.feature_store.table.footer import footer_digest
from elastic_rec.feature_store.table.format import HistoryManifest, ImpressionManifest, Manifest
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.own_files import IMPRESSIONS
from elastic_rec.feature_store.utils import checked_json as checked
from elastic_rec.feature_store.utils.atomic_write import sync
from elastic_rec.feature_store.utils.errors import DAMAGED, DataError
from elastic_rec.feature_store.utils.typed_json import ABSENT, from_json, to_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_GONE = "if the store was overwritten, or a vacuum deleted this version, just now: open the store again"

AnyManifest = TypeVar("AnyManifest", bound=Manifest)
AnyFile = TypeVar("AnyFile")


def describe_file(root: Path, path: Path) -> dict[str, Any]:
    """{"path", "bytes", "sha256"} of a file below `root`; syncs it to disk, since a manifest will vouch for it."""
    sync(path)
    return {"path": path.relative_to(root).as_posix(), **checked.describe_file(path)}


def describe_data_file(root: Path, path: Path) -> dict[str, Any]:
    """describe_file() of a Parquet file that is read in parts, with the digest of its footer."""
    described = describe_file(root, path)
    with open_location(path).open() as file:
        return {**described, "footer": footer_digest(file)}


def put_in_place(entries: list[AnyFile], work: Path, root: Location) -> list[AnyFile]:
    """Moves finished files of `work` into the table at `root`, under names made of their digests, so that none replaces
    another's bytes. Entries of files that are not in `work` are in place already, and stay as they are. All of it lasts
    through a power cut before this returns."""
    moved = []
    for entry in entries:
        folder, name = entry.path.split("/")
        stem = "part" if folder != "vocab" else Path(name).stem
        path = f"{folder}/{stem}-{entry.sha256[:16]}.parquet"
        if path == entry.path or not (work / entry.path).exists():
            moved.append(entry)
            continue
        (root / path).receive(work / entry.path)
        moved.append(replace(entry, path=path))
    if root.is_local:
        sync(Path(root))
    return moved


def commit(manifest: AnyManifest, *, work: Path, root: Location, name: str = MANIFEST) -> AnyManifest:
    """The one way in which tables are written: puts the files of `work` that `manifest` names in place, then writes the
    manifest, last, as root/name. Returns it with the paths and the hash that it has there."""
    entries = manifest.named_files()
    placed = dict(zip((entry.path for entry in entries), put_in_place(entries, work, root), strict=True))
    changes = {
        "files": [placed[entry.path] for entry in manifest.files],
        "vocabularies": {column: placed[entry.path] for column, entry in manifest.vocabularies.items()},
    }
    if manifest.items:
        changes["items"] = placed[manifest.items.path]
    return write_manifest(root / name, replace(manifest, **changes))


def write_manifest(path: Location, manifest: AnyManifest) -> AnyManifest:
    """Whole or not at all. Returns the manifest with its hash."""
    content = sealed(to_json(manifest), manifest.FORMAT)
    path.replace(json.dumps(content, indent=1, ensure_ascii=False).encode())
    return replace(manifest, hash=content["hash"])


def sealed(content: dict, format: str) -> dict:
    """The content of a manifest with format, format version and hash."""
    content = {"format": format, "version": FORMAT_VERSION, **content}
    return {**content, "hash": content_hash(content)}


def content_hash(content: dict) -> str:
    """sha256 of all but "hash"."""
    rest = {key: value for key, value in content.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def version_path(root: Location, version: int) -> Location:
    """Where the manifest of a version is filed."""
    return root / f"manifest-{version:06d}.json"


def filed_versions(root: Location) -> list[int]:
    """Versions with a manifest of their own, ascending; version 0 gets one when the first append leaves it."""
    names = (re.fullmatch(r"manifest-(\d{6,})\.json", path.name) for path in root.files(recursive=False))
    return sorted(int(name[1]) for name in names if name)


def read_manifest(root: Location, version: int | None = None) -> HistoryManifest:
    """Reads and checks the manifest of a version (None: the current one, manifest.json) and that every file it
    names is there with the recorded size (DataError)."""
    manifest = load_manifest(root, version)
    check_sizes(root, manifest)
    return manifest


def load_manifest(root: Location, version: int | None = None) -> HistoryManifest:
    """As read_manifest, whether or not the files are there."""
    filed = filed_versions(root)
    remedy = f"take one of {_listed(filed)}, with ingest.py restore version=N" if filed else "run the ingest again"
    if version is None or (version == 0 and not filed):
        manifest = _parse(HistoryManifest, root / MANIFEST, remedy)
        current = manifest.version
        if current > 0 and current not in filed:
            raise DataError(
                f"{root / MANIFEST}: names version {current}, but {version_path(root, current).name} is missing; "
                f"copy the store whole, or {remedy}"
            )
    elif version in filed:
        manifest = _parse(HistoryManifest, version_path(root, version), remedy)
        if manifest.version != version:
            raise DataError(f"{version_path(root, version)}: is of version {manifest.version}; {remedy}")
    else:
        raise DataError(f"{root}: no version {version}; there are {_listed(filed) or '0 only'}")
    return manifest


def load_impressions(root: Location) -> ImpressionManifest:
    """The manifest of the impressions of the store at `root`, whether or not its files are there."""
    path = root / IMPRESSIONS / MANIFEST
    if not path.is_file():
        raise DataError(f"{root}: has no impressions; {ImpressionManifest.REMEDY}")
    return _parse(ImpressionManifest, path, ImpressionManifest.REMEDY)


def check_sizes(root: Location, manifest: Manifest) -> None:
    """Raises DataError where a file is missing or has another size than the manifest says."""
    entries = manifest.named_files()
    for entry, size in zip(entries, root.sizes([entry.path for entry in entries]), strict=True):
        if size is None:
            raise DataError(
                f"{root / entry.path}: missing, though the manifest names it; {_GONE}, or run the ingest again"
            )
        if size != entry.bytes:
            raise DataError(f"{root / entry.path}: {size} bytes, the manifest says {entry.bytes}; {DAMAGED}")


def check_digest(path: Location, sha256: str, *, copy: Path | None = None) -> None:
    """Raises DataError where a file's bytes (or those of a local copy of it) are not those that ingest wrote."""
    try:
        digest = (path if copy is None else open_location(copy)).digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {_GONE}, or run the ingest again") from error
    if digest != sha256:
        raise DataError(f"{path}: its sha256 is not the manifest's; {DAMAGED}")


def _listed(versions: list[int]) -> str:
    return ", ".join(map(str, versions))


def _parse(kind: type[AnyManifest], path: Location, remedy: str) -> AnyManifest:
    """A manifest that could have been written by ingest. remedy: what to do where it is missing."""
    if not path.is_file():
        there = f"it has no {path.name}" if path.parent.is_dir() else "no such folder"
        raise DataError(f"{path.parent}: unfinished or not {kind.TABLE} ({there}); {remedy}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); {kind.REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != kind.FORMAT:
        raise DataError(f"{path}: not the manifest of {kind.TABLE} (format is not '{kind.FORMAT}'); {kind.REMEDY}")
    if content.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: store format version {content.get('version')}, this code reads version {FORMAT_VERSION}; "
            f"{kind.REMEDY}"
        )
    if content.get("hash") != content_hash(content):
        raise DataError(
            f"{path}: its hash does not match its content; it was changed or damaged after it was written: "
            f"restore it, or {kind.REMEDY}"
        )

    def fail(place: str, value: Any) -> NoReturn:
        found = "missing" if value is ABSENT else f"{value!r}"
        raise DataError(
            f"{path}: {place} is {found[:80]}, which ingest never writes: the manifest may have been tampered "
            "with, and could name files outside the store. Run the ingest again, or fetch the store from its "
            "source again"
        )

    manifest = from_json(kind, content, fail)
    manifest.check(fail)
    return replace(manifest, hash=content["hash"])
