"""SASRec against its definition, one event at a time in float64; no leak between users or from the future."""

import pytest
import torch

from elastic_rec.models.towers.config import TowerConfig
from elastic_rec.models.towers.sasrec import Groups, Sasrec, naive, sdpa

D, H, LENGTHS = 12, 3, [5, 0, 1, 64, 7, 1, 33]


def make(attention=sdpa, *, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    config = TowerConfig(width=D, heads=H, layers=2, ffn_multiple=2, dropout=dropout)
    return Sasrec(config, max_history=64, attention=attention).to(dtype)


def events(lengths, dtype=torch.float64, seed=0):
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
    T = int(offsets_B1[-1])
    tokens_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return tokens_TD, offsets_B1, torch.arange(T)


def definition(model, tokens_TD, offsets_B1):
    """Outputs (T, D) and summaries (B, D), by loops over users, blocks, events and heads."""
    d, outputs, summaries = D // H, [], []
    for start, end in zip(offsets_B1[:-1].tolist(), offsets_B1[1:].tolist(), strict=True):
        n = end - start
        if n == 0:
            summaries.append(torch.zeros(D, dtype=tokens_TD.dtype))
            continue
        x = [tokens_TD[start + i] + model.position[n - 1 - i] for i in range(n)]
        for block in model.blocks:
            q, k, v = zip(*(block.qkv(block.norm(x_i)).split(D) for x_i in x), strict=True)
            y = []
            for i in range(n):
                heads = []
                for h in range(H):
                    part = slice(h * d, (h + 1) * d)
                    scores = torch.stack([q[i][part] @ k[j][part] / d**0.5 for j in range(i + 1)])
                    weights = scores.exp() / scores.exp().sum()
                    heads.append(sum(weights[j] * v[j][part] for j in range(i + 1)))
                mid = x[i] + block.out(torch.cat(heads))
                y.append(mid + block.ffn(mid))
            x = y
        outputs += [model.norm(x_i) for x_i in x]
        summaries.append(outputs[-1])
    return torch.stack(outputs), torch.stack(summaries)


def gradients(model, outputs, tokens_TD):
    weighted = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)
    names = [*dict(model.named_parameters()), "tokens"]
    return dict(zip(names, torch.autograd.grad(weighted, [*model.parameters(), tokens_TD]), strict=True))


@pytest.mark.parametrize("attention", [sdpa, naive])
def test_outputs_and_gradients_follow_the_definition(attention):
    model = make(attention)
    tokens_TD, *rest = events(LENGTHS)
    tokens_TD.requires_grad_(True)
    want = definition(model, tokens_TD, rest[0])
    got = model(tokens_TD, *rest)
    torch.testing.assert_close((got.tokens, got.user_embedding), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.interests[:, 0], want[1], rtol=1e-10, atol=1e-10)
    expected = gradients(model, want, tokens_TD)
    for name, grad in gradients(model, (got.tokens, got.user_embedding), tokens_TD).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("attention", [sdpa, naive])
@pytest.mark.parametrize("lengths", [LENGTHS, [40], [8, 8, 8], [0, 3]])
def test_the_newest_event_alone_is_the_same_user_embedding(attention, lengths):
    model = make(attention)
    tokens_TD, *rest = events(lengths)
    tokens_TD.requires_grad_(True)
    all_outputs, newest = model(tokens_TD, *rest), model(tokens_TD, *rest, all_positions=False)
    assert newest.tokens is None
    torch.testing.assert_close(newest.user_embedding, all_outputs.user_embedding, rtol=1e-10, atol=1e-10)
    expected = gradients(model, [all_outputs.user_embedding], tokens_TD)
    for name, grad in gradients(model, [newest.user_embedding], tokens_TD).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_float32_errs_like_float32():
    """The fused kernel runs in float32 only; allowed is ten times what writing the scores out errs."""
    batch64, batch32 = events(LENGTHS), events(LENGTHS, torch.float32)
    judge = make()(*batch64).tokens
    error = (make(dtype=torch.float32)(*batch32).tokens - judge).abs().max()
    allowed = 10 * (make(naive, dtype=torch.float32)(*batch32).tokens - judge).abs().max()
    assert 0 < error <= allowed


@pytest.mark.parametrize("all_positions", [True, False])
def test_users_do_not_see_each_other(all_positions):
    """Another user's NaN and absence change nothing, and no gradient reaches another user."""
    model = make(dtype=torch.float32)
    tokens_TD, offsets_B1, times_s_T = events(LENGTHS, torch.float32)
    out = model(tokens_TD, offsets_B1, times_s_T, all_positions=all_positions)
    start, end = int(offsets_B1[3]), int(offsets_B1[4])
    strangers = torch.full_like(tokens_TD, torch.nan)
    strangers[start:end] = tokens_TD[start:end]
    beside_nan = model(strangers, offsets_B1, times_s_T, all_positions=all_positions)
    torch.testing.assert_close(beside_nan.user_embedding[3], out.user_embedding[3], rtol=1e-6, atol=1e-6)
    assert beside_nan.user_embedding[0].isnan().all()  # the NaN did reach those it belongs to
    alone = model(
        tokens_TD[start:end], torch.tensor([0, end - start]), times_s_T[start:end], all_positions=all_positions
    )
    torch.testing.assert_close(alone.user_embedding[0], out.user_embedding[3], rtol=1e-5, atol=1e-5)
    # Gradients, too: user 3's embedding pulls on user 3's events only.
    tokens_TD.requires_grad_(True)
    model(tokens_TD, offsets_B1, times_s_T, all_positions=all_positions).user_embedding[3].square().sum().backward()
    touched = tokens_TD.grad.abs().sum(1) > 0
    assert touched[start:end].all() and touched.sum() == end - start


def test_the_future_changes_nothing():
    model = make(dtype=torch.float32)
    tokens_TD, offsets_B1, times_s_T = events([40], torch.float32)
    changed = tokens_TD.clone()
    changed[25:] = torch.randn(15, D)
    before, after = (model(x, offsets_B1, times_s_T).tokens for x in (tokens_TD, changed))
    assert torch.equal(before[:25], after[:25])
    assert not torch.equal(before[25:], after[25:])
    stretched = model(tokens_TD.flip(0), offsets_B1, times_s_T).user_embedding
    assert not torch.allclose(stretched, before[-1:])  # the order of events matters


@pytest.mark.parametrize("lengths", [[0, 0], [0]])
@pytest.mark.parametrize("all_positions", [True, False])
def test_no_events_at_all(lengths, all_positions):
    out = make()(*events(lengths), all_positions=all_positions)
    assert torch.equal(out.user_embedding, torch.zeros(len(lengths), D, dtype=torch.float64))


def test_padding_stays_under_half():
    lengths = torch.randint(0, 300, (500,), generator=torch.Generator().manual_seed(0))
    groups = Groups.build(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
    assert groups.token_S.numel() < 2 * lengths.sum()
    assert len(groups.shapes) <= 10
    torch.testing.assert_close(groups.token_S[groups.slot_T], torch.arange(int(lengths.sum())))
    assert Groups.build(torch.tensor([0, 4, 8])).plain and not groups.plain


def test_dropout_is_on_in_training_only():
    model, batch = make(dropout=0.5), events([9])
    assert not torch.equal(model(*batch).user_embedding, model(*batch).user_embedding)
    model.eval()
    assert torch.equal(model(*batch).user_embedding, model(*batch).user_embedding)


def test_a_history_beyond_its_positions_is_refused():
    with pytest.raises(ValueError, match=r"a history of 65 events, but .* positions for 64: give .*data.max_history"):
        make()(*events([65]))
    with pytest.raises(ValueError, match=r"no multiple of model.heads=3: set model.width=63"):
        TowerConfig(tower="sasrec", width=64, heads=3)


@pytest.mark.parametrize("lengths", [[64], [7, 64, 12]])
def test_the_fused_kernel_is_taken(lengths):
    """The baseline of every speed figure: torch would fall back to N x N scores without a word."""
    model = make(dtype=torch.float32)
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
    tokens_TD = torch.randn(sum(lengths), D, requires_grad=True)
    with torch.profiler.profile() as seen:
        model(tokens_TD, offsets_B1, torch.zeros(sum(lengths), dtype=torch.int64)).tokens.sum().backward()
    calls = {event.key: event.count for event in seen.key_averages()}
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    groups = len(Groups.build(offsets_B1).shapes)
    assert calls[kernel] == calls[f"{kernel}_backward"] == groups * len(model.blocks)
    assert "aten::_scaled_dot_product_attention_math" not in calls
