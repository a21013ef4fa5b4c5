"""The causal tower: its formulas, causality to the bit, what it allocates, and training it sharded."""

import copy
import math

import pytest
import torch
from retrieval import make_batch, shard
from torch.nn import functional as F
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from towers import LENGTHS, Allocations, C, D, H, K, events, every_batch, make_tower

from elastic_rec.models.ops.causal_lda import chunks as chunks_module
from elastic_rec.models.ops.causal_lda import reference
from elastic_rec.models.retrieval.model import EventTable, RetrievalModel
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.causal_tower import CausalTower
from elastic_rec.models.towers.elastic.recency import age_bucket
from elastic_rec.models.towers.elastic.tower import ElasticTower


def by_definition(tower, tokens_TD, offsets_B1, times_s_T):
    """The formulas of causal_layer.py, on the event-by-event ops."""
    first_T = torch.zeros(len(tokens_TD), dtype=torch.bool)
    first_T[offsets_B1[:-1][offsets_B1.diff() > 0]] = True
    bucket_T = age_bucket(times_s_T.diff(prepend=times_s_T[:1])).masked_fill(first_T, len(tower.gap.gap) - 1)
    x_TD, experts_RKD, d = tokens_TD + tower.gap.gap[bucket_T], None, D // H
    for number, layer in enumerate(tower.stack.layers):
        fold = tower.first if number == 0 else tower.stack.aggregates[number - 1]
        query, key, value = fold.qkv(F.layer_norm(x_TD, (D,), fold.norm.weight, fold.norm.bias)).chunk(3, dim=1)
        query, key, value = (t.reshape(-1, H, d) for t in (query, key, value))
        rate_HK = (math.log(2) / fold.log_half_life_K.exp()).expand(H, K)
        sums = reference.aggregate(fold.ask_HKd / d**0.5, key, value, times_s_T, rate_HK, offsets_B1, C)
        mean_RKD = torch.nan_to_num(sums.sum_RHKe / sums.norm_RHK.clamp_min(1e-30)[..., None])
        mean_RKD = mean_RKD.transpose(1, 2).flatten(2)
        if experts_RKD is None and tower.memory is None:
            experts_RKD = tower.seeds.seeds_KD.expand_as(mean_RKD)
        elif experts_RKD is None:
            choose = tower.memory.select
            chosen = choose.choose(mean_RKD, choose.seeds.seeds_KD.expand_as(mean_RKD), torch.ones(len(mean_RKD)))
            bank = (
                tower.memory.bank.embeddings["bank"].weight[chosen.features.values()].view(*chosen.weights_BKS.shape, D)
            )
            experts_RKD = chosen.seeds_BKD + (chosen.weights_BKS[..., None] * bank).sum(2)
        experts_RKD = experts_RKD + layer.mix(mean_RKD)
        experts_RKD = experts_RKD + layer.expert_ffn(experts_RKD)
        expert_key, expert_value = layer.expert_key_value(layer.norm_experts(experts_RKD)).chunk(2, dim=-1)
        expert_key, expert_value = (t.reshape(-1, K, H, d).transpose(1, 2) for t in (expert_key, expert_value))
        read_THd = reference.dispatch(
            query / d**0.5, expert_key, expert_value, key, value, layer.bias_HW, offsets_B1, C
        )
        x_TD = x_TD + layer.out(read_THd.flatten(1))
        x_TD = x_TD + layer.token_ffn(x_TD)
    return tower.summary.mix(tower.summary.norm(x_TD))


@pytest.mark.parametrize("memory", [True, False])
def test_equals_the_formulas_with_gradients(memory):
    tower = make_tower(memory=memory, layers=3).double()
    torch.nn.init.normal_(tower.stack.layers[0].bias_HW)
    tokens_TD, offsets_B1, times_s_T = events(LENGTHS, dtype=torch.float64)
    leaves = [tokens_TD.requires_grad_(True), *tower.parameters()]
    mine = tower(tokens_TD, offsets_B1, times_s_T).tokens
    definition = by_definition(tower, tokens_TD, offsets_B1, times_s_T)
    torch.testing.assert_close(mine, definition, rtol=1e-9, atol=1e-11)
    probe = torch.randn_like(mine)
    for leaf, got, want in zip(
        leaves,
        torch.autograd.grad((mine * probe).sum(), leaves),
        torch.autograd.grad((definition * probe).sum(), leaves),
        strict=True,
    ):
        assert want.abs().sum() > 0
        digits = 1e-6 if leaf.shape == (64, D) else 1e-10  # TorchRec's tables give float32, whatever they hold
        torch.testing.assert_close(got, want, rtol=1e-7, atol=digits * want.abs().max().item())


@pytest.mark.parametrize("memory", [True, False])
def test_later_events_change_no_bit(memory):
    """Content, time and number of all later events of a user, and another user: the same outputs, bit for bit.

    Of their number: as long as a batch has a dozen events; MKL multiplies matrices of fewer rows in another order."""
    tower = make_tower(memory=memory, layers=3).eval()
    lengths = [40, 37]
    tokens_TD, offsets_B1, times_s_T = events(lengths)
    before = tower(tokens_TD, offsets_B1, times_s_T).tokens
    for t in range(40, 77):
        later_TD, later_T = tokens_TD.clone(), times_s_T.clone()
        later_TD[t + 1 :] = 9 - 100 * later_TD[t + 1 :]
        later_T[t + 1 :] += 10**8
        after = tower(later_TD, offsets_B1, later_T).tokens
        assert torch.equal(after[: t + 1], before[: t + 1]) and (t == 76 or not torch.equal(after, before))
        cut = tower(tokens_TD[: t + 1], torch.tensor([0, 40, t + 1]), times_s_T[: t + 1])
        assert torch.equal(cut.tokens, before[: t + 1])
        assert torch.equal(cut.user_embedding[1], before[t])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("lengths", [LENGTHS, [0], [0, 0, 3 * C]])
def test_newest_events_only_are_the_same_for_less(lengths, layers):
    """all_positions=False: the same embeddings, interests and gradients; the last layer's hardly cost anything."""
    tower, batch = make_tower(layers=layers), events(lengths)
    results = []
    for all_positions in (True, False):
        batch[0].grad = None
        tower.zero_grad()
        out = tower(batch[0].requires_grad_(True), *batch[1:], all_positions=all_positions)
        assert (out.tokens is None) == (not all_positions)
        (
            out.user_embedding.square().mul(torch.arange(D)).sum() + out.interests.square().mul(torch.arange(D)).sum()
        ).backward()
        results.append([out.user_embedding, out.interests, batch[0].grad, *(p.grad for p in tower.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-5 * max(want.abs().max().item(), 1) if want.numel() else 0
        )


def test_earlier_events_do_change_it():
    """Through the window, and beyond it through the experts alone; without half-lives only gaps of the window count."""
    tower = make_tower(layers=1).eval()
    tokens_TD, offsets_B1, times_s_T = events([37])
    before = tower(tokens_TD, offsets_B1, times_s_T).tokens
    tokens_TD[0] *= -1
    changed = (tower(tokens_TD, offsets_B1, times_s_T).tokens != before).any(1)
    assert changed[: 2 * C].all() and changed[2 * C :].any()  # one layer: its window ends, experts go on
    assert not torch.equal(tower(tokens_TD, offsets_B1, times_s_T * 3).tokens, before)


def test_slots_of_a_chunk_are_asked_for_by_the_chunks_before():
    tower = make_tower()
    asked = []
    tower.memory.select.register_forward_hook(lambda m, i, selection: asked.append(selection.features.values()))
    tokens_TD, offsets_B1, times_s_T = events([5 * C])
    tower(tokens_TD, offsets_B1, times_s_T).tokens.sum().backward()
    other_TD = tokens_TD.clone()
    other_TD[2 * C :] *= -1
    tower(other_TD, offsets_B1, times_s_T)
    before, after = (ids.view(6, -1) for ids in asked)  # boundary r is the start of chunk r
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] != after[3:]).any(1).all()
    rows = tower.memory.bank.embeddings["bank"].weight.grad.abs().sum(1) > 0
    assert rows.nonzero().squeeze(1).tolist() == before[:5].unique().tolist()  # the last boundary: no event's business
    assert tower.memory.usage()["share"] > 0


@pytest.mark.parametrize("memory", [True, False])
def test_neighbours_change_nothing(memory):
    tower = make_tower(memory=memory).eval()
    tokens_TD, offsets_B1, times_s_T = events(LENGTHS)
    out = tower(tokens_TD, offsets_B1, times_s_T)
    start = int(offsets_B1[-2])
    alone = tower(tokens_TD[start:], torch.tensor([0, 37]), times_s_T[start:])
    tokens_TD[:start] = torch.nan
    beside_nan = tower(tokens_TD, offsets_B1, times_s_T)
    for got in (alone, beside_nan):
        torch.testing.assert_close(got.tokens[-37:], out.tokens[start:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.interests[-1], out.interests[-1], rtol=1e-6, atol=1e-6)
        assert torch.equal(got.user_embedding[-1], got.tokens[-1])


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 5, 0], [1], [0], [0, 0]])
def test_every_parameter_has_a_gradient_in_every_batch(lengths, memory):
    """From the user embedding alone, as the retrieval head uses it: DDP waits for parameters that are left out."""
    tower = make_tower(memory=memory, dropout=0.1)
    tokens_TD, offsets_B1, times_s_T = events(lengths)
    out = tower(tokens_TD.requires_grad_(True), offsets_B1, times_s_T)
    assert out.interests.shape == (len(lengths), K, D) and out.user_embedding.shape == (len(lengths), D)
    assert out.tokens.shape == tokens_TD.shape
    out.user_embedding.square().mul(torch.arange(D)).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert lengths is not LENGTHS or parameter.grad.abs().sum() > 0, name
    assert tokens_TD.grad.isfinite().all()


def saved_numbers(tower, lengths):
    tokens_TD, offsets_B1, times_s_T = events(lengths)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / 4
        return tensor

    with Allocations() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = tower(tokens_TD.requires_grad_(True), offsets_B1, times_s_T)
        out.tokens.sum().backward()
    return sum(storages.values()), seen


def test_activations_are_linear_in_events():
    """T·D and R·K·D times a small number per layer; nothing [B, longest], nothing of all windows' scores."""
    tower = make_tower(chunk=32)
    (small, _), (large, _) = saved_numbers(tower, [1024, 1024]), saved_numbers(tower, [4096, 4096])
    per_event = (large - small) / (8192 - 2048)
    assert per_event <= 2 * (20 * D + 24 * K * D / 32), per_event
    ragged, seen = saved_numbers(tower, [1] * 31 + [8192] + [1] * 32)
    T, R, block_scores = 8255, 8192 // 32 + 63 + 64, chunks_module.BLOCK_EVENTS * H * (K + 64)
    assert seen.largest <= max(3 * T * D, 2 * R * K * D, block_scores) < 64 * 8192 * 2, seen.shape
    assert ragged < large * 1.5


def make_model(kind, every_position=False):
    torch.manual_seed(0)
    return RetrievalModel(
        tables=[EventTable("item", 102), EventTable("gap", 40)],
        tower=TowerConfig(width=16, experts=4, dropout=0.0, tower=kind, chunk=8),
        memory=MemoryConfig(num_keys=8, top_r=2),
        every_position=every_position,
    )


def test_the_retrieval_model_takes_either_tower():
    causal, paper = make_model("elastic_causal"), make_model("elastic")
    assert isinstance(causal.tower, CausalTower) and isinstance(paper.tower, ElasticTower)
    batch = make_batch()
    for model in (causal, paper):
        assert model.eval().encode(batch).tokens is None
        assert model(batch)[0].isfinite()
    with pytest.raises(ValueError, match=r"model\.tower=elastic trains on the answer"):
        make_model("elastic", every_position=True)
    with pytest.raises(ValueError, match=r"set model\.tower=elastic_causal"):
        paper.tower(torch.zeros(1, 16), torch.tensor([0, 1]), torch.zeros(1, dtype=torch.int64), all_positions=True)


def test_a_loss_at_every_position_is_that_of_each_prefix():
    """The query at an event is that of the prefix which ends there; the loss is their weighted mean."""
    model, batch = make_model("elastic_causal", every_position=True), every_batch()
    loss, (query_PD, loss_P, _) = model(batch)
    assert loss.item() == pytest.approx((loss_P * batch.weights).sum().item() / batch.weights.sum().item())
    starts_P = torch.repeat_interleave(batch.starts, batch.ends - batch.starts)
    first_P = torch.repeat_interleave(
        (batch.ends - batch.starts).cumsum(0) - (batch.ends - batch.starts), batch.ends - batch.starts
    )
    single = copy.copy(batch)
    single.starts, single.ends = starts_P, starts_P + torch.arange(len(starts_P)) - first_P + 1
    model.eval()
    torch.testing.assert_close(query_PD, model.query(single), rtol=1e-5, atol=1e-6)
    lengths_R = batch.ends - batch.starts
    ends_R = lengths_R.cumsum(0)[lengths_R > 0] - 1
    torch.testing.assert_close(query_PD[ends_R], model.query(batch)[lengths_R > 0], rtol=1e-5, atol=1e-6)


def test_autocast_to_bfloat16_trains_and_stays_near():
    tower, batch = make_tower(memory=False), events(LENGTHS)
    exact = tower(*batch).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tower(*batch).tokens
    assert (got - exact).abs().max() < 0.05 * exact.abs().max()
    got.float().square().mul(torch.arange(D)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in tower.parameters())


@pytest.mark.parametrize("every_position", [True, False])
def test_sharded_and_pipelined_equals_plain(gloo, every_position):
    plain = make_model("elastic_causal", every_position)
    sharded, optimizer = shard(copy.deepcopy(plain))
    batches = [every_batch(seed) if every_position else make_batch(seed) for seed in range(4)]
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
    for batch, (query_RD, _, sharded_loss) in zip(batches, pipelined, strict=True):
        loss, (plain_query_RD, *_) = plain(batch)
        assert sharded_loss.item() == pytest.approx(loss.item(), rel=1e-4)
        torch.testing.assert_close(query_RD, plain_query_RD, rtol=1e-4, atol=1e-5)
        losses.append(loss.item())
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o in optimizers:
            o.step()
    assert len(pipeline._pipelined_modules) == 1
    assert len(set(losses)) == 4


def test_it_learns_what_happened_long_ago():
    """Planted: the first of 64 events decides; two layers of windows reach back 32 events, so experts must carry it."""
    tower, head = make_tower(memory=False, half_life=False, chunk=8), torch.nn.Linear(D, 2)
    optimizer = torch.optim.Adam([*tower.parameters(), *head.parameters()], lr=0.01)
    g = torch.Generator().manual_seed(0)
    offsets_B1, times_s_T = torch.arange(33) * 64, torch.arange(32 * 64)
    marks, right = torch.randn(2, D // 2, generator=g), []
    for _ in range(80):
        answer_B = torch.randint(0, 2, (32,), generator=g)
        tokens_BND = torch.zeros(32, 64, D)
        tokens_BND[:, 1:, : D // 2] = torch.randn(32, 63, D // 2, generator=g)
        tokens_BND[:, 0, D // 2 :] = marks[answer_B]
        logits = head(tower(tokens_BND.flatten(0, 1), offsets_B1, times_s_T).user_embedding)
        loss = F.cross_entropy(logits, answer_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((logits.argmax(1) == answer_B).float().mean().item())  # of users never seen before
    assert sum(right[:10]) / 10 < 0.7 and sum(right[-10:]) / 10 > 0.95, right
