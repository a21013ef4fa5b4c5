"""Inference in micro-batches is the pass over all at once, holds no more memory for longer histories, stays causal."""

import pytest
import torch
from towers import LENGTHS, Allocations, C, D, events, make_tower

from elastic_rec.models.towers.elastic import micro_batches
from elastic_rec.models.towers.elastic.micro_batches import MicroBatch, split


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setitem(micro_batches.MICRO_BATCH_EVENTS, "cpu", 6)


def test_whole_users_side_by_side_and_long_ones_in_parts():
    offsets_B1 = torch.tensor([0, 3, 4, 4, 15, 17, 18, 18])
    assert list(split(offsets_B1, per_user=0)) == [
        MicroBatch(0, 3, 0, 4),
        MicroBatch(3, 4, 4, 10, followed=True),
        MicroBatch(3, 4, 10, 15, follows=True),
        MicroBatch(4, 7, 15, 18),
    ]
    assert [micro_batch[:2] for micro_batch in split(torch.zeros(9, dtype=torch.int64), per_user=3)] == [
        (0, 3),
        (3, 6),
        (6, 8),
    ]
    assert list(split(torch.zeros(1, dtype=torch.int64), per_user=1)) == []


@pytest.mark.parametrize("all_positions", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, [37], [0, 5, 0], [6, 6, 12, 13], [0] * 20])
def test_pieces_equal_the_pass_at_once(lengths, all_positions, monkeypatch):
    tower, batch = make_tower(layers=3).eval(), events(lengths)
    with torch.no_grad():
        parts = tower(*batch, all_positions=all_positions)
        state = tower.step(*batch, tower.init_state(len(lengths)), all_positions)
        more = tower.step(*batch, state[1], all_positions)  # from the users' states
        monkeypatch.setitem(micro_batches.MICRO_BATCH_EVENTS, "cpu", 1 << 20)
        whole = tower(*batch, all_positions=all_positions)
        whole_state = tower.step(*batch, tower.init_state(len(lengths)), all_positions)
        whole_more = tower.step(*batch, whole_state[1], all_positions)
    for got, want in ((parts, whole), (state[0], whole), (more[0], whole_more[0])):
        for name, tensor in want._asdict().items():
            torch.testing.assert_close(getattr(got, name), tensor, rtol=1e-5, atol=1e-5, msg=name)
    for got, want in ((state[1], whole_state[1]), (more[1], whole_more[1])):
        for name, tensor in vars(want).items():
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(getattr(got, name), tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_how_many_follow_changes_no_bit(monkeypatch):
    """As in test_models_causal: as long as no pass has less than a dozen events, where MKL adds in another order."""
    monkeypatch.setitem(micro_batches.MICRO_BATCH_EVENTS, "cpu", 16)
    tower, (tokens_TD, offsets_B1, times_s_T) = make_tower().eval(), events([20, 60])
    with torch.no_grad():
        whole = tower(tokens_TD, offsets_B1, times_s_T).tokens
        for t in (t for t in range(30, 80) if (t - 20) % 16 not in range(1, 12)):
            cut_B1 = torch.tensor([0, 20, t])
            assert torch.equal(tower(tokens_TD[:t], cut_B1, times_s_T[:t]).tokens, whole[:t]), t


def test_memory_does_not_grow_with_the_history(monkeypatch):
    monkeypatch.setitem(micro_batches.MICRO_BATCH_EVENTS, "cpu", 64 * C)
    tower, largest = make_tower().eval(), []
    for length in (500 * C, 2000 * C):
        batch = events([length])
        with torch.no_grad(), Allocations() as seen:
            tower(*batch, all_positions=False)
        largest.append(seen.largest)
    assert largest[1] == largest[0] < 500 * C * D, seen.shape


def test_with_gradients_it_is_one_pass():
    """Micro-batches keep nothing for a backward pass, so there they must not be used."""
    tower, batch = make_tower(), events(LENGTHS)
    out = tower(*batch)
    assert out.tokens.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(tower(*batch).tokens, out.tokens, rtol=1e-5, atol=1e-5)
