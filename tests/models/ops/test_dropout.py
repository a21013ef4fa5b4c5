"""The CPU's dropout: how many it drops, that what is left has the right mean, and that gradients see the same mask."""

import pytest
import torch

from elastic_rec.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.02, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_drops_a_share_of_p_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    shape, n = (1001, 333), 1001 * 333  # no multiple of four
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    out = Dropout(p)(x)
    zeros_BN = out == 0
    deviation = 4 * (p * (1 - p) / n) ** 0.5
    assert abs(zeros_BN.double().mean() - p) < deviation + 2**-16
    for dim in (0, 1):  # no column, no row is special; lag 1 to 4: the four numbers of one draw are independent
        shares = zeros_BN.double().mean(dim)
        assert (shares - p).abs().max() < 6 * (p * (1 - p) / zeros_BN.shape[dim]) ** 0.5 + 1e-3
    flat = zeros_BN.flatten().double() - p
    for lag in (1, 2, 3, 4):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * p * (1 - p) / n**0.5
    assert out.detach().unique().double().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-2)
    assert out.dtype == dtype
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, out.detach())


def test_seeded_and_fresh_at_each_call_and_off_in_evaluation():
    drop, x = Dropout(0.3), torch.randn(50, 7)
    torch.manual_seed(1)
    first, second = drop(x), drop(x)
    torch.manual_seed(1)
    assert torch.equal(drop(x), first) and not torch.equal(first, second)
    assert drop.eval()(x) is x and Dropout(0.0)(x) is x
