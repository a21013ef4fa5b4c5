"""Ranking against a sharded catalogue, and metrics: each held to a few boring lines of NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.tasks.next_item import sharded_topk as retrieval
from elastic_rec.pipeline.tasks.next_item.metrics import MISS, Coverage, RetrievalMetrics

NUM_ITEMS, FIRST, WIDTH = 53, 2, 8


@pytest.fixture
def world():
    alone = start_world("cpu")
    yield alone
    dist.destroy_process_group()


def problem(num_queries: int, seed: int = 0):
    """Integer-valued vectors, so that scores are exact and ties are common."""
    g = torch.Generator().manual_seed(seed)
    table_VD = torch.randint(-1, 2, (NUM_ITEMS, WIDTH), generator=g).float()
    query_RD = torch.randint(-1, 2, (num_queries, WIDTH), generator=g).float()
    target_R = torch.randint(FIRST, NUM_ITEMS, (num_queries,), generator=g)
    owner_S = torch.randint(0, num_queries, (num_queries * 9,), generator=g)
    item_S = torch.randint(0, NUM_ITEMS, (num_queries * 9,), generator=g)  # reserved ids and repeats among them
    return table_VD, query_RD, target_R, (owner_S, item_S)


def murmur(x: int) -> int:
    """murmur3's 32-bit finaliser, https://github.com/aappleby/smhasher."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def boring(table_VD, query_RD, target_R, seen, k):
    """Per query: (rank among all, rank among unseen, top-k ids among unseen), by (score desc, hash of the id)."""
    result = []
    for r, (query_D, target) in enumerate(zip(query_RD, target_R.tolist(), strict=True)):
        score_V = (table_VD @ query_D).numpy()
        order = sorted(range(FIRST, NUM_ITEMS), key=lambda i, s=score_V: (-s[i], murmur(i)))
        mine = {int(i) for o, i in zip(*seen, strict=True) if o == r}
        unseen = [i for i in order if i not in mine]
        with_target = [i for i in order if i not in mine or i == target]
        result.append((order.index(target), with_target.index(target), (unseen + [-1] * k)[:k]))
    return result


def check(catalogue, table_VD, query_RD, target_R, seen, k: int) -> None:
    want = boring(table_VD, query_RD, target_R, seen, k)
    rank_all, rank_unseen = catalogue.rank_targets(query_RD, target_R, seen)
    assert rank_all.tolist() == [w[0] for w in want]
    assert rank_unseen.tolist() == [w[1] for w in want]
    ids, scores = catalogue.top_k(query_RD, k, seen)
    assert ids.tolist() == [w[2] for w in want]
    for r, row in enumerate(ids.tolist()):
        expected = [float(table_VD[i] @ query_RD[r]) if i >= 0 else -float("inf") for i in row]
        assert scores[r].tolist() == expected


@pytest.mark.parametrize(("chunk", "tile"), [(7, 1 << 22), (16384, 1 << 22), (16384, 35), (16384, 1)])
@pytest.mark.parametrize("k", [10, 60])  # 60: more than there are items
def test_catalogue_equals_sorting(world, monkeypatch, chunk, tile, k):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    monkeypatch.setattr(retrieval, "TILE", tile)
    table_VD, *rest = problem(11)
    catalogue = retrieval.ShardedCatalogue(first_row=0, weight_VD=table_VD, first_item=FIRST, world=world)
    check(catalogue, table_VD, *rest, k)


def test_rivals_can_be_narrowed_to_candidates(world):
    table_VD, query_RD, target_R, seen = problem(11)
    candidates_V = torch.rand(NUM_ITEMS, generator=torch.Generator().manual_seed(0)) < 0.6
    catalogue = retrieval.ShardedCatalogue(
        first_row=0, weight_VD=table_VD, first_item=FIRST, world=world, candidates_V=candidates_V
    )
    rank_all, rank_unseen = catalogue.rank_targets(query_RD, target_R, seen)
    for r, target in enumerate(target_R.tolist()):
        score_V = table_VD @ query_RD[r]
        above = {i for i in range(FIRST, NUM_ITEMS) if (-score_V[i], murmur(i)) < (-score_V[target], murmur(target))}
        rivals = {i for i in above if candidates_V[i]}
        mine = {int(i) for o, i in zip(*seen, strict=True) if o == r}
        assert (rank_all[r], rank_unseen[r]) == (len(rivals), len(rivals - mine))
    assert (
        rank_all
        < retrieval.ShardedCatalogue(first_row=0, weight_VD=table_VD, first_item=FIRST, world=world).rank_targets(
            query_RD, target_R, seen
        )[0]
    ).any()


def _on_rank(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World(rank=rank, size=size, device=torch.device("cpu"))
    table_VD, *rest = problem(3 + 4 * rank, seed=rank)  # uneven queries, their own on each rank
    table_VD = problem(1)[0]
    low, high = [(0, 1), (1, 30), (30, NUM_ITEMS)][rank]  # uneven shards, one of them without a rankable item
    catalogue = retrieval.ShardedCatalogue(
        first_row=low, weight_VD=table_VD[low:high], first_item=FIRST, world=world
    )  # fmt: skip
    check(catalogue, table_VD, *rest, 10)
    empty = torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64)
    nobody = (torch.empty(0, dtype=torch.int64),) * 2
    queries = (rest[0], rest[1], rest[2]) if rank == 0 else (*empty, nobody)  # a rank that has nothing left to ask
    check(catalogue, table_VD, *queries, 10)
    dist.destroy_process_group()


def test_catalogue_over_three_ranks_equals_sorting(tmp_path):
    mp.spawn(_on_rank, args=(3, str(tmp_path)), nprocs=3)


def test_sort_key_orders_floats_and_inverts():
    score = torch.tensor([-torch.inf, -3.5, -1e-30, 0.0, 1e-30, 2.0, torch.inf])
    ids = torch.tensor([0, 1, 2, 7, 16383, 2**31 - 2, 2**31 - 1])
    key = retrieval.sort_key(score, ids)
    assert (key.diff() > 0).all()
    back_ids, back = retrieval.from_sort_key(key)
    assert back_ids.tolist() == ids.tolist() and back.tolist() == score.tolist()
    same = retrieval.sort_key(torch.tensor([0.0, -0.0, 0.0]), torch.tensor([5, 3, 4]))
    assert same.argsort(descending=True).tolist() == sorted(range(3), key=lambda i: murmur([5, 3, 4][i]))


def test_metrics_equal_their_definitions(world):
    ranks = torch.tensor([0, 4, 5, 9, 10, 99, MISS])
    lengths = torch.tensor([1, 19, 20, 49, 50, 500, 49])
    kinds = torch.tensor([0, 2, 2, 0, 2, 2, 0])
    metrics = RetrievalMetrics(k=[5, 10], length_edges=[20, 50], device=world.device)
    metrics.update(ranks[:2], lengths[:2], kinds[:2])
    metrics.update(ranks[2:], lengths[2:], kinds[2:])
    got = metrics.compute()
    r = ranks.double().numpy()
    r[-1] = np.inf
    assert got["users"] == 7
    assert got["mrr"] == pytest.approx(np.mean(1 / (r + 1)))
    assert got["hr@5"] == pytest.approx(np.mean(r < 5)) and got["hr@10"] == pytest.approx(np.mean(r < 10))
    assert got["ndcg@10"] == pytest.approx(np.mean(np.where(r < 10, 1 / np.log2(r + 2), 0)))
    assert {name: part["users"] for name, part in got["by_length"].items()} == {"0-19": 2, "20-49": 3, "50+": 2}
    assert got["by_length"]["50+"]["hr@10"] == 0
    assert list(got["by_target"]) == ["repeat_recent", "new"], "a kind without users is left out"
    repeat, new = got["by_target"].values()
    assert (repeat["users"], new["users"]) == (3, 4) and repeat["share"] == pytest.approx(3 / 7)
    assert repeat["hr@10"] == pytest.approx(2 / 3) and repeat["mrr"] == pytest.approx((1 + 1 / 10) / 3)
    missed = RetrievalMetrics(k=[5, 10], length_edges=[20], device=world.device)
    missed.update(*(torch.tensor([value]) for value in (MISS, 3, 0)))
    assert missed.compute()["mrr"] == 0
    whole = RetrievalMetrics(k=[10], length_edges=[], device=world.device)
    whole.update(ranks, lengths, kinds)
    assert whole.compute()["by_length"]["0+"]["users"] == 7


def test_coverage_counts_distinct_items(world):
    coverage = Coverage(num_items=12, first_item=2, device=world.device)
    coverage.update(torch.tensor([[2, 3], [3, -1]]))
    coverage.update(torch.tensor([[2, 5]]))
    assert coverage.compute() == pytest.approx(3 / 10)
