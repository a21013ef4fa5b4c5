"""The synthetic set of suite=far_back: one event long ago decides which item comes next.

    [noise ...] marker m [d - 1 events of noise] question -> answer m        with probability 1 - noise, else any answer

Bayes rate of the first guess: 1 - noise + noise / markers. A guess that has not seen the marker: 1 / markers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


@dataclass
class FarBackConfig:
    distances: list[int] = field(
        default_factory=lambda: [100, 1_000, 10_000, 100_000],
        metadata={"help": "how many events back the deciding one lies, in evaluation"},
    )
    train_distance: int = field(default=10_000, metadata={"help": "the farthest in training"})
    window: int = field(default=1_000, metadata={"help": "the newest events, all that the models beside see"})
    markers: int = field(default=100, metadata={"help": "deciding events, and as many answers"})
    noise_items: int = field(default=1_000, metadata={"help": "items of the events that decide nothing"})
    noise: float = field(default=0.1, metadata={"help": "share of answers that are drawn instead of decided"})
    steps: int = field(default=800, metadata={"help": "optimiser steps"})
    step_events: int = field(default=16_384, metadata={"help": "events per step, at least 16 users"})
    learning_rate: float = field(default=0.002, metadata={"help": "Adam's"})
    users: int = field(default=1_000, metadata={"help": "evaluated per distance, fewer where max_events says so"})
    max_events: int = field(default=10_000_000, metadata={"help": "evaluated per distance, at least 64 users"})

    def __post_init__(self) -> None:
        if not self.distances or min(self.distances) < 2 or self.train_distance < 16 or self.window < 32:
            raise ValueError(
                f"far_back: distances={self.distances}, train_distance={self.train_distance}, window={self.window}: "
                "give distances of at least 2, train_distance of at least 16, window of at least 32"
            )
        if not 0 <= self.noise < 1 or self.markers < 2:
            raise ValueError(f"far_back: noise={self.noise}, markers={self.markers}: set 0 <= noise < 1, markers >= 2")

    @property
    def num_items(self) -> int:
        return 2 * self.markers + self.noise_items + 1

    @property
    def bayes(self) -> float:
        return 1 - self.noise + self.noise / self.markers


class Questions(NamedTuple):
    """items_BN: every user's history, the question last. targets_B: the item that came next."""

    items_BN: torch.Tensor
    targets_B: torch.Tensor


def draw(config: FarBackConfig, users: int, distance: int, generator: torch.Generator) -> Questions:
    """Users whose deciding event lies `distance` events before the question, behind up to a quarter as much noise."""
    markers, first_noise = config.markers, 2 * config.markers
    lead = int(torch.randint(0, distance // 4 + 1, (), generator=generator))
    shape = (users, lead + 1 + distance)
    items_BN = torch.randint(first_noise, first_noise + config.noise_items, shape, generator=generator)
    items_BN[:, lead] = torch.randint(0, markers, (users,), generator=generator)
    items_BN[:, -1] = config.num_items - 1
    any_B = torch.randint(0, markers, (users,), generator=generator)
    is_noise_B = torch.rand(users, generator=generator) < config.noise
    return Questions(items_BN, markers + torch.where(is_noise_B, any_B, items_BN[:, lead]))
