"""A history given in windows is the history given at once; only gradients end where a window does."""

import pytest
import torch
from histories import LOO, make, random_histories

from elastic_rec.feature_store.batches.splits import Targets
from elastic_rec.feature_store.batches.windows import HistoryWindows
from elastic_rec.models.retrieval.model import EventTable, RetrievalModel
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig

NUM_ITEMS = 60


def make_model(*, windows: bool) -> RetrievalModel:
    torch.manual_seed(0)
    return RetrievalModel(
        tables=[EventTable("item", NUM_ITEMS), EventTable("gap", 40)],
        tower=TowerConfig(width=16, experts=4, dropout=0.0, tower="elastic_causal", chunk=4),
        memory=MemoryConfig(num_keys=8, top_r=2),
        every_position=True,
        windows=windows,
    )


def all_items(targets, weights):
    return torch.arange(2, NUM_ITEMS).numpy(), torch.zeros(NUM_ITEMS - 2).numpy()


def whole_and_cut(stage: str, size: int):
    histories = random_histories()
    whole = make(histories, stage=stage, split=LOO, targets=Targets.every_event, max_history=60, candidates=all_items)
    windows = HistoryWindows(
        histories, size=size, split=LOO, stage=stage, max_history=60, seed=5, epoch=2, world_size=1
    )
    return whole, [windows.batch(number, windows.count, all_items) for number in range(windows.count)]


@pytest.mark.parametrize("size", [3, 4, 7, 25])
def test_a_query_after_all_windows_is_that_of_the_whole(size):
    whole, parts = whole_and_cut("valid", size)
    assert len(parts) > 2
    cut, plain = make_model(windows=True).eval(), make_model(windows=False).eval()
    with torch.no_grad():
        for part in parts:
            query_RD = cut.query(part)
        torch.testing.assert_close(query_RD, plain.query(whole), rtol=1e-5, atol=1e-6)
        once_more = [cut.query(part) for part in parts][-1]
    assert torch.equal(once_more, query_RD), "window 0 starts anew"


@pytest.mark.parametrize("size", [4, 7])
def test_the_losses_of_all_windows_add_up_to_the_one_of_the_whole(size):
    whole, parts = whole_and_cut("train", size)
    cut, plain = make_model(windows=True), make_model(windows=False)
    total = sum((cut(part)[0] * part.normaliser).detach() for part in parts)
    torch.testing.assert_close(total, (plain(whole)[0] * whole.normaliser).detach(), rtol=1e-5, atol=1e-4)


def test_gradients_end_at_a_window_and_so_does_what_is_held():
    _, parts = whole_and_cut("train", 7)
    model = make_model(windows=True)
    model(parts[0])[0].backward()
    state = model.tower.keep.state
    assert not any(t.requires_grad for t in vars(state).values() if isinstance(t, torch.Tensor))
    for part in parts[1:]:
        model.zero_grad()
        model(part)[0].backward()  # a graph into an earlier window would be gone by now
    assert model.tower.keep.state is None


def test_windows_out_of_order_and_other_towers_are_refused():
    _, parts = whole_and_cut("train", 7)
    model = make_model(windows=True)
    model(parts[0])
    with pytest.raises(ValueError, match=r"window 2 of .* where window 1 was due"):
        model(parts[2])
    with pytest.raises(ValueError, match=r"data\.window=0"):
        RetrievalModel(
            tables=[EventTable("item", NUM_ITEMS)],
            tower=TowerConfig(width=16, tower="elastic"),
            memory=MemoryConfig(enabled=False),
            windows=True,
        )
