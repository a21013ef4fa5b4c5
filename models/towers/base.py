"""What every sequence tower is: a user's events in, interests and one vector per user out.

Legend: B users (or prefixes), T events of all users, D width, K interests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import nn

from elastic_rec.models.towers.config import MemoryConfig, TowerConfig

if TYPE_CHECKING:
    from elastic_rec.models.towers.elastic.moments import Moments


class TowerOutput(NamedTuple):
    """interests (B, K, D), normalised, one row per interest. user_embedding (B, D), a user's events as one vector.

    tokens (T, D), the output of each event; a user's last one is the user embedding. None unless asked for.
    moments of all events (towers/elastic/moments.py); None from a tower without user states.
    """

    interests: torch.Tensor
    user_embedding: torch.Tensor
    tokens: torch.Tensor | None = None
    moments: Moments | None = None


class SequenceTower(nn.Module):
    """forward(tokens_TD, offsets_B1, times_s_T, all_positions) -> TowerOutput.

    tokens_TD: the events of all users, end to end, each user's in order of time, of unit scale. offsets_B1 int64: user
    b's events are [offsets[b], offsets[b+1]), [0, 3, 3, 5] for three users with 3, 0 and 2 events. times_s_T: int64
    seconds. all_positions: an output at each event is asked for; False leaves out `tokens`, and the work for them.

    Class attributes tell what a tower can do; models and pipeline ask for them, not for names:
    is_causal      an event's output depends on no later event, so that it can be asked for and trained at each event
    has_states     a user can be continued (`step`) and read as of several times in one pass (`readings`); the output
                   has mean and covariance (`moments`)
    has_memory     it can start from an interest memory
    has_positions  it takes histories of at most max_history events
    """

    is_causal: ClassVar[bool] = False
    has_states: ClassVar[bool] = False
    has_memory: ClassVar[bool] = False
    has_positions: ClassVar[bool] = False

    @classmethod
    def build(
        cls, config: TowerConfig, memory: MemoryConfig, *, max_history: int, device: torch.device | str | None
    ) -> Self:
        return cls(config, memory, device=device)


def build_tower(
    config: TowerConfig, memory: MemoryConfig, *, max_history: int = 200, device: torch.device | str | None = None
) -> SequenceTower:
    """The tower that `config.tower` names. max_history: the longest history it will see.

    Raises ValueError where a memory is asked for and the tower takes none."""
    if memory.enabled and not config.kind.has_memory:
        raise ValueError(f"model.tower={config.tower} has no interest memory: set memory=off")
    return config.kind.build(config, memory, max_history=max_history, device=device)
