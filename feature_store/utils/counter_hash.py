"""Counter-based random numbers: a pure function of its keys, the same on every rank, machine and numpy version.

numpy's own Generator streams may change between releases (NEP 19), which would silently change the order of a
resumed epoch. splitmix64 (Steele, Lea, Flood 2014; the public-domain finaliser) never does.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def counter_hash(*keys: int | np.ndarray) -> np.ndarray:
    """Keys (ints or int64 arrays that broadcast together) -> uint64 array, at least one-dimensional."""
    hashed = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        for key in keys:
            # Every key is mixed before it meets the next one, so (1, 2) and (2, 1) differ.
            hashed = _splitmix64(hashed ^ _as_uint64(key))
    return hashed


def counter_uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Keys, as for counter_hash -> float64 array in [0, 1)."""
    return (counter_hash(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _as_uint64(key: int | np.ndarray) -> np.ndarray:
    if isinstance(key, int):
        return np.array([key & 0xFFFFFFFFFFFFFFFF], np.uint64)
    return np.atleast_1d(np.asarray(key)).astype(np.int64).view(np.uint64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))
