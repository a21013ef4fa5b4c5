"""The impressions of a store: what columns they have, their vocabularies, and rows by row group of the histories."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.table.format import ImpressionManifest, ItemIds
from elastic_rec.feature_store.table.manifest import check_digest, check_sizes, load_impressions
from elastic_rec.feature_store.table.own_files import IMPRESSIONS
from elastic_rec.feature_store.table.schema import USER
from elastic_rec.feature_store.table.store import Store, open_data_file, read_row_groups
from elastic_rec.feature_store.table.vocabulary import FIRST, Vocabulary
from elastic_rec.feature_store.utils.arrow import flat_list
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import Bags, offsets_of

_OPEN_FILES = 32
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Impressions as stored, I of them with C candidates: user ids, times (store's unit), bags of candidates, labels
    (C, L) with NaN for none, bags of context."""

    first_row: int
    users: pa.Array
    times: np.ndarray
    candidates: Bags
    labels: np.ndarray
    context: dict[str, Bags]


class ImpressionTable:
    """num_rows: impressions, numbered through the files in order. labels, context, item_context: column names.

    DataError where there is no such table, a file is missing or cut, or it was written for other item ids.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.manifest = store, load_impressions(store.path)
        self.path = store.path / IMPRESSIONS
        check_sizes(self.path, self.manifest)
        _check_fits(self.manifest, store)
        self.num_rows: int = self.manifest.num_impressions
        self.labels: list[str] = self.manifest.labels
        self.context: list[str] = self.manifest.context
        self.item_context: list[str] = self.manifest.item_context
        self.percentiles: list[int] = self.manifest.time_percentiles
        counts = [entry.num_impressions for entry in self.manifest.files]
        self.first_rows = offsets_of(np.array(counts, np.int64))
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)

    def vocabulary(self, column: str) -> Vocabulary:
        """Of a context column of impressions or items."""
        entry = self.manifest.vocabularies[column]
        check_digest(self.path / entry.path, entry.sha256)
        return Vocabulary.read(self.path / entry.path, column=column)

    def table_sizes(self) -> dict[str, int]:
        """Rows an embedding table needs, for each context column of impressions and items."""
        return {name: entry.size for name, entry in self.manifest.vocabularies.items()}

    @cached_property
    def item_bags(self) -> dict[str, Bags]:
        """Attributes of items: one bag per item index of the store's vocabulary (new items of later appends: empty)."""
        if not self.item_context:
            return {}
        path = self.path / self.manifest.items.path
        check_digest(path, self.manifest.items.sha256)
        with path.open() as file:
            table = pq.read_table(file)
        bags = {name: _bags(table[name]) for name in self.item_context}
        missing = self.store.vocabulary("item").size - len(table)
        return {
            name: Bags(np.append(bag.offsets, np.full(missing, bag.offsets[-1])), bag.values)
            for name, bag in bags.items()
        }

    def users_and_times(self, file: int) -> tuple[pa.Array, np.ndarray]:
        """(user ids, times in the store's unit) of all impressions of a file, by its number; decodes these two
        columns."""
        groups = list(range(len(self.manifest.files[file].row_groups)))
        table = self.read_groups(file, groups, [USER, "timestamp"])
        return table[USER].combine_chunks(), table["timestamp"].to_numpy()

    def read(self, file: int, begin: int, end: int) -> Rows:
        """Rows [begin, end) of a file; decodes the row groups they lie in."""
        edges = offsets_of(np.array([rows for rows, _ in self.manifest.files[file].row_groups]))
        first = int(np.searchsorted(edges, begin, side="right")) - 1
        last = int(np.searchsorted(edges, end, side="left"))
        columns = [USER, "timestamp", "candidates", *self.context]
        table = self.read_groups(file, list(range(first, last)), columns)
        table = table.slice(begin - edges[first], end - begin)
        lengths, structs = flat_list(table["candidates"])
        labels = [structs.field(name).to_numpy(zero_copy_only=False) for name in self.labels]
        return Rows(
            first_row=int(self.first_rows[file]) + begin,
            users=table[USER].combine_chunks(),
            times=table["timestamp"].to_numpy(),
            candidates=Bags(offsets_of(lengths), structs.field("item").to_numpy()),
            labels=np.stack(labels, axis=1).astype(np.float32),
            context={name: _bags(table[name]) for name in self.context},
        )

    def read_groups(self, file: int, groups: list[int], columns: list[str]) -> pa.Table:
        """Columns of row groups of a file; DataError where they do not hold what the manifest says."""
        entry = self.manifest.files[file]
        path = self.path / entry.path
        table = read_row_groups(self._open(file), groups, columns, path)
        if "candidates" in table.column_names:
            expected = sum(entry.row_groups[group][1] for group in groups)
            found = sum(len(chunk.flatten()) for chunk in table["candidates"].chunks)
            if found != expected:
                raise DataError(
                    f"{path}: row groups {groups} have {found} candidates, the manifest says {expected}; the file "
                    "was changed or damaged after it was written: restore it, or ingest the impressions again"
                )
        return table

    def _open_file(self, file: int) -> pq.ParquetFile:
        entry = self.manifest.files[file]
        return open_data_file(self.path / entry.path, entry.footer)


def _bags(column: pa.ChunkedArray) -> Bags:
    lengths, values = flat_list(column)
    return Bags(offsets_of(lengths), values.to_numpy())


def ids_of(items: Vocabulary) -> ItemIds:
    """What impressions keep of the item ids that they are written with."""
    return ItemIds(size=items.size, sha256=_ids_digest(items, items.size))


def _check_fits(manifest: ImpressionManifest, store: Store) -> None:
    """Appends keep buckets and item indices, so a table outlives them; a store made again is another store."""
    if manifest.store == store.manifest.hash:
        return
    items, written = store.vocabulary("item"), manifest.item_ids
    same = items.size >= written.size and _ids_digest(items, written.size) == written.sha256
    if not same or manifest.num_buckets != store.manifest.num_buckets:
        raise DataError(f"{store.path}: its impressions were written with other item ids or buckets; {manifest.REMEDY}")


def _ids_digest(vocabulary: Vocabulary, size: int) -> str:
    """Digest of the ids of indices below `size`."""
    digest = hashlib.sha256()
    for begin in range(0, size - FIRST, _BLOCK):
        ids = vocabulary.ids.slice(begin, min(_BLOCK, size - FIRST - begin))
        digest.update(json.dumps(ids.to_pylist()).encode())
    return digest.hexdigest()
