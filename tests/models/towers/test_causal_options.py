"""What the causal tower can be asked for instead: no time, only experts or only events, SASRec in its place."""

import pytest
import torch
from towers import C, D, H, K, events, every_batch

from elastic_rec.models.retrieval.model import EventTable, RetrievalModel
from elastic_rec.models.towers.base import build_tower
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chunk": 0}, "model.chunk=0: set at least 1"),
        ({"tower": "both"}, "model.tower=both: set one of elastic_causal, elastic, sasrec"),
    ],
)
def test_configs_say_what_to_set(bad, message):
    with pytest.raises(ValueError, match=message):
        TowerConfig(**bad)


def test_without_time_only_the_order_counts():
    config = {"width": D, "heads": H, "experts": K, "dropout": 0.0, "chunk": C}
    tokens_TD, offsets_B1, times_s_T = events([9, 37])
    for kind in ("elastic_causal", "elastic"):
        for time, same in (("none", True), ("past", False)):
            tower = build_tower(TowerConfig(**config, tower=kind, time=time), MemoryConfig(num_keys=8)).eval()
            one, other = (tower(tokens_TD, offsets_B1, t).user_embedding for t in (times_s_T, times_s_T // 1000))
            assert torch.equal(one, other) is same, (kind, time)
            assert any("half_life" in name for name, _ in tower.named_parameters()) is (
                kind == "elastic_causal" and time == "past"
            )


def moved_by(reads, event, position):
    """Whether an event's content reaches the output at a position of a user of four chunks, in a tower of one layer."""
    torch.manual_seed(0)
    config = TowerConfig(
        width=D, heads=H, experts=K, layers=1, dropout=0.0, tower="elastic_causal", chunk=C, reads=reads
    )
    tower = build_tower(config, MemoryConfig(enabled=False)).eval()
    tokens_TD, offsets_B1, times_s_T = events([4 * C])
    before = tower(tokens_TD, offsets_B1, times_s_T).tokens[position]
    tokens_TD[event] += 1
    return not torch.equal(before, tower(tokens_TD, offsets_B1, times_s_T).tokens[position])


@pytest.mark.parametrize(
    ("event", "position", "experts", "near"),
    [
        (0, C, True, True),  # in the chunk before: folded into the experts, and seen directly
        (0, 3 * C, True, False),  # three chunks back: through the experts only
        (3 * C, 3 * C + 1, False, True),  # in the own chunk: not folded yet
        (3 * C, 3 * C, True, True),  # itself
        (1, 0, False, False),  # later
    ],
)
def test_what_an_event_reads_can_be_narrowed(event, position, experts, near):
    assert moved_by("both", event, position) is (experts or near)
    assert moved_by("experts", event, position) is experts
    assert moved_by("events", event, position) is near


def test_sasrec_is_trained_and_asked_like_the_tower():
    torch.manual_seed(0)
    config = TowerConfig(width=16, dropout=0.0, tower="sasrec")
    tables = [EventTable("item", 102), EventTable("gap", 40)]
    with pytest.raises(ValueError, match="has no interest memory: set memory"):
        RetrievalModel(tables=tables, tower=config, memory=MemoryConfig())
    off = MemoryConfig(enabled=False)
    model = RetrievalModel(tables=tables, tower=config, memory=off, every_position=True, max_history=70)
    batch = every_batch()
    loss, (query_PD, loss_P, _) = model(batch)
    assert len(query_PD) == len(loss_P) == len(batch.targets) and loss.isfinite()
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.tower.parameters())
    lengths_R = batch.ends - batch.starts
    ends_R = lengths_R.cumsum(0)[lengths_R > 0] - 1
    torch.testing.assert_close(query_PD[ends_R], model.eval().query(batch)[lengths_R > 0], rtol=1e-5, atol=1e-6)
