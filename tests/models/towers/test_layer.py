"""The layer computes the paper's formulas, though it never projects an event; configs refuse what can't work."""

import pytest
import torch

from elastic_rec.models.ops.lda import reference
from elastic_rec.models.tiles import TileLayout
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.layer import Aggregate, Dispatch, LDALayer

LENGTHS, B, K, D, H = [0, 1, 7, 64], 4, 3, 8, 2


def setup():
    torch.manual_seed(0)
    offsets_B1 = torch.tensor([0, *LENGTHS]).cumsum(0)
    layout = TileLayout.build(offsets_B1, int(offsets_B1[-1]))
    tokens_TD = torch.randn(layout.num_tokens, D, dtype=torch.float64, requires_grad=True)
    experts_BKD = torch.randn(B, K, D, dtype=torch.float64, requires_grad=True)
    return layout, tokens_TD, experts_BKD


def heads_first(experts_BKD):
    return experts_BKD.view(B, K, H, D // H).transpose(1, 2)


@pytest.mark.parametrize("kind", [Aggregate, Dispatch])
def test_equals_the_paper_formula(kind):
    layout, tokens_TD, experts_BKD = setup()
    module = kind(D, H).double()
    scale = (D // H) ** -0.5
    if kind is Aggregate:
        mine = module(experts_BKD, tokens_TD, layout)
        mixed_BHKd = reference.aggregate(
            heads_first(module.query(experts_BKD)) * scale,
            module.key(tokens_TD).view(-1, H, D // H),
            module.value(tokens_TD).view(-1, H, D // H),
            layout.offsets_B1,
        )
        paper = module.out(mixed_BHKd.transpose(1, 2).reshape(B, K, D))
        assert torch.equal(mine[0], torch.zeros_like(mine[0]))  # the user without events
    else:
        mine = module(tokens_TD, experts_BKD, layout)
        mixed_THd = reference.dispatch(
            module.query(tokens_TD).view(-1, H, D // H) * scale,
            heads_first(module.key(experts_BKD)),
            heads_first(module.value(experts_BKD)),
            layout.offsets_B1,
        )
        paper = module.out(mixed_THd.flatten(1))
    torch.testing.assert_close(mine, paper, rtol=1e-10, atol=1e-12)
    leaves = [tokens_TD, experts_BKD, *module.parameters()]
    probe = torch.randn_like(paper)
    for got, want in zip(
        torch.autograd.grad((mine * probe).sum(), leaves),
        torch.autograd.grad((paper * probe).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_last_layer_leaves_tokens_alone_and_builds_no_half_for_them():
    layout, tokens_TD, experts_BKD = setup()
    config = TowerConfig(width=D, heads=H, experts=K)
    last, inner = LDALayer(config, last=True).double(), LDALayer(config, last=False).double()
    assert last(tokens_TD, experts_BKD, layout)[0] is tokens_TD
    assert not torch.equal(inner(tokens_TD, experts_BKD, layout)[0], tokens_TD)
    assert sum(p.numel() for p in last.parameters()) < sum(p.numel() for p in inner.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TowerConfig(width=64, heads=3), r"model.width=64 .* model.heads=3: set model.width=63"),
        (lambda: TowerConfig(width=6, heads=2), r"multiple of 4.*set model.width=8"),
        (lambda: TowerConfig(layers=0), r"model.layers=0: set at least 1"),
        (lambda: TowerConfig(dropout=1.0), r"model.dropout=1.0: set at least 0, at most 0.99"),
        (lambda: MemoryConfig(num_keys=4, top_r=5), r"set memory.top_r=4"),
        (lambda: MemoryConfig(heads=0), r"memory.heads=0: set at least 1"),
    ],
)
def test_configs_say_what_to_set(make, message):
    with pytest.raises(ValueError, match=message):
        make()
