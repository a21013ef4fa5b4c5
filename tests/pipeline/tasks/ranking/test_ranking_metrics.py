"""The figures of ranking against their definitions, pair by pair and request by request, ties included; the same in
batches, on several ranks, and in bounded memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm_ranks

from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.tasks.ranking import open_users, score_counts
from elastic_rec.pipeline.tasks.ranking.metrics import RankingMetrics, grouped_auc, ndcg
from elastic_rec.pipeline.tasks.ranking.score_counts import ScoreCounts

EDGES = [50, 20]


@dataclass
class Stage:
    """(I,): owner, events seen. (C,): impression, logit; (C, 2): labels, NaN for none."""

    owner: np.ndarray
    seen: np.ndarray
    impression: np.ndarray
    logit: np.ndarray
    label: np.ndarray

    def batch(self, chosen: np.ndarray) -> tuple[SimpleNamespace, np.ndarray]:
        """Some of its impressions, as the reader gives them, and their logits (the second label's are the opposite)."""
        mine = np.flatnonzero(np.isin(self.impression, chosen))
        is_labelled = ~np.isnan(self.label[mine])
        of_owner = np.bincount(self.owner[self.impression], minlength=self.owner.max(initial=0) + 1)
        parts = {
            "impression": np.searchsorted(chosen, self.impression[mine]),
            "starts": np.zeros(len(chosen), np.int64),
            "ends": self.seen[chosen],
            "owners": self.owner[chosen],
            "owner_candidates": of_owner[self.owner[chosen]],
            "labels": np.where(is_labelled, self.label[mine], 0).astype(np.float32),
            "label_weights": is_labelled.astype(np.float32),
        }
        logits_CL = np.stack([self.logit[mine], -self.logit[mine]], axis=1).astype(np.float32)
        return SimpleNamespace(**{name: torch.from_numpy(part) for name, part in parts.items()}), logits_CL

    def figures(self, world: World, *, num_batches: int) -> dict:
        """Batches of far-apart impressions, dealt to the ranks."""
        figures = RankingMetrics(labels=["click", "kept"], length_edges=EDGES, world=world)
        for number in range(num_batches):
            chosen = np.arange(len(self.owner))[number::num_batches]
            figures.update(*self.batch(chosen[world.rank :: world.size]))
        return figures.compute()


def draw(seed: int, num_impressions: int = 80) -> Stage:
    rng = np.random.default_rng(seed)
    impression = np.repeat(np.arange(num_impressions), rng.integers(1, 6, num_impressions))
    logit = np.round(rng.normal(size=len(impression)), 1).astype(np.float32)  # many ties
    click = (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(float)
    kept = np.where(rng.random(len(logit)) < 0.3, np.nan, rng.integers(0, 2, len(logit)))
    owner = np.sort(rng.integers(0, 15, num_impressions))
    return Stage(owner, rng.integers(0, 90, num_impressions), impression, logit, np.stack([click, kept], axis=1))


@pytest.fixture
def world():
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture
def small(monkeypatch):
    """Users are looked through often."""
    monkeypatch.setattr(open_users, "LOOK_AT", 5)


def auc_by_pairs(logit, label) -> float | None:
    pairs = [(p > n) + (p == n) / 2 for p in logit[label > 0] for n in logit[label == 0]]
    return float(np.mean(pairs)) if pairs else None


def by_definition(stage: Stage, label: int, among: np.ndarray) -> dict:
    """among: bool per candidate."""
    keep = among & ~np.isnan(stage.label[:, label])
    y, z = stage.label[keep, label], stage.logit[keep].astype(float) * (1 - 2 * label)
    user, request = stage.owner[stage.impression][keep], stage.impression[keep]
    p = 1 / (1 + np.exp(-z))
    entropy = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    of_the_mean = -(y.mean() * np.log(y.mean()) + (1 - y.mean()) * np.log(1 - y.mean()))
    aucs = {u: auc_by_pairs(z[user == u], y[user == u]) for u in np.unique(user)}
    aucs = {u: auc for u, auc in aucs.items() if auc is not None}
    sizes = [(user == u).sum() for u in aucs]
    return {
        "candidates": len(y),
        "log_loss": entropy,
        "ne": entropy / of_the_mean,
        "calibration": p.sum() / y.sum(),
        "auc": auc_by_pairs(z, y),
        "gauc": np.average(list(aucs.values()), weights=sizes),
        "gauc_users": len(aucs),
        "ndcg": np.mean([ndcg_by_shuffling(z[request == r], y[request == r]) for r in np.unique(request[y > 0])]),
    }


def ndcg_by_shuffling(logit, label, num: int = 400) -> float:
    """The mean over random orders of the candidates; exact where nothing is tied."""
    rng, gains = np.random.default_rng(0), []
    for _ in range(num if len(np.unique(logit)) < len(logit) else 1):
        shuffled = rng.permutation(len(logit))
        order = shuffled[np.argsort(-logit[shuffled], kind="stable")]
        gains.append((label[order] / np.log2(np.arange(len(order)) + 2)).sum())
    return np.mean(gains) / (1 / np.log2(np.arange(int(label.sum())) + 2)).sum()


@pytest.mark.parametrize("seed", range(2))
def test_figures_equal_their_definitions(world, small, seed):
    stage = draw(seed)
    found = stage.figures(world, num_batches=7)
    seen = stage.seen[stage.impression]
    for label, mine in enumerate((found, found["labels"]["kept"])):
        parts = {"0-19": seen < 20, "20-49": (seen >= 20) & (seen < 50), "50+": seen >= 50}
        assert list(mine["by_length"]) == list(parts)
        for got, among in [(mine, seen >= 0), *((mine["by_length"][name], among) for name, among in parts.items())]:
            want = by_definition(stage, label, among)
            got = {name: got[name] for name in want}
            assert got.pop("ndcg") == pytest.approx(want.pop("ndcg"), abs=0.02), "drawn orders of ties"
            assert got == pytest.approx(want, rel=1e-9)


def test_equal_scores_get_chance_whatever_the_order_shown(world):
    stage = draw(0)
    stage.logit[:] = -0.3
    order = np.lexsort((-stage.label[:, 0], stage.impression))  # positives shown first
    stage.label = stage.label[order]
    found = stage.figures(world, num_batches=2)
    assert found["auc"] == found["gauc"] == 0.5
    by_chance = []
    for request in np.unique(stage.impression):
        label = stage.label[stage.impression == request, 0]
        gain = 1 / np.log2(np.arange(len(label)) + 2)
        if label.any():
            by_chance.append(label.mean() * gain.sum() / gain[: int(label.sum())].sum())
    assert found["ndcg"] == pytest.approx(np.mean(by_chance), rel=1e-12) and found["ndcg"] < 0.9


def test_ndcg_without_ties_is_the_plain_one():
    logit, label = np.array([0.1, 0.9, 0.5, 0.2]), np.array([1.0, 0.0, 1.0, 1.0])
    value, request = ndcg(logit, label, np.array([4, 4, 4, 7]))
    want = (1 / np.log2(3) + 1 / np.log2(4)) / (1 + 1 / np.log2(3))
    assert request.tolist() == [4, 7] and value == pytest.approx([want, 1.0])


def test_one_class_only_and_no_label_at_all(world):
    stage = draw(0)
    stage.label[:] = [0.0, np.nan]
    found = stage.figures(world, num_batches=3)
    assert found.keys() == {"label", "candidates", "log_loss", "by_length", "labels"}, "the others are not defined"
    assert found["labels"] == {"kept": {"candidates": 0, "by_length": {}}}
    ones = np.ones(3)
    assert all(len(part) == 0 for part in grouped_auc(ones, ones, ones))


def on_ranks(rank: int, size: int, folder: str) -> None:
    world = start_world("cpu")
    open_users.LOOK_AT, score_counts.MOST_CODES = 5, 30
    found = draw(1).figures(world, num_batches=5)
    if rank == size - 1:
        np.save(f"{folder}/{size}.npy", found, allow_pickle=True)
    dist.destroy_process_group()


def test_any_number_of_ranks_has_the_same_figures(tmp_path):
    """Each user's impression groups are dealt to all ranks; counts of scores are coarsened."""
    found = {}
    for size in (1, 2, 3):
        warm_ranks.call(on_ranks, str(tmp_path), ranks=size)
        found[size] = np.load(tmp_path / f"{size}.npy", allow_pickle=True).item()
    assert found[1]["auc_error_at_most"] > 0 and found[1]["gauc_users"] > 5
    for size in (2, 3):
        flat, want = dict(flatten(found[size])), dict(flatten(found[1]))
        assert flat == pytest.approx(want, rel=1e-12)


def flatten(figures: dict, prefix: str = ""):
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        elif key != "label":
            yield prefix + key, value


def test_counts_are_exact_while_scores_fit_and_bounded_beyond(monkeypatch):
    rng = np.random.default_rng(0)
    score = (rng.normal(size=5000) * 10.0 ** rng.integers(-3, 2, 5000)).astype(np.float32)
    score[:4] = [0.0, -0.0, np.float32(1e-42), np.float32(-1e-42)]
    label = rng.random(5000) < 1 / (1 + np.exp(-score.astype(float)))
    exact = grouped_auc(score, label.astype(float), np.zeros(5000))[0][0]

    def count(parts: int) -> ScoreCounts:
        counts = ScoreCounts()
        for chosen in np.array_split(rng.permutation(5000), parts):
            counts.add(score[chosen], label[chosen])
        return counts

    assert count(9).auc() == (pytest.approx(exact, abs=1e-14), 0)
    for most in (2000, 300, 40):
        monkeypatch.setattr(score_counts, "MOST_CODES", most)
        found = {(count(parts).auc(), len(counts.code_N)) for parts in (1, 7, 31) if (counts := count(parts)).auc()}
        assert len(found) == 1, "order and batches do not matter"
        (((auc, off), num),) = found
        assert num <= most and 0 < off < 20 / most and abs(auc - exact) <= off


def test_memory_does_not_grow_with_candidates(world, monkeypatch):
    """Ten times the candidates, the same peak."""
    monkeypatch.setattr(score_counts, "MOST_CODES", 1 << 12)
    monkeypatch.setattr(open_users, "LOOK_AT", 1 << 10)
    rng, peaks = np.random.default_rng(0), []
    for num_batches in (30, 300):
        figures = RankingMetrics(labels=["click"], length_edges=[], world=world)
        tracemalloc.start()
        for number in range(num_batches):
            figures.update(*whole_users(rng, number))
        found = figures.compute()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found["candidates"] == num_batches * 1000 and list(found["by_length"]) == ["0+"]
        assert 0 < found["auc_error_at_most"] < 1e-3
    assert peaks[1] < 1.3 * peaks[0] < 4e6, peaks


def whole_users(rng, number: int, num_users: int = 20) -> tuple[SimpleNamespace, np.ndarray]:
    """10 impressions of 5 candidates of each of so many users."""
    owner = np.repeat(number * num_users + np.arange(num_users), 10)
    num = len(owner) * 5
    logit = rng.normal(size=(num, 1)).astype(np.float32)
    label = (rng.random((num, 1)) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    parts = {
        "impression": np.repeat(np.arange(len(owner)), 5),
        "starts": np.zeros(len(owner), np.int64),
        "ends": np.zeros(len(owner), np.int64),
        "owners": owner,
        "owner_candidates": np.full(len(owner), 50),
        "labels": label,
        "label_weights": np.ones_like(label),
    }
    return SimpleNamespace(**{name: torch.from_numpy(part) for name, part in parts.items()}), logit
