"""The ranking model on real batches: no leak, shared histories, peers and losses against plain loops."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranking_data import make_ranking_store
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from elastic_rec.feature_store.batches.splits import ImpressionSplit
from elastic_rec.feature_store.reading.impression_reader import ImpressionReader
from elastic_rec.feature_store.table.store import Store
from elastic_rec.models.ranking import target_attention
from elastic_rec.models.ranking.config import RankingConfig
from elastic_rec.models.ranking.histories import CausalHistory, MeanHistory
from elastic_rec.models.ranking.model import EventInteraction, RankingModel, pair_loss
from elastic_rec.models.ranking.target_attention import ActivationUnit, EventReader
from elastic_rec.models.retrieval.model import EventTable
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.pipeline.tasks.ranking.data import RankingBatch

READERS = ["tower", "moments", "elastic", "none", "mean", "din", "sim"]
D = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store.open(str(make_ranking_store(tmp_path_factory.mktemp("ranking"), num_users=12)))


def batches(store, max_impressions_per_user: int = 16, size: int = 8, max_history: int = 100) -> list[RankingBatch]:
    reader = ImpressionReader(
        store,
        columns=["action"],
        split=ImpressionSplit(valid_time="2090-01-01", test_time="2091-01-01"),
        stage="train",
        global_batch_size=size,
        max_impressions_per_user=max_impressions_per_user,
        max_history=max_history,
        shuffle=False,
    )
    return [RankingBatch.of(impressions) for impressions in reader.epoch(0)]


def make_model(store, history: str = "tower", **ranking) -> RankingModel:
    sizes = {"device": 4, "tags": 5}
    torch.manual_seed(0)
    kind = "elastic" if history == "elastic" else "elastic_causal"
    return RankingModel(
        tables=[EventTable(name, store.vocabulary(name).size) for name in ("item", "action")] + [EventTable("gap", 40)],
        context=[EventTable("device", sizes["device"])],
        item_context=[EventTable("tags", sizes["tags"])],
        num_labels=2,
        tower=TowerConfig(width=D, experts=4, dropout=0.0, tower=kind, chunk=4, moments=3 * (kind == "elastic_causal")),
        memory=MemoryConfig(num_keys=8, top_r=2),
        ranking=RankingConfig(
            history="tower" if history == "elastic" else history,
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
        user_end = int(batch.features["item"].offsets()[int(batch.group[target]) + 1])
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
    for max_impressions_per_user in (16, 1):
        scores = {}
        with torch.no_grad():
            for batch in batches(store, max_impressions_per_user=max_impressions_per_user):
                for c, row in enumerate(model.score(batch)):
                    scores.setdefault(int(batch.impression_rows[batch.impression[c]]), []).append(row)
        found.append(torch.cat([torch.stack(scores[i]) for i in sorted(scores)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def spans(batch, candidate: int, last_n: int = 10**9) -> tuple[int, int]:
    i = int(batch.impression[candidate])
    end = int(batch.ends[i])
    return max(int(batch.starts[i]), end - last_n), end


def attend(unit: ActivationUnit, candidate_D, events_nD):
    """DIN's definition: its MLP on each pair, softmax, weighted sum."""
    if not len(events_nD):
        return torch.zeros_like(candidate_D)
    hidden = unit.event(events_nD) + unit.candidate(candidate_D) + unit.product(events_nD * candidate_D)
    return unit.score(F.gelu(hidden)).squeeze(1).softmax(0) @ events_nD


def test_mean_against_a_plain_loop(store):
    batch = batches(store)[0]
    g = torch.Generator().manual_seed(0)
    events_TD = torch.randn(batch.times_s.numel(), D, generator=g)
    mean = MeanHistory()(events_TD, torch.zeros(batch.impression.numel(), D), batch)
    for c in range(len(mean)):
        seen = events_TD[slice(*spans(batch, c))]
        wanted = seen.mean(0) if len(seen) else torch.zeros(D)
        torch.testing.assert_close(mean[c, 0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_pairs", [1, 40, 1 << 15])
@pytest.mark.parametrize("top_k", [None, 3])
def test_event_readers_and_their_gradients_against_a_plain_loop(store, monkeypatch, top_k, block_pairs):
    monkeypatch.setattr(target_attention, "BLOCK_PAIRS", block_pairs)
    batch = batches(store)[0]
    batch.ends[0] = batch.starts[0]  # one that sees no event
    g = torch.Generator().manual_seed(0)
    T, C = batch.times_s.numel(), batch.impression.numel()
    events_TD, candidates_CD, grad_CD = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (T, C, C))
    reader = EventReader(D, last_n=9, top_k=top_k).double()
    leaves = [events_TD.requires_grad_(), candidates_CD.requires_grad_(), *reader.parameters()]
    got_CD = reader(events_TD, candidates_CD, batch)[:, 0]
    wanted = []
    for c, candidate_D in enumerate(candidates_CD):
        near = events_TD[slice(*spans(batch, c, 9))]
        if top_k:
            near = near[(near @ candidate_D).topk(min(top_k, len(near))).indices]
        wanted.append(attend(reader.unit, candidate_D, near))
    torch.testing.assert_close(got_CD, torch.stack(wanted))
    got = torch.autograd.grad((got_CD * grad_CD).sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad((torch.stack(wanted) * grad_CD).sum(), leaves))


def test_of_equally_near_events_the_newer_is_kept(store):
    batch = batches(store)[0]
    events_TD = torch.arange(batch.times_s.numel()).float()[:, None].expand(-1, D)
    reader = EventReader(D, last_n=9, top_k=1)  # a candidate of zeros is equally near to all
    got_CD = reader(events_TD, torch.zeros(batch.impression.numel(), D), batch)[:, 0]
    ends_C = batch.ends[batch.impression]
    sees = ends_C > batch.starts[batch.impression]
    assert torch.equal(got_CD[sees, 0], ends_C[sees] - 1.0)


def test_a_rank_without_events_has_a_gradient_for_every_parameter():
    nothing, events_TD = torch.zeros(1, dtype=torch.int64), torch.zeros(0, D, requires_grad=True)
    for num_candidates in (0, 2):
        reader = EventReader(D, last_n=9)
        batch = SimpleNamespace(starts=nothing, ends=nothing, impression=nothing.expand(num_candidates))
        got = reader(events_TD, torch.ones(num_candidates, D), batch)
        got.sum().backward()
        assert got.shape == (num_candidates, 1, D) and not got.any()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in reader.parameters())


def test_a_reader_of_a_thousand_events_keeps_no_pairs():
    """500 candidates, 1,000 events: the hidden units of all pairs would be 64 MB. Kept: places, 9 bytes a pair."""
    T, C = 1000, 500
    spans_I = {"starts": torch.zeros(1, dtype=torch.int64), "ends": torch.tensor([T])}
    batch = SimpleNamespace(**spans_I, impression=torch.zeros(C, dtype=torch.int64))
    reader = EventReader(D, last_n=1000)
    events_TD, candidates_CD = torch.randn(T, D, requires_grad=True), torch.randn(C, D)
    with torch.profiler.profile(profile_memory=True) as profile:
        reader(events_TD, candidates_CD, batch).sum().backward()
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    block = target_attention.BLOCK_PAIRS * 32 * 4
    assert block < peak < 6 * block + 9 * T * C, f"{peak:,} bytes"


def test_an_event_is_its_item_and_how_it_went():
    events = EventInteraction(["item", "rating", "gap"], D, 0.0)
    g = torch.Generator().manual_seed(0)
    item, rating, gap = (torch.randn(5, D, generator=g) for _ in range(3))
    embedded = {
        name: SimpleNamespace(values=lambda x=x: x) for name, x in zip(events.names, (item, rating, gap), strict=True)
    }
    rest = rating + gap
    wanted = F.layer_norm(item + rest + D**0.5 * item * rest, (D,))
    torch.testing.assert_close(events(embedded), wanted)
    alone = EventInteraction(["item"], D, 0.0)
    torch.testing.assert_close(alone(embedded), F.layer_norm(item, (D,)))


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
        for i in range(len(batch.group)):
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


def test_a_head_sees_the_moments_alone_is_trained_by_itself_and_the_logits_are_averaged(store):
    model, batch = make_model(store, "tower").eval(), batches(store)[0]
    with torch.no_grad():
        logits_SCL = model.logits(batch)
        torch.testing.assert_close(model.score(batch), logits_SCL.mean(0))
        each = [model.loss(logits_CL[None], batch)[0] for logits_CL in logits_SCL]
        torch.testing.assert_close(model(batch)[0], sum(each) / 2)
        model.history.attention.out.weight.mul_(2.0)
        model.history.tower.summary.mix.weight.mul_(2.0)
        changed_SCL = model.logits(batch)
        assert not torch.equal(changed_SCL[0], logits_SCL[0]) and torch.equal(changed_SCL[1], logits_SCL[1])
        model.history.moments.query_rD.mul_(2.0)
        assert not torch.equal(model.logits(batch)[1], logits_SCL[1])


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


def test_untrained_candidates_read_means_of_the_events():
    torch.manual_seed(0)
    history = CausalHistory(
        TowerConfig(width=32, tower="elastic_causal", time="none", dropout=0.0), MemoryConfig(num_keys=8)
    )
    B, N = 20, 50
    events_BND = F.layer_norm(torch.randn(B, 1, 32) + torch.randn(B, N, 32), (32,))
    offsets_B1, times_s_T = torch.arange(B + 1) * N, torch.arange(N).repeat(B)
    output = history.tower(events_BND.flatten(0, 1), offsets_B1, times_s_T, readings=(torch.arange(B), offsets_B1[1:]))
    read_BD = history.attention(output.interests, torch.randn(B, 32), torch.arange(B))
    alike_BB = F.cosine_similarity(read_BD[:, None], events_BND.mean(1)[None], dim=-1)
    assert torch.equal(alike_BB.argmax(1), torch.arange(B)) and alike_BB.diagonal().mean() > 0.6
