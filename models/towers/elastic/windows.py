"""A long history in windows: the state that one window leaves is where the next one begins (ours).

    batch        window 0 of 3    window 1 of 3    window 2 of 3      the same users in the same rows
    user a       [. . . .]        [. . . .]        [. .]
    user b       [. . . .]        []               []                 done: its output stays as it was
    state        from nothing     detached         detached, dropped at the end

Gradients end at a window's edge (truncated back-propagation), and all that is left of a window is its state, so memory
does not grow with the history. The state stays in the tower and does not travel with the batch: a pipeline has the next
batch on the device before this one's forward has run.
"""

from __future__ import annotations

import torch
from torch import nn

from elastic_rec.models.towers.base import TowerOutput
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.causal_tower import CausalTower
from elastic_rec.models.towers.elastic.state import UserState

Window = tuple[int, int]  # number, how many


class WindowedTower(CausalTower):
    """forward(tokens_TD, offsets_B1, times_s_T, all_positions, window) -> TowerOutput after this window.

    The windows of a batch of users must come in order; ValueError otherwise. Window 0 starts from nothing. The
    parameters are those of CausalTower.
    """

    def __init__(self, config: TowerConfig, memory: MemoryConfig, *, device: torch.device | str | None = None):
        super().__init__(config, memory, device=device)
        self.keep = KeepState()
        self.begin = BeginState(config, self.keep)

    def forward(
        self,
        tokens_TD: torch.Tensor,
        offsets_B1: torch.Tensor,
        times_s_T: torch.Tensor,
        all_positions: bool = True,
        window: Window = (0, 1),
    ) -> TowerOutput:
        state = self.begin(offsets_B1, window)
        return self.keep(self.encode(tokens_TD, offsets_B1, times_s_T, state, all_positions), window)


class BeginState(nn.Module):
    """forward(offsets_B1, window) -> the state a window starts from."""

    def __init__(self, config: TowerConfig, keep: KeepState):
        super().__init__()
        self.config, self.keep = config, keep

    def forward(self, offsets_B1: torch.Tensor, window: Window) -> UserState:
        number, count = window
        if number == 0:
            num_users = offsets_B1.numel() - 1  # no fingerprint: this state never leaves the tower
            return UserState.empty(num_users, self.config, fingerprint="", device=offsets_B1.device)
        if self.keep.following != number:
            raise ValueError(
                f"window {number} of {count} where window {self.keep.following} was due: give the windows of a batch "
                "in order, each once"
            )
        return self.keep.state


class KeepState(nn.Module):
    """forward((output, state), window) -> output. A module, as BeginState, for its state is no part of the trace."""

    def __init__(self):
        super().__init__()
        self.state: UserState | None = None
        self.following = 0

    def forward(self, step: tuple[TowerOutput, UserState], window: Window) -> TowerOutput:
        number, count = window
        is_last = number + 1 == count
        self.state, self.following = (None, 0) if is_last else (step[1].detach(), number + 1)
        return step[0]
