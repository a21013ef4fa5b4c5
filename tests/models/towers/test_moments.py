"""Moments of events: means and covariances as numpy has them, for any cut, and target attention's first order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from towers import LENGTHS, C, D, events, make_tower, run

from elastic_rec.models.ranking.histories import MomentReader
from elastic_rec.models.towers.config import TowerConfig
from elastic_rec.models.towers.elastic.moments import Moments

RANK = 3


@pytest.mark.parametrize("rank", [0, 1, RANK, D])
def test_moments_are_mean_and_covariance_of_all_events(rank):
    tower = make_tower(layers=1, moments=rank)
    batch = events(LENGTHS)
    with torch.no_grad():
        got = tower(*batch).moments
    assert got.covariance.shape == (len(LENGTHS), rank, D)
    for user, (start, end) in enumerate(zip(batch[1][:-1].tolist(), batch[1][1:].tolist(), strict=True)):
        v_ND = batch[0][start:end].double()
        if start == end:
            assert not got.mean[user].any() and not got.covariance[user].any()
            continue
        torch.testing.assert_close(got.mean[user].double(), v_ND.mean(0), rtol=1e-5, atol=1e-6)
        if rank:
            whole_DD = np.cov(v_ND.T.numpy(), bias=True)
            want_rD = tower.moments.key_rD.double().detach() @ torch.from_numpy(whole_DD)
            torch.testing.assert_close(got.covariance[user].double(), want_rD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[[i] for i in range(1, 38)], [[C - 1], [2 * C], [2 * C], [37]], [[0], [37]]])
def test_any_split_into_steps_has_the_moments_of_the_whole(cuts):
    tower = make_tower(moments=RANK).eval()
    batch = events(LENGTHS)
    with torch.no_grad():
        whole, (_, out, state) = tower(*batch), run(tower, *batch, cuts, through_bytes=True)
    torch.testing.assert_close(out.moments, whole.moments, rtol=1e-4, atol=1e-5)
    assert state.moments_Brf.shape == (len(LENGTHS), RANK + 1, D + 1)


def test_gradients_of_moments_run_through_states():
    tower = make_tower(layers=1, moments=RANK)
    tokens_TD, offsets_B1, times_s_T = events(LENGTHS)
    leaves = [tokens_TD.requires_grad_(True), tower.moments.key_rD]

    def loss(output):
        return (output.moments.covariance**2).sum() + output.moments.mean.pow(3).sum()

    want = torch.autograd.grad(loss(tower(tokens_TD, offsets_B1, times_s_T)), leaves)
    _, out, _ = run(tower, tokens_TD, offsets_B1, times_s_T, [[3], [C], [2 * C + 1], [20], [37]])
    for a, b in zip(torch.autograd.grad(loss(out), leaves), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_a_broken_user_breaks_no_other():
    tower = make_tower(layers=1, moments=RANK)
    tokens_TD, offsets_B1, times_s_T = events([5, 6])
    with torch.no_grad():
        clean = tower(tokens_TD, offsets_B1, times_s_T).moments
        tokens_TD[:5] = torch.nan
        got = tower(tokens_TD, offsets_B1, times_s_T).moments
    assert got.mean[0].isnan().all() and torch.equal(got.mean[1], clean.mean[1])
    assert torch.equal(got.covariance[1], clean.covariance[1])


def test_long_histories_keep_their_precision():
    tower = make_tower(layers=1, moments=RANK, chunk=32).eval()
    batch = events([100_000])
    with torch.no_grad():
        got = tower(*batch).moments
        want = tower.double()(batch[0].double(), *batch[1:]).moments
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_a_candidate_reads_target_attention_to_first_order():
    """Against softmax over single events: the difference falls with the square of the scores."""
    torch.manual_seed(0)
    config = TowerConfig(width=D, moments=D, tower="elastic_causal")
    reader = MomentReader(config).double()
    events_ND, candidates_CD = torch.randn(50, D).double(), torch.randn(7, D).double()
    mean_D = events_ND.mean(0)
    covariance_DD = events_ND.T @ events_ND / 50 - mean_D[:, None] * mean_D
    moments, one = Moments(mean_D[None], covariance_DD[None]), torch.zeros(7, dtype=torch.int64)
    errors = []
    for size in (1e-2, 1e-3):
        with torch.no_grad():
            reader.query_rD.copy_(size * torch.eye(D))
            got_CD = reader(moments, candidates_CD, one)
            scores_CN = candidates_CD @ (size * D**-0.5 * torch.eye(D).double()) @ events_ND.T
            errors.append((got_CD - scores_CN.softmax(-1) @ events_ND).abs().max())
    assert errors[0] < 1e-2 * size_of(events_ND) and errors[1] < 0.02 * errors[0]


def test_candidates_of_one_impression_read_what_they_read_among_others():
    torch.manual_seed(0)
    reader = MomentReader(TowerConfig(width=D, moments=RANK, tower="elastic_causal"))
    both = Moments(torch.randn(2, D), torch.randn(2, RANK, D))
    candidates_CD, impression_C = torch.randn(9, D), torch.tensor([1] * 4 + [0] * 5)
    together_CD = reader(both, candidates_CD, impression_C)
    for number, rows in ((1, slice(0, 4)), (0, slice(4, 9))):
        alone = Moments(*(part[number : number + 1] for part in both))
        got = reader(alone, candidates_CD[rows], torch.zeros_like(impression_C[rows]))
        torch.testing.assert_close(got, together_CD[rows])


def size_of(x: torch.Tensor) -> float:
    return float(x.abs().max())


def test_moments_want_a_causal_tower_and_a_rank_that_fits():
    with pytest.raises(ValueError, match=r"set at most model\.width=16"):
        TowerConfig(width=16, moments=17)
    with pytest.raises(ValueError, match=r"model\.tower=elastic_causal"):
        TowerConfig(width=16, moments=4, tower="elastic")
