"""A new day's events folded into a store: the next version, all or nothing.

Buckets that get events are written again beside the old ones (copy-on-write), the others are shared. Data files first,
then their manifest, then manifest.json (versions.py): whatever moment the process dies at, the current version
stays whole, and running the append again finishes it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from elastic_rec.feature_store.ingestion.checks import Policy
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.ingestion.merge import MergeEngine
from elastic_rec.feature_store.ingestion.sources import NAMED_ROLES
from elastic_rec.feature_store.ingestion.writer import write_sorted, write_vocabularies
from elastic_rec.feature_store.table.format import HistoryFile, HistoryManifest, SourceFile, VocabularyFile
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.manifest import check_digest
from elastic_rec.feature_store.table.schema import history_schema
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.versions import append_folder, next_version, publish, writing
from elastic_rec.feature_store.table.vocabulary import FIRST
from elastic_rec.feature_store.utils.credentials import mask_credentials
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.progress import peak_memory_bytes


def append(config: AppendConfig) -> dict:
    """Adds config.input to the store at config.store. Returns figures; DataError leaves the store as it was."""
    began = time.perf_counter()
    with writing(config.store) as root:
        base = Store.open(root)
        settings = _settings(config, base)
        paths, format = find_inputs(config.input, format=config.format.value)
        if not config.force and settings.event_id_column is None:
            _refuse_known(paths, base)
        with append_folder(root) as work:
            merged = _merge(settings, base, paths, format, work)
            manifest = _publish(base, merged, work) if merged.data else base.manifest
    seconds = time.perf_counter() - began
    rate = round(merged.read_events / seconds)
    peak = peak_memory_bytes()
    return {
        "store": str(config.store),
        **_figures(manifest, merged),
        "seconds": round(seconds, 3),
        "events_per_s": rate,
        "peak_memory_bytes": peak,
    }


def _settings(config: AppendConfig, base: Store) -> IngestConfig:
    """How the store was made, for new input; DataError where the store cannot grow."""
    stored = base.manifest
    if stored.row_group_events is None:
        raise DataError(f"{base.path}: written before appends (no digests of its input); ingest everything again")
    columns, filters = stored.source.columns, stored.filters
    for name in ("min_user_events", "min_item_events", "max_history"):
        if (value := filters.get(name, none := getattr(IngestConfig(), name))) > none:
            raise DataError(
                f"{base.path} was made with {name}={value}: what was dropped then is not in it and might be kept "
                f"today. Make the store with {name}={none} to append to it, or ingest everything again"
            )
    for name in ("out_of_order", "gaps"):
        if getattr(config.checks, name) is Policy.drop:
            raise DataError(
                f"checks.{name}=drop would look at the new events alone; append with keep (late events are put in "
                "their place), or fail"
            )
    return IngestConfig(
        input=config.input,
        format=config.format,
        checks=config.checks,
        memory_limit=config.memory_limit,
        threads=config.threads,
        user_column=columns["user"],
        item_column=columns["item"],
        timestamp_column=columns["timestamp"],
        event_id_column=columns.get("event_id"),
        context_columns=[name for name in columns if name not in NAMED_ROLES],
        timestamp_unit=stored.time_unit,
        row_group_events=stored.row_group_events,
        first_time=filters.get("first_time"),
        end_time=filters.get("end_time"),
        min_vocabulary_count=filters.get("min_vocabulary_count", 1),
    )


def _refuse_known(paths: list[Location], base: Store) -> None:
    """Without event ids only the bytes of a file tell that its events are in the store already."""
    taken = [entry for entry in base.manifest.source.files if entry.events]
    known = {entry.sha256: f"{mask_credentials(entry.path)}, version {entry.version}" for entry in taken}
    sizes = {entry.bytes for entry in taken}
    for path in paths:
        if path.size() in sizes and (digest := path.digest()) in known:
            raise DataError(
                f"{path}: the same bytes were taken before ({known[digest]}); nothing was appended. To append such "
                "events once more and so double them: force=true"
            )


class Merged(NamedTuple):
    """What came of the new events, in files of the work folder that nothing refers to yet.

    read_events: of the input. old: entries of the data files that `data` replaces; none where every event was known
    or dropped. counts: as MergeEngine.fold gives them. outside: events dropped by the time range.
    """

    inputs: list[SourceFile]
    read_events: int
    checks: dict[str, int]
    duplicates: int
    outside: int
    old: list[HistoryFile]
    data: list[HistoryFile]
    vocabularies: dict[str, VocabularyFile]
    counts: dict[str, int]


def _merge(config: IngestConfig, base: Store, paths: list[Location], format: str, work: Path) -> Merged:
    root, roles = base.path, config.roles()
    old_files = {entry.bucket: entry for entry in base.manifest.files}
    (work / "duckdb").mkdir()
    with MergeEngine(
        base=base,
        work=work / "duckdb",
        roles=list(roles),
        memory_limit=config.memory_limit,
        threads=config.threads,
        checks=config.checks,
    ) as engine:
        inputs = engine.load_inputs(paths, format=format, columns=roles)
        read_events = sum(entry.events for entry in inputs)
        checks = engine.clean()
        engine.adopt_types()
        outside = engine.keep_times(*config.time_range())
        old = _pick(old_files, engine.touched_buckets())
        copies = {entry.path: (root / entry.path).fetch(work / "old" / str(entry.bucket)) for entry in old}
        for entry in old:  # a bit flipped on disk must not be copied under a fresh digest
            check_digest(root / entry.path, entry.sha256, copy=copies[entry.path])
        checks["duplicates"] += (known := engine.drop_known(list(copies.values())))
        duplicates = checks["duplicates"] if config.checks.duplicates is Policy.drop else known
        if not engine.num_staged():
            counts = {"appended_events": 0, "users": base.num_users, "new_users": 0}
            counts |= {"items": base.vocabulary("item").size - FIRST, "new_items": 0}
            return Merged(inputs, read_events, checks, duplicates, outside, [], [], {}, counts)
        old = _pick(old_files, engine.touched_buckets())
        counts = engine.fold(min_vocabulary_count=config.min_vocabulary_count)
        vocabularies = write_vocabularies(map(engine.vocabulary, base.manifest.vocabularies), work)
        data, order_checks = write_sorted(
            engine.merged_batches([copies[entry.path] for entry in old]),
            root=work,
            schema=history_schema(base.manifest.schema.user_id, base.manifest.schema.events),
            row_group_events=config.row_group_events,
            checks=config.checks,
            unit=base.time_unit,
            num_events=_num_events(old) + counts["appended_events"],
        )
    return Merged(inputs, read_events, checks | order_checks, duplicates, outside, old, data, vocabularies, counts)


def _publish(base: Store, merged: Merged, work: Path) -> HistoryManifest:
    """Makes the next version, from the files in `work`, the current one."""
    root = base.path
    expected = _num_events(merged.old) + merged.counts["appended_events"]
    if (found := _num_events(merged.data)) != expected:
        raise DataError(
            f"{root}: {expected} events went in and {found} came out; nothing was appended. This is a fault of the "
            "program: please report it with the input"
        )
    base_files, source, filters = base.manifest.files, base.manifest.source, base.manifest.filters
    by_bucket = {entry.bucket: entry for entry in [*base_files, *merged.data]}
    files = [by_bucket[bucket] for bucket in sorted(by_bucket)]
    version = next_version(root)
    inputs = [replace(entry, path=mask_credentials(entry.path)) for entry in source.files]
    inputs += [replace(entry, version=version) for entry in merged.inputs]
    dropped = {"dropped_duplicates": merged.duplicates, "dropped_events": merged.outside}
    manifest = replace(
        base.manifest,
        version=version,
        parent=base.manifest.hash,
        num_users=merged.counts["users"],
        num_events=_num_events(files),
        files=files,
        vocabularies=merged.vocabularies,
        source=replace(source, files=inputs),
        filters=filters | {name: filters[name] + more for name, more in dropped.items()},
        checks=merged.checks,
    )
    return publish(root, manifest, work=work)


def _figures(manifest: HistoryManifest, merged: Merged) -> dict:
    """Of an append that made `manifest` the current one, or left it so."""
    appended = merged.counts["appended_events"]
    data_bytes = sum(entry.bytes for entry in merged.data)
    written_bytes = data_bytes + sum(entry.bytes for entry in merged.vocabularies.values())
    appended_bytes = data_bytes * appended / max(1, _num_events(merged.data))
    return {
        "version": manifest.version,
        "hash": manifest.hash,
        "read_events": merged.read_events,
        "dropped_duplicates": merged.duplicates,
        "checks": merged.checks,
        **merged.counts,
        "events": manifest.num_events,
        "rewritten_files": len(merged.data),
        "written_bytes": written_bytes,
        "appended_bytes": round(appended_bytes),
        "write_amplification": round(written_bytes / appended_bytes, 2) if appended else 0.0,
    }


def _num_events(entries: list[HistoryFile]) -> int:
    return sum(entry.num_events for entry in entries)


def _pick(files: dict[int, HistoryFile], buckets: set[int]) -> list[HistoryFile]:
    return [files[bucket] for bucket in sorted(buckets) if bucket in files]
