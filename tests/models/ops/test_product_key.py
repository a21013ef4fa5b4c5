"""Product keys against all n_keys^2 sums."""

import pytest
import torch

from elastic_rec.models.ops.product_key import product_key_topk, reference


def inputs(num_keys=12, half=5, heads=3, queries=40):
    g = torch.Generator().manual_seed(0)
    query_QHd = torch.randn(queries, heads, 2 * half, generator=g)
    subkeys_H2nh = torch.randn(heads, 2, num_keys, half, generator=g)
    return query_QHd, subkeys_H2nh


@pytest.mark.parametrize("top_r", [1, 4, 12])
def test_equals_reference(top_r):
    single = inputs()
    results = []
    for function, dtype in ((reference.topk, torch.float64), (reference.topk, torch.float32), (product_key_topk,) * 2):
        dtype = torch.float32 if function is product_key_topk else dtype
        query, subkeys = (t.to(dtype).requires_grad_(True) for t in single)
        ids, scores = function(query, subkeys, top_r)
        probe = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append((ids, scores.detach(), *torch.autograd.grad((scores * probe).sum(), (query, subkeys))))
    judge, own, mine = results
    assert mine[0].dtype == torch.int64
    assert torch.equal(mine[0], judge[0])
    for truth, ref32, got in zip(judge[1:], own[1:], mine[1:], strict=True):
        assert (got - truth).abs().max() <= 8 * (ref32 - truth).abs().max()


def test_gradcheck():
    query, subkeys = (t.double().requires_grad_(True) for t in inputs(num_keys=4, half=2, heads=2, queries=3))
    assert torch.autograd.gradcheck(lambda q, k: product_key_topk(q, k, 2)[1], (query, subkeys))


def test_no_queries():
    query, subkeys = inputs(queries=0)
    ids, scores = product_key_topk(query, subkeys, 4)
    assert ids.shape == scores.shape == (0, 3, 4)


def test_errors():
    query, subkeys = inputs()
    with pytest.raises(ValueError, match=r"top_r = 13 must lie in 1\.\.n_keys = 12"):
        product_key_topk(query, subkeys, 13)
    with pytest.raises(ValueError, match="twice the sub-keys' width"):
        product_key_topk(query[..., :5], subkeys, 2)
