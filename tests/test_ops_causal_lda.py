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
H, K, d, e = 2, 3, 5, 4


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
        [draw(H, K, d), draw(T, H, d), draw(T, H, e), times_s_T, rate_HK],
        [draw(T, H, d), draw(R, H, K, d), draw(R, H, K, e), draw(H, 2 * chunk)],
    )


def scaled(partial):
    """The mean and the log of the total weight: what doesn't depend on which maximum a form took off."""
    return partial.mean(), partial.max_RHK + partial.norm_RHK.double().log()


def gradients(out, leaves, seed=1):
    g = torch.Generator().manual_seed(seed)
    probe = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * probe).sum(), leaves)


@pytest.mark.parametrize("block", [2, 128])  # 2: users and windows straddle blocks
def test_aggregate_equals_the_recurrence(block, monkeypatch):
    monkeypatch.setattr(chunks_module, "BLOCK", block)
    chunks = chunks_of(LENGTHS)
    (query, key, value, times_s_T, rate), _ = inputs(LENGTHS)
    leaves = [t.requires_grad_(True) for t in (query, key, value, rate)]
    fast = causal_aggregate(query, key, value, times_s_T, rate, chunks)
    slow = reference.aggregate(query, key, value, times_s_T, rate, chunks.tiles.offsets_B1, C)
    assert torch.equal(fast.clock_R, slow.clock_R)
    for got, want in zip(scaled(fast), scaled(slow), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for got, want in zip(gradients(fast.mean(), leaves), gradients(slow.mean(), leaves), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * want.abs().max().item())


@pytest.mark.parametrize("block", [2, 128])
def test_dispatch_equals_the_definition(block, monkeypatch):
    monkeypatch.setattr(chunks_module, "BLOCK", block)
    chunks = chunks_of(LENGTHS)
    (_, key, value, *_), (query, expert_key, expert_value, bias) = inputs(LENGTHS)
    leaves = [t.requires_grad_(True) for t in (query, expert_key, expert_value, key, value, bias)]
    fast = causal_dispatch(*leaves, chunks)
    slow = reference.dispatch(*leaves, chunks.tiles.offsets_B1, C)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    for got, want in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 40.0])  # 40: scores near 200, where exp overflows unless a maximum is taken off
def test_float32_errs_no_more_than_float32_itself(scale):
    """Allowed: 8 times the error that rounding the inputs' products to float32 makes in the definition."""
    chunks = chunks_of(LENGTHS)
    (query, key, value, times_s_T, rate), (ask, expert_key, expert_value, bias) = inputs(LENGTHS, dtype=torch.float32)
    query, ask = query * scale, ask * scale
    fast = causal_aggregate(query, key, value, times_s_T, rate, chunks).mean()
    slow = reference.aggregate(query, key, value, times_s_T, rate, chunks.tiles.offsets_B1, C).mean()
    assert (fast - slow).abs().max() <= 8 * scale * 2**-23 * slow.abs().max() * math.sqrt(d)
    arguments = (ask, expert_key, expert_value, key, value, bias)
    exact = reference.dispatch(*(t.double() for t in arguments), chunks.tiles.offsets_B1, C)
    own = reference.dispatch(*arguments, chunks.tiles.offsets_B1, C)
    assert (causal_dispatch(*arguments, chunks) - exact).abs().max() <= 8 * (own - exact).abs().max()


@pytest.mark.parametrize("times", ["dense", "sparse", "none"])
def test_50000_events_in_float32(times):
    """To 1e-5 of the float64 recurrence, however short or long the half-lives are against the history."""
    lengths, chunk = [50_000, 1_000], 32
    longest_gap_s = {"dense": 10, "sparse": 1_000_000, "none": 10}[times]
    (query, key, value, times_s_T, rate), _ = inputs(
        lengths, dtype=torch.float32, longest_gap_s=longest_gap_s, chunk=chunk
    )
    rate = rate * (times != "none")
    chunks = chunks_of(lengths, chunk)
    fast = causal_aggregate(query, key, value, times_s_T, rate, chunks)
    slow = reference.aggregate(query, key, value, times_s_T, rate, chunks.tiles.offsets_B1, chunk)
    error = (fast.mean() - slow.mean()).abs().max() / slow.mean().abs().max()
    weight = (scaled(fast)[1] - scaled(slow)[1])[fast.norm_RHK > 0].abs().max()
    print(f"{times}: {error:.1e} of the largest mean, log of the total weight off by {weight:.1e}")
    assert error <= 1e-5 and weight <= 1e-5


def pieces_of(key, value, times_s_T, query, rate, cuts):
    """Partials of adjacent stretches of one user, and the partial of all of it."""

    def whole(a, b):
        chunks = chunks_of([b - a])
        row = causal_aggregate(query, key[a:b], value[a:b], times_s_T[a:b], rate, chunks)
        return row.rows(chunks.end_B)

    return [whole(a, b) for a, b in itertools.pairwise(cuts)], whole(cuts[0], cuts[-1])


def test_partials_combine_in_any_grouping():
    (query, key, value, times_s_T, rate), _ = inputs([60])
    parts, whole = pieces_of(key, value, times_s_T, query, rate, [0, 1, 9, 9, 25, 60])

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
    (query, key, value, times_s_T, rate), _ = inputs(lengths)
    leaves = [t.requires_grad_(True) for t in (query, key, value, rate)]
    chunks = chunks_of(lengths)
    one = causal_aggregate(query, key, value, times_s_T, rate, chunks).rows(chunks.end_B).mean()
    events = [range(o, o + n) for o, n in zip([0, *itertools.accumulate(lengths)], lengths, strict=False)]
    rows = [[i for r in events for i in r[:cut]], [i for r in events for i in r[cut:]]]
    state = None
    for index in rows:
        sizes = [sum(i in r for i in index) for r in events]
        part = chunks_of(sizes)
        state = causal_aggregate(query, key[index], value[index], times_s_T[index], rate, part, state).rows(part.end_B)
    torch.testing.assert_close(state.mean(), one, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(state.mean(), leaves), gradients(one, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * want.abs().max().item())


def both(key, value, query, lengths, times_s_T, aggregate_query, rate, bias):
    chunks = chunks_of(lengths)
    mean_RHKe = causal_aggregate(aggregate_query, key, value, times_s_T, rate, chunks).mean()
    expert_key = torch.nn.functional.pad(mean_RHKe, (0, d - e))
    return causal_dispatch(query, expert_key, mean_RHKe, key, value, bias, chunks)


def test_later_events_change_no_bit():
    """Other later events, more of them, far larger scores, another clock, other neighbours: the same bits up to t."""
    lengths = [5, 257, 40]
    (query, key, value, times_s_T, rate), (ask, _, _, bias) = inputs(lengths, dtype=torch.float32)
    before = both(key, value, ask, lengths, times_s_T, query, rate, bias)
    for t in (0, C - 1, C, 2 * C, 131, 255):
        first, end = 5 + t + 1, 5 + 257
        later_key, later_value, later_times = key.clone(), value.clone(), times_s_T.clone()
        later_key[first:] = later_key[first:] * 100 + 7
        later_value[first:] -= 1000
        later_times[first:] += 10**8
        after = both(later_key, later_value, ask, lengths, later_times, query, rate, bias)
        assert torch.equal(after[:first], before[:first])
        assert not torch.equal(after[first:end], before[first:end])
        cut = both(key[:first], value[:first], ask[:first], [5, t + 1], times_s_T[:first], query, rate, bias)
        assert torch.equal(cut, before[:first])


def test_a_neighbour_of_nan_changes_nothing():
    lengths = [20, 33, 9]
    (query, key, value, times_s_T, rate), (ask, _, _, bias) = inputs(lengths, dtype=torch.float32)
    before = both(key, value, ask, lengths, times_s_T, query, rate, bias)
    key[:20] = value[:20] = ask[:20] = torch.nan
    assert torch.equal(both(key, value, ask, lengths, times_s_T, query, rate, bias)[20:], before[20:])


@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 2, 0]])
def test_empty_histories(lengths):
    (query, key, value, times_s_T, rate), (ask, *_, bias) = inputs(lengths)
    leaves = [t.requires_grad_(True) for t in (query, key, value, rate, ask, bias)]
    chunks = chunks_of(lengths)
    partial = causal_aggregate(query, key, value, times_s_T, rate, chunks)
    ends_BHKe = partial.mean()[chunks.end_B]
    out = both(key, value, ask, lengths, times_s_T, query, rate, bias)
    assert out.shape == value.shape
    empty = torch.tensor(lengths) == 0
    assert torch.equal(ends_BHKe[empty], torch.zeros_like(ends_BHKe[empty]))
    for grad in torch.autograd.grad(ends_BHKe.square().sum() + out.square().sum(), leaves):
        assert grad.isfinite().all()


def test_half_precision_follows_the_double():
    (query, key, value, times_s_T, rate), (ask, _, _, bias) = inputs(LENGTHS)
    exact = both(key, value, ask, LENGTHS, times_s_T, query, rate, bias)
    half = [t.to(torch.bfloat16) for t in (key, value, ask)]
    got = both(*half, LENGTHS, times_s_T, query.float(), rate.float(), bias.float())
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() < 0.1 * exact.abs().max()


class Allocations(TorchDispatchMode):
    """Remembers the largest tensor that any op gives back, forward or backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def memory(lengths, chunk=32, width=16, experts=4):
    """(largest allocation, numbers saved for backward) of both ops, forward and backward; heads of one width."""
    g = torch.Generator().manual_seed(0)
    T, chunks = sum(lengths), chunks_of(lengths, chunk)
    key, value, ask = (torch.randn(T, 1, width, generator=g, requires_grad=True) for _ in range(3))
    query, bias = torch.randn(1, experts, width, requires_grad=True), torch.zeros(1, 2 * chunk, requires_grad=True)
    rate, times_s_T = torch.full((1, experts), 1e-6, requires_grad=True), torch.arange(T)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / 4
        return tensor

    with Allocations() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mean = causal_aggregate(query, key, value, times_s_T, rate, chunks).mean()
            out = causal_dispatch(ask, mean, mean, key, value, bias, chunks)
        out.sum().backward()
    return seen.largest, sum(storages.values())


def test_memory_is_that_of_events_plus_experts_per_chunk():
    """No tensor holds more than max(T·D, R·K·(D+1)) numbers or a block's scores, and what backward needs is a small
    multiple of T·D + R·K·D. The scores of all windows, T·(K + 2C), are more than 4 times T·D here."""
    D, experts, chunk, lengths = 16, 4, 32, [30_000, 1, 5_000]
    T, R = sum(lengths), chunks_of(lengths, chunk).num_boundaries
    largest, saved = memory(lengths)
    window_scores, block_scores = T * (experts + 2 * chunk), chunks_module.BLOCK * chunk * (experts + 2 * chunk)
    assert largest <= max(T * D, R * experts * (D + 1), block_scores) < window_scores / 4
    assert saved <= 5 * T * D + 12 * R * experts * D
    assert 1.9 < memory([2 * n for n in lengths])[1] / saved < 2.1
    one = memory([sum(lengths)])[1]  # nothing is padded to the longest user
    assert abs(saved / one - 1) < 0.01


def test_errors_say_what_to_do():
    (query, key, value, times_s_T, rate), (ask, expert_key, expert_value, bias) = inputs([4, 9])
    chunks = chunks_of([4, 9])
    with pytest.raises(ValueError, match=r"13, 12 and 13 rows, the chunks 13 events"):
        causal_aggregate(query, key, value[1:], times_s_T, rate, chunks)
    with pytest.raises(ValueError, match="whole seconds as int64"):
        causal_aggregate(query, key, value, times_s_T.float(), rate, chunks)
    with pytest.raises(ValueError, match="3 rows for 2 users"):
        causal_aggregate(query, key, value, times_s_T, rate, chunks, Partial.empty(3, H, K, e))
    with pytest.raises(ValueError, match="4 rows, the chunks 5 boundaries"):
        causal_dispatch(ask, expert_key[:4], expert_value[:4], key, value, bias, chunks)
    with pytest.raises(ValueError, match="a chunk of 8 needs 16"):
        causal_dispatch(ask, expert_key, expert_value, key, value, bias[:, :9], chunks)
