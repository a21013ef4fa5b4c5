"""Reads every byte of a store and compares it with what was written: histories, vocabularies, impressions, states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from elastic_rec.feature_store.states.files import StateFile
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.manifest import (
    MANIFEST,
    check_digest,
    filed_versions,
    load_impressions,
    load_manifest,
)
from elastic_rec.feature_store.table.own_files import IMPRESSIONS, state_files
from elastic_rec.feature_store.utils.errors import DataError


@dataclass
class Findings:
    """What a check has found. counts: files that are whole, by kind, and bytes read. broken: what is wrong with each of
    the others, with its path."""

    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @contextmanager
    def about(self, kind: str) -> Iterator[None]:
        """What is checked inside is one file of a kind; DataError says that it is broken."""
        try:
            yield
            self.counts[kind] += 1
        except DataError as error:
            self.broken.append(str(error))


def verify_store(root: Location, findings: Findings) -> None:
    """Checks every version that the store at `root` keeps, its impressions, and the states of all models.

    DataError where there is no store.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    data, vocabularies = {}, {}
    for version in [None, *filed_versions(root)]:
        with findings.about("manifests"):
            manifest = load_manifest(root, version)
            data |= {(entry.path, entry.sha256): entry for entry in manifest.files}
            vocabularies |= {(entry.path, entry.sha256): entry for entry in manifest.vocabularies.values()}
    for kind, entries in (("data_files", data), ("vocabularies", vocabularies)):
        findings.counts["bytes"] += sum(entry.bytes for entry in entries.values())
        for entry in entries.values():
            with findings.about(kind):
                check_digest(root / entry.path, entry.sha256)
    if (root / IMPRESSIONS / MANIFEST).is_file():
        _verify_impressions(root, findings)
    for path in state_files(root):
        with findings.about("states"):
            StateFile(path).verify()


def _verify_impressions(root: Location, findings: Findings) -> None:
    entries = []
    with findings.about("manifests"):
        entries = load_impressions(root).named_files()
    findings.counts["bytes"] += sum(entry.bytes for entry in entries)
    for entry in entries:
        with findings.about("impression_files"):
            check_digest(root / IMPRESSIONS / entry.path, entry.sha256)
