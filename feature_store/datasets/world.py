"""The knobs of synthetic data, and the world they describe: the interest of each item, and how popular it is in it.

Legend: V items in C interests of S = V / C items each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastic_rec.configs.options import Options, option

BLOCK_EVENTS = 1 << 19  # events held in memory at once; part of what a seed means


@dataclass
class SyntheticConfig(Options, prefix="synthetic."):
    """The knobs. Raises ValueError for values out of bounds, and for those that do not go together."""

    num_users: int = option(5000, "users", at_least=1)
    num_items: int = option(1024, "items; a multiple of num_interests")
    num_interests: int = option(16, "latent interests that the items are parted into", at_least=2)
    events_per_user_min: int = option(20, "shortest history (lag=0)")
    events_per_user_max: int = option(60, "longest history (lag=0); lengths are uniform between")
    major_weight: float = option(
        0.7, "share of a user's major interest; the minor one has the rest", at_least=0, at_most=1
    )
    drift: float = option(
        0.05, "probability per event that the minor interest becomes the major", at_least=0, at_most=1
    )
    noise: float = option(0.1, "probability that an event comes from global popularity instead", at_least=0, at_most=1)
    zipf_exponent: float = option(
        1.0, "popularity inside an interest falls as rank^-this; 0: all items alike", at_least=0, at_most=10
    )
    lag: int = option(
        0, "events between the deciding event and its answer; 0: drifting interests", at_least=0, at_most=1_000_000
    )
    num_segments: int = option(
        1, "pin ... answer stretches per user (lag>0); histories have this x (lag+1)", at_least=1
    )
    seed: int = option(0, "same seed, same data", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_items < self.num_interests or self.num_items % self.num_interests:
            near = max(1, round(self.num_items / self.num_interests)) * self.num_interests
            raise ValueError(
                f"num_items={self.num_items} must be a multiple of num_interests={self.num_interests}; set {near}"
            )
        if self.history_length_max > 100_000_000:
            raise ValueError(f"num_segments={self.num_segments} with lag={self.lag}: set at most 10^8 events a user")
        if self.lag == 0 and not 3 <= self.events_per_user_min <= self.events_per_user_max <= BLOCK_EVENTS:
            raise ValueError(
                f"events_per_user_min={self.events_per_user_min}, events_per_user_max={self.events_per_user_max}: set "
                f"3 <= min (an event each to train, validate and test on) <= max <= {BLOCK_EVENTS}; beyond, set lag"
            )

    @property
    def history_length_max(self) -> int:
        """Events of the longest history."""
        return self.num_segments * (self.lag + 1) if self.lag else self.events_per_user_max

    @property
    def users_per_chunk(self) -> int:
        """So many users that neither their events nor the filter's C x C beliefs outgrow a block."""
        return max(1, BLOCK_EVENTS // max(self.history_length_max, self.num_interests**2))


@dataclass(frozen=True)
class World:
    """rank_probs_S: probability of each rank inside an interest. item_ids_CS: the id of each item; ids are shuffled, so
    that they tell nothing. interest_V1, rank_V1: the way back, by item id (1..V; entry 0 unused)."""

    rank_probs_S: np.ndarray
    item_ids_CS: np.ndarray
    interest_V1: np.ndarray
    rank_V1: np.ndarray

    @staticmethod
    def of(config: SyntheticConfig) -> World:
        """The world of a setting; its seed alone decides which item has which interest."""
        C, S = config.num_interests, config.num_items // config.num_interests
        weights_S = np.arange(1, S + 1, dtype=np.float64) ** -config.zipf_exponent
        ids = 1 + np.random.default_rng([config.seed, 0]).permutation(C * S).astype(np.int64)
        place_V1 = np.zeros(C * S + 1, np.int64)
        place_V1[ids] = np.arange(C * S)
        return World(weights_S / weights_S.sum(), ids.reshape(C, S), place_V1 // S, place_V1 % S)
