"""Spans of flat arrays, without a Python loop per span.

starts  2 7 4   lengths  3 0 2   ->   span_indices = 2 3 4 . 4 5
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(B,) lengths -> (B+1,) int64 offsets."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def span_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) starts and lengths -> (sum of lengths,) int64 positions, span after span."""
    offsets = offsets_of(lengths)
    return np.repeat(np.asarray(starts, np.int64) - offsets[:-1], lengths) + np.arange(offsets[-1])


class Bags(NamedTuple):
    """N bags of vocabulary indices: offsets (N+1,) int64, values (sum of sizes,) int64."""

    offsets: np.ndarray
    values: np.ndarray

    def take(self, rows: np.ndarray) -> Bags:
        lengths = np.diff(self.offsets)[rows]
        return Bags(offsets_of(lengths), self.values[span_indices(self.offsets[rows], lengths)])


def concat_bags(parts: list[Bags]) -> Bags:
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return Bags(offsets_of(lengths), np.concatenate([part.values for part in parts]))


def run_starts(keys: pa.Array) -> np.ndarray:
    """Positions (int64) where a run of equal neighbours begins, 0 included; keys has at least one element."""
    changed = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1))
    return np.append(0, np.flatnonzero(changed.to_numpy(zero_copy_only=False)) + 1)
