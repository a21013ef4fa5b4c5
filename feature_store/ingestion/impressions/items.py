"""Attributes of items (genres, year) as bags of vocabulary indices, one row per item index."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.sources import cast_ids
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.vocabulary import UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.arrow import flat_bags, flat_list, is_list, list_array
from elastic_rec.feature_store.utils.errors import DataError


def item_attributes(config: ImpressionConfig, items: Vocabulary) -> tuple[pa.Table | None, dict[str, Vocabulary]]:
    """(table of one list<int64> column per attribute, rows by item index; a vocabulary per attribute).

    An item that item_input does not have gets {unknown} where the column holds single values, else an empty bag.
    """
    if not config.item_input:
        return None, {}
    path, names = open_location(config.item_input), config.item_context_columns
    try:
        with path.open() as file:
            there = pq.read_schema(file).names
            file.seek(0)
            table = pq.read_table(file, columns=[config.item_column, *names])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: item attributes cannot be read ({error})") from error
    if missing := [name for name in [config.item_column, *names] if name not in table.column_names]:
        raise DataError(f"{path}: no column {missing}; it has: {there}")
    ids = cast_ids(table[config.item_column].combine_chunks(), items.type, where=f"{path}: {config.item_column}")
    rows = _row_of_index(items.encode(ids), items.size, path)
    columns, vocabularies = {}, {}
    for name in names:
        try:
            columns[name], vocabularies[name] = _bags(table[name], name, rows)
        except pa.ArrowException as error:
            raise DataError(f"{path}: '{name}' is {table[name].type} ({error}); cast it to int64 or string") from error
    return pa.table(columns), vocabularies


def _row_of_index(indices: np.ndarray, size: int, path: Location) -> np.ndarray:
    """(V,) row of the input with the attributes of each item index, -1 where there is none."""
    known = np.flatnonzero(indices > UNKNOWN)
    if len(np.unique(indices[known])) < len(known):
        raise DataError(f"{path}: an item has two rows; keep one of them")
    rows = np.full(size, -1, np.int64)
    rows[indices[known]] = known
    return rows


def _bags(column: pa.ChunkedArray, name: str, rows: np.ndarray) -> tuple[pa.Array, Vocabulary]:
    lengths, values = flat_bags(column)
    values = values.cast(pa.int64() if pa.types.is_integer(values.type) else pa.string())
    counted = pc.value_counts(values.drop_null()).flatten()
    counts = pa.table({"id": counted[0], "count": counted[1]}).sort_by([("count", "descending"), ("id", "ascending")])
    vocabulary = Vocabulary(column=name, ids=counts["id"].combine_chunks(), counts=counts["count"].to_numpy())
    encoded = list_array(lengths, pa.array(vocabulary.encode(values)), pa.list_(pa.int64()))
    taken = pa.chunked_array([encoded.take(pa.array(rows, mask=rows < 0))])
    if is_list(column.type):
        return list_array(*flat_list(taken), pa.list_(pa.int64())), vocabulary
    single = np.full(len(rows), UNKNOWN, np.int64)
    single[rows >= 0] = flat_list(taken)[1].to_numpy()
    return list_array(np.ones(len(rows), np.int64), pa.array(single), pa.list_(pa.int64())), vocabulary
