"""Causal linear dispatcher attention on jagged histories: K experts as running sums, events that see no later event.

    aggregate   P_k(t) = sum_{j<=t} w_kj(t) value[j]
                w_kj(t) = softmax_j(expert_query[k] . key[j] - decay_per_s[k] · (t - time_j))
    dispatch    out[t] = mean value by ONE softmax of query[t] . key (+ bias[events between], for events) over
                [K experts as they stood when t's chunk began ; events of the chunk before, and of the own up to t]

Legend: B users, T events of all users, H heads, K experts, C events per chunk, N chunks, R = N + B boundaries
(chunks.py draws them), G chunks of a block, d head width, W = 2C window slots, 3: query, key, value, 2: key, value.
One row per event holds all three: both ops read rows in tiles, and a row is then one stretch of memory.
Scores are plain dot products: scale queries by 1/sqrt(d) beforehand.

Work O(T·H·(K + 2C)·d); saved for backward O(T·H·d + R·H·K·d): weights are computed again.
Ours (the paper's form is bidirectional); the running sum is that of online softmax, Milakov & Gimelshein 2018.
"""

from __future__ import annotations

import torch

from elastic_rec.models.ops.causal_lda.aggregate import aggregate
from elastic_rec.models.ops.causal_lda.chunks import Chunks
from elastic_rec.models.ops.causal_lda.dispatch import dispatch
from elastic_rec.models.ops.causal_lda.partial import Partial, combine

__all__ = ["Chunks", "Partial", "causal_aggregate", "causal_dispatch", "combine"]


def causal_aggregate(
    expert_query_HKd: torch.Tensor,
    qkv_T3Hd: torch.Tensor,
    times_s_T: torch.Tensor,
    decay_per_s_HK: torch.Tensor,
    chunks: Chunks,
    start: Partial | None = None,
) -> Partial:
    """Running sums at every boundary -> Partial with R rows; `.mean()` gives P. The events' queries are not used.

    times_s_T: int64 seconds. decay_per_s_HK: ln 2 / half-life; zeros: nothing fades.
    start: one row per user, what earlier events left; the given events continue from it at a chunk's start.
    """
    T = chunks.tiles.num_tokens
    if not qkv_T3Hd.shape[0] == times_s_T.shape[0] == T:
        raise ValueError(
            f"keys and values have {qkv_T3Hd.shape[0]} rows, times {times_s_T.shape[0]}, the chunks {T} events: build "
            "the chunks from the offsets of these very events"
        )
    if times_s_T.is_floating_point():
        raise ValueError(f"times_s_T is {times_s_T.dtype}: give whole seconds as int64, floats can't hold today's time")
    if start is not None and start.clock_R.shape[0] != chunks.tiles.num_users:
        raise ValueError(
            f"start has {start.clock_R.shape[0]} rows for {chunks.tiles.num_users} users: one row per user"
        )
    return aggregate(expert_query_HKd, qkv_T3Hd, times_s_T, decay_per_s_HK, chunks, start)


def causal_dispatch(
    qkv_T3Hd: torch.Tensor, experts_RK2Hd: torch.Tensor, bias_HW: torch.Tensor, chunks: Chunks
) -> torch.Tensor:
    """Events attend over experts and their window -> (T, H, d). bias_HW: per head, by the number of events between."""
    if experts_RK2Hd.shape[0] != chunks.num_boundaries:
        raise ValueError(
            f"expert keys have {experts_RK2Hd.shape[0]} rows, the chunks {chunks.num_boundaries} boundaries: give "
            "the experts at every boundary, as causal_aggregate returns them"
        )
    if bias_HW.shape[1] != 2 * chunks.chunk:
        raise ValueError(f"bias_HW has {bias_HW.shape[1]} columns: a chunk of {chunks.chunk} needs {2 * chunks.chunk}")
    return dispatch(qkv_T3Hd, experts_RK2Hd, bias_HW, chunks)
