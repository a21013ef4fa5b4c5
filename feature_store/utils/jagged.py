"""Jagged arrays in numpy, without a Python loop per row: flat values, and offsets that say where each row begins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(B,) lengths -> (B+1,) int64 offsets: [3, 0, 2] -> [0, 3, 3, 5]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def span_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) starts and lengths -> (sum of lengths,) int64 positions: [2, 7, 4] and [3, 0, 2] -> [2, 3, 4, 4, 5]."""
    offsets = offsets_of(lengths)
    return np.repeat(np.asarray(starts, np.int64) - offsets[:-1], lengths) + np.arange(offsets[-1])


class Bags(NamedTuple):
    """N bags of vocabulary indices: offsets (N+1,) int64, values (sum of sizes,) int64.

    offsets [0, 2, 2, 3], values [5, 8, 6]: the bags {5, 8}, {}, {6}.
    """

    offsets: np.ndarray
    values: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, the size of each bag: [2, 0, 1]."""
        return np.diff(self.offsets)

    def take(self, bags: np.ndarray) -> Bags:
        """The bags with these numbers, in that order; [2, 0] gives offsets [0, 1, 3], values [6, 5, 8]."""
        starts = self.offsets[bags]
        lengths = self.offsets[bags + 1] - starts  # of these alone: tables have millions of bags
        return Bags(offsets_of(lengths), self.values[span_indices(starts, lengths)])

    @staticmethod
    def concat(parts: list[Bags]) -> Bags:
        """The bags of all parts, of which there is at least one."""
        lengths = np.concatenate([part.lengths for part in parts])
        return Bags(offsets_of(lengths), np.concatenate([part.values for part in parts]))


def flat_structs(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.StructArray]:
    """A list<struct> column -> ((N+1,) int64 offsets, [0, 3, 3, 5] for lists of 3, 0 and 2; the structs end to end).

    No copy where the column has one chunk: children of the struct are then the Parquet reader's buffers.
    """
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.values.slice(offsets[0], offsets[-1] - offsets[0])


def run_starts(keys: pa.Array) -> np.ndarray:
    """Positions (int64) where a run of equal neighbours begins: a a b a -> [0, 2, 3]. keys: at least one element."""
    changed = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1))
    return np.append(0, np.flatnonzero(changed.to_numpy(zero_copy_only=False)) + 1)
