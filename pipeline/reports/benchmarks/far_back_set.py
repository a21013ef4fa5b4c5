"""The synthetic set of suite=far_back: one event long ago decides which item comes next.

    [noise ...] marker m [d - 1 events of noise] question -> answer m        with probability 1 - noise, else any answer

Bayes rate of the first guess: 1 - noise + noise / markers. A guess that has not seen the marker: 1 / markers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from elastic_rec.pipeline.reports.benchmarks.config import FarBackConfig


class Questions(NamedTuple):
    """items_BN: every user's history, the question last. targets_B: the item that came next."""

    items_BN: torch.Tensor
    targets_B: torch.Tensor


def draw(config: FarBackConfig, users: int, distance: int, generator: torch.Generator) -> Questions:
    """Users whose deciding event lies `distance` events before the question. Up to a quarter as many events of noise
    come before it."""
    markers, first_noise = config.markers, 2 * config.markers
    lead = int(torch.randint(0, distance // 4 + 1, (), generator=generator))
    shape = (users, lead + 1 + distance)
    items_BN = torch.randint(first_noise, first_noise + config.noise_items, shape, generator=generator)
    items_BN[:, lead] = torch.randint(0, markers, (users,), generator=generator)
    items_BN[:, -1] = config.num_items - 1
    any_B = torch.randint(0, markers, (users,), generator=generator)
    is_noise_B = torch.rand(users, generator=generator) < config.noise
    return Questions(items_BN, markers + torch.where(is_noise_B, any_B, items_BN[:, lead]))
