"""AUC of any number of scores in bounded memory: how often each score was a positive's, and a negative's.

The bits of a float32, read as a whole number, rise with it: they are the key. While at most MOST_CODES (key, class)
pairs differ, every score has its own key and the AUC is exact. Beyond that all keys lose their lowest bit, as often as
needed, and scores that then share a key count as ties: `auc` bounds the error by half the share of such pairs.

    scores   -0.70  -0.69   0.30   0.30     1 bit dropped:   [-0.70 -0.69]   [0.30 0.30]

How many bits are dropped follows from all scores together, not from their order, nor from which rank had them.
"""

from __future__ import annotations

import numpy as np

from elastic_rec.pipeline.runtime.world import World, of_each_rank

MOST_CODES = 1 << 18  # times 16 bytes


class ScoreCounts:
    """Grows by `add` and `merge`; over_ranks() is what all ranks have counted.

    code_N: ascending int64, 2 * key + class. count_N: int64. bits: dropped so far, of every key.
    """

    def __init__(self) -> None:
        self.code_N, self.count_N, self.bits = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
        self._waiting: list[np.ndarray] = []

    def add(self, score_C: np.ndarray, is_positive_C: np.ndarray) -> None:
        """(C,) finite float32, (C,) bool."""
        raw_C = (score_C.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: -0 becomes 0
        key_C = np.where(raw_C < 0, -(raw_C & 0x7FFFFFFF), raw_C)
        self._waiting.append(2 * key_C + is_positive_C)
        if sum(map(len, self._waiting)) > MOST_CODES:
            self._settle()

    def merge(self, code_N: np.ndarray, count_N: np.ndarray, bits: int) -> None:
        """Adds what another has counted."""
        mine_N, self.bits, before = self.code_N, max(bits, self.bits), self.bits
        code_N = np.concatenate([_drop(mine_N, self.bits - before), _drop(code_N, self.bits - bits)])
        self.code_N, self.count_N = _sums(code_N, np.concatenate([self.count_N, count_N]))
        while len(self.code_N) > MOST_CODES:
            self.bits += 1
            self.code_N, self.count_N = _sums(_drop(self.code_N, 1), self.count_N)

    def auc(self) -> tuple[float, float] | None:
        """(share of (positive, negative) pairs in the right order, a tie counts half; how far off at most), or None
        where there is one class only."""
        self._settle()
        _, place_N = np.unique(self.code_N >> 1, return_inverse=True)
        positive_K, negative_K = (
            np.bincount(place_N, self.count_N * (self.code_N & 1 == label)) for label in (True, False)
        )
        pairs = positive_K.sum() * negative_K.sum()
        if not pairs:
            return None
        below_K = negative_K.cumsum() - negative_K
        tied = float((positive_K * negative_K).sum() / pairs) / 2
        return float((positive_K * below_K).sum() / pairs) + tied, tied * (self.bits > 0)

    def over_ranks(self, world: World) -> ScoreCounts:
        """Collective."""
        self._settle()
        total = ScoreCounts()
        for table, bits in of_each_rank(world, np.stack([self.code_N, self.count_N]), self.bits):
            total.merge(*table, bits)
        return total

    def _settle(self) -> None:
        if self._waiting:
            code_N, count_N = np.unique(np.concatenate(self._waiting), return_counts=True)
            self._waiting = []
            self.merge(code_N, count_N, 0)


def _drop(code_N: np.ndarray, bits: int) -> np.ndarray:
    return (code_N >> (bits + 1)) * 2 + (code_N & 1)


def _sums(code_N: np.ndarray, count_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct codes, and the sum of each one's counts."""
    code_N, place_N = np.unique(code_N, return_inverse=True)
    return code_N, np.bincount(place_N, count_N, len(code_N)).astype(np.int64)
