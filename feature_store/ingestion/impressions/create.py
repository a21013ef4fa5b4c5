"""Impression log -> STORE/impressions, all or nothing, in the buckets and with the item ids of the histories.

    STORE/impressions/bucket=0000/part-<digest>.parquet   one row per impression, sorted by (user, time, input order)
    STORE/impressions/vocab/<context column>-<digest>.parquet
    STORE/impressions/items/part-<digest>.parquet         attributes, row i is item index i
    STORE/impressions/manifest.json                       written last; replacing it replaces the table

Row groups end where those of the histories do (as far as the history's users go), so a reader of one row group of
histories decodes the impressions of its users and no others.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.engine import ImpressionEngine
from elastic_rec.feature_store.ingestion.impressions.items import item_attributes
from elastic_rec.feature_store.ingestion.impressions.writer import cut_impressions, impression_schema
from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.ingestion.writer import BUCKET, BucketFiles, write_vocabularies
from elastic_rec.feature_store.table.format import ImpressionFile, ImpressionManifest, NamedFile
from elastic_rec.feature_store.table.impression_table import ids_of
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.manifest import commit, describe_data_file, describe_file
from elastic_rec.feature_store.table.own_files import IMPRESSIONS, data_files
from elastic_rec.feature_store.table.store import Store, first_users
from elastic_rec.feature_store.table.versions import append_folder, writing
from elastic_rec.feature_store.table.vocabulary import UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.arrow import flat_list, list_array


def ingest_impressions(config: ImpressionConfig, *, out: str, memory_limit: str = "1GB", threads: int = 0) -> dict:
    """Writes the impressions of the store at `out`, in the place of those it may have. Returns figures; DataError for
    bad input leaves everything as it was."""
    began = time.perf_counter()
    paths, _ = find_inputs(config.input, format="parquet")
    with writing(out) as root, append_folder(root) as work:
        manifest = _build(config, paths, Store.open(root), work, memory_limit, threads)
        _publish(manifest, work, root / IMPRESSIONS)
    seconds = time.perf_counter() - began
    return {
        "impressions": manifest.num_impressions,
        "candidates": manifest.num_candidates,
        "unknown_candidates": manifest.num_unknown_candidates,
        "labels": manifest.labels,
        "context": [*manifest.context, *manifest.item_context],
        "bytes": sum(entry.bytes for entry in manifest.named_files()),
        "seconds": round(seconds, 3),
        "impressions_per_s": round(manifest.num_impressions / seconds),
    }


def _build(
    config: ImpressionConfig, paths: list[Location], store: Store, work: Path, memory_limit: str, threads: int
) -> ImpressionManifest:
    """Files in `work`; returns the manifest that names them."""
    items = store.vocabulary("item")
    (work / "duckdb").mkdir()
    with ImpressionEngine(config, store, work=work / "duckdb", memory_limit=memory_limit, threads=threads) as engine:
        inputs = engine.load_inputs(paths)
        vocabularies = {name: engine.vocabulary(name) for name in config.context_columns}
        encode = Encoder(config, items, vocabularies, user_type=store.manifest.schema.user_id)
        files = _write(config, engine.sorted_batches(), encode, store, work)
        percentiles = engine.percentiles()
    attributes, attribute_vocabularies = item_attributes(config, items)
    attributes_file = None
    if attributes is not None:
        path = work / "items" / "items.parquet"
        path.parent.mkdir()
        pq.write_table(attributes, path, compression="zstd")
        attributes_file = NamedFile(**describe_file(work, path))
    entries = write_vocabularies((vocabularies | attribute_vocabularies).values(), work)
    return ImpressionManifest(
        store=store.manifest.hash,
        num_buckets=store.manifest.num_buckets,
        time_unit=store.time_unit,
        time_percentiles=percentiles,
        item_ids=ids_of(items),
        num_impressions=sum(entry.events for entry in inputs),
        num_candidates=sum(entry.num_candidates for entry in files),
        num_unknown_candidates=encode.num_unknown,
        labels=config.label_columns,
        context=config.context_columns,
        item_context=config.item_context_columns,
        files=files,
        vocabularies={name: replace(entry, type=None) for name, entry in entries.items()},
        items=attributes_file,
        source=[
            {"path": path.name, "sha256": entry.sha256, "impressions": entry.events}
            for path, entry in zip(paths, inputs, strict=True)
        ],
    )


class Encoder:
    """Sorted rows with raw ids -> the table as it is stored; counts candidates that no event of the store names."""

    def __init__(
        self, config: ImpressionConfig, items: Vocabulary, context: dict[str, Vocabulary], *, user_type: str
    ) -> None:
        self.labels, self.items, self.context = config.label_columns, items, context
        self.schema = impression_schema(user_type, self.labels, list(context))
        self.num_unknown = 0

    def __call__(self, rows: pa.Table) -> pa.Table:
        lengths, raw = flat_list(rows["candidates"])
        ids = self.items.encode(raw)
        self.num_unknown += int(np.count_nonzero(ids == UNKNOWN))
        type = self.schema.field("candidates").type
        leaves = [pa.array(ids), *(flat_list(rows[name])[1].cast(pa.float32()) for name in self.labels)]
        structs = pa.StructArray.from_arrays(leaves, fields=list(type.value_type))
        columns = [
            rows["user_id"].combine_chunks().cast(self.schema.field("user_id").type),
            rows["timestamp"].combine_chunks(),
            list_array(lengths, structs, type),
        ]
        for name, vocabulary in self.context.items():
            lengths, raw = flat_list(rows[name])
            columns.append(list_array(lengths, pa.array(vocabulary.encode(raw)), self.schema.field(name).type))
        return pa.table(columns, schema=self.schema)


def _write(
    config: ImpressionConfig, batches: pa.RecordBatchReader, encode: Encoder, store: Store, work: Path
) -> list[ImpressionFile]:
    """Data files of all buckets; returns their entries."""
    files = BucketFiles(work, encode.schema)
    try:
        for bucket, rows in cut_impressions(batches, first_users(store), cap=config.row_group_candidates):
            table = encode(rows.drop_columns([BUCKET]))
            files.write(bucket, table, len(table["candidates"].chunk(0).values))
    finally:
        files.close()
    return [
        ImpressionFile(
            **describe_data_file(work, path),
            stored_bucket=bucket,
            row_groups=row_groups,
            num_impressions=sum(rows for rows, _ in row_groups),
            num_candidates=sum(candidates for _, candidates in row_groups),
        )
        for bucket, path, row_groups in files.written
    ]


def _publish(manifest: ImpressionManifest, work: Path, folder: Location) -> None:
    """Makes the files of `work` the impressions of the store; the files of those before are deleted."""
    named = {entry.path for entry in commit(manifest, work=work, root=folder).named_files()}
    for file in data_files(folder.parent, folder=IMPRESSIONS):
        if file.below(folder) not in named:
            file.delete()
