"""The figures of ranking against their definitions, pair by pair and request by request, ties included."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_rec.pipeline.ranking_metrics import Scored, by_length, figures_of, grouped_auc, ndcg


def draw(seed: int, num: int = 200) -> Scored:
    rng = np.random.default_rng(seed)
    logit = np.round(rng.normal(size=num), 1)  # many ties
    label = (rng.random(num) < 1 / (1 + np.exp(-logit))).astype(float)
    user = rng.integers(-3, 15, num)
    return Scored(logit, label, user, user * 10 + rng.integers(0, 3, num), rng.integers(0, 90, num))


def auc_by_pairs(logit, label) -> float | None:
    pairs = [(p > n) + (p == n) / 2 for p in logit[label > 0] for n in logit[label == 0]]
    return float(np.mean(pairs)) if pairs else None


@pytest.mark.parametrize("seed", range(4))
def test_auc_and_gauc(seed):
    scored = draw(seed)
    figures = figures_of(scored)
    assert figures["auc"] == pytest.approx(auc_by_pairs(scored.logit, scored.label), abs=1e-12)
    wanted, weights = [], []
    for user in np.unique(scored.user):
        mine = scored.user == user
        auc = auc_by_pairs(scored.logit[mine], scored.label[mine])
        if auc is not None:
            wanted.append(auc)
            weights.append(mine.sum())
    assert figures["gauc"] == pytest.approx(np.average(wanted, weights=weights), abs=1e-12)
    assert figures["gauc_users"] == len(wanted)


@pytest.mark.parametrize("seed", range(2))
def test_entropy_and_calibration(seed):
    scored = draw(seed)
    p, y = 1 / (1 + np.exp(-scored.logit)), scored.label
    entropy = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    of_the_mean = -(y.mean() * np.log(y.mean()) + (1 - y.mean()) * np.log(1 - y.mean()))
    figures = figures_of(scored)
    assert figures["ne"] == pytest.approx(entropy / of_the_mean, rel=1e-6)
    assert figures["calibration"] == pytest.approx(p.sum() / y.sum(), rel=1e-6)
    assert figures["log_loss"] == pytest.approx(entropy, rel=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_ndcg_of_each_request(seed):
    scored, wanted = draw(seed), []
    for request in np.unique(scored.impression):
        mine = np.flatnonzero(scored.impression == request)
        if scored.label[mine].sum():
            order = sorted(mine, key=lambda i: -scored.logit[i])  # stable
            gain = sum(scored.label[i] / np.log2(place + 2) for place, i in enumerate(order))
            wanted.append(gain / sum(1 / np.log2(place + 2) for place in range(int(scored.label[mine].sum()))))
    assert sorted(ndcg(scored.logit, scored.label, scored.impression)) == pytest.approx(sorted(wanted))


def test_one_class_only_and_nothing_at_all():
    scored = draw(0)
    ones = scored.where(scored.label > 0)
    figures = figures_of(ones)
    assert "auc" not in figures and "gauc" not in figures and figures["ndcg"] == 1.0
    assert figures_of(scored.where(scored.label > 2)) == {"candidates": 0}
    auc, sizes = grouped_auc(ones.logit, ones.label, ones.user)
    assert len(auc) == len(sizes) == 0


def test_by_length_parts_add_up():
    scored = draw(1)
    parts = by_length(scored, [50, 20])
    assert list(parts) == ["0-19", "20-49", "50+"] and sum(part["candidates"] for part in parts.values()) == 200
    middle = scored.where((scored.seen >= 20) & (scored.seen < 50))
    assert parts["20-49"]["auc"] == pytest.approx(auc_by_pairs(middle.logit, middle.label))
