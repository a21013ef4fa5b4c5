"""Histories -> the PrefixBatch a model takes: (prefix, target) rows for training, evaluation or scoring.

    user, n = 8, leave_one_out    e0 e1 e2 e3 e4 e5 | e6 | e7
    train, every_event            [e0 e1 e2 e3 e4] -> e1 e2 e3 e4 e5          (a target after every event)
    train, sampled (2 per user)   [e0 e1] -> e2,  [e0 e1 e2 e3] -> e4         (other targets in each epoch)
    valid / test / score          [e0 .. e5] -> e6   /   [e0 .. e6] -> e7   /   [e0 .. e7]

Prefixes keep their newest max_history events. Events in no prefix stay out of the batch altogether, so what comes
after a prefix cannot reach the model by any path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.splits import SplitConfig, Targets, split_bounds
from elastic_rec.feature_store.batches.torchrec_types import KeyedJaggedTensor
from elastic_rec.feature_store.table.vocabulary import PAD, UNKNOWN
from elastic_rec.feature_store.utils.counter_hash import counter_uniform
from elastic_rec.feature_store.utils.jagged import span_indices

NUM_GAP_BUCKETS = 40
STAGES = ("train", "valid", "test", "score")
CandidateSampler = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
_TARGETS, _STRETCHES = 3, 4  # tell these uses of counter_uniform from the reader's


class Prefixes(NamedTuple):
    """(R,) each: the user's position in the batch, prefix [starts, ends) and target on the T axis (-1: none)."""

    users: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    targets: np.ndarray


def make_prefix_batch(
    histories: Histories,
    *,
    split: SplitConfig,
    stage: str,
    targets: Targets = Targets.every_event,
    prefixes_per_user: int = 1,
    max_history: int,
    seed: int,
    epoch: int,
    world_size: int,
    candidates: CandidateSampler | None = None,
) -> PrefixBatch:
    """stage: train, valid, test or score. One row per user, in training with sampled targets `prefixes_per_user`.
    See PrefixBatch for shapes. Raises ValueError for an unknown stage or sizes below 1.

    targets: of training. every_event: a target after every event, for causal models only: targets and weights (P,) for
        the P events of all prefixes, and a normaliser of this rank's targets alone (the caller adds up the ranks). A
        history longer than max_history gives a stretch of it, drawn by (seed, epoch, user).
        sampled: `prefixes_per_user` targets per user, drawn by (seed, epoch, user), each with its prefix.

    seed, epoch: choose the training targets, together with the user's row number only, so they do not depend on ranks.
    world_size: enters the normaliser, a rank's share of the global number of rows.
    candidates: (targets (R,), weights (R,)) -> (ids (C,) int64, log_q (C,) float32) for the "candidate" feature.
    """
    if stage not in STAGES or prefixes_per_user < 1 or max_history < 1:
        raise ValueError(
            f"stage={stage!r}, prefixes_per_user={prefixes_per_user}, max_history={max_history}: stage is one of "
            f"{', '.join(STAGES)}, the others are at least 1"
        )
    is_every = stage == "train" and targets is Targets.every_event
    per_user = prefixes_per_user if stage == "train" else 1
    prefixes = choose_prefixes(histories, split, stage, targets, per_user, max_history, seed, epoch)
    rows = histories.rows[prefixes.users]
    if is_every:
        items, query_gap_s = targets_after(histories, prefixes.starts, prefixes.ends)
    else:
        items, query_gap_s = targets_at(histories, prefixes.targets)
    weights = loss_weights(stage, rows, items)
    normaliser = weights.sum() if is_every else histories.num_global_users * per_user / world_size
    spans = rows, prefixes.starts, prefixes.ends
    return assemble(histories, *spans, items, query_gap_s, weights, normaliser, candidates)


def targets_at(histories: Histories, positions_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(items, seconds since the event before) at positions of the T axis: (PAD, -1) where there is none (-1)."""
    has_target = positions_R >= 0
    positions = positions_R[has_target]
    items, gaps = np.full(len(positions_R), PAD, np.int64), np.full(len(positions_R), -1, np.int64)
    items[has_target] = histories.columns["item"][positions]
    user = np.searchsorted(histories.offsets, positions, side="right") - 1
    is_first = histories.offsets[user] == positions
    gaps[has_target] = np.where(is_first, -1, histories.times_s[positions] - histories.times_s[positions - 1])
    return items, gaps


def targets_after(histories: Histories, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P,) each, as targets_at, of the event after every event of the stretches [starts, ends)."""
    return targets_at(histories, span_indices(starts + 1, ends - starts))


def loss_weights(stage: str, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    # An unknown item is never the next item: there is no row of the catalogue to rank.
    return ((rows >= 0) if stage == "score" else (targets > UNKNOWN)).astype(np.float32)


def assemble(
    histories: Histories,
    rows: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    targets: np.ndarray,
    query_gap_s: np.ndarray,
    weights: np.ndarray,
    normaliser: float,
    candidates: CandidateSampler | None,
    window: tuple[int, int] = (0, 1),
) -> PrefixBatch:
    """The batch of prefixes [starts, ends) of the histories' T axis, without the events that no prefix covers."""
    keep_T, starts, ends = compact(starts, ends, len(histories.times_s))
    ids, log_q = (np.zeros(0, np.int64), np.zeros(0, np.float32))
    if candidates is not None:
        ids, log_q = candidates(targets, weights)
    columns = {**histories.columns, "gap": gap_buckets(histories)}
    return PrefixBatch(
        features=_features(columns, histories.offsets, keep_T, ids),
        times_s=torch.from_numpy(histories.times_s[keep_T]),
        starts=torch.from_numpy(starts),
        ends=torch.from_numpy(ends),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        log_q=torch.from_numpy(np.asarray(log_q, np.float32)),
        normaliser=torch.tensor(normaliser, dtype=torch.float32),
        rows=torch.from_numpy(rows),
        query_gap_s=torch.from_numpy(query_gap_s),
        window=window,
    )


def gap_buckets(histories: Histories) -> np.ndarray:
    """(T,) int64: 0 for a user's first event, else 1 + floor(log2(1 + seconds since the one before)), at most 39."""
    # frexp's exponent is floor(log2(x)) + 1 exactly; log2 itself may round across a power of two.
    return np.minimum(np.frexp(gaps_s(histories) + 1.0)[1], NUM_GAP_BUCKETS - 1).astype(np.int64)


def gaps_s(histories: Histories) -> np.ndarray:
    """(T,) int64 seconds since the user's event before, -1 for a user's first event."""
    gaps = np.diff(histories.times_s, prepend=0)
    gaps[histories.offsets[:-1][np.diff(histories.offsets) > 0]] = -1
    return gaps


def choose_prefixes(
    histories: Histories,
    split: SplitConfig,
    stage: str,
    targets: Targets,
    prefixes_per_user: int,
    max_history: int,
    seed: int,
    epoch: int,
) -> Prefixes:
    begins, n_B = histories.offsets[:-1], np.diff(histories.offsets)
    users = np.arange(len(n_B))
    if stage == "score":
        ends, positions = n_B, np.full(len(n_B), -1)
    elif stage == "train" and targets is Targets.every_event:
        starts, ends = _stretches(histories, split_bounds(split, histories).train_end, max_history, seed, epoch)
        return Prefixes(users, starts, ends, ends)
    elif stage == "train":
        users = np.repeat(users, prefixes_per_user)
        train_end_B = split_bounds(split, histories).train_end
        positions = _draw_targets(train_end_B, histories.rows, prefixes_per_user, seed, epoch)
        ends = np.maximum(positions, 0)
    else:
        bounds = split_bounds(split, histories)
        positions = bounds.valid if stage == "valid" else bounds.test
        ends = np.maximum(positions, 0)
    starts = np.maximum(ends - max_history, 0)
    begins = begins[users]
    return Prefixes(users, begins + starts, begins + ends, np.where(positions >= 0, begins + positions, -1))


def _stretches(
    histories: Histories, train_end_B: np.ndarray, max_history: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """One stretch of up to max_history training events per user, with an event after it: (starts, ends)."""
    last_B = np.maximum(train_end_B - 1, 0)  # the last training event is only ever a target
    spare_B = np.maximum(last_B - max_history, 0)
    u_B = counter_uniform(_STRETCHES, seed, epoch, histories.rows, np.zeros_like(histories.rows))
    starts = histories.offsets[:-1] + np.minimum((u_B * (spare_B + 1)).astype(np.int64), spare_B)
    return starts, starts + np.minimum(last_B, max_history)


def _draw_targets(train_end_B: np.ndarray, rows_B: np.ndarray, per_user: int, seed: int, epoch: int) -> np.ndarray:
    """(B*J,) positions in [1, train_end), one from each of J = per_user equal strata, rising; -1 for train_end < 2."""
    stratum_J = np.arange(per_user)
    u_BJ = counter_uniform(_TARGETS, seed, epoch, rows_B[:, None], stratum_J[None, :])
    choices_B1 = (train_end_B - 1)[:, None]
    targets_BJ = 1 + np.floor((stratum_J + u_BJ) / per_user * choices_B1).astype(np.int64)
    # (J - 1 + u) / J may round up to 1.
    targets_BJ = np.where(choices_B1 >= 1, np.minimum(targets_BJ, choices_B1), -1)
    return targets_BJ.ravel()


def compact(starts: np.ndarray, ends: np.ndarray, num_events: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drops events that no prefix covers: (keep_T bool, starts, ends on the shortened axis)."""
    depth = np.zeros(num_events + 1, np.int64)
    np.add.at(depth, starts, 1)
    np.add.at(depth, ends, -1)
    keep = np.cumsum(depth)[:-1] > 0
    new_position = np.zeros(num_events + 1, np.int64)
    np.cumsum(keep, out=new_position[1:])
    return keep, new_position[starts], new_position[ends]


def _features(
    columns: dict[str, np.ndarray], offsets_B1: np.ndarray, keep_T: np.ndarray, candidate_ids: np.ndarray
) -> KeyedJaggedTensor:
    """Keys: the event columns (all with the same lengths), then "candidate" with its ids in row 0."""
    kept = np.concatenate([[0], np.cumsum(keep_T)])[offsets_B1]
    lengths_B = np.diff(kept)
    candidate_B = np.zeros_like(lengths_B)
    candidate_B[0] = len(candidate_ids)
    values = [*(values[keep_T] for values in columns.values()), np.asarray(candidate_ids, np.int64)]
    return KeyedJaggedTensor(
        keys=[*columns, "candidate"],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate([lengths_B] * len(columns) + [candidate_B])),
    )
