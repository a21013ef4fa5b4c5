"""The ranking model on real batches: no leak, shared histories, peers and losses against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranking_data import make_ranking_store
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from elastic_rec.feature_store.impressions.config import ImpressionSplit
from elastic_rec.feature_store.impressions.reader import ImpressionReader
from elastic_rec.feature_store.store import Store
from elastic_rec.models.elastic.config import MemoryConfig, TowerConfig
from elastic_rec.models.heads.histories import ActivationUnit, DinHistory, MeanHistory, SimHistory
from elastic_rec.models.heads.ranking import RankingModel, pair_loss
from elastic_rec.models.heads.ranking_config import RankingConfig
from elastic_rec.models.heads.retrieval import EventTable
from elastic_rec.pipeline.ranking_task import RankingBatch

READERS = ["tower", "bidirectional", "none", "mean", "din", "sim"]
D = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store.open(str(make_ranking_store(tmp_path_factory.mktemp("ranking"), num_users=12)))


def batches(store, per_visit: int = 16, size: int = 8, max_history: int = 100) -> list[RankingBatch]:
    reader = ImpressionReader(
        store,
        columns=["action"],
        split=ImpressionSplit(valid_time="2090-01-01", test_time="2091-01-01"),
        stage="train",
        global_batch_size=size,
        per_visit=per_visit,
        max_history=max_history,
        shuffle=False,
    )
    return [RankingBatch.of(impressions) for impressions in reader.epoch(0)]


def make_model(store, history: str = "tower", **ranking) -> RankingModel:
    sizes = {"device": 4, "tags": 5}
    torch.manual_seed(0)
    attention = "bidirectional" if history == "bidirectional" else "causal"
    return RankingModel(
        tables=[EventTable(name, store.vocabulary(name).size) for name in ("item", "action")] + [EventTable("gap", 40)],
        context=[EventTable("device", sizes["device"])],
        item_context=[EventTable("tags", sizes["tags"])],
        num_labels=2,
        tower=TowerConfig(width=D, experts=4, dropout=0.0, attention=attention, chunk=4),
        memory=MemoryConfig(num_keys=8, top_r=2),
        ranking=RankingConfig(
            history="tower" if history == "bidirectional" else history,
            **{"last_n": 9, "top_k": 3, "hidden": [16], "dropout": 0.0, **ranking},
        ),
    )


@pytest.mark.parametrize("history", READERS)
def test_what_comes_after_an_impression_changes_no_score_of_it(store, history):
    model = make_model(store, history).eval()
    batch = batches(store)[0]
    with torch.no_grad():
        before = model.score(batch)
        target = int(batch.ends.argsort()[len(batch.ends) // 2])
        end = int(batch.ends[target])
        values, times_s = batch.features["item"].values().clone(), batch.times_s.clone()
        values[end:] = 2 + (values[end:] + 5) % 20
        user_end = int(batch.features["item"].offsets()[int(batch.visit[target]) + 1])
        times_s[end:user_end] += 10**6
        names = batch.features.keys()
        features = {name: batch.features[name] for name in names}
        parts = [values if name == "item" else tensor.values() for name, tensor in features.items()]
        lengths = torch.cat([tensor.lengths() for tensor in features.values()])
        changed = KeyedJaggedTensor(keys=list(features), values=torch.cat(parts), lengths=lengths)
        after = model.score(replace(batch, features=changed, times_s=times_s))
    mine = batch.impression == target
    assert mine.any() and torch.equal(before[mine], after[mine])
    if history != "none":
        assert not torch.equal(before, after), "later impressions do see the change"


@pytest.mark.parametrize("history", READERS)
def test_impressions_that_share_a_history_score_as_each_alone(store, history):
    model = make_model(store, history).eval()
    found = []
    for per_visit in (16, 1):
        scores = {}
        with torch.no_grad():
            for batch in batches(store, per_visit=per_visit):
                for c, row in enumerate(model.score(batch)):
                    scores.setdefault(int(batch.impression_rows[batch.impression[c]]), []).append(row)
        found.append(torch.cat([torch.stack(scores[i]) for i in sorted(scores)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def spans(batch, candidate: int, last_n: int = 10**9) -> tuple[int, int]:
    i = int(batch.impression[candidate])
    end = int(batch.ends[i])
    return max(int(batch.starts[i]), end - last_n), end


def test_peers_against_plain_loops(store):
    batch = batches(store)[0]
    g = torch.Generator().manual_seed(0)
    T, C = batch.times_s.numel(), batch.impression.numel()
    events_TD, candidates_CD = torch.randn(T, D, generator=g), torch.randn(C, D, generator=g)
    mean = MeanHistory()(events_TD, candidates_CD, batch)
    din, sim = DinHistory(D, last_n=9), SimHistory(D, last_n=9, top_k=3)
    sim.unit = din.unit
    got_din, got_sim = din(events_TD, candidates_CD, batch), sim(events_TD, candidates_CD, batch)

    def attend(unit: ActivationUnit, candidate_D, events_nD):
        if not len(events_nD):
            return torch.zeros(D)
        hidden = unit.event(events_nD) + unit.candidate(candidate_D) + unit.product(events_nD * candidate_D)
        return unit.score(F.gelu(hidden)).squeeze(1).softmax(0) @ events_nD

    for c in range(C):
        start, end = spans(batch, c)
        seen = events_TD[start:end]
        wanted = seen.mean(0) if len(seen) else torch.zeros(D)
        torch.testing.assert_close(mean[c, 0], wanted, rtol=1e-4, atol=1e-5)
        near = events_TD[slice(*spans(batch, c, 9))]
        torch.testing.assert_close(got_din[c, 0], attend(din.unit, candidates_CD[c], near), rtol=1e-4, atol=1e-5)
        best = (near @ candidates_CD[c]).topk(min(3, len(near))).indices
        torch.testing.assert_close(got_sim[c, 0], attend(din.unit, candidates_CD[c], near[best]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", ["shared_bottom", "mmoe"])
def test_loss_is_the_weighted_sum_over_labels_and_pairs(store, sharing):
    batch = batches(store)[0]
    weights = [2.0, 0.5]
    model = make_model(store, "mean", sharing=sharing, label_weights=weights, pairwise=0.3)
    loss, (logits_CL, _, detached) = model(batch)
    wanted = 0.0
    for label, weight in enumerate(weights):
        known = [c for c in range(len(logits_CL)) if batch.label_weights[c, label] > 0]
        entropy = sum(F.binary_cross_entropy_with_logits(logits_CL[c, label], batch.labels[c, label]) for c in known)
        pairs = 0.0
        for i in range(len(batch.visit)):
            mine = [c for c in known if int(batch.impression[c]) == i]
            losses = [
                F.softplus(logits_CL[n, label] - logits_CL[p, label])
                for p in mine
                for n in mine
                if batch.labels[p, label] > batch.labels[n, label]
            ]
            pairs = pairs + (len(mine) * sum(losses) / len(losses) if losses else 0.0)
        wanted = wanted + weight * (entropy + 0.3 * pairs) / len(known)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(detached, loss)
    assert float(pair_loss(logits_CL, batch)[0]) > 0
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_wrong_number_of_label_weights_is_refused(store):
    with pytest.raises(ValueError, match="1 numbers, the impressions 2 labels"):
        make_model(store, "none", label_weights=[1.0])
    with pytest.raises(ValueError, match="top_k"):
        RankingConfig(top_k=0)


def test_the_history_decides_on_planted_data(store):
    figures = {}
    for history in ("none", "tower"):
        model = make_model(store, history)
        optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(12):
            for batch in batches(store):
                loss, _ = model(batch)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        figures[history] = float(np.mean([float(model(batch)[0].detach()) for batch in batches(store)]))
    assert figures["tower"] < figures["none"]
