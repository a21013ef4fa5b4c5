"""The knobs of synthetic data, and the world they describe: the interest of each item, and how popular it is in it.

Legend: V items in C interests of S = V / C items each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BLOCK_EVENTS = 1 << 19  # events held in memory at once; part of what a seed means


@dataclass
class SyntheticConfig:
    num_users: int = field(default=5000, metadata={"help": "users"})
    num_items: int = field(default=1024, metadata={"help": "items; a multiple of num_interests"})
    num_interests: int = field(default=16, metadata={"help": "latent interests that the items are parted into"})
    events_per_user_min: int = field(default=20, metadata={"help": "shortest history (lag=0)"})
    events_per_user_max: int = field(
        default=60, metadata={"help": "longest history (lag=0); lengths are uniform between"}
    )
    major_weight: float = field(
        default=0.7, metadata={"help": "share of a user's major interest; the minor one has the rest"}
    )
    drift: float = field(
        default=0.05, metadata={"help": "probability per event that the minor interest becomes the major"}
    )
    noise: float = field(
        default=0.1, metadata={"help": "probability that an event comes from global popularity instead"}
    )
    zipf_exponent: float = field(default=1.0, metadata={"help": "popularity inside an interest falls as rank^-this"})
    lag: int = field(
        default=0, metadata={"help": "events between the deciding event and its answer; 0: drifting interests"}
    )
    num_segments: int = field(
        default=1, metadata={"help": "pin ... answer stretches per user (lag>0); histories have this x (lag+1)"}
    )
    seed: int = field(default=0, metadata={"help": "same seed, same data"})

    def __post_init__(self) -> None:
        if self.num_users < 1:
            raise ValueError(f"num_users={self.num_users}: set at least 1")
        if self.num_interests < 2:
            raise ValueError(f"num_interests={self.num_interests}: major and minor differ, set at least 2")
        if self.num_items < self.num_interests or self.num_items % self.num_interests:
            near = max(1, round(self.num_items / self.num_interests)) * self.num_interests
            raise ValueError(
                f"num_items={self.num_items} must be a multiple of num_interests={self.num_interests}; set {near}"
            )
        for name in ("major_weight", "drift", "noise"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is a probability; set it between 0 and 1")
        if not 0.0 <= self.zipf_exponent <= 10.0:
            raise ValueError(f"zipf_exponent={self.zipf_exponent}: set it between 0 (all items alike) and 10")
        if not 0 <= self.lag <= 1_000_000:
            raise ValueError(f"lag={self.lag}: set it between 0 (drifting interests) and 1000000")
        if self.num_segments < 1 or self.history_length_max > 100_000_000:
            raise ValueError(
                f"num_segments={self.num_segments} with lag={self.lag}: set 1 or more, at most 10^8 events a user"
            )
        if self.lag == 0 and not 3 <= self.events_per_user_min <= self.events_per_user_max <= BLOCK_EVENTS:
            raise ValueError(
                f"events_per_user_min={self.events_per_user_min}, events_per_user_max={self.events_per_user_max}: set "
                f"3 <= min (an event each to train, validate and test on) <= max <= {BLOCK_EVENTS}; beyond, set lag"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: set 0 or more")

    @property
    def history_length_max(self) -> int:
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
        C, S = config.num_interests, config.num_items // config.num_interests
        weights_S = np.arange(1, S + 1, dtype=np.float64) ** -config.zipf_exponent
        ids = 1 + np.random.default_rng([config.seed, 0]).permutation(C * S).astype(np.int64)
        place_V1 = np.zeros(C * S + 1, np.int64)
        place_V1[ids] = np.arange(C * S)
        return World(weights_S / weights_S.sum(), ids.reshape(C, S), place_V1 // S, place_V1 % S)
