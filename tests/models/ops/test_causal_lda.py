"""Causal LDA against its event-by-event definition: outputs, every gradient, edges, long histories, causality."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_rec.models.ops.causal_lda import Chunks, Partial, causal_aggregate, causal_dispatch, combine, reference
from elastic_rec.models.ops.causal_lda import chunks as chunks_module

C = 8
LENGTHS = [0, 1, C - 1, C, C + 1, 2 * C + 1, 257, 0, 3]
H, K, d = 2, 3, 5


def chunks_of(lengths, chunk=C):
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
    return Chunks.build(offsets_B1, int(offsets_B1[-1]), chunk)


def inputs(lengths, *, seed=0, dtype=torch.float64, longest_gap_s=100_000, chunk=C):
    """Arguments of aggregate, and the further ones of dispatch. Half-lives from minutes to years."""
    g = torch.Generator().manual_seed(seed)
    T, R = sum(lengths), chunks_of(lengths, chunk).num_boundaries

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    times_s_T = 1_700_000_000 + torch.randint(0, longest_gap_s, (T,), generator=g).cumsum(0)
    half_lives_K = torch.logspace(2.5, 8, K, dtype=torch.float64)
    rate_HK = (math.log(2) / half_lives_K).expand(H, K).clone().to(dtype)
    return (
        [draw(H, K, d), draw(T, 3, H, d), times_s_T, rate_HK],
        [draw(R, K, 2, H, d), draw(H, 2 * chunk)],
    )


def scaled(partial):
    """The mean and the log of the total weight: what doesn't depend on which maximum a form took off."""
    return partial.mean(), partial.max_RHK + partial.norm_RHK.double().log()


def aggregate_by_definition(ask, qkv, times_s_T, rate, chunks):
    return reference.aggregate(ask, qkv[:, 1], qkv[:, 2], times_s_T, rate, chunks.tiles.offsets_B1, chunks.chunk)


def dispatch_by_definition(qkv, experts, bias, chunks):
    expert_key, expert_value = experts.permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(1)
    return reference.dispatch(query, expert_key, expert_value, key, value, bias, chunks.tiles.offsets_B1, chunks.chunk)


def gradients(out, leaves, seed=1):
    g = torch.Generator().manual_seed(seed)
    probe = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * probe).sum(), leaves)


@pytest.mark.parametrize("lengths", [LENGTHS, [7 * C]])  # [7 * C]: no padding anywhere
@pytest.mark.parametrize("block", [2 * C, 128 * C])  # 2 * C: users and windows straddle blocks
def test_aggregate_equals_the_recurrence(block, lengths, monkeypatch):
    monkeypatch.setattr(chunks_module, "BLOCK_EVENTS", block)
    chunks = chunks_of(lengths)
    (ask, qkv, times_s_T, rate), _ = inputs(lengths)
    leaves = [t.requires_grad_(True) for t in (ask, qkv, rate)]
    fast = causal_aggregate(ask, qkv, times_s_T, rate, chunks)
    slow = aggregate_by_definition(ask, qkv, times_s_T, rate, chunks)
    assert torch.equal(fast.clock_R, slow.clock_R)
    for got, want in zip(scaled(fast), scaled(slow), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for got, want in zip(gradients(fast.mean(), leaves), gradients(slow.mean(), leaves), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * want.abs().max().item())


@pytest.mark.parametrize("lengths", [LENGTHS, [7 * C]])
@pytest.mark.parametrize("block", [1, 2 * C, 128 * C])
def test_dispatch_equals_the_definition(block, lengths, monkeypatch):
    monkeypatch.setattr(chunks_module, "BLOCK_EVENTS", block)
    chunks = chunks_of(lengths)
    (_, qkv, *_), (experts, bias) = inputs(lengths)
    leaves = [t.requires_grad_(True) for t in (qkv, experts, bias)]
    fast = causal_dispatch(*leaves, chunks)
    slow = dispatch_by_definition(*leaves, chunks)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for got, want in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 40.0])  # 40: scores near 200, where exp overflows unless a maximum is taken off
def test_float32_errs_no_more_than_float32_itself(scale):
    """Allowed: 8 times the error that rounding the inputs' products to float32 makes in the definition."""
    chunks = chunks_of(LENGTHS)
    (ask, qkv, times_s_T, rate), (experts, bias) = inputs(LENGTHS, dtype=torch.float32)
    ask, qkv = ask * scale, qkv * torch.tensor([scale, 1, 1])[:, None, None]
    fast = causal_aggregate(ask, qkv, times_s_T, rate, chunks).mean()
    slow = aggregate_by_definition(ask, qkv, times_s_T, rate, chunks).mean()
    assert (fast - slow).abs().max() <= 8 * scale * 2**-23 * slow.abs().max() * math.sqrt(d)
    arguments = (qkv, experts, bias)
    exact = dispatch_by_definition(*(t.double() for t in arguments), chunks)
    own = dispatch_by_definition(*arguments, chunks)
    assert (causal_dispatch(*arguments, chunks) - exact).abs().max() <= 8 * (own - exact).abs().max()


@pytest.mark.parametrize("times", ["dense", "sparse", "none"])
def test_50000_events_in_float32(times):
    """To 1e-5 of the float64 recurrence, however short or long the half-lives are against the history."""
    lengths, chunk = [50_000, 1_000], 32
    longest_gap_s = {"dense": 10, "sparse": 1_000_000, "none": 10}[times]
    (ask, qkv, times_s_T, rate), _ = inputs(lengths, dtype=torch.float32, longest_gap_s=longest_gap_s, chunk=chunk)
    rate = rate * (times != "none")
    chunks = chunks_of(lengths, chunk)
    fast = causal_aggregate(ask, qkv, times_s_T, rate, chunks)
    slow = aggregate_by_definition(ask, qkv, times_s_T, rate, chunks)
    error = (fast.mean() - slow.mean()).abs().max() / slow.mean().abs().max()
    weight = (scaled(fast)[1] - scaled(slow)[1])[fast.norm_RHK > 0].abs().max()
    print(f"{times}: {error:.1e} of the largest mean, log of the total weight off by {weight:.1e}")
    assert error <= 1e-5 and weight <= 1e-5


def pieces_of(ask, qkv, times_s_T, rate, cuts):
    """Partials of adjacent stretches of one user, and the partial of all of it."""

    def whole(a, b):
        chunks = chunks_of([b - a])
        row = causal_aggregate(ask, qkv[a:b], times_s_T[a:b], rate, chunks)
        return row.rows(chunks.end_B)

    return [whole(a, b) for a, b in itertools.pairwise(cuts)], whole(cuts[0], cuts[-1])


def test_partials_combine_in_any_grouping():
    (*arguments, rate), _ = inputs([60])
    parts, whole = pieces_of(*arguments, rate, [0, 1, 9, 9, 25, 60])

    def groupings(parts):
        if len(parts) == 1:
            yield parts[0]
        for i in range(1, len(parts)):
            for left, right in itertools.product(groupings(parts[:i]), groupings(parts[i:])):
                yield combine(left, right, rate)

    found = list(groupings(parts))
    assert len(found) == 14  # Catalan number: all binary trees over 5 stretches, one of them empty
    for partial in found:
        assert torch.equal(partial.clock_R, whole.clock_R)
        for got, want in zip(scaled(partial), scaled(whole), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    still = combine(parts[3], parts[4], 0 * rate)
    assert not torch.allclose(still.mean(), combine(parts[3], parts[4], rate).mean())  # the gap between them counts


def test_start_continues_at_a_chunk():
    """[first 3 chunks] then the rest from their partial, for several users at once = all in one go, gradients too."""
    lengths, cut = [5 * C + 3, 3 * C, 0, 3 * C + 1], 3 * C
    (ask, qkv, times_s_T, rate), _ = inputs(lengths)
    leaves = [t.requires_grad_(True) for t in (ask, qkv, rate)]
    chunks = chunks_of(lengths)
    one = causal_aggregate(ask, qkv, times_s_T, rate, chunks).rows(chunks.end_B).mean()
    events = [range(o, o + n) for o, n in zip([0, *itertools.accumulate(lengths)], lengths, strict=False)]
    rows = [[i for r in events for i in r[:cut]], [i for r in events for i in r[cut:]]]
    state = None
    for index in rows:
        sizes = [sum(i in r for i in index) for r in events]
        part = chunks_of(sizes)
        state = causal_aggregate(ask, qkv[index], times_s_T[index], rate, part, state).rows(part.end_B)
    torch.testing.assert_close(state.mean(), one, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(state.mean(), leaves), gradients(one, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * want.abs().max().item())


def both(ask, qkv, times_s_T, rate, bias, lengths):
    chunks = chunks_of(lengths)
    mean_RKHd = causal_aggregate(ask, qkv, times_s_T, rate, chunks).mean().transpose(1, 2)
    return causal_dispatch(qkv, torch.stack([mean_RKHd, mean_RKHd], dim=2), bias, chunks)


def test_later_events_change_no_bit():
    """Other later events, more of them, far larger scores, another clock, other neighbours: the same bits up to t."""
    lengths = [5, 257, 40]
    (ask, qkv, times_s_T, rate), (_, bias) = inputs(lengths, dtype=torch.float32)
    before = both(ask, qkv, times_s_T, rate, bias, lengths)
    for t in (0, C - 1, C, 2 * C, 131, 255):
        first, end = 5 + t + 1, 5 + 257
        later, later_times = qkv.clone(), times_s_T.clone()
        later[first:, 1] = later[first:, 1] * 100 + 7
        later[first:, 2] -= 1000
        later_times[first:] += 10**8
        after = both(ask, later, later_times, rate, bias, lengths)
        assert torch.equal(after[:first], before[:first])
        assert not torch.equal(after[first:end], before[first:end])
        cut = both(ask, qkv[:first], times_s_T[:first], rate, bias, [5, t + 1])
        assert torch.equal(cut, before[:first])


def test_a_neighbour_of_nan_changes_nothing():
    lengths = [20, 33, 9]
    """Nor a gradient, whichever side of the user the stranger is on."""
    (ask, qkv, times_s_T, rate), (_, bias) = inputs(lengths, dtype=torch.float32)
    before = both(ask, qkv.requires_grad_(True), times_s_T, rate, bias, lengths)
    (grad,) = torch.autograd.grad(before[20:53].square().sum(), qkv)
    strange = qkv.detach().clone()
    strange[:20] = strange[53:] = torch.nan
    after = both(ask, strange.requires_grad_(True), times_s_T, rate, bias, lengths)
    (strange_grad,) = torch.autograd.grad(after[20:53].square().sum(), strange)
    assert torch.equal(after[20:53], before[20:53]) and torch.equal(strange_grad[20:53], grad[20:53])


@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 2, 0]])
def test_empty_histories(lengths):
    (ask, qkv, times_s_T, rate), (_, bias) = inputs(lengths)
    leaves = [t.requires_grad_(True) for t in (ask, qkv, rate, bias)]
    chunks = chunks_of(lengths)
    partial = causal_aggregate(ask, qkv, times_s_T, rate, chunks)
    ends_BHKe = partial.mean()[chunks.end_B]
    out = both(ask, qkv, times_s_T, rate, bias, lengths)
    assert out.shape == (sum(lengths), H, d)
    empty = torch.tensor(lengths) == 0
    assert torch.equal(ends_BHKe[empty], torch.zeros_like(ends_BHKe[empty]))
    for grad in torch.autograd.grad(ends_BHKe.square().sum() + out.square().sum(), leaves):
        assert grad.isfinite().all()


def test_half_precision_follows_the_double():
    (ask, qkv, times_s_T, rate), (_, bias) = inputs(LENGTHS)
    exact = both(ask, qkv.requires_grad_(True), times_s_T, rate, bias, LENGTHS)
    half = qkv.detach().to(torch.bfloat16).requires_grad_(True)
    got = both(ask.float(), half, times_s_T, rate.float(), bias.float(), LENGTHS)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() < 0.1 * exact.abs().max()
    (want_grad,), (got_grad,) = gradients(exact, [qkv]), gradients(got, [half])
    assert (got_grad.double() - want_grad).abs().max() < 0.1 * want_grad.abs().max()


class Allocations(TorchDispatchMode):
    """Remembers the largest tensor that any op gives back, forward or backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def memory(lengths, chunk=32, width=4, experts=4):
    """(largest allocation, numbers saved for backward) of both ops, forward and backward; one head."""
    g = torch.Generator().manual_seed(0)
    T, chunks = sum(lengths), chunks_of(lengths, chunk)
    qkv = torch.randn(T, 3, 1, width, generator=g, requires_grad=True)
    ask, bias = torch.randn(1, experts, width, requires_grad=True), torch.zeros(1, 2 * chunk, requires_grad=True)
    rate, times_s_T = torch.full((1, experts), 1e-6, requires_grad=True), torch.arange(T)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / 4
        return tensor

    with Allocations() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mean_RKHd = causal_aggregate(ask, qkv, times_s_T, rate, chunks).mean().transpose(1, 2)
            out = causal_dispatch(qkv, torch.stack([mean_RKHd, mean_RKHd], dim=2), bias, chunks)
        out.sum().backward()
    return seen.largest, sum(storages.values())


def test_memory_is_that_of_events_plus_experts_per_chunk():
    """No tensor holds more than max(3·T·D, R·K·(D+1)) numbers or a block's scores, and what backward needs is a small
    multiple of T·D + R·K·D. The scores of all windows, T·(K + 2C), are more than 4 times 3·T·D here."""
    D, experts, chunk, lengths = 4, 4, 32, [30_000, 1, 5_000]
    T, R = sum(lengths), chunks_of(lengths, chunk).num_boundaries
    largest, saved = memory(lengths)
    window_scores, block_scores = T * (experts + 2 * chunk), chunks_module.BLOCK_EVENTS * (experts + 2 * chunk)
    assert largest <= max(3 * T * D, R * experts * (D + 1), block_scores) < window_scores / 4
    assert saved <= 5 * T * D + 12 * R * experts * D
    assert 1.9 < memory([2 * n for n in lengths])[1] / saved < 2.1
    one = memory([sum(lengths)])[1]  # nothing is padded to the longest user
    assert abs(saved / one - 1) < 0.01


def test_errors_say_what_to_do():
    (ask, qkv, times_s_T, rate), (experts, bias) = inputs([4, 9])
    chunks = chunks_of([4, 9])
    with pytest.raises(ValueError, match=r"12 rows, times 13, the chunks 13 events"):
        causal_aggregate(ask, qkv[1:], times_s_T, rate, chunks)
    with pytest.raises(ValueError, match="whole seconds as int64"):
        causal_aggregate(ask, qkv, times_s_T.float(), rate, chunks)
    with pytest.raises(ValueError, match="3 rows for 2 users"):
        causal_aggregate(ask, qkv, times_s_T, rate, chunks, Partial.empty(3, H, K, d))
    with pytest.raises(ValueError, match="4 rows, the chunks 5 boundaries"):
        causal_dispatch(qkv, experts[:4], bias, chunks)
    with pytest.raises(ValueError, match="a chunk of 8 needs 16"):
        causal_dispatch(qkv, experts, bias[:, :9], chunks)
