"""Prefix batches against a plain Python definition, and leaks: what lies behind a cut changes nothing."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from histories import BY_TIME, LOO, make, random_histories

from elastic_rec.feature_store.batches.examples import NUM_GAP_BUCKETS, gap_buckets
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import Targets, split_bounds


def rows_of(batch: PrefixBatch) -> list[tuple]:
    """Each prefix row as plain values: (user row, items, actions, gaps, times, target, weight)."""
    columns = [batch.features[name].values() for name in ("item", "action", "gap")]
    found = []
    for r in range(len(batch.rows)):
        span = slice(int(batch.starts[r]), int(batch.ends[r]))
        parts = [c[span].tolist() for c in (*columns, batch.times_s)]
        found.append((int(batch.rows[r]), *parts, int(batch.targets[r]), float(batch.weights[r])))
    return found


@pytest.mark.parametrize("max_history", [1, 20, 1000])
@pytest.mark.parametrize("split", [LOO, BY_TIME])
@pytest.mark.parametrize("stage", ["train", "valid", "test", "score"])
def test_rows_by_definition(stage, split, max_history):
    h = random_histories()
    batch = make(h, stage=stage, split=split, max_history=max_history)
    bounds = split_bounds(split, h)
    per_user = 3 if stage == "train" else 1
    rows = rows_of(batch)
    assert len(rows) == per_user * len(h.rows)
    gaps = gap_buckets(h)
    covered = set()
    for r, (row, items, actions, gap, times, target, weight) in enumerate(rows):
        user = r // per_user
        begin, n = int(h.offsets[user]), int(h.offsets[user + 1] - h.offsets[user])
        assert row == h.rows[user]
        if stage == "score":
            end = n
            assert (target, weight) == (0, 1.0)
        elif stage == "train":
            train_end = int(bounds.train_end[user])
            if train_end < 2:
                assert (items, target, weight) == ([], 0, 0.0)
                continue
            # Which position was drawn shows in the prefix; several may fit where items repeat, one must.
            low = 1 + int(np.floor((r % per_user) / per_user * (train_end - 1)))
            high = 1 + int(np.ceil((r % per_user + 1) / per_user * (train_end - 1)))
            fits = [
                p
                for p in range(low, min(high, train_end))
                if h.columns["item"][begin + max(0, p - max_history) : begin + p].tolist() == items
                and h.times_s[begin + max(0, p - max_history) : begin + p].tolist() == times
                and h.columns["item"][begin + p] == target
            ]
            assert fits and weight == 1.0
            end = fits[0]
        else:
            position = int(getattr(bounds, stage)[user])
            if position < 0:
                assert (items, target, weight) == ([], 0, 0.0)
                continue
            end = position
            assert (target, weight) == (h.columns["item"][begin + end], 1.0)
        span = slice(begin + max(0, end - max_history), begin + end)  # the NEWEST max_history events
        assert items == h.columns["item"][span].tolist() and times == h.times_s[span].tolist()
        assert actions == h.columns["action"][span].tolist() and gap == gaps[span].tolist()
        covered |= set(range(span.start, span.stop))
    assert len(batch.times_s) == len(batch.features["item"].values()) >= len(covered)
    if stage != "train":  # above, fits[0] may stand for another position of equal content
        assert len(batch.times_s) == len(covered)
    assert float(batch.normaliser) == len(h.rows) * per_user


def test_events_outside_every_prefix_stay_out():
    """Targets far apart, short prefixes: the events between the prefixes of one user are not in the batch."""
    h = random_histories(lengths=(1000,))
    batch = make(h, prefixes_per_user=4, max_history=10)
    assert len(batch.times_s) == 40 and batch.features.lengths().tolist() == [40, 40, 40, 0]
    assert batch.starts.tolist() == [0, 10, 20, 30]


def test_targets_spread_over_history_and_change_with_epoch():
    h = random_histories(lengths=(402,))
    h = replace(h, columns={"item": np.arange(402) + 2, "action": np.ones(402, np.int64)})
    drawn = np.array([make(h, epoch=e, prefixes_per_user=4).targets.numpy() - 2 for e in range(400)])
    for j in range(4):  # 399 choices in 4 strata
        assert drawn[:, j].min() >= 1 + j * 399 // 4 and drawn[:, j].max() <= 1 + (j + 1) * 399 // 4
    assert drawn.min() < 6 and drawn.max() >= 396  # both ends are reached: 1 and 399
    assert len(np.unique(drawn)) > 350
    assert not np.array_equal(make(h, seed=6).targets, make(h, seed=5).targets)


def test_sampled_targets_do_not_depend_on_the_batch_a_user_is_in():
    """Any sub-batch, any order, another world size: the same rows with the same content per user."""
    h = random_histories()
    whole = rows_of(make(h))
    for users in ([0, 2, 4, 6, 8], [9, 3], [7]):
        lengths = np.diff(h.offsets)[users]
        index = np.concatenate([np.arange(h.offsets[u], h.offsets[u + 1]) for u in users])
        part = Sequences(
            h.rows[users],
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            h.times[index],
            {name: values[index] for name, values in h.columns.items()},
            num_global_rows=h.num_global_rows,
        )
        batch = make(part, world_size=2)
        assert rows_of(batch) == [whole[u * 3 + j] for u in users for j in range(3)]
        assert float(batch.normaliser) == 15.0


def with_changed_events(h: Sequences, at: np.ndarray, *, later_s: int) -> Sequences:
    """Events `at` get another item, another action, and a later time."""
    columns = {name: values.copy() for name, values in h.columns.items()}
    for values in columns.values():
        values[at] += np.random.default_rng(1).integers(1, 40, len(at))
    times = h.times.copy()
    times[at] += later_s
    return replace(h, columns=columns, times=times)


def differing_fields(a: PrefixBatch, b: PrefixBatch) -> set[str]:
    names = {f.name for f in fields(PrefixBatch)} - {"features", "window"}
    found = {name for name in names if not torch.equal(getattr(a, name), getattr(b, name))}
    same = torch.equal(a.features.values(), b.features.values()) and torch.equal(
        a.features.lengths(), b.features.lengths()
    )
    return found if same else found | {"features"}


@pytest.mark.parametrize("split", [LOO, BY_TIME])
@pytest.mark.parametrize("stage", ["train", "valid", "test"])
def test_changing_events_behind_the_cut_changes_nothing(stage, split):
    """Behind the last event a stage may show: not a bit of the batch changes. The target itself: only `targets`."""
    h = random_histories()
    bounds = split_bounds(split, h)
    # Under a global split a later time moves an event into another part, which is the split's very point.
    later_s = 10_000 if split is LOO else 0
    checked = 0
    for user, (begin, end) in enumerate(zip(h.offsets[:-1], h.offsets[1:], strict=True)):
        target = int(bounds.train_end[user]) - 1 if stage == "train" else int(getattr(bounds, stage)[user])
        if target < 1:
            continue
        behind = np.arange(begin + target + 1, end)
        before = make(h, stage=stage, split=split)
        after = make(with_changed_events(h, behind, later_s=later_s), stage=stage, split=split)
        assert differing_fields(before, after) == set()
        if stage != "train":
            changed = with_changed_events(h, np.arange(begin + target, end), later_s=later_s)
            different = differing_fields(before, make(changed, stage=stage, split=split))
            assert different - {"query_gap_s"} == {"targets"}  # its time is that of the query
        checked += 1
    assert checked >= 4


def test_changing_events_behind_a_training_cut_changes_nothing():
    """One cut per user, so everything behind the drawn target (training events among it) must be out of sight."""
    h = random_histories(lengths=(20, 40, 129))
    h = replace(h, columns={"item": np.arange(189) + 2, "action": np.ones(189, np.int64)})
    num_behind = []
    for epoch in range(10):
        before = make(h, prefixes_per_user=1, epoch=epoch)
        target_T = before.targets.numpy() - 2  # items are numbered like events
        behind = np.concatenate([np.arange(t + 1, end) for t, end in zip(target_T, h.offsets[1:], strict=True)])
        num_behind.append(len(behind))
        after = make(with_changed_events(h, behind, later_s=10_000), prefixes_per_user=1, epoch=epoch)
        assert differing_fields(before, after) == set()
    assert max(num_behind) > 60


@pytest.mark.parametrize("split", [LOO, BY_TIME])
def test_held_out_events_never_reach_training(split):
    """Every event has its own item: no held-out item is a training input or target, in any of many epochs."""
    h = random_histories(lengths=(2, 3, 5, 9, 40))
    num_events = int(h.offsets[-1])
    h = replace(h, columns={"item": np.arange(num_events) + 2, "action": np.ones(num_events, np.int64)})
    bounds = split_bounds(split, h)
    held_out = np.concatenate([np.arange(h.offsets[u] + bounds.train_end[u], h.offsets[u + 1]) for u in range(5)]) + 2
    targets = {stage: make(h, stage=stage, split=split).targets.numpy() for stage in ("valid", "test")}
    seen = set()
    for epoch in range(200):
        batch = make(h, epoch=epoch, split=split)
        seen |= set(batch.features["item"].values().tolist()) | set(batch.targets.tolist())
    assert not seen & set(held_out.tolist())
    for found in targets.values():
        real = set(found[found > 0].tolist())
        assert real and real <= set(held_out.tolist())
    # and the row that predicts a target never shows it
    for stage in ("valid", "test"):
        assert all(target not in items for _, items, _, _, _, target, _ in rows_of(make(h, stage=stage, split=split)))


def test_gap_buckets():
    times = np.array([100, 100, 101, 104, 111, 10**9, 5, 5 + 2**50, 7])
    h = Sequences(np.arange(4), np.array([0, 6, 6, 8, 9]), times, {"item": np.full(9, 2)})
    assert gap_buckets(h).tolist() == [0, 1, 2, 3, 4, 30, 0, NUM_GAP_BUCKETS - 1, 0]
    for bits in range(1, 38):  # exact at powers of two
        for gap, want in ((2**bits - 2, bits), (2**bits - 1, bits + 1)):
            h = Sequences(np.arange(1), np.array([0, 2]), np.array([9, 9 + gap]), {})
            assert gap_buckets(h)[1] == want


def test_gap_looks_before_the_truncated_prefix():
    h = random_histories(lengths=(30,))
    batch = make(h, stage="score", max_history=5)
    assert batch.features["gap"].values().tolist() == gap_buckets(h)[25:].tolist()
    assert batch.features["gap"].values()[0] > 0


def test_unknown_targets_and_padding_users_weigh_nothing():
    h = random_histories(lengths=(5, 5))
    items = h.columns["item"].copy()
    items[4] = 1
    batch = make(replace(h, columns={**h.columns, "item": items}), stage="test")
    assert batch.weights.tolist() == [0.0, 1.0]
    padding = replace(Sequences.padding(["item"]), num_global_rows=5)
    for stage, rows in (("train", 3), ("valid", 1), ("test", 1), ("score", 1)):
        batch = make(padding, stage=stage, world_size=2)
        assert batch.weights.tolist() == [0.0] * rows and batch.rows.tolist() == [-1] * rows
        assert batch.features.stride() == 1 and batch.features.lengths().tolist() == [0, 0, 0]
        assert batch.starts.tolist() == batch.ends.tolist() == [0] * rows
        assert float(batch.normaliser) == 2.5 * rows


def test_candidates_go_to_row_0_and_shapes_are_right():
    h = random_histories(lengths=(9, 0, 12))
    asked = {}

    def sampler(targets, weights):
        asked.update(targets=targets, weights=weights)
        return np.array([7, 8, 9]), np.array([0.5, 1.5, 2.5], np.float32)

    batch = make(h, candidates=sampler)
    assert batch.features.keys() == ["item", "action", "gap", "candidate"] and batch.features.stride() == 3
    assert batch.features["candidate"].lengths().tolist() == [3, 0, 0]
    assert batch.features["candidate"].values().tolist() == [7, 8, 9] and batch.log_q.tolist() == [0.5, 1.5, 2.5]
    assert np.array_equal(asked["targets"], batch.targets) and np.array_equal(asked["weights"], batch.weights)
    without = make(h)
    assert len(without.log_q) == 0 and without.features["candidate"].lengths().tolist() == [0, 0, 0]
    dtypes = {f.name: getattr(batch, f.name).dtype for f in fields(PrefixBatch) if f.name not in ("features", "window")}
    floats = {"weights", "log_q", "normaliser"}
    assert all(dtypes[n] == (torch.float32 if n in floats else torch.int64) for n in dtypes)
    assert batch.normaliser.shape == () and batch.features.values().dtype == torch.int64


@pytest.mark.parametrize("settings", [{"stage": "training"}, {"prefixes_per_user": 0}, {"max_history": 0}])
def test_wrong_arguments(settings):
    with pytest.raises(ValueError, match="stage is one of train, valid, test, score"):
        make(random_histories(), **settings)


@pytest.mark.parametrize("max_history", [1, 20, 1000])
@pytest.mark.parametrize("split", [LOO, BY_TIME])
def test_a_target_behind_every_event(split, max_history):
    """One stretch of training events per user, whose targets are the same stretch one event later."""
    h = random_histories()
    batch = make(h, targets=Targets.every_event, split=split, max_history=max_history)
    items, done = batch.features["item"].values(), 0
    for user, train_end in enumerate(split_bounds(split, h).train_end):
        span = slice(int(batch.starts[user]), int(batch.ends[user]))
        got, targets = items[span].tolist(), batch.targets[done : done + span.stop - span.start].tolist()
        done += len(targets)
        train = h.columns["item"][h.offsets[user] : h.offsets[user] + train_end].tolist()
        length = min(max(train_end - 1, 0), max_history)
        assert len(got) == length
        at = (
            [i for i in range(len(train) - length) if train[i : i + length + 1] == [*got[:1], *targets]] if got else [0]
        )
        assert at and got[1:] == targets[:-1]
    assert done == len(batch.targets) == len(batch.weights) == int(batch.normaliser)
    assert (batch.weights == 1).all() and batch.rows.tolist() == h.rows.tolist()


def test_windows_of_long_histories_move_with_the_epoch_and_not_with_the_ranks():
    h = random_histories(lengths=(129,) * 40)
    starts = {}
    for epoch in range(3):
        batch = make(h, targets=Targets.every_event, max_history=10, epoch=epoch)
        starts[epoch] = batch.times_s[batch.starts].tolist()
    assert starts[0] != starts[1] != starts[2]
    cut = h.offsets[20]
    columns = {name: values[cut:] for name, values in h.columns.items()}
    half = Sequences(h.rows[20:], h.offsets[20:] - cut, h.times[cut:], columns, num_global_rows=40)
    batch = make(half, targets=Targets.every_event, max_history=10, epoch=1, world_size=2)
    assert batch.times_s[batch.starts].tolist() == starts[1][20:]


def test_held_out_events_change_nothing_in_every_position_training():
    h = random_histories()
    changed = replace(h, columns={name: values.copy() for name, values in h.columns.items()}, times=h.times.copy())
    for end, n in zip(h.offsets[1:], np.diff(h.offsets), strict=True):
        for back in range(1, min(2, n) + 1):
            changed.columns["item"][end - back] = 49 - changed.columns["item"][end - back]
            changed.times[end - back] += 7
    one, other = make(h, targets=Targets.every_event), make(changed, targets=Targets.every_event)
    assert torch.equal(one.features.values(), other.features.values())
    assert torch.equal(one.targets, other.targets) and torch.equal(one.times_s, other.times_s)
