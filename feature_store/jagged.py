"""Spans of flat arrays, without a Python loop per span.

starts  2 7 4   lengths  3 0 2   ->   span_indices = 2 3 4 . 4 5
"""

from __future__ import annotations

import numpy as np


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(B,) lengths -> (B+1,) int64 offsets."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def span_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(B,) starts and lengths -> (sum of lengths,) int64 positions, span after span."""
    offsets = offsets_of(lengths)
    return np.repeat(np.asarray(starts, np.int64) - offsets[:-1], lengths) + np.arange(offsets[-1])
