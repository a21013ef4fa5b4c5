"""The best hit rate that any model can reach on synthetic events, from the events alone (never from the hidden states).

Drift: given the items seen, the hidden state (major a, minor b) has a belief that is exact by the forward filter

    drift    belief'(a, b) = (1 - drift) belief(a, b) + drift [a != b] sum_x belief(x, a) / (C - 1)
    see c    belief (a, b) ~ belief'(a, b) (noise / C + (1 - noise) (w [a = c] + (1 - w) [b = c]))     w = major_weight

(an item's rank inside its interest c says nothing of the state, and cancels). The next event is then of interest c with
probability q_c = noise / C + (1 - noise) (w belief'(a = c) + (1 - w) belief'(b = c)), and is its item of rank r with
probability q_c p_r.
Lag: q_c = noise / C + (1 - noise) [c = c*], where c* is the interest of the pin.

The Bayes-optimal HR@k is the mean over users of the sum of the k largest q_c p_r: nothing that knows only the history
can do better. Repeats are allowed and seen items are not masked; a model must be judged in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from elastic_rec.feature_store.datasets.world import BLOCK_EVENTS, SyntheticConfig, World


def next_interests(config: SyntheticConfig, interests_BL: np.ndarray, lengths_B: np.ndarray, back: int) -> np.ndarray:
    """q (B, back, C) float64: [:, j] is the prediction of the event at length-1-j, given all events before it.

    interests_BL: the interest of each event seen; columns from lengths_B on are padding. lengths_B > back - 1.
    """
    order_B = np.argsort(
        -lengths_B, kind="stable"
    )  # long histories first: those still running at t are a leading slice
    seen_BL, ends_B = interests_BL[order_B], lengths_B[order_B]
    B, C = len(ends_B), config.num_interests
    noise, signal, w = config.noise / C, 1 - config.noise, config.major_weight
    differ_CC = 1.0 - np.eye(C)
    belief_BCC = np.broadcast_to(differ_CC / (C * (C - 1)), (B, C, C)).copy()
    q_BKC = np.zeros((B, back, C))
    for t in range(int(ends_B[0])):
        A = int(np.searchsorted(-ends_B, -t, side="left"))  # users with more than t events
        belief = belief_BCC[:A]
        new_minor = belief.sum(axis=1)[:, :, None] * (differ_CC / (C - 1))
        belief = (1 - config.drift) * belief + config.drift * new_minor
        from_end = ends_B[:A] - 1 - t
        asked = np.flatnonzero(from_end < back)
        q_C = w * belief[asked].sum(axis=2) + (1 - w) * belief[asked].sum(axis=1)
        q_BKC[asked, from_end[asked]] = noise + signal * q_C
        user, c = np.arange(A), seen_BL[:A, t]
        after = noise * belief
        after[user, c, :] += signal * w * belief[user, c, :]
        after[user, :, c] += signal * (1 - w) * belief[user, :, c]
        belief_BCC[:A] = after / after.sum(axis=(1, 2), keepdims=True)
    back_in_place = np.empty_like(q_BKC)
    back_in_place[order_B] = q_BKC
    return back_in_place


def top_k(
    q_NC: np.ndarray, rank_probs_S: np.ndarray, c_N: np.ndarray, r_N: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(probability mass (N,) of the k likeliest items, whether the true item (interest c, rank r) is among them (N,)).

    Only the first k ranks of each interest can be among the top k. Ties go to the smaller (interest, rank).
    """
    K = min(k, len(rank_probs_S))
    scores_NJ = (q_NC[:, :, None] * rank_probs_S[:K]).reshape(len(q_NC), -1)
    mass_N = np.sort(scores_NJ, axis=1)[:, -k:].sum(axis=1)
    own_N1 = (q_NC[np.arange(len(c_N)), c_N] * rank_probs_S[r_N])[:, None]
    earlier_NJ = np.arange(scores_NJ.shape[1]) < (c_N * K + np.minimum(r_N, K))[:, None]
    ahead_N = ((scores_NJ > own_N1) | ((scores_NJ == own_N1) & earlier_NJ)).sum(axis=1)
    return mass_N, (ahead_N < k) & (r_N < k)


def bayes_hit_rate(config: SyntheticConfig, events: str | Path, *, k: int = 10) -> dict:
    """{"test": {...}, "validation": {...}} of the events that `generate` wrote with this config.

    bayes_hit_rate: the best expected HR@k; bayes_hit_rate_realised: the best predictor's hits on the very items drawn;
    standard_error: of realised against expected; popularity_hit_rate(_realised): the same for the k items of highest
    global popularity. Lag: the last answer is "test", the one before it "validation" (absent with one segment).
    """
    world = World.of(config)
    batches = lagged_targets(config, world, Path(events)) if config.lag else drift_targets(config, world, Path(events))
    sums: dict[str, np.ndarray] = {}
    even_1C = np.full((1, config.num_interests), 1 / config.num_interests)
    for place, q_NC, c_N, r_N in batches:
        for part in np.array_split(np.arange(len(c_N)), -(-len(c_N) * config.num_interests * k // BLOCK_EVENTS)):
            mass, hit = top_k(q_NC[part], world.rank_probs_S, c_N[part], r_N[part], k)
            popular = np.broadcast_to(even_1C, (len(part), config.num_interests))
            popular_mass, popular_hit = top_k(popular, world.rank_probs_S, c_N[part], r_N[part], k)
            figures = (np.ones(len(part)), mass, hit, mass * (1 - mass), popular_mass, popular_hit)
            sums[place] = sums.get(place, 0.0) + np.array([f.sum(dtype=np.float64) for f in figures])
    places = {"test": "last answer", "validation": "second last answer"} if config.lag else POSITIONS
    result = {}
    for place, (n, mass, hit, variance, popular_mass, popular_hit) in sums.items():
        result[place] = {
            "position": places[place],
            "num_users": int(n),
            "bayes_hit_rate": mass / n,
            "bayes_hit_rate_realised": hit / n,
            "standard_error": max(variance, 0.0) ** 0.5 / n,
            "popularity_hit_rate": popular_mass / n,
            "popularity_hit_rate_realised": popular_hit / n,
        }
    return result


POSITIONS = {"test": "last event", "validation": "second last event"}
Targets = Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]


def drift_targets(config: SyntheticConfig, world: World, events: Path) -> Targets:
    """(place, q (N, C), true interest (N,), true rank (N,)), a row group of whole users at a time."""
    with pq.ParquetFile(events) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["user_id", "item_id"])
            users_T, items_T = table["user_id"].to_numpy(), table["item_id"].to_numpy()
            starts_B = np.flatnonzero(np.diff(users_T, prepend=users_T[0] - 1))
            lengths_B = np.diff(starts_B, append=len(users_T))
            padded_BL = np.zeros((len(starts_B), lengths_B.max()), np.int64)
            padded_BL[np.arange(lengths_B.max()) < lengths_B[:, None]] = world.interest_V1[items_T]
            q_BKC = next_interests(config, padded_BL, lengths_B, back=len(POSITIONS))
            for j, place in enumerate(POSITIONS):
                target_B = items_T[starts_B + lengths_B - 1 - j]
                yield place, q_BKC[:, j], world.interest_V1[target_B], world.rank_V1[target_B]


def lagged_targets(config: SyntheticConfig, world: World, events: Path) -> Targets:
    """As above. Every history has the same length, so the rows of the pins and answers asked for are known."""
    G, C, step = config.num_segments, config.num_interests, config.lag + 1
    wanted = {"test": G - 1, "validation": G - 2} if G > 1 else {"test": 0}
    # items_UG2: (user, segment asked for, pin or answer), gathered over the row groups
    items_UG2 = np.zeros((config.num_users, len(wanted), 2), np.int64)
    first_row = 0
    with pq.ParquetFile(events) as file:
        for group in range(file.num_row_groups):
            items_T = file.read_row_group(group, columns=["item_id"])["item_id"].to_numpy()
            user_T, position_T = np.divmod(first_row + np.arange(len(items_T)), G * step)
            segment_T, offset_T = np.divmod(position_T, step)
            for g, segment in enumerate(wanted.values()):
                for i, offset in enumerate((0, config.lag)):
                    rows = np.flatnonzero((segment_T == segment) & (offset_T == offset))
                    items_UG2[user_T[rows], g, i] = items_T[rows]
            first_row += len(items_T)
    for g, place in enumerate(wanted):
        for first in range(0, config.num_users, BLOCK_EVENTS // C + 1):
            pin_N, answer_N = items_UG2[first : first + BLOCK_EVENTS // C + 1, g].T
            pinned_NC = world.interest_V1[pin_N][:, None] == np.arange(C)
            q_NC = config.noise / C + (1 - config.noise) * pinned_NC
            yield place, q_NC, world.interest_V1[answer_N], world.rank_V1[answer_N]


def write_bayes(config: SyntheticConfig, events: Path, target: Path, *, k: int = 10) -> None:
    """Measures the best hit rate at `k` that any model can reach, and writes it to `target` as JSON."""
    figures = {"k": k, "mode": "lag" if config.lag else "drift"} | bayes_hit_rate(config, events, k=k)
    target.write_text(json.dumps(figures | {"config": asdict(config)}, indent=1))
