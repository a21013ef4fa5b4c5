"""Cross entropy in blocks against the plain one: values, gradients, precision, memory."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from elastic_rec.models.ops.linear_cross_entropy import linear_cross_entropy, reference, torch_blocks


def inputs(R, C=37, D=8, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(R + C)
    query = (torch.randn(R, D, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    table = (torch.randn(C, D, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    return query, table, torch.randint(0, C, (R,), generator=g), torch.rand(R, generator=g).to(dtype)


def results(function, query, table, target, weight):
    """Total, losses, both gradients of twice the total."""
    total, loss_R = function(query, table, target, weight)
    return total.detach(), loss_R, *torch.autograd.grad(2 * total, (query, table))


@pytest.mark.parametrize("R", [0, 1, 7, 64, 129])
@pytest.mark.parametrize("block", [1, 37 * 5, 1 << 20])
def test_equals_the_reference(R, block, monkeypatch):
    monkeypatch.setitem(torch_blocks.BLOCK_LOGITS, "cpu", block)
    given = inputs(R)
    got = results(linear_cross_entropy, *given)
    for one, other in zip(got, results(reference.linear_cross_entropy, *given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not got[1].requires_grad


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])  # 8: logits in the hundreds, probabilities that underflow
def test_float32_errs_no_more_than_the_reference(scale):
    exact = results(reference.linear_cross_entropy, *inputs(129, scale=scale))
    given = inputs(129, dtype=torch.float32, scale=scale)
    plain = results(reference.linear_cross_entropy, *given)
    for got, want, usual in zip(results(linear_cross_entropy, *given), exact, plain, strict=True):
        assert (got - want).abs().max() <= 4 * (usual - want).abs().max() + 1e-6 * want.abs().max()


def test_without_gradients_the_same_losses():
    query, table, target, weight = inputs(64)
    with torch.no_grad():
        total, loss_R = linear_cross_entropy(query, table, target, weight)
    want_total, want_R = reference.linear_cross_entropy(query, table, target, weight)
    torch.testing.assert_close((total, loss_R), (want_total.detach(), want_R))


def test_autocast_keeps_the_softmax_in_float32():
    given = inputs(129, dtype=torch.float32)
    want = results(reference.linear_cross_entropy, *given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(linear_cross_entropy, *given)
    assert [tensor.dtype for tensor in got] == [torch.float32] * 4
    for one, other in zip(got, want, strict=True):
        assert 0 < (one - other).abs().max() < 0.05 * other.abs().max()


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    monkeypatch.setitem(torch_blocks.BLOCK_LOGITS, "cpu", 37 * 8)
    largest = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    query, table, target, weight = inputs(1000)
    with Watch():
        total, _ = linear_cross_entropy(query, table, target, weight)
        total.backward()
    assert 37 * 8 <= largest <= 1000 * 8 < 1000 * 37


def test_shapes_are_checked():
    query, table, target, weight = inputs(7)
    with pytest.raises(ValueError, match=r"expected \(R, D\), \(C, D\)"):
        linear_cross_entropy(query, table, target[:3], weight)
