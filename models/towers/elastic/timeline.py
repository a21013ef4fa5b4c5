"""The time axis of a causal pass: the new events of each user, after those of an earlier pass that are still open.

Legend: B users, T new events, C events per chunk, E = T + the events kept in the users' states, W = 2C slots for them.

    state     kept  [d e f]  [g]         C = 3: chunk [d e f] and the open chunk [g]; a b c are in the running sums
    new                         h i j k
    axis E          [d e f]  [g h i]  [j k .]
    next state               [g h i]  [j k]          the chunk [d e f] went into the running sums

The kept events are the last full chunk, which the window of the next events still sees, and the open one: at most
2C - 1. The sums in a state end where they begin, so that a pass starts at a chunk's edge, whatever the events before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from elastic_rec.models.ops.causal_lda import Chunks
from elastic_rec.models.towers.elastic.state import UserState, num_kept


class Readings(NamedTuple):
    """Moments at which users are read: I more boundaries, each between two events of its user (ours).

        user's events   [a b c d] [e f g h] [i j .]       C = 4
        boundaries     ^0        ^1        ^2      ^3
        reading                       ^ end = 6 sees a..f: boundary 1, and the events e f of its chunk

    A reading's running sums are those of the boundary before it and of at most C events: work O(I·C·D) beside one pass,
    instead of I passes. It equals a pass over just the events before `end`, so a stored user state gives it too.

    newest_I: the newest event a reading sees (any, where sees_I is False). boundary_I: the one before that event's
    chunk. event_IC, seen_IC: the events of that chunk, and which of them the reading sees.
    """

    newest_I: torch.Tensor
    sees_I: torch.Tensor
    boundary_I: torch.Tensor
    event_IC: torch.Tensor
    seen_IC: torch.Tensor

    @staticmethod
    def build(chunks: Chunks, user_I: torch.Tensor, ends_I: torch.Tensor) -> Readings:
        """A reading sees the events [offsets[user], end) of its user. ends_I: positions on the T axis."""
        sees_I, num_events = ends_I > chunks.tiles.offsets_B1[user_I], chunks.tiles.num_tokens
        if not num_events:
            none_IC = torch.zeros(ends_I.numel(), 0, dtype=torch.int64, device=ends_I.device)
            return Readings(torch.zeros_like(ends_I), sees_I, chunks.first_B[user_I], none_IC, none_IC.bool())
        newest_I = (ends_I - 1).clamp_min(0)
        slot_I = chunks.tiles.slot_T[newest_I]
        boundary_I = torch.where(sees_I, chunks.before_N[slot_I // chunks.chunk], chunks.first_B[user_I])
        event_IC = (newest_I - slot_I % chunks.chunk)[:, None] + torch.arange(chunks.chunk, device=ends_I.device)
        seen_IC = (event_IC <= newest_I[:, None]) & sees_I[:, None]
        return Readings(newest_I, sees_I, boundary_I, event_IC.clamp_max(num_events - 1), seen_IC)


@dataclass(frozen=True)
class Timeline:
    """chunks: of axis E. times_s_E int64. gap_s_T: seconds since the user's event before, -1 for the first ever.

    state: what the users' earlier events left; None: there were none, and axes E and T are one.
    readings: where users are read beside the boundaries; only without a state.
    source_E: row of [kept slots (B*W) ; new events (T)] that stands at each place of E. place_T: the way back.
    """

    chunks: Chunks
    offsets_B1: torch.Tensor
    times_s_E: torch.Tensor
    gap_s_T: torch.Tensor
    state: UserState | None = None
    source_E: torch.Tensor | None = None
    place_T: torch.Tensor | None = None
    readings: Readings | None = None

    @staticmethod
    def build(
        offsets_B1: torch.Tensor,
        times_s_T: torch.Tensor,
        chunk: int,
        state: UserState | None = None,
        readings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Timeline:
        """readings: (user_I, ends_I), as in `Readings.build`."""
        offsets_B1, num_new = offsets_B1.to(torch.int64), times_s_T.numel()
        if state is None:
            chunks = Chunks.build(offsets_B1, num_new, chunk)
            at = None if readings is None else Readings.build(chunks, *readings)
            return Timeline(chunks, offsets_B1, times_s_T, _gaps(chunks, times_s_T), readings=at)
        device, window = offsets_B1.device, 2 * chunk
        kept_B = num_kept(state.count_B, chunk)
        axis_B1 = torch.cat([kept_B.new_zeros(1), (kept_B + offsets_B1.diff()).cumsum(0)])
        chunks = Chunks.build(axis_B1, int(axis_B1[-1]), chunk)
        user_E = chunks.tiles.user_T
        place_in_user_E = torch.arange(user_E.numel(), device=device) - axis_B1[user_E]
        is_new_E = place_in_user_E >= kept_B[user_E]
        new_row_E = len(kept_B) * window + offsets_B1[user_E] + place_in_user_E - kept_B[user_E]
        source_E = torch.where(is_new_E, new_row_E, user_E * window + place_in_user_E)
        times_s_E = torch.cat([state.times_s_BW.flatten(), times_s_T]).index_select(0, source_E)
        place_T = is_new_E.nonzero().squeeze(1)
        gap_s_T = _gaps(chunks, times_s_E)[place_T]
        return Timeline(chunks, offsets_B1, times_s_E, gap_s_T, state, source_E, place_T)

    @property
    def num_users(self) -> int:
        """Users, B."""
        return self.offsets_B1.numel() - 1

    def join(self, kept_BW: torch.Tensor, new_T: torch.Tensor) -> torch.Tensor:
        """(B, W, ...) and (T, ...) -> (E, ...)."""
        kept_X = kept_BW.flatten(0, 1).to(new_T.dtype)
        if self.num_users == 1:
            return torch.cat([kept_X[: self.times_s_E.numel() - new_T.shape[0]], new_T])
        return torch.cat([kept_X, new_T]).index_select(0, self.source_E)

    def new(self, x_E: torch.Tensor) -> torch.Tensor:
        """(E, ...) -> (T, ...)."""
        if self.place_T is None:
            return x_E
        if self.num_users == 1:
            return x_E[x_E.shape[0] - self.place_T.numel() :]
        return x_E.index_select(0, self.place_T)

    def newest(self) -> Newest:
        """What the newest event of each user sees of a layer: its own chunk, the one before, and their boundaries."""
        chunk, tiles = self.chunks.chunk, self.chunks.tiles
        chunks_B = self.chunks.end_B - self.chunks.first_B
        skipped_B = (chunks_B - 2).clamp_min(0) * chunk
        offsets_B1 = torch.cat([skipped_B.new_zeros(1), (tiles.offsets_B1.diff() - skipped_B).cumsum(0)])
        near = Chunks.build(offsets_B1, int(offsets_B1[-1]), chunk)
        device, has_new_B = offsets_B1.device, self.offsets_B1.diff() > 0
        shift_B = tiles.offsets_B1[:-1] + skipped_B - offsets_B1[:-1]
        users_B = torch.arange(self.num_users, device=device)
        user_R = torch.repeat_interleave(users_B, near.end_B - near.first_B + 1, output_size=near.num_boundaries)
        number_R = torch.arange(near.num_boundaries, device=device)
        event_E = torch.arange(near.tiles.num_tokens, device=device) + shift_B[near.tiles.user_T]
        timeline = Timeline(
            chunks=near,
            offsets_B1=torch.cat([skipped_B.new_zeros(1), has_new_B.cumsum(0)]),
            times_s_E=self.times_s_E.index_select(0, event_E),
            gap_s_T=self.gap_s_T.index_select(0, self.offsets_B1[1:][has_new_B] - 1),
            state=self.state,
            place_T=offsets_B1[1:][has_new_B] - 1,
        )
        return Newest(
            timeline,
            event_E=event_E,
            boundary_R=number_R + (self.chunks.end_B - near.end_B)[user_R],
            new_T=self.offsets_B1[1:][has_new_B] - 1,
        )


class Newest(NamedTuple):
    """timeline: of the newest new event per user. event_E, boundary_R, new_T: its rows of the full axes."""

    timeline: Timeline
    event_E: torch.Tensor
    boundary_R: torch.Tensor
    new_T: torch.Tensor


def _gaps(chunks: Chunks, times_s_E: torch.Tensor) -> torch.Tensor:
    if not times_s_E.numel():
        return times_s_E
    first_E = chunks.tiles.offsets_B1[chunks.tiles.user_T]
    number_E = torch.arange(first_E.numel(), device=first_E.device)
    gap_s_E = (times_s_E - times_s_E[(number_E - 1).clamp_min(0)]).clamp_min(0)
    return gap_s_E.masked_fill(number_E == first_E, -1)
