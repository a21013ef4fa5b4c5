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
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import SplitConfig, Targets, split_bounds
from elastic_rec.feature_store.batches.torchrec_types import keyed_jagged
from elastic_rec.feature_store.table.vocabulary import PAD, UNKNOWN
from elastic_rec.feature_store.utils.counter_hash import counter_uniform
from elastic_rec.feature_store.utils.jagged import offsets_of, span_indices

NUM_GAP_BUCKETS = 40
STAGES = ("train", "valid", "test", "score")
CandidateSampler = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
_TARGETS, _SPANS = 3, 4  # tell these uses of counter_uniform from the reader's


class Prefixes(NamedTuple):
    """(R,) int64 each: the user's row in the store; the prefix, events [starts, ends) of the T axis; the target's place
    on it, -1 for none. Two users of 3 and 2 events, last event as target: starts [0, 3], ends [2, 4], targets [2, 4].
    """

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    targets: np.ndarray


class TargetEvents(NamedTuple):
    """items: int64, PAD: none. gaps_s: int64 seconds since the user's event before, -1: none. weights: float32."""

    items: np.ndarray
    gaps_s: np.ndarray
    weights: np.ndarray


def make_prefix_batch(
    histories: Sequences,
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
    """One row per user, or `prefixes_per_user` rows in training on sampled targets. See PrefixBatch for shapes.

    stage: train, valid, test or score. targets: in training. every_event is for causal models only: targets and weights
        are (P,) for the P events of all prefixes, the normaliser is that of this rank (the caller adds up the ranks),
        and of a history longer than max_history a part is taken. sampled: each target has its own prefix.
    seed, epoch: choose the training targets, together with the user's row number only, so they do not depend on ranks.
    world_size: enters the normaliser, a rank's share of the global number of rows.
    candidates: (targets (R,), weights (R,)) -> (ids (C,) int64, log_q (C,) float32) for the "candidate" feature.
    Raises ValueError for an unknown stage and for sizes below 1.
    """
    if stage not in STAGES or prefixes_per_user < 1 or max_history < 1:
        raise ValueError(
            f"stage={stage!r}, prefixes_per_user={prefixes_per_user}, max_history={max_history}: stage is one of "
            f"{', '.join(STAGES)}, the others are at least 1"
        )
    is_every = stage == "train" and targets is Targets.every_event
    per_user = prefixes_per_user if stage == "train" else 1
    drawn = {"max_history": max_history, "seed": seed, "epoch": epoch, "per_user": None if is_every else per_user}
    prefixes = choose_prefixes(histories, split=split, stage=stage, **drawn)
    found = target_events(histories, prefixes, stage=stage, after_every=is_every)
    normaliser = found.weights.sum() if is_every else histories.num_global_rows * per_user / world_size
    return assemble(histories, prefixes, found, normaliser, candidates)


def target_events(histories: Sequences, prefixes: Prefixes, *, stage: str, after_every: bool) -> TargetEvents:
    """The prefixes' targets, (R,) each. after_every: the event after each event of a prefix, (P,), prefix by prefix."""
    positions = prefixes.targets
    if after_every:
        positions = span_indices(prefixes.starts + 1, prefixes.ends - prefixes.starts)
    items, gaps_s = targets_at(histories, positions)
    # An unknown item is never the next item: there is no row of the catalogue to rank.
    weights = (prefixes.rows >= 0) if stage == "score" else (items > UNKNOWN)
    return TargetEvents(items, gaps_s, weights.astype(np.float32))


def targets_at(histories: Sequences, positions_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(items, seconds since the event before) at positions of the T axis: (PAD, -1) where there is none (-1)."""
    has_target = positions_R >= 0
    positions = positions_R[has_target]
    items, gaps = np.full(len(positions_R), PAD, np.int64), np.full(len(positions_R), -1, np.int64)
    items[has_target] = histories.columns["item"][positions]
    user = np.searchsorted(histories.offsets, positions, side="right") - 1
    is_first = histories.offsets[user] == positions
    gaps[has_target] = np.where(is_first, -1, histories.times_s[positions] - histories.times_s[positions - 1])
    return items, gaps


def assemble(
    histories: Sequences,
    prefixes: Prefixes,
    found: TargetEvents,
    normaliser: float,
    candidates: CandidateSampler | None,
    window: tuple[int, int] = (0, 1),
) -> PrefixBatch:
    """The batch of some prefixes of the histories, without the events that no prefix covers."""
    keep_T, position_T1 = covered(prefixes.starts, prefixes.ends, len(histories.times))
    columns = {**histories.columns, "gap": gap_buckets(histories)}
    kept = replace(histories, columns=columns).pick(keep_T, rows=histories.rows, offsets=position_T1[histories.offsets])
    ids, log_q = (np.zeros(0, np.int64), np.zeros(0, np.float32))
    if candidates is not None:
        ids, log_q = candidates(found.items, found.weights)
    candidate_B = np.zeros(len(kept.rows), np.int64)
    candidate_B[0] = len(ids)
    bags = [(name, kept.lengths, values) for name, values in kept.columns.items()]
    return PrefixBatch(
        features=keyed_jagged([*bags, ("candidate", candidate_B, np.asarray(ids, np.int64))]),
        times_s=torch.from_numpy(kept.times_s),
        starts=torch.from_numpy(position_T1[prefixes.starts]),
        ends=torch.from_numpy(position_T1[prefixes.ends]),
        targets=torch.from_numpy(found.items),
        weights=torch.from_numpy(found.weights),
        log_q=torch.from_numpy(np.asarray(log_q, np.float32)),
        normaliser=torch.tensor(normaliser, dtype=torch.float32),
        rows=torch.from_numpy(prefixes.rows),
        query_gap_s=torch.from_numpy(found.gaps_s),
        window=window,
    )


def gap_buckets(histories: Sequences) -> np.ndarray:
    """(T,) int64: 0 for a user's first event, else 1 + floor(log2(1 + seconds since the one before)), at most 39."""
    gaps_s = np.diff(histories.times_s, prepend=0)
    gaps_s[histories.offsets[:-1][histories.lengths > 0]] = -1
    # frexp's exponent is floor(log2(x)) + 1 exactly; log2 itself may round across a power of two.
    return np.minimum(np.frexp(gaps_s + 1.0)[1], NUM_GAP_BUCKETS - 1).astype(np.int64)


def choose_prefixes(
    histories: Sequences,
    *,
    split: SplitConfig,
    stage: str,
    max_history: int,
    seed: int,
    epoch: int,
    per_user: int | None = None,
) -> Prefixes:
    """The prefix or prefixes of each user. per_user: of training; None: one, each event of which has a target after it.

    Its `targets` are then of no use.
    """
    rows, begins = histories.rows, histories.offsets[:-1]
    if stage == "score":
        places, ends = np.full(len(rows), -1), histories.lengths
    else:
        bounds = split_bounds(split, histories)
        if stage == "train" and per_user is None:
            starts, ends = _training_spans(histories, bounds.train_end, max_history, seed, epoch)
            return Prefixes(rows, starts, ends, ends)
        if stage == "train":
            places = _draw_targets(bounds.train_end, rows, per_user, seed, epoch)
            rows, begins = np.repeat(rows, per_user), np.repeat(begins, per_user)
        else:
            places = bounds.valid if stage == "valid" else bounds.test
        ends = np.maximum(places, 0)
    starts = np.maximum(ends - max_history, 0)
    return Prefixes(rows, begins + starts, begins + ends, np.where(places >= 0, begins + places, -1))


def _training_spans(
    histories: Sequences, train_end_B: np.ndarray, max_history: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per user up to max_history training events that follow one another, with an event after them: (starts, ends)."""
    last_B = np.maximum(train_end_B - 1, 0)  # the last training event is only ever a target
    spare_B = np.maximum(last_B - max_history, 0)
    u_B = counter_uniform(_SPANS, seed, epoch, histories.rows, np.zeros_like(histories.rows))
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


def covered(starts: np.ndarray, ends: np.ndarray, num_events: int) -> tuple[np.ndarray, np.ndarray]:
    """Which events lie in a span, (T,) bool, and the place of each event without the others, (T+1,) int64.

    starts [0, 3], ends [2, 4] of 5 events: [1, 1, 0, 1, 0] and [0, 1, 2, 2, 3, 3].
    """
    depth = np.zeros(num_events + 1, np.int64)
    np.add.at(depth, starts, 1)
    np.add.at(depth, ends, -1)
    keep = np.cumsum(depth)[:-1] > 0
    return keep, offsets_of(keep)
