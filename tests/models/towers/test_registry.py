"""Every tower of the registry keeps the promises of `SequenceTower`, and of its own facts."""

import pytest
import torch

import elastic_rec.models
from elastic_rec.models import MemoryConfig, TowerConfig, build_tower
from elastic_rec.models.towers.registry import TOWERS, tower_class

D, OFFSETS = 16, torch.tensor([0, 5, 5, 12])


@pytest.fixture(params=TOWERS)
def tower(request):
    torch.manual_seed(0)
    kind = tower_class(request.param)
    config = TowerConfig(tower=request.param, width=D, dropout=0.0, chunk=4)
    return build_tower(config, MemoryConfig(enabled=kind.has_memory, num_keys=8), max_history=8)


def events():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, D, generator=g), OFFSETS, torch.arange(12) * 60


def test_output(tower):
    out = tower(*events(), False)
    assert out.user_embedding.shape == (3, D) and out.interests.shape[::2] == (3, D) and out.tokens is None
    (out.user_embedding.square().sum() + out.interests.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_an_output_at_each_event_is_given_where_no_later_event_changes_it(tower):
    tokens_TD, *rest = events()
    if not tower.is_causal:
        with pytest.raises(ValueError, match=r"set model\.tower=elastic_causal"):
            tower(tokens_TD, *rest, True)
        return
    before = tower(tokens_TD, *rest, True).tokens
    after = tower(tokens_TD + (torch.arange(12) > 5)[:, None], *rest, True).tokens
    assert torch.equal(before[:6], after[:6]) and not torch.equal(before[6:], after[6:])


def test_what_a_tower_cannot_do_is_refused(tower):
    assert hasattr(tower, "step") is tower.has_states
    if tower.has_positions:
        with pytest.raises(ValueError, match="a history of 9 events"):
            tower(torch.zeros(9, D), torch.tensor([0, 9]), torch.arange(9), False)


def test_the_face_has_what_it_names():
    assert all(getattr(elastic_rec.models, name).__name__ == name for name in elastic_rec.models.__all__)
    with pytest.raises(AttributeError, match="has no 'Tower': it has CausalTower"):
        elastic_rec.models.Tower  # noqa: B018
