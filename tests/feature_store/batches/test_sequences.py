"""Sequences against lists of lists: what is taken, cut and joined, and in which unit times are."""

import numpy as np
import pytest

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.utils.jagged import offsets_of

LENGTHS = np.array([3, 0, 2, 40, 1])


@pytest.fixture
def sequences() -> Sequences:
    times = np.arange(LENGTHS.sum()) * 1000 + 999
    columns = {"item": np.arange(len(times)) + 2, "action": np.arange(len(times)) % 3}
    return Sequences(np.array([4, 7, 9, 10, 11]), offsets_of(LENGTHS), times, columns, units_per_second=1000)


def lists(sequences: Sequences) -> list[tuple[int, list]]:
    """(row, events as (time, item, action)) per user."""
    events = list(zip(sequences.times_s, *sequences.columns.values(), strict=True))
    edges = sequences.offsets.tolist()
    return [(int(row), events[a:b]) for row, a, b in zip(sequences.rows, edges[:-1], edges[1:], strict=True)]


@pytest.mark.parametrize("users", [[4, 0, 0, 1], [3, 2, 1], [], [1]], ids=["few", "most", "none", "empty"])
def test_taken_in_order_and_as_often_as_named(sequences, users):
    assert lists(sequences.take(np.array(users, np.int64))) == [lists(sequences)[user] for user in users]


def test_cut_and_joined(sequences):
    whole = lists(sequences)
    assert lists(sequences.slice(1, 4)) == whole[1:4] and lists(sequences.slice(2, 2)) == []
    assert lists(Sequences.concat([sequences.slice(0, 2), sequences.slice(2, 5)])) == whole
    ends = sequences.offsets[1:]
    newest = sequences.spans(np.maximum(sequences.offsets[:-1], ends - 2), ends)
    assert lists(newest) == [(row, events[-2:]) for row, events in whole]


def test_numbers_in_the_docstring():
    named = Sequences(np.array([4, 7, 9]), np.array([0, 3, 3, 5]), np.arange(5), {})
    assert named.lengths.tolist() == [3, 0, 2] and named.owners.tolist() == [0, 0, 0, 2, 2]
    assert named.places.tolist() == [0, 1, 2, 0, 1] and named.take(np.array([2, 0])).offsets.tolist() == [0, 2, 5]
    assert named.spans(np.array([1, 3, 3]), np.array([3, 3, 4])).offsets.tolist() == [0, 2, 2, 3]


def test_padding_and_seconds(sequences):
    padding = Sequences.padding(["item"], 1000)
    assert lists(padding) == [(-1, [])] and padding.units_per_second == 1000
    assert sequences.times_s.tolist() == list(range(len(sequences.times)))
