"""The interest memory: exactly the rows read get gradients, use is counted, and a large bank costs little more."""

import time

import pytest
import torch

from elastic_rec.models.tiles import TileLayout
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.memory import InterestMemory, slot_usage
from elastic_rec.models.towers.elastic.recency import NUM_AGE_BUCKETS, NUM_POSITION_BUCKETS, age_bucket, position_bucket
from elastic_rec.models.towers.elastic.tower import ElasticTower

D, K = 16, 4


def make_memory(num_keys=16, heads=2, top_r=3):
    torch.manual_seed(0)
    return InterestMemory(TowerConfig(width=D, experts=K), MemoryConfig(num_keys=num_keys, heads=heads, top_r=top_r))


def events(lengths):
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
    T = int(offsets_B1[-1])
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1)), TileLayout.build(offsets_B1, T)


def test_gradients_reach_subkeys_query_net_and_exactly_the_rows_read():
    memory = make_memory()
    tokens_TD, layout = events([9, 4, 33])
    selection = memory.select(tokens_TD, layout)
    read_M = torch.zeros(256, dtype=torch.bool)
    read_M[selection.features.values()] = True
    assert 0 < read_M.sum() < 256
    assert selection.features.lengths().tolist() == [K * 2 * 3] * 3

    memory(tokens_TD, layout).square().sum().backward()
    rows_M = memory.bank.embeddings["bank"].weight.grad.abs().sum(1)
    assert torch.equal(rows_M > 0, read_M)
    subkeys_H2n = memory.select.subkeys.grad.abs().sum(-1)
    first_n = torch.zeros(2, 16, dtype=torch.bool)
    ids_HX = selection.features.values().view(-1, 2, 3).transpose(0, 1).flatten(1)
    for head in range(2):
        first_n[head, ids_HX[head] // 16] = True
    assert torch.equal(subkeys_H2n[:, 0] > 0, first_n)
    for name, parameter in memory.select.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_experts_are_seeds_plus_weighted_rows():
    memory = make_memory()
    tokens_TD, layout = events([9, 4])
    selection = memory.select(tokens_TD, layout)
    rows_BKHrD = memory.bank.embeddings["bank"].weight[selection.features.values().view(2, K, 2, 3)]
    weights_BKHr = selection.weights_BKS.view(2, K, 2, 3)
    torch.testing.assert_close(weights_BKHr.sum(-1), torch.ones(2, K, 2))
    want = memory.select.seeds.seeds_KD + (weights_BKHr[..., None] * rows_BKHrD).sum((2, 3))
    torch.testing.assert_close(memory(tokens_TD, layout), want)


def test_usage_counts_training_reads_only():
    memory = make_memory()
    tokens_TD, layout = events([9, 0, 4])
    selection = memory.select(tokens_TD, layout)
    of_users_with_events = selection.features.values().view(3, -1)[[0, 2]].flatten()
    want_M = torch.bincount(of_users_with_events, minlength=256)
    assert torch.equal(memory.select.counts.long(), want_M)
    memory.eval()(tokens_TD, layout)
    assert torch.equal(memory.select.counts.long(), want_M)
    assert memory.usage(reset=True)["share"] == (want_M > 0).double().mean()
    assert memory.usage() == {"share": 0.0, "effective": 0.0}
    assert "select.counts" not in memory.state_dict()


def test_slot_usage_known_answers():
    assert slot_usage(torch.tensor([5, 5, 5, 5])) == {"share": 1.0, "effective": pytest.approx(4.0)}
    assert slot_usage(torch.tensor([0, 8, 0, 0])) == {"share": 0.25, "effective": pytest.approx(1.0)}


def test_a_fresh_bank_is_used_widely():
    """512 users of 20 random events: queries differ enough to reach most of 256 slots, in a fairly even way."""
    memory = make_memory()
    memory(*events([20] * 512))
    usage = memory.usage()
    assert usage["share"] > 0.5 and usage["effective"] > 0.2 * 256, usage


def test_step_time_hardly_depends_on_the_number_of_slots():
    """256 times the slots; forward without gradients, since an unsharded table's gradient is dense by construction."""
    g = torch.Generator().manual_seed(1)
    tokens_TD, offsets_B1 = torch.randn(64 * 256, 32, generator=g), torch.arange(65) * 256
    small, large = (
        ElasticTower(TowerConfig(width=32), MemoryConfig(num_keys=num_keys)).eval() for num_keys in (64, 1024)
    )
    seconds = {small: [], large: []}
    with torch.no_grad():
        for _ in range(9):  # in turns, and the best of each: other processes only ever slow a run down
            for tower, times in seconds.items():
                start = time.perf_counter()
                tower(tokens_TD, offsets_B1, torch.arange(64 * 256))
                times.append(time.perf_counter() - start)
    ratio = min(seconds[large]) / min(seconds[small])
    print(f"tower forward, 64 users x 256 events, D=32, K=8: 2^20 slots / 2^12 slots = {ratio:.2f}x the time")
    assert ratio < 3


def test_recency_buckets():
    positions = torch.arange(20_000_000, dtype=torch.int64)[::7919]
    buckets = position_bucket(torch.cat([torch.arange(64), positions]))
    assert buckets[:16].tolist() == list(range(16))  # the newest events one by one
    assert buckets[[16, 22, 23, 31, 32]].tolist() == [16, 16, 17, 17, 18]  # then two per doubling
    assert (buckets[64:].diff() >= 0).all() and buckets.max() == NUM_POSITION_BUCKETS - 1
    ages = age_bucket(torch.tensor([-5, 0, 1, 2, 3, 4, 2**38 - 1, 2**38, 2**62]))
    assert ages.tolist() == [0, 0, 1, 2, 2, 3, 38, NUM_AGE_BUCKETS - 1, NUM_AGE_BUCKETS - 1]
