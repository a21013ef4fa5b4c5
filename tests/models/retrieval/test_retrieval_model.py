"""The retrieval model end to end on real batches: losses, leaks, and the sharded model against the plain one."""

import copy
import math
from functools import partial

import pytest
import torch
from retrieval import LENGTHS, NUM_GAPS, NUM_ITEMS, make_batch, shard
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from elastic_rec.models.retrieval.model import EventTable, RetrievalModel
from elastic_rec.models.retrieval.softmax import FullSoftmax, SampledSoftmax
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig


def make_model(softmax="full", device=None, memory=True):
    torch.manual_seed(0)
    return RetrievalModel(
        tables=[EventTable("item", NUM_ITEMS), EventTable("gap", NUM_GAPS)],
        tower=TowerConfig(tower="elastic", width=16, experts=4, dropout=0.0),
        memory=MemoryConfig(enabled=memory, num_keys=8, top_r=2),
        softmax=softmax,
        device=device,
    )


@pytest.mark.parametrize("memory", [True, False])
def test_first_loss_is_that_of_a_uniform_guess(memory):
    batch = make_batch(lengths=[30] * 64)
    loss, (query_RD, loss_R, _) = make_model(memory=memory)(batch)
    assert query_RD.shape == (128, 16) and loss_R.shape == (128,) and not loss_R.requires_grad
    assert loss.item() == pytest.approx((batch.weights * loss_R).sum().item() / 128)
    assert (batch.weights * loss_R).sum() / batch.weights.sum() == pytest.approx(math.log(NUM_ITEMS - 2), abs=0.25)


@pytest.mark.parametrize("lengths", [[0, 0], [0, 3], [1]])
@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_odd_batches(lengths, softmax):
    model = make_model(softmax)
    loss, _ = model(make_batch(lengths=lengths, negatives=7 if softmax == "sampled" else 0))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_query_is_scored_by_dot_product_with_the_item_table():
    model, batch = make_model().eval(), make_batch()
    query_RD = model.query(batch)
    items_VD = model.embeddings.embeddings["item"].weight
    wanted_R = (query_RD @ items_VD[2:].T).log_softmax(-1).gather(1, batch.targets[:, None] - 2).neg().squeeze(1)
    torch.testing.assert_close(model(batch)[1][1], wanted_R)
    assert model.encode(batch).interests.shape == (8, 4, 16)


def test_nothing_after_the_cut_changes_a_query():
    """Other items, gaps and times behind every prefix's end, other targets: the same query, bit for bit."""
    model, batch = make_model().eval(), make_batch(seed=3)
    before = model.query(batch)
    after = copy.deepcopy(batch)
    T = sum(LENGTHS)
    inside_T = torch.zeros(T, dtype=torch.bool)
    for start, end in zip(batch.starts.tolist(), batch.ends.tolist(), strict=True):
        inside_T[start:end] = True
    assert 0 < inside_T.sum() < T - 1
    values = after.features.values()
    values[:T] = torch.where(inside_T, values[:T], NUM_ITEMS - 1)
    values[T : 2 * T] = torch.where(inside_T, values[T : 2 * T], NUM_GAPS - 1)
    after.times_s = torch.where(inside_T, after.times_s, 10**9)
    after.targets = after.targets.flip(0)
    assert torch.equal(model.query(after), before)

    shorter = int(torch.argmin(torch.where(batch.ends > batch.starts, batch.ends - batch.starts, 10**6)))
    last = int(batch.ends[shorter]) - 1  # and an event inside does change exactly the prefixes that hold it
    after.features.values()[last] = (after.features.values()[last] - 1) % 100 + 2
    holds_R = (batch.starts <= last) & (last < batch.ends)
    changed_R = (model.query(after) != before).any(1)
    assert torch.equal(changed_R, holds_R) and holds_R.any() and not holds_R.all()


@pytest.mark.parametrize("kind", ["elastic", "elastic_causal"])
def test_the_time_of_the_query_moves_the_query_only_where_it_was_asked_for(kind):
    batch = make_batch()
    later = copy.copy(batch)
    later.query_gap_s = batch.query_gap_s + 10**7
    for time in ("none", "past", "query"):
        torch.manual_seed(0)
        tower = TowerConfig(width=16, experts=4, dropout=0.0, tower=kind, time=time)
        tables = [EventTable("item", NUM_ITEMS), EventTable("gap", NUM_GAPS)]
        model = RetrievalModel(tables=tables, tower=tower, memory=MemoryConfig(num_keys=8)).eval()
        if time == "query":
            torch.nn.init.normal_(model.head.time.by_gap)
        assert torch.equal(model.query(batch), model.query(later)) is (time != "query")
        assert torch.equal(
            model.encode(batch).user_embedding, model.encode(later).user_embedding
        )  # a state holds no query's time


def softmax_inputs(R=6, V=30, D=8):
    g = torch.Generator().manual_seed(0)
    query_RD, items_VD = torch.randn(R, D, generator=g), torch.randn(V, D, generator=g)
    return query_RD, items_VD, torch.randint(2, V, (R,), generator=g)


def test_sampled_softmax_over_all_items_is_the_full_softmax():
    query_RD, items_VD, targets_R = (t.requires_grad_(t.is_floating_point()) for t in softmax_inputs())
    ids_C = torch.cat([torch.arange(2, 30), targets_R])
    weights_R = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])
    full = FullSoftmax()(query_RD, items_VD[2:], torch.arange(2, 30), targets_R, torch.zeros(28), weights_R)
    sampled = SampledSoftmax()(query_RD, items_VD[ids_C], ids_C, targets_R, torch.zeros(34), weights_R)
    torch.testing.assert_close(sampled, full)
    torch.testing.assert_close(full[0], (weights_R * full[1]).sum())
    for got, want in zip(*(torch.autograd.grad(x[0], (query_RD, items_VD)) for x in (sampled, full)), strict=True):
        torch.testing.assert_close(got, want)


def test_log_q_makes_an_uneven_sampler_unbiased():
    """Expected exp(loss) is the full softmax's partition sum over the target's share, whatever the sampler favours."""
    query_RD, items_VD, targets_R = softmax_inputs()
    query_RD = query_RD * 0.3
    ones_R = torch.ones(6)
    full_R = FullSoftmax()(query_RD, items_VD[2:], torch.arange(2, 30), targets_R, torch.zeros(28), ones_R)[1].exp()
    g, S, draws = torch.Generator().manual_seed(1), 64, 400
    p_V = torch.arange(28, 0, -1).float() / torch.arange(29).sum()
    corrected, plain = [], []
    for _ in range(draws):
        drawn_S = torch.multinomial(p_V, S, replacement=True, generator=g)
        ids_C = torch.cat([drawn_S + 2, targets_R])
        log_q_C = torch.cat([(S * p_V[drawn_S]).log(), torch.zeros(6)])
        for losses, log_q in ((corrected, log_q_C), (plain, 0 * log_q_C + math.log(S / 28))):
            loss_R = SampledSoftmax()(query_RD, items_VD[ids_C], ids_C, targets_R, log_q, ones_R)[1]
            losses.append(loss_R.exp())
    corrected, plain = torch.stack(corrected), torch.stack(plain)
    error_R = corrected.std(0) / draws**0.5
    assert ((corrected.mean(0) - full_R).abs() < 4 * error_R).all()
    assert ((plain.mean(0) - full_R).abs() > 4 * error_R).any()  # a uniform correction would be seen


def test_accidental_hits_count_nothing():
    query_RD, items_VD, targets_R = softmax_inputs()
    negatives_S = torch.tensor([3, 7, 11])
    targets_R[:] = 5
    loss = partial(SampledSoftmax(), weights_R=torch.ones(6))
    ids_C = torch.cat([negatives_S, targets_R])
    want = loss(query_RD, items_VD[ids_C], ids_C, targets_R, torch.zeros(9))
    with_hit_C = torch.cat([torch.tensor([5, 5]), ids_C])
    got = loss(query_RD, items_VD[with_hit_C], with_hit_C, targets_R, torch.zeros(11))
    torch.testing.assert_close(got, want)
    only_hits_C = torch.cat([torch.tensor([5]), targets_R])  # no negative is left: certainty, not NaN
    only = loss(query_RD, items_VD[only_hits_C], only_hits_C, targets_R, torch.zeros(7))
    torch.testing.assert_close(only[1], torch.zeros(6))


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="at least one negative"):
        make_model("sampled")(make_batch(negatives=0, lengths=[60] * 50))  # 100 candidates, 100 rows
    with pytest.raises(ValueError, match="put 'item' first"):
        RetrievalModel(tables=[EventTable("gap", 3)], tower=TowerConfig(), memory=MemoryConfig())
    with pytest.raises(ValueError, match="nosuch"):
        make_model("nosuch")


@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_sharded_and_pipelined_equals_plain(gloo, softmax):
    plain = make_model(softmax)
    sharded, optimizer = shard(copy.deepcopy(plain))
    batches = [make_batch(seed, negatives=9 if softmax == "sampled" else 0) for seed in range(4)]
    pipeline, stream = TrainPipelineSparseDist(sharded, optimizer, torch.device("cpu")), iter(batches)
    pipelined = [pipeline.progress(stream) for _ in batches]

    tables = {n: p for n, p in plain.named_parameters() if "embeddings." in n}
    assert len(tables) == 3
    optimizers = [
        RowWiseAdagrad([p for n, p in tables.items() if "bank" not in n], lr=0.1, eps=1e-8),
        RowWiseAdagrad([p for n, p in tables.items() if "bank" in n], lr=0.5, eps=1e-8),
        torch.optim.AdamW([p for n, p in plain.named_parameters() if n not in tables], lr=1e-3),
    ]
    losses = []
    for batch, (query_RD, loss_R, sharded_loss) in zip(batches, pipelined, strict=True):
        loss, (plain_query_RD, plain_loss_R, _) = plain(batch)
        assert sharded_loss.item() == pytest.approx(loss.item(), rel=1e-4)
        torch.testing.assert_close(query_RD, plain_query_RD, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss_R, plain_loss_R, rtol=1e-4, atol=1e-5)
        losses.append(loss.item())
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o in optimizers:
            o.step()
    assert len(pipeline._pipelined_modules) == 1  # the event tables' lookup is fetched ahead; the bank's can't be
    assert len(set(losses)) == 4


def test_tables_made_on_meta_train(gloo):
    model = make_model(device="meta")
    assert {n for n, p in model.named_parameters() if p.is_meta} == {
        f"{path}.weight" for path in ("embeddings.embeddings.item", "embeddings.embeddings.gap")
    } | {"tower.memory.bank.embeddings.bank.weight"}
    sharded, optimizer = shard(model)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, _ = sharded(make_batch())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
