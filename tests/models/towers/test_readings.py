"""A pass read as of several moments is what a pass over only the events before each would have given."""

from __future__ import annotations

import pytest
import torch
from towers import LENGTHS, C, D, events

from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.causal_tower import CausalTower


def towers(*, memory: bool, time: str = "past") -> tuple[CausalTower, CausalTower]:
    config = TowerConfig(
        width=D, heads=2, experts=4, layers=3, dropout=0.0, tower="elastic_causal", chunk=C, time=time, moments=3
    )
    settings = MemoryConfig(enabled=memory, num_keys=8, heads=2, top_r=3)
    torch.manual_seed(0)
    tower, plain = CausalTower(config, settings), CausalTower(config, settings)
    plain.load_state_dict(tower.state_dict())
    return tower, plain


def readings(offsets_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every end of every user, in a shuffled order."""
    pairs = [(u, e) for u in range(len(offsets_B1) - 1) for e in range(int(offsets_B1[u]), int(offsets_B1[u + 1]) + 1)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    user_I, ends_I = torch.tensor(pairs)[order].unbind(1)
    return user_I, ends_I


def loss_of(output, weights_IKD: torch.Tensor) -> torch.Tensor:
    moments = (output.moments.mean * weights_IKD[:, 1]).sum() + (output.moments.covariance.sum(1) ** 2).sum()
    return (output.interests * weights_IKD).sum() + (output.user_embedding * weights_IKD[:, 0]).sum() + moments


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("time", ["past", "none"])
def test_a_reading_equals_a_pass_over_the_events_before_it_and_so_do_gradients(memory, time):
    tower, plain = towers(memory=memory, time=time)
    tokens_TD, offsets_B1, times_s_T = events(LENGTHS)
    user_I, ends_I = readings(offsets_B1)
    tokens_TD.requires_grad_()
    got = tower(tokens_TD, offsets_B1, times_s_T, readings=(user_I, ends_I))
    weights = torch.randn(got.interests.shape, generator=torch.Generator().manual_seed(1))
    loss_of(got, weights).backward()
    got_grad = [tokens_TD.grad.clone(), *(p.grad.clone() for p in tower.parameters() if p.grad is not None)]

    tokens_TD.grad = None
    index = torch.cat([torch.arange(offsets_B1[u], e) for u, e in zip(user_I, ends_I, strict=True)])
    cut_I1 = torch.cat([ends_I.new_zeros(1), (ends_I - offsets_B1[user_I]).cumsum(0)])
    want = plain(tokens_TD[index], cut_I1, times_s_T[index], False)
    loss_of(want, weights).backward()
    torch.testing.assert_close(got.interests, want.interests, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.user_embedding, want.user_embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.moments, want.moments, rtol=1e-4, atol=1e-5)
    want_grad = [tokens_TD.grad, *(p.grad for p in plain.parameters() if p.grad is not None)]
    for a, b in zip(got_grad, want_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4 * float(b.abs().max()) + 1e-6)


def test_a_later_event_changes_no_bit_of_a_reading():
    tower, _ = towers(memory=True)
    tokens_TD, offsets_B1, times_s_T = events([37, 9])
    user_I, ends_I = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 18, 40, 5])
    before = tower(tokens_TD, offsets_B1, times_s_T, readings=(user_I, ends_I))
    changed_TD, later_T = tokens_TD.clone(), times_s_T.clone()
    changed_TD[18:37], later_T[18:37] = torch.randn(19, D), later_T[18:37] + 10**7
    changed_TD[40:] += 1.0
    after = tower(changed_TD, offsets_B1, later_T, readings=(user_I, ends_I))
    assert torch.equal(before.interests, after.interests) and torch.equal(before.user_embedding, after.user_embedding)
    assert all(torch.equal(a, b) for a, b in zip(before.moments, after.moments, strict=True))
    late = tower(changed_TD, offsets_B1, later_T, readings=(torch.tensor([0]), torch.tensor([19])))
    assert not torch.allclose(late.user_embedding, before.user_embedding[1])


def test_no_events_at_all():
    tower, plain = towers(memory=True)
    none = torch.zeros(0, dtype=torch.int64)
    at = torch.tensor([0, 1]), torch.zeros(2).long()
    got = tower(torch.zeros(0, D), torch.zeros(3, dtype=torch.int64), none, readings=at)
    want = plain(torch.zeros(0, D), torch.zeros(3, dtype=torch.int64), none, False)
    torch.testing.assert_close(got.interests, want.interests)
    torch.testing.assert_close(got.user_embedding, want.user_embedding)
    assert all(not a.any() and torch.equal(a, b) for a, b in zip(got.moments, want.moments, strict=True))


def test_a_stored_state_answers_with_the_same_numbers():
    tower, _ = towers(memory=True)
    tower.eval()
    tokens_TD, offsets_B1, times_s_T = events([37])
    none = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        state = tower.step(tokens_TD[:21], torch.tensor([0, 21]), times_s_T[:21], tower.init_state(1))[1]
        output, _ = tower.step(torch.zeros(0, D), torch.zeros(2, dtype=torch.int64), none, state, False)
        got = tower(tokens_TD, offsets_B1, times_s_T, readings=(torch.tensor([0]), torch.tensor([21])))
    torch.testing.assert_close(output.interests, got.interests, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.user_embedding, got.user_embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.moments, got.moments, rtol=1e-4, atol=1e-5)
