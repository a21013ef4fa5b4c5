"""One pass over a user's events, read as of several moments: ranking's impressions share a history (ours).

Legend: B users, T events, D width, K experts, H heads, d = D/H, C events per chunk, R boundaries between chunks,
I readings: (user, end), what the user was when exactly the events before `end` had happened.

    user's events   [a b c d] [e f g h] [i j .]       C = 4
    boundaries     ^0        ^1        ^2      ^3
    reading                       ^ end = 6 (sees a..f): boundary 1, and the events e f of its chunk

A reading is one boundary more, between two events: its running sums are those of the boundary before it and at most C
events on top. Work O(I·C·D) beside the pass itself, instead of I passes. The output equals CausalTower's over just the
events before `end` (a test compares), so a stored user state answers with the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from elastic_rec.models.ops.causal_lda import Partial, combine
from elastic_rec.models.towers.elastic.causal_layer import CausalAggregate, Depth, Read
from elastic_rec.models.towers.elastic.causal_tower import CausalTower
from elastic_rec.models.towers.elastic.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.moments import Moments, RunningMoments, moments_of
from elastic_rec.models.towers.elastic.timeline import Timeline


class AsOf(NamedTuple):
    """interests (I, K, D), normalised; summary (I, D); moments of the events seen: see CausalOutput."""

    interests: torch.Tensor
    summary: torch.Tensor
    moments: Moments


class Places(NamedTuple):
    """newest_I: the event a reading ends with (any, where sees_I is False). boundary_I: before that event's chunk.
    event_IC, seen_IC: the events of that chunk, and which of them the reading sees."""

    newest_I: torch.Tensor
    sees_I: torch.Tensor
    boundary_I: torch.Tensor
    event_IC: torch.Tensor
    seen_IC: torch.Tensor


class Placer(nn.Module):
    """forward(timeline, user_I, ends_I) -> Places. ends_I: positions on the T axis, within the reading's user."""

    def forward(self, timeline: Timeline, user_I: torch.Tensor, ends_I: torch.Tensor) -> Places:
        chunks, num_events = timeline.chunks, timeline.times_s_E.numel()
        sees_I = ends_I > timeline.offsets_B1[user_I]
        slots_C = torch.arange(chunks.chunk, device=ends_I.device)
        if not num_events:
            none_IC = torch.zeros(ends_I.numel(), 0, dtype=torch.int64, device=ends_I.device)
            return Places(torch.zeros_like(ends_I), sees_I, chunks.first_B[user_I], none_IC, none_IC.bool())
        newest_I = (ends_I - 1).clamp_min(0)
        slot_I = chunks.tiles.slot_T[newest_I]
        boundary_I = torch.where(sees_I, chunks.before_N[slot_I // chunks.chunk], chunks.first_B[user_I])
        event_IC = (newest_I - slot_I % chunks.chunk)[:, None] + slots_C
        seen_IC = (event_IC <= newest_I[:, None]) & sees_I[:, None]
        return Places(newest_I, sees_I, boundary_I, event_IC.clamp_max(num_events - 1), seen_IC)


def sums_at(aggregate: CausalAggregate, read: Read, timeline: Timeline, places: Places) -> Partial:
    """The running sums of one layer at each reading, I rows."""
    before = read.sums.rows(places.boundary_I)
    if not places.event_IC.numel():
        return before
    wide, d = before.norm_RHK.dtype, aggregate.ask_HKd.shape[-1]
    key_ICHd, value_ICHd = read.qkv_E3Hd[:, 1:][places.event_IC].to(wide).unbind(2)
    clock_I = timeline.times_s_E[places.newest_I]
    age_IC = (clock_I[:, None] - timeline.times_s_E[places.event_IC]).clamp_min(0).to(wide)
    scores_IHKC = torch.einsum("ichd,hkd->ihkc", key_ICHd, aggregate.ask_HKd.to(wide) * d**-0.5)
    scores_IHKC = scores_IHKC - age_IC[:, None, None] * aggregate.rate().to(wide)[..., None]
    seen_I11C = places.seen_IC[:, None, None]
    max_IHK = scores_IHKC.detach().masked_fill(~seen_I11C, -torch.inf).amax(-1)
    max_IHK = max_IHK.masked_fill(~places.sees_I[:, None, None], 0.0)
    weights_IHKC = (scores_IHKC - max_IHK[..., None]).masked_fill(~seen_I11C, -torch.inf).exp()
    own = Partial(
        max_IHK.double(), weights_IHKC.sum(-1), torch.einsum("ihkc,ichd->ihkd", weights_IHKC, value_ICHd), clock_I
    )
    return combine(before, own, aggregate.rate())


def mean_of(sums: Partial) -> torch.Tensor:
    """(rows, K, D), as CausalAggregate gives it."""
    return sums.mean().transpose(1, 2).flatten(2)


class MomentsAt(nn.Module):
    """forward(sums_Rrf, tokens_TD, places) -> Moments, I rows."""

    def __init__(self, running: RunningMoments):
        super().__init__()
        self.running = [running]  # in a list: it is the tower's child already

    def forward(self, sums_Rrf: torch.Tensor, tokens_TD: torch.Tensor, places: Places) -> Moments:
        own_Irf = self.running[0].sums(tokens_TD[places.event_IC], places.seen_IC)
        return moments_of(sums_Rrf.index_select(0, places.boundary_I) + own_Irf)


class Widener(nn.Module):
    """forward(read, timeline, places) -> the first layer's Read with the I readings behind the R boundaries: the memory
    is asked once for all."""

    def __init__(self, aggregate: CausalAggregate):
        super().__init__()
        self.aggregate = [aggregate]  # in a list: it is the tower's child already

    def forward(self, read: Read, timeline: Timeline, places: Places) -> Read:
        sums = sums_at(self.aggregate[0], read, timeline, places)
        joint = Partial(*(torch.cat([a, b]) for a, b in zip(read.sums, sums, strict=True)))
        return Read(read.qkv_E3Hd, joint, torch.cat([read.mean_RKD, mean_of(sums)]))


class Splitter(nn.Module):
    """forward(rows, places) -> ((R, ...), (I, ...))."""

    def forward(self, rows: torch.Tensor, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        num = places.newest_I.numel()
        return rows[: rows.shape[0] - num], rows[rows.shape[0] - num :]


class Reader(nn.Module):
    """forward(depth, experts_IKD, places, moments) -> AsOf: the readings' experts through all layers."""

    def __init__(self, tower: CausalTower):
        super().__init__()
        self.tower = [tower]

    def forward(self, depth: Depth, experts_IKD: torch.Tensor, places: Places, moments: Moments) -> AsOf:
        tower = self.tower[0]
        aggregates = [tower.first, *tower.stack.aggregates]
        means = [
            mean_of(sums_at(aggregate, read, depth.timeline, places))
            for aggregate, read in zip(aggregates, depth.reads, strict=True)
        ]
        for layer, mean_IKD in zip(tower.stack.layers, means, strict=True):
            experts_IKD = layer.update(experts_IKD, mean_IKD)
        norm, mix = tower.summary.norm, tower.summary.mix
        # One gather out of both: a rank without any event still has a gradient, of zeros, for every parameter.
        rows_XD = torch.cat([depth.tokens_TD, experts_IKD.mean(1).to(depth.tokens_TD.dtype)])
        own_I = torch.arange(places.newest_I.numel(), device=rows_XD.device) + depth.tokens_TD.shape[0]
        newest_ID = rows_XD.index_select(0, torch.where(places.sees_I, places.newest_I, own_I))
        return AsOf(norm(experts_IKD), mix(norm(newest_ID)), moments)


class AsOfTower(CausalTower):
    """forward(tokens_TD, offsets_B1, times_s_T, user_I, ends_I) -> AsOf. The same parameters as CausalTower, and its
    `step` continues users' states."""

    def __init__(self, config: TowerConfig, memory: MemoryConfig, *, device: torch.device | str | None = None):
        super().__init__(config, memory, device=device)
        self.place, self.split = Placer(), Splitter()
        self.widen, self.reader, self.moments_at = Widener(self.first), Reader(self), MomentsAt(self.moments)

    def forward(
        self,
        tokens_TD: torch.Tensor,
        offsets_B1: torch.Tensor,
        times_s_T: torch.Tensor,
        user_I: torch.Tensor,
        ends_I: torch.Tensor,
    ) -> AsOf:
        timeline = self.timeline(offsets_B1, times_s_T, None)
        places = self.place(timeline, user_I, ends_I)
        moments = self.moments_at(self.moments(tokens_TD, timeline), tokens_TD, places)
        tokens_TD = self.gap(tokens_TD, timeline)
        read = self.first(tokens_TD, timeline)
        wide = self.widen(read, timeline, places)
        experts = self.seeds(wide, timeline) if self.memory is None else self.memory(wide, timeline)
        parts = self.split(experts, places)
        depth = self.stack(tokens_TD, parts[0], read, timeline, True)
        return self.reader(depth, parts[1], places, moments)
