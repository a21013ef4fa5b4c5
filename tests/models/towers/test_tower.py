"""The whole tower: what it allocates, that users are independent, and that odd batches work."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from towers import Allocations

from elastic_rec.models.tiles import TILE
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.tower import ElasticTower

D, K, H, MULTIPLE = 16, 4, 2, 2
LONGEST, LENGTHS = 4096, [1] * 31 + [4096] + [1] * 32


def make_tower(*, memory=True, layers=2, dropout=0.0):
    torch.manual_seed(0)
    config = TowerConfig(width=D, heads=H, experts=K, layers=layers, ffn_multiple=MULTIPLE, dropout=dropout)
    return ElasticTower(config, MemoryConfig(enabled=memory, num_keys=16, heads=2, top_r=3))


def events(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
    T = int(offsets_B1[-1])
    return torch.randn(T, D, generator=g), offsets_B1, torch.randint(0, 3600, (T,), generator=g).cumsum(0)


def padded_aggregate(tokens_TD, offsets_B1):
    """What must never be built: [B, longest, D]."""
    padded_BND = pad_sequence(list(tokens_TD.split(offsets_B1.diff().tolist())), batch_first=True)
    return (padded_BND * 2).sum()


def quadratic_attention(tokens_TD, offsets_B1):
    """What must never be built either: one user's [N, N]."""
    start, end = offsets_B1[31], offsets_B1[32]
    return (tokens_TD[start:end] @ tokens_TD[start:end].T).softmax(-1).sum()


def largest_allocation(function, tokens_TD, *rest):
    tokens_TD = tokens_TD.clone().requires_grad_(True)
    with Allocations() as seen:
        function(tokens_TD, *rest).sum().backward()
    return seen


def test_no_padded_and_no_quadratic_tensor():
    """No tensor, forward or backward, holds more than ffn_multiple * D numbers per event, tile padding included, i.e.
    (T + B*C) * 2D; a [B, longest] tensor would hold 1 number per slot at least B*longest, and N x N more still."""
    tokens_TD, offsets_B1, times_s_T = events(LENGTHS)
    T, B = sum(LENGTHS), len(LENGTHS)
    bound = (T + B * TILE) * MULTIPLE * D
    assert bound < B * LONGEST < LONGEST**2
    tower = make_tower(dropout=0.1)
    seen = largest_allocation(lambda *x: tower(*x).user_embedding, tokens_TD, offsets_B1, times_s_T)
    assert T * D <= seen.largest <= bound, seen.shape
    # The same check catches both ways of getting it wrong.
    assert largest_allocation(padded_aggregate, tokens_TD, offsets_B1).largest >= B * LONGEST
    assert largest_allocation(quadratic_attention, tokens_TD, offsets_B1).largest >= LONGEST**2


def saved_numbers(tower, lengths):
    tokens_TD, offsets_B1, times_s_T = events(lengths)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = tower(tokens_TD.requires_grad_(True), offsets_B1, times_s_T)
    assert out.user_embedding.requires_grad
    return sum(storages.values()) / 4


def test_saved_activations_are_linear_in_events():
    """What backward needs grows by a constant per event: D and H*K times a small number per layer, whatever N is."""
    tower = make_tower()
    small, large = saved_numbers(tower, [1024, 1024]), saved_numbers(tower, [4096, 4096])
    per_event = (large - small) / (8192 - 2048)
    assert per_event <= 24 * (D + H * K), per_event
    huge = saved_numbers(tower, [8192])  # one user of 8192 costs what two of 4096 do
    assert huge <= 1.01 * large


@pytest.mark.parametrize("memory", [True, False])
def test_order_and_neighbours_change_nothing(memory):
    tower = make_tower(memory=memory).eval()
    lengths = [0, 1, 7, 64, 129]
    tokens_TD, offsets_B1, times_s_T = events(lengths)
    out = tower(tokens_TD, offsets_B1, times_s_T)

    order = [3, 0, 4, 1, 2]
    rows = torch.cat([torch.arange(int(offsets_B1[u]), int(offsets_B1[u + 1])) for u in order])
    shuffled_B1 = torch.tensor([0, *(lengths[u] for u in order)]).cumsum(0)
    shuffled = tower(tokens_TD[rows], shuffled_B1, times_s_T[rows])
    for got, want in zip(shuffled[:2], out[:2], strict=True):
        torch.testing.assert_close(got, want[order], rtol=1e-6, atol=1e-6)
    print("bitwise equal after a shuffle:", torch.equal(shuffled.user_embedding, out.user_embedding[order]))

    start = int(offsets_B1[4])
    alone = tower(tokens_TD[start:], torch.tensor([0, 129]), times_s_T[start:])
    torch.testing.assert_close(alone.user_embedding[0], out.user_embedding[4], rtol=1e-6, atol=1e-6)
    strangers = tokens_TD.clone()
    strangers[:start] = torch.nan
    beside_nan = tower(strangers, offsets_B1, times_s_T)
    torch.testing.assert_close(beside_nan.user_embedding[4], out.user_embedding[4], rtol=1e-6, atol=1e-6)


def test_the_order_of_events_matters():
    """Recency is in: LDA alone sees a set and would give one answer for both orders."""
    tower = make_tower().eval()
    tokens_TD, offsets_B1, times_s_T = events([9])
    forward, backward = (tower(x, offsets_B1, times_s_T).user_embedding for x in (tokens_TD, tokens_TD.flip(0)))
    assert (forward - backward).abs().max() > 1e-3
    stretched = tower(tokens_TD, offsets_B1, times_s_T * 100).user_embedding  # same order, other gaps
    assert (forward - stretched).abs().max() > 1e-3
    later = tower(tokens_TD, offsets_B1, times_s_T + 10**9).user_embedding  # same gaps, another decade
    assert torch.equal(forward, later)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("lengths", [[0, 5, 0], [0, 0, 0], [1], [0]])
def test_empty_histories(lengths, memory):
    tower = make_tower(memory=memory)
    tokens_TD, offsets_B1, times_s_T = events(lengths)
    tokens_TD.requires_grad_(True)
    out = tower(tokens_TD, offsets_B1, times_s_T)
    assert out.interests.shape == (len(lengths), K, D)
    assert out.user_embedding.isfinite().all()
    out.user_embedding.square().sum().backward()
    assert tokens_TD.grad.isfinite().all()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_every_parameter_gets_a_gradient():
    tower = make_tower(layers=3)
    tower(*events([40, 3, 0])).interests.square().mul(torch.randn(K, D)).sum().backward()
    silent = [n for n, p in tower.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == ["summary.mix.weight", "summary.mix.bias"]  # only the summary, which this loss leaves out
