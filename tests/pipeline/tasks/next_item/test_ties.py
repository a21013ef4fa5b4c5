"""Equal scores: a fixed order that says nothing of popularity, the same in ranks and in lists. NaN is never best."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from elastic_rec.pipeline.runtime.errors import NonFiniteError
from elastic_rec.pipeline.runtime.world import start_world
from elastic_rec.pipeline.tasks.next_item.sharded_topk import ShardedCatalogue, from_tie_order, tie_order

FIRST = 2


@pytest.fixture(scope="module")
def world():
    yield start_world("cpu")
    dist.destroy_process_group()


def padding_histories() -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.zeros(0, dtype=torch.int64),) * 2


def catalogue(world, weight_VD: torch.Tensor) -> ShardedCatalogue:
    return ShardedCatalogue(first_row=0, weight_VD=weight_VD, first_item=FIRST, world=world)


def test_the_order_of_ties_is_a_bijection_and_alike_in_numpy_and_torch():
    ids = np.concatenate([np.arange(1 << 16), np.array([2**31 - 1, 2**32 - 2, 2**32 - 1])])
    mixed = tie_order(ids)
    assert mixed[1] == 0x514E28B7 and mixed.min() >= 0 and mixed.max() < 2**32
    assert (from_tie_order(mixed) == ids).all()
    assert (tie_order(torch.from_numpy(ids)).numpy() == mixed).all()
    assert (from_tie_order(torch.from_numpy(mixed)).numpy() == ids).all()


def test_equal_scores_are_worth_chance_not_popularity(world):
    """Items are numbered by frequency, which falls as 1/rank: ten items by id would hit 47 %, chance is 3.3 %."""
    num_items = 300
    mass_V = 1 / np.arange(1, num_items + 1)
    mass_V /= mass_V.sum()
    targets = torch.arange(FIRST, FIRST + num_items)
    zeros = catalogue(world, torch.zeros(FIRST + num_items, 4))
    rank, _ = zeros.rank_targets(torch.ones(num_items, 4), targets, padding_histories())
    assert sorted(rank.tolist()) == list(range(num_items))
    assert mass_V[:10].sum() > 0.45, "what popularity would give"
    assert mass_V[rank.numpy() < 10].sum() < 0.1
    assert abs(np.corrcoef(rank.numpy(), np.arange(num_items))[0, 1]) < 0.1
    ids, _ = zeros.top_k(torch.ones(1, 4), 10)
    assert ids[0].tolist() == targets[rank.argsort()][:10].tolist(), "lists follow the same order"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused(world, number):
    weight_VD = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    weight_VD[7, 1] = number
    for ask in (
        lambda broken: broken.rank_targets(torch.ones(3, 4), torch.tensor([7, 8, 9]), padding_histories()),
        lambda broken: broken.top_k(torch.ones(3, 4), 5),
    ):
        with pytest.raises(NonFiniteError, match="a score is NaN or infinite"):
            ask(catalogue(world, weight_VD))
        ask(catalogue(world, weight_VD.nan_to_num(0, 1, -1)))
    huge = torch.full((40, 4), 1e30)
    with pytest.raises(NonFiniteError, match="overflows float32"):
        catalogue(world, huge).top_k(torch.full((1, 4), 1e30), 5)


def test_a_nan_is_the_worst_rank_should_one_ever_pass(world, monkeypatch):
    monkeypatch.setattr("elastic_rec.pipeline.tasks.next_item.sharded_topk.ScoreWatch.check", lambda self, world: None)
    weight_VD = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    weight_VD[7] = float("nan")
    rank, _ = catalogue(world, weight_VD).rank_targets(torch.ones(2, 4), torch.tensor([7, 8]), padding_histories())
    assert rank[0] >= 37, "as a target: below every other item"
    assert rank[1] >= 1, "as a rival: above the target"
