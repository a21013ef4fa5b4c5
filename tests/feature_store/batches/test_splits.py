"""Splits by hand, and on random histories: train, valid and test never overlap."""

import numpy as np
import pytest

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import SplitConfig, SplitKind, split_bounds
from elastic_rec.feature_store.table.times import parse_time_s


def histories_of(times: list[list[int]]) -> Sequences:
    lengths = [len(t) for t in times]
    flat = np.array([t for user in times for t in user], np.int64)
    items = np.arange(len(flat)) + 2
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Sequences(np.arange(len(times)), offsets, flat, {"item": items})


def bounds(config: SplitConfig, times: list[list[int]]) -> list[tuple[int, int, int]]:
    return list(zip(*(b.tolist() for b in split_bounds(config, histories_of(times))), strict=True))


def test_leave_one_out_by_hand():
    times = [list(range(n)) for n in (0, 1, 2, 3, 6)]
    assert bounds(SplitConfig(), times) == [(0, -1, -1), (0, -1, -1), (0, -1, 1), (1, 1, 2), (4, 4, 5)]


def test_global_time_by_hand():
    config = SplitConfig(kind="global_time", valid_time="10", test_time="20")
    times = [[1, 9, 10, 19, 20, 30], [], [1, 2], [10, 11, 20], [20, 21], [5, 20], [9, 10], [3, 3, 25, 25]]
    want = [(2, 2, 4), (0, -1, -1), (2, -1, -1), (0, -1, 2), (0, -1, -1), (1, -1, 1), (1, 1, -1), (2, -1, 2)]
    assert bounds(config, times) == want


@pytest.mark.parametrize("kind", list(SplitKind))
def test_parts_never_overlap(kind):
    rng = np.random.default_rng(0)
    times = [np.sort(rng.integers(0, 30, rng.integers(0, 12))).tolist() for _ in range(300)]
    moments = {"valid_time": "10", "test_time": "20"} if kind is SplitKind.global_time else {}
    found = bounds(SplitConfig(kind=kind, **moments), times)
    for (train_end, valid, test), user in zip(found, times, strict=True):
        assert 0 <= train_end <= len(user)
        for target in (valid, test):
            assert target == -1 or (1 <= target < len(user) and target >= train_end)
        assert valid == -1 or test == -1 or valid < test
        if kind is SplitKind.global_time:
            assert all(t < 10 for t in user[:train_end]) and (train_end == len(user) or user[train_end] >= 10)
            assert valid == -1 or 10 <= user[valid] < 20
            assert test == -1 or user[test] >= 20 > user[test - 1]
    assert min(sum(v >= 0 for _, v, _ in found), sum(t >= 0 for _, _, t in found)) > 50


def test_times_as_dates_or_seconds():
    assert parse_time_s("2001-01-01") == 978307200
    assert parse_time_s("2001-01-01T01:00:00+01:00") == 978307200
    assert parse_time_s("978307200") == parse_time_s(978307200) == 978307200
    assert parse_time_s("2001-01-01T00:00:00.25") == parse_time_s("978307200.25") == 978307201


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "global_time"}, "needs valid_time and test_time"),
        ({"kind": "global_time", "valid_time": "20", "test_time": "10"}, "valid_time=20 must be before test_time=10"),
        ({"kind": "global_time", "valid_time": "soon", "test_time": "10"}, "time 'soon': give an ISO date"),
        ({"valid_time": "10"}, "no effect on leave_one_out"),
        ({"kind": "random"}, "data.split.kind=random: set leave_one_out or global_time"),
    ],
)
def test_settings_that_make_no_sense(settings, match):
    with pytest.raises(ValueError, match=match):
        SplitConfig(**settings)
