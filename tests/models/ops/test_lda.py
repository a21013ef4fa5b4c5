"""Fast aggregate and dispatch against their definition: outputs, every gradient, edge lengths, users kept apart."""

from functools import partial

import pytest
import torch

from elastic_rec.models.ops.lda import lda_aggregate, lda_dispatch, reference
from elastic_rec.models.tiles import TileLayout

LENGTHS = [64, 0, 1, 129, 7]


def layout_of(lengths, tile=32):
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
    return TileLayout.build(offsets_B1, int(offsets_B1[-1]), tile)


def inputs(op, form, lengths=LENGTHS, scale=1.0):
    """float64 tensors (x, y, z): the op's three arguments. form "paper": heads; "shared": one unprojected token."""
    g = torch.Generator().manual_seed(0)
    B, T = len(lengths), sum(lengths)
    H, K, d, e = (2, 8, 16, 12) if form == "paper" else (1, 16, 24, 24)
    users = [torch.randn(B, H, K, w, generator=g, dtype=torch.float64) for w in (d, e)]
    events = [torch.randn(T, H, w, generator=g, dtype=torch.float64) for w in (d, e)]
    if op == "aggregate":
        return [users[0] * scale, events[0], events[1]]
    return [events[0] * scale, users[0], users[1]]


def run(function, tensors, *, shared):
    """Output and gradients. shared: the third argument is the second (events as keys and values alike)."""
    leaves = [t.detach().clone().requires_grad_(True) for t in tensors[: 2 if shared else 3]]
    out = function(*leaves, *(leaves[1:] if shared else []))
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * probe).sum(), leaves)]


# allowed: times the float32 reference's own largest error. Scale 40 gives scores near 500, where exp overflows unless
# the maximum is taken off; there softmax picks one event, the textbook's derivative cancels to an exact 0 and the
# quotient's to a rounding error, hence the wider bound.
@pytest.mark.parametrize(("scale", "allowed"), [(1.0, 8), (40.0, 40)])
@pytest.mark.parametrize("form", ["paper", "shared"])
@pytest.mark.parametrize("op", ["aggregate", "dispatch"])
def test_equals_reference(op, form, scale, allowed):
    layout, groups = layout_of(LENGTHS), 2 if form == "shared" else 1
    shared = form == "shared" and op == "aggregate"
    if op == "aggregate":
        fast, slow = partial(lda_aggregate, layout=layout), partial(reference.aggregate, offsets_B1=layout.offsets_B1)
    else:
        fast = partial(lda_dispatch, layout=layout, groups=groups)
        slow = partial(reference.dispatch, offsets_B1=layout.offsets_B1, groups=groups)
    exact = inputs(op, form, scale=scale)
    single = [t.float() for t in exact]
    judge = run(slow, [t.double() for t in single], shared=shared)
    own = run(slow, single, shared=shared)
    mine = run(fast, single, shared=shared)
    for name, truth, ref32, got in zip(["out", "d1", "d2", "d3"], judge, own, mine, strict=False):
        bound = allowed * (ref32 - truth).abs().max()
        assert bound < 1e-2 * truth.abs().max()  # else the comparison says nothing
        assert (got - truth).abs().max() <= bound, name


@pytest.mark.parametrize("op", ["aggregate", "dispatch"])
def test_gradcheck(op):
    lengths = [0, 1, 3, 5]
    layout = layout_of(lengths, tile=2)
    g = torch.Generator().manual_seed(0)
    users = [torch.randn(4, 2, 2, w, generator=g, dtype=torch.float64, requires_grad=True) for w in (2, 3)]
    events = [torch.randn(9, 2, w, generator=g, dtype=torch.float64, requires_grad=True) for w in (2, 3)]
    if op == "aggregate":
        assert torch.autograd.gradcheck(lambda *x: lda_aggregate(*x, layout), (users[0], *events))
    else:
        assert torch.autograd.gradcheck(lambda *x: lda_dispatch(*x, layout, 2), (events[0], *users))


@pytest.mark.parametrize("lengths", [[0, 3, 0], [0, 0]])
def test_empty_history_gives_zeros_and_finite_gradients(lengths):
    layout = layout_of(lengths)
    query = torch.randn(len(lengths), 2, 4, 8, requires_grad=True)
    tokens = torch.randn(sum(lengths), 2, 8, requires_grad=True)
    out = lda_aggregate(query, tokens, tokens, layout)
    back = lda_dispatch(tokens, query, query, layout)
    assert back.shape == tokens.shape
    (out.square().sum() + back.square().sum()).backward()
    empty = torch.tensor(lengths) == 0
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    assert torch.equal(query.grad[empty], torch.zeros_like(out[empty]))
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("op", ["aggregate", "dispatch"])
def test_a_user_does_not_depend_on_the_others(op):
    """Alone, in company, and beside a neighbour whose events are NaN: the same numbers."""
    x, y, z = (t.float() for t in inputs(op, "paper"))
    layout, alone = layout_of(LENGTHS), layout_of([129])
    start, end = layout.offsets_B1[3], layout.offsets_B1[4]
    if op == "aggregate":
        y[:start] = z[:start] = torch.nan
        together = lda_aggregate(x, y, z, layout)[3]
        single = lda_aggregate(x[3:4], y[start:end], z[start:end], alone)[0]
    else:
        x[:start] = y[:3] = z[:3] = torch.nan
        together = lda_dispatch(x, y, z, layout)[start:end]
        single = lda_dispatch(x[start:end], y[3:4], z[3:4], alone)
    torch.testing.assert_close(together, single, rtol=0, atol=1e-6)


def test_errors_name_the_argument():
    layout = layout_of([2, 3])
    query, tokens = torch.randn(2, 1, 4, 8), torch.randn(5, 1, 8)
    with pytest.raises(ValueError, match=r"value_THe has shape \(4, 1, 8\).*5 rows, the layout's events"):
        lda_aggregate(query, tokens, tokens[:4], layout)
    with pytest.raises(ValueError, match=r"key_BHKd has shape \(1, 1, 4, 8\).*2 rows, the layout's users"):
        lda_dispatch(tokens, query[:1], query, layout)
    with pytest.raises(ValueError, match="4 keys can't be split in 3"):
        lda_dispatch(tokens, query, query, layout, groups=3)
