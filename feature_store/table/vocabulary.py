"""Raw ids <-> table rows. Row 0 is padding, row 1 stands for every id not seen at ingest, the rest by count.

An append never moves an id: its new ids come after all old ones, by count within the append.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.utils.errors import DAMAGED, DataError

PAD = 0
UNKNOWN = 1
FIRST = 2


class Vocabulary:
    """Ids in order of falling count (ties: rising id), so index 2 is the most frequent id of the first ingest.

    ids: int64 or string Array, ids[i] has index i + FIRST.
    counts: (size,) int64, events with that id in the store, 0 for the two reserved indices.
    """

    def __init__(self, *, column: str, ids: pa.Array, counts: np.ndarray) -> None:
        self.column = column
        self.ids = ids
        self.counts = np.concatenate([np.zeros(FIRST, np.int64), counts.astype(np.int64)])

    @property
    def size(self) -> int:
        """Rows an embedding table needs, the two reserved ones included."""
        return len(self.ids) + FIRST

    @property
    def type(self) -> str:
        """ "int64" or "string"."""
        return "int64" if pa.types.is_int64(self.ids.type) else "string"

    def digest(self, size: int) -> str:
        """sha256 of the ids of indices 0..size-1: two vocabularies with one digest agree on them."""
        ids = self.ids.slice(0, size - FIRST)
        found = hashlib.sha256(f"{self.ids.type} {size}".encode())
        if pa.types.is_int64(ids.type):
            found.update(ids.to_numpy().tobytes())
        else:
            found.update(pc.binary_length(ids).to_numpy().tobytes() + "".join(ids.to_pylist()).encode())
        return found.hexdigest()

    def encode(self, raw: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Raw ids -> (len,) int64 indices; ids that are not in the vocabulary, and nulls, give UNKNOWN."""
        if raw.type != self.ids.type:
            raw = self._cast(raw)
        found = pc.fill_null(pc.add(pc.index_in(raw, value_set=self.ids, skip_nulls=True), FIRST), UNKNOWN)
        return np.asarray(found).astype(np.int64)

    def decode(self, indices: np.ndarray) -> pa.Array:
        """Indices (any int dtype) -> raw ids; PAD and UNKNOWN give null. Raises DataError past the end."""
        indices = np.asarray(indices)
        if len(indices) and (indices.min() < 0 or indices.max() >= self.size):
            wrong = int(indices.max() if indices.max() >= self.size else indices.min())
            raise DataError(
                f"vocabulary '{self.column}': index {wrong} is outside 0..{self.size - 1}; another store's indices?"
            )
        return self.ids.take(pa.array(indices - FIRST, type=pa.int64(), mask=indices < FIRST))

    def _cast(self, raw: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        same_kind = pa.types.is_integer(raw.type) == pa.types.is_integer(self.ids.type)
        if pa.types.is_null(raw.type) or (same_kind and not pa.types.is_floating(raw.type)):
            return raw.cast(self.ids.type)
        raise DataError(f"vocabulary '{self.column}' holds {self.ids.type} ids, got {raw.type}; cast them first")

    def write(self, path: Path) -> None:
        """Writes a Parquet file of (id, index, count), a row per id."""
        table = pa.table(
            {"id": self.ids, "index": np.arange(FIRST, self.size, dtype=np.int64), "count": self.counts[FIRST:]}
        )
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def read(cls, path: Location, *, column: str) -> Vocabulary:
        """Reads what write() wrote. DataError where the indices do not count up from FIRST."""
        with path.open() as file:
            table = pq.read_table(file)
        if not np.array_equal(table["index"].to_numpy(), np.arange(FIRST, FIRST + len(table))):
            raise DataError(f"{path}: indices are not {FIRST}, {FIRST + 1}, ...; {DAMAGED}")
        ids = table["id"].combine_chunks()
        return cls(column=column, ids=ids, counts=table["count"].to_numpy())
