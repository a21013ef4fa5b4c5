"""STORE/impressions/manifest.json: the table's files and vocabularies, and which item ids it was written with."""

from __future__ import annotations

import hashlib
import json

from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.manifest import MANIFEST, check_sizes, content_hash, named_files
from elastic_rec.feature_store.table.manifest_checks import check_impressions
from elastic_rec.feature_store.table.own_files import IMPRESSIONS as FOLDER
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.vocabulary import FIRST, Vocabulary
from elastic_rec.feature_store.utils.errors import DataError

FORMAT = "elastic-rec-impressions"
VERSION = 1
_REMEDY = "ingest the impressions again (ingest.py impressions)"
_BLOCK = 1 << 20


def write_manifest(folder: Location, content: dict) -> None:
    manifest = {"format": FORMAT, "version": VERSION, **content}
    manifest["hash"] = content_hash(manifest)
    (folder / MANIFEST).replace(json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def read_manifest(store: Store) -> dict:
    """Reads and checks the manifest of a store's impressions, the files it names, and that it fits the store."""
    manifest = load_manifest(store.path)
    check_sizes(store.path / FOLDER, named_files(manifest))
    _check_fits(manifest, store)
    return manifest


def load_manifest(root: Location) -> dict:
    """The manifest of the impressions of the store at `root`, whether or not its files are there."""
    path = root / FOLDER / MANIFEST
    if not path.is_file():
        raise DataError(f"{root}: has no impressions; {_REMEDY}")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); {_REMEDY}") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{path}: not a manifest of impressions, version {VERSION}; {_REMEDY}")
    if manifest.get("hash") != content_hash(manifest):
        raise DataError(f"{path}: its hash does not match its content; {_REMEDY}")
    check_impressions(manifest, str(path))
    return manifest


def _check_fits(manifest: dict, store: Store) -> None:
    """Appends keep buckets and item indices, so a table outlives them; a store made anew is another store."""
    if manifest["store"] == store.manifest["hash"]:
        return
    items, written = store.vocabulary("item"), manifest["item_ids"]
    same = items.size >= written["size"] and ids_digest(items, written["size"]) == written["sha256"]
    if not same or manifest["num_buckets"] != store.manifest["num_buckets"]:
        raise DataError(f"{store.path}: its impressions were written with other item ids or buckets; {_REMEDY}")


def ids_digest(vocabulary: Vocabulary, size: int) -> str:
    """Digest of the ids of indices below `size`."""
    digest = hashlib.sha256()
    for begin in range(0, size - FIRST, _BLOCK):
        ids = vocabulary.ids.slice(begin, min(_BLOCK, size - FIRST - begin))
        digest.update(json.dumps(ids.to_pylist()).encode())
    return digest.hexdigest()
