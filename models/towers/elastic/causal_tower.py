"""The causal tower: an output at every event that no later event changes, and users that can be continued (ours).

Legend: B users (or prefixes), T new events of all users, D width, K experts, R boundaries between chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.towers.base import SequenceTower, TowerOutput
from elastic_rec.models.towers.config import MemoryConfig, Time, TowerConfig
from elastic_rec.models.towers.elastic.causal_layer import CausalAggregate, CausalStack, Depth
from elastic_rec.models.towers.elastic.memory import InterestMemory, Seeds
from elastic_rec.models.towers.elastic.micro_batches import in_micro_batches
from elastic_rec.models.towers.elastic.moments import RunningMoments, moments_of
from elastic_rec.models.towers.elastic.recency import NUM_AGE_BUCKETS, age_bucket
from elastic_rec.models.towers.elastic.state import Fingerprint, UserState, check_state, num_kept
from elastic_rec.models.towers.elastic.timeline import Timeline

# TorchRec traces the tower's forward. A wrapped function is one step of the trace, and may look at sizes and values.
build_timeline = Timeline.build
torch.fx.wrap("build_timeline")
torch.fx.wrap("check_state")


@torch.fx.wrap
def next_state(
    timeline: Timeline, depth: Depth, newest_BD: torch.Tensor, moments_Brf: torch.Tensor
) -> UserState | None:
    """The users' states after the events of the timeline; None where it began without any."""
    state, chunks, chunk = timeline.state, timeline.chunks, timeline.chunks.chunk
    if state is None:
        return None
    count_B = state.count_B + timeline.offsets_B1.diff()
    kept_B = num_kept(count_B, chunk)
    axis_B1 = chunks.tiles.offsets_B1
    folded_B = chunks.first_B + (axis_B1.diff() - kept_B) // chunk  # the boundary where the kept events begin
    slot_W = torch.arange(2 * chunk, device=count_B.device)
    empty_BW = slot_W >= kept_B[:, None]
    return state.next(
        count_B=count_B,
        newest_BD=newest_BD.masked_fill((count_B == 0)[:, None], 0.0),
        times_s_E=timeline.times_s_E,
        layers=[(layer_sums.sums.rows(folded_B), layer_sums.qkv_E3Hd) for layer_sums in depth.layer_sums],
        moments_Brf=moments_Brf,
        place_BW=((axis_B1[1:] - kept_B)[:, None] + slot_W).masked_fill(empty_BW, 0),
        empty_BW=empty_BW,
    )


class Gap(nn.Module):
    """forward(tokens_TD, timeline) -> tokens_TD plus an embedding of the time since the user's event before.

    Counted backwards only: unlike `Recency`, which counts from the prefix's end, it is the same whatever comes later.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.gap = None
        if config.time is not Time.none:
            self.gap = nn.Parameter(torch.randn(NUM_AGE_BUCKETS + 1, config.width) * 0.5)

    def forward(self, tokens_TD: torch.Tensor, timeline: Timeline) -> torch.Tensor:
        if self.gap is None:
            return tokens_TD
        bucket_T = age_bucket(timeline.gap_s_T).masked_fill(timeline.gap_s_T < 0, NUM_AGE_BUCKETS)
        return tokens_TD + F.embedding(bucket_T, self.gap)


class ReadOut(NamedTuple):
    """The output, and the newest event of each row of it before the output's norm (B, D)."""

    output: TowerOutput
    newest_BD: torch.Tensor


class CausalReadout(nn.Module):
    """forward(depth, moments_Brf, all_positions) -> ReadOut: a row per user, or per reading where there are some."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.mix = nn.Linear(config.width, config.width)

    def forward(self, depth: Depth, moments_Brf: torch.Tensor, all_positions: bool) -> ReadOut:
        timeline, T = depth.timeline, depth.tokens_TD.shape[0]
        if (at := timeline.readings) is None:
            end_BKD = depth.experts_RKD.index_select(0, timeline.chunks.end_B)
            has_new_B, newest_B = timeline.offsets_B1.diff() > 0, timeline.offsets_B1[1:] - 1
        else:
            end_BKD = depth.experts_RKD[timeline.chunks.num_boundaries :]
            has_new_B, newest_B = at.sees_I, at.newest_I
        earlier_BD = end_BKD.mean(1).to(depth.tokens_TD.dtype)
        if timeline.state is not None:
            earlier_BD = torch.where(timeline.state.count_B[:, None] > 0, timeline.state.newest_BD, earlier_BD)
        # One gather out of both: a rank without any event still has a gradient, of zeros, for every parameter.
        rows_XD = torch.cat([depth.tokens_TD, earlier_BD])
        row_B = torch.where(has_new_B, newest_B, torch.arange(len(newest_B), device=newest_B.device) + T)
        newest_BD, tokens_TD = rows_XD.index_select(0, row_B), None
        if at is not None:
            user_BD = self.mix(self.norm(newest_BD))
        else:
            outputs_XD = self.mix(self.norm(rows_XD))
            user_BD, tokens_TD = outputs_XD.index_select(0, row_B), outputs_XD[:T] if all_positions else None
        return ReadOut(TowerOutput(self.norm(end_BKD), user_BD, tokens_TD, moments_of(moments_Brf)), newest_BD)


class CausalTower(SequenceTower):
    """forward(tokens_TD, offsets_B1, times_s_T) -> TowerOutput; step(..., state) -> (TowerOutput, UserState).

    user_embedding is the output of the user's newest event, and each row of `tokens` that of its event, which no later
    event changes. A user without any event has the mean of the seeds' interests as its newest event, and moments of
    zeros. all_positions=False leaves out the output's `tokens` and most of the last layer.

    readings (user_I, ends_I): the output has a row per reading, of user_I as of just before event ends_I, a position on
    the T axis. With offsets [0, 3, 5], reading (1, 4) is user 1 after its first event. No `tokens` then.
    `memory` is an InterestMemory or None. TorchRec traces forward and step, because the tower owns the memory's bank:
    they only call sub-modules and functions under `torch.fx.wrap`.
    """

    is_causal = has_states = has_memory = True

    def __init__(self, config: TowerConfig, memory: MemoryConfig, *, device: torch.device | str | None = None):
        super().__init__()
        self.config, self.memory_config = config, memory
        self.gap = Gap(config)
        self.first = CausalAggregate(config, 0)
        self.memory = InterestMemory(config, memory, causal=True, device=device) if memory.enabled else None
        self.seeds = None if memory.enabled else Seeds(config)
        self.stack = CausalStack(config)
        self.moments, self.summary = RunningMoments(config), CausalReadout(config)
        self._fingerprint = Fingerprint(self)

    def forward(
        self,
        tokens_TD: torch.Tensor,
        offsets_B1: torch.Tensor,
        times_s_T: torch.Tensor,
        all_positions: bool = True,
        readings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> TowerOutput:
        if readings is None:
            return self.encode(tokens_TD, offsets_B1, times_s_T, None, all_positions)[0]
        return self.run(tokens_TD, offsets_B1, times_s_T, None, False, readings)[0]

    def encode(
        self,
        tokens_TD: torch.Tensor,
        offsets_B1: torch.Tensor,
        times_s_T: torch.Tensor,
        state: UserState | None,
        all_positions: bool,
    ) -> tuple[TowerOutput, UserState | None]:
        """The events in micro-batches, or all at once. state None: users start from nothing, and none is made."""
        # Micro-batches where nothing is kept for a backward pass. Not on several ranks with a memory: its sharded
        # lookups are collective, and ranks would differ in how many micro-batches they have.
        alone = self.memory is None or not dist.is_initialized() or dist.get_world_size() == 1
        if alone and not torch.is_grad_enabled():
            return in_micro_batches(self, tokens_TD, offsets_B1, times_s_T, state, all_positions)
        return self.run(tokens_TD, offsets_B1, times_s_T, state, all_positions)

    def run(
        self, tokens_TD, offsets_B1, times_s_T, state: UserState | None, all_positions: bool, readings=None
    ) -> tuple[TowerOutput, UserState | None]:
        """All events at once."""
        timeline = build_timeline(offsets_B1, times_s_T, self.config.chunk, state, readings)
        moments_Brf = self.moments(tokens_TD, timeline)
        tokens_TD = self.gap(tokens_TD, timeline)
        layer_sums = self.first(tokens_TD, timeline)
        if self.memory is None:
            experts_RKD = self.seeds(layer_sums.mean_RKD.shape[0])
        else:
            experts_RKD = self.memory(layer_sums, timeline)
        depth = self.stack(tokens_TD, experts_RKD, layer_sums, timeline, all_positions)
        read_out = self.summary(depth, moments_Brf, all_positions)
        return read_out[0], next_state(timeline, depth, read_out[1], moments_Brf)

    def fingerprint(self) -> str:
        """32 hex digits that change with the tower's configuration and dense weights. Tables are trained together with
        these and may be sharded or larger than memory: they are left out."""
        return self._fingerprint()

    def init_state(self, num_users: int, *, dtype: torch.dtype = torch.float32) -> UserState:
        """States of users without events. dtype: of the keys and values kept, by far the largest part."""
        return UserState.empty(
            num_users, self.config, fingerprint=self.fingerprint(), dtype=dtype, device=self.summary.mix.weight.device
        )

    def step(
        self,
        tokens_TD: torch.Tensor,
        offsets_B1: torch.Tensor,
        times_s_T: torch.Tensor,
        state: UserState,
        all_positions: bool = True,
    ) -> tuple[TowerOutput, UserState]:
        """New events of a batch of users (none for some) -> the output after them, and the next states.

        Equal to one pass over all events, for any cut. Gradients run into the state it was given: `state.detach()`
        cuts them off. In training a state may outlive a change of weights; in evaluation that is refused.
        """
        fingerprint = None if self.training else self.fingerprint()
        check_state(state, num_users=offsets_B1.numel() - 1, fingerprint=fingerprint)
        return self.encode(tokens_TD, offsets_B1, times_s_T, state, all_positions)
