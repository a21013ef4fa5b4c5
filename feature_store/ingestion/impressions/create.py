"""Impression log -> STORE/impressions, all or nothing, in the buckets and with the item ids of the histories.

    STORE/impressions/bucket=0000/part-<digest>.parquet   one row per impression, sorted by (user, time, input order)
    STORE/impressions/vocab/<context column>-<digest>.parquet
    STORE/impressions/items/part-<digest>.parquet         attributes, row i is item index i
    STORE/impressions/manifest.json                       written last; replacing it replaces the table

Row groups end where those of the histories do (as far as the history's users go), so whoever reads one row group of
histories decodes the impressions of its users and no others.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.engine import ImpressionEngine
from elastic_rec.feature_store.ingestion.impressions.items import item_attributes
from elastic_rec.feature_store.ingestion.impressions.writer import cut_impressions, impression_schema
from elastic_rec.feature_store.ingestion.inputs import check_entries, find_inputs
from elastic_rec.feature_store.ingestion.writer import BUCKET
from elastic_rec.feature_store.table.impression_manifest import FOLDER, ids_digest, write_manifest
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.manifest import describe_data_file, describe_file, named_files, put_in_place
from elastic_rec.feature_store.table.own_files import data_files
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
        content = _build(config, paths, Store.open(root), work, memory_limit, threads)
        _publish(content, work, root)
    seconds = time.perf_counter() - began
    num_unknown = content["num_unknown_candidates"]
    return {
        "impressions": content["num_impressions"],
        "candidates": content["num_candidates"],
        "unknown_candidates": num_unknown,
        "labels": content["labels"],
        "context": [*content["context"], *content["item_context"]],
        "bytes": sum(entry["bytes"] for entry in named_files(content)),
        "seconds": round(seconds, 3),
        "impressions_per_s": round(content["num_impressions"] / seconds),
    }


def _build(
    config: ImpressionConfig, paths: list[Location], store: Store, work: Path, memory_limit: str, threads: int
) -> dict:
    items = store.vocabulary("item")
    (work / "duckdb").mkdir()
    (work / "vocab").mkdir()
    with ImpressionEngine(config, store, work=work / "duckdb", memory_limit=memory_limit, threads=threads) as engine:
        source = []
        for path in paths:
            local = path.fetch(work / "input")
            source.append({"path": path.name, "sha256": open_location(local).digest()})
            source[-1]["impressions"] = engine.load(path, local)
            if not path.is_local:
                local.unlink()
        named = zip(paths, source, strict=True)
        check_entries([{**entry, "path": path, "events": entry["impressions"]} for path, entry in named])
        engine.check_labels()
        vocabularies = {name: engine.vocabulary(name) for name in config.context_columns}
        encode = Encoder(config, items, vocabularies, user_type=store.manifest["vocabularies"]["user"]["type"])
        files = _write(config, engine.sorted_batches(), encode, store, work)
        percentiles = engine.percentiles()
    attributes, attribute_vocabularies = item_attributes(config, items)
    if config.item_input:
        (work / "items").mkdir()
        pq.write_table(attributes, work / "items" / "items.parquet", compression="zstd")
    entries = {}
    for name, vocabulary in (vocabularies | attribute_vocabularies).items():
        path = work / "vocab" / f"{name}.parquet"
        vocabulary.write(path)
        entries[name] = {"size": vocabulary.size, **describe_file(work, path)}
    return {
        "store": store.manifest["hash"],
        "num_buckets": store.manifest["num_buckets"],
        "time_unit": store.time_unit,
        "time_percentiles": percentiles,
        "item_ids": {"size": items.size, "sha256": ids_digest(items, items.size)},
        "num_impressions": sum(entry["impressions"] for entry in source),
        "num_candidates": sum(entry["num_candidates"] for entry in files),
        "num_unknown_candidates": encode.num_unknown,
        "labels": config.label_columns,
        "context": config.context_columns,
        "item_context": config.item_context_columns,
        "files": files,
        "vocabularies": entries,
        "items": describe_file(work, work / "items" / "items.parquet") if config.item_input else None,
        "source": source,
    }


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
) -> list[dict]:
    """Data files of all buckets; returns their manifest entries."""
    entries: list[dict] = []
    writer = None
    parts = cut_impressions(batches, first_users(store), cap=config.row_group_candidates)
    try:
        for bucket, rows in parts:
            if not entries or entries[-1]["bucket"] != bucket:
                if writer is not None:
                    writer.close()
                path = work / f"bucket={bucket:04d}" / "part.parquet"
                path.parent.mkdir()
                writer = pq.ParquetWriter(path, encode.schema, compression="zstd", write_page_checksum=True)
                entries.append({"bucket": bucket, "path": path, "row_groups": []})
            table = encode(rows.drop_columns([BUCKET]))
            writer.write_table(table, row_group_size=len(table))
            entries[-1]["row_groups"].append([len(table), len(table["candidates"].chunk(0).values)])
    finally:
        if writer is not None:
            writer.close()
    return [_describe(work, entry) for entry in entries]


def _describe(work: Path, entry: dict) -> dict:
    counts = np.array(entry["row_groups"]).sum(axis=0).tolist()
    described = describe_data_file(work, entry["path"])
    return {**entry, **described, "num_impressions": counts[0], "num_candidates": counts[1]}


def _publish(content: dict, work: Path, root: Location) -> None:
    """Moves finished files into the store under names made of their digests; the manifest makes them its impressions,
    and the files of those before are deleted."""
    folder, entries = root / FOLDER, named_files(content)
    for entry, moved in zip(entries, put_in_place(entries, work, folder), strict=True):
        entry["path"] = moved["path"]
    write_manifest(folder, content)
    named = {entry["path"] for entry in entries}
    for file in data_files(root, folder=FOLDER):
        if file.below(folder) not in named:
            file.delete()
