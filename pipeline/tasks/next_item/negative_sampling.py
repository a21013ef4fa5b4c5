"""What the loss ranks a target against: the whole catalogue, or negatives shared by the step.

Candidates are looked up through the sharded item table like any event, in the same all-to-all.
"""

from __future__ import annotations

import numpy as np

from elastic_rec.feature_store.batches.examples import CandidateSampler
from elastic_rec.feature_store.table.vocabulary import FIRST, Vocabulary
from elastic_rec.pipeline.config.train import LossConfig


def make_candidates(
    loss: LossConfig, *, items: Vocabulary, num_items: int, seed: int
) -> FullCandidates | SampledCandidates:
    """What loss.softmax names. num_items: rows of the item table."""
    return FullCandidates(num_items) if loss.softmax == "full" else SampledCandidates(items.counts, loss, seed=seed)


class FullCandidates:
    """Every item, ascending: the target of id i is column i - FIRST."""

    def __init__(self, num_items: int) -> None:
        self.ids = np.arange(FIRST, num_items, dtype=np.int64)
        self.log_q = np.zeros(len(self.ids), dtype=np.float32)

    def at_step(self, step: int, window: int = 0) -> CandidateSampler:
        """The same at every step: (ids (V,), zeros (V,))."""
        return lambda targets, weights: (self.ids, self.log_q)


class SampledCandidates:
    """S negatives drawn with replacement, the same on every rank, followed by the rank's own targets.

    counts: (num_items,) how often each item occurs. log_q is the log of the expected number of times a candidate
    is drawn, log(S q): with it the sampled softmax estimates the full one (Bengio & Senecal 2008; Yi et al. 2019).
    """

    def __init__(self, counts: np.ndarray, config: LossConfig, *, seed: int) -> None:
        mass = np.maximum(counts, 1).astype(np.float64) ** config.popularity_power
        mass[:FIRST] = 0
        q = mass / mass.sum()
        self.cumulative = np.cumsum(q)
        with np.errstate(divide="ignore"):
            self.log_expected = np.log(config.num_negatives * q).astype(np.float32)
        self.num_negatives = config.num_negatives
        self.seed = seed

    def at_step(self, step: int, window: int = 0) -> CandidateSampler:
        """(targets (R,), weights (R,)) -> (ids (S + R,) int64, log_q (S + R,) float32) of this step and window."""
        draws = np.random.default_rng([self.seed, step, window]).random(self.num_negatives)
        negatives = np.searchsorted(self.cumulative, draws, side="right").clip(FIRST, len(self.cumulative) - 1)

        def candidates(targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            real = np.where(weights > 0, targets, FIRST)  # a row without a target still needs a place to point at
            ids = np.concatenate([negatives, real])
            return ids, self.log_expected[ids]

        return candidates
