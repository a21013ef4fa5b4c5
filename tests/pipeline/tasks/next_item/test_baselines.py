"""Counting baselines: each held to plain Python over lists and dictionaries, whatever the tiles and the ranks."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from next_item import make_task

from elastic_rec.feature_store.table.vocabulary import FIRST
from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.tasks.next_item import baselines
from elastic_rec.pipeline.tasks.next_item.baselines import HALF_LIVES, WEIGHTS, fit_baselines
from elastic_rec.pipeline.tasks.next_item.sharded_topk import tie_order
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask
from elastic_rec.pipeline.tasks.next_item.transition_counts import PairCounter


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def task(world, tmp_path_factory) -> NextItemTask:
    return make_task(helpers.make_store(tmp_path_factory.mktemp("data")), world)


class Judge:
    """The same five rules for one user at a time. users: all items of each user, in order; leave-one-out."""

    def __init__(self, users: list[list[int]], num_items: int) -> None:
        training = [items[:-2] for items in users]
        self.counts = Counter(item for items in training for item in items)
        self.next: dict[int, Counter] = defaultdict(Counter)
        for items in training:
            for first, second in pairwise(items):
                self.next[first][second] += 1
        ids = torch.arange(num_items)
        order = dict(zip(ids.tolist(), tie_order(ids).tolist(), strict=True))
        catalogue = sorted(range(FIRST, num_items), key=lambda item: (-self.counts[item], order[item]))
        self.popular = {item: place for place, item in enumerate(catalogue)}

    def scores(self, name: str, seen: list[int], *, half_life: float = 1, weight: float = 0) -> dict[int, float]:
        if name == "popularity":
            return dict(self.counts)
        if name == "last_item":
            return dict(self.next[seen[-1]]) if seen else {}
        if name == "recent":
            return {item: place + 1 for place, item in enumerate(seen)}
        own: dict[int, float] = defaultdict(float)
        for age, item in enumerate(reversed(seen)):
            own[item] += 2 ** (-age / half_life)
        own = {item: value / math.fsum(own.values()) for item, value in own.items()}
        if name == "frequency":
            return own
        found = {item: weight * value for item, value in own.items()}
        for lag, last in enumerate(list(reversed(seen))[:5], start=1):
            for item, count in self.next[last].items():
                found[item] = found.get(item, 0) + count / self.next[last].total() / lag
        return found

    def rank(self, scores: dict[int, float], target: int, seen: list[int], *, exclude_seen: bool) -> int:
        rivals = [item for item in self.popular if not (exclude_seen and item in seen and item != target)]
        key = {item: (-round(scores.get(item, 0), 12), self.popular[item]) for item in rivals}
        return sorted(rivals, key=key.__getitem__).index(target)


def users_of(task: NextItemTask) -> list[list[int]]:
    return [
        histories.columns["item"][a:b].tolist()
        for histories in task.histories(batch_size=50)
        for a, b in zip(histories.offsets[:-1], histories.offsets[1:], strict=True)
    ]


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("pairs", [64, 1 << 22])
def test_every_baseline_ranks_as_plain_counting_does(task, monkeypatch, pairs, exclude_seen):
    """Small tiles hold one user, large ones all. Lists of one event and users without any are among them."""
    monkeypatch.setattr(baselines, "TILE_PAIRS", pairs)
    judge = Judge(users_of(task), task.num_items)
    found = fit_baselines(task, batch_size=50, exclude_seen=exclude_seen)
    assert [b.name for b in found] == ["popularity", "last_item", "recent", "frequency", "markov_frequency"]
    for histories in task.histories(batch_size=50):
        n_B = np.diff(histories.offsets)
        before_B = np.where(np.arange(len(n_B)) % 7 == 0, 0, n_B - 1)  # some have nothing before the target
        target_B = histories.columns["item"][histories.offsets[:-1] + before_B]
        for baseline in found:
            ranks = baseline.rank_targets(histories, before_B, target_B, exclude_seen=exclude_seen)
            for user, rank in enumerate(ranks.tolist()):
                start = histories.offsets[user]
                seen = histories.columns["item"][start : start + before_B[user]].tolist()
                scores = judge.scores(baseline.name, seen, **baseline.settings)
                assert rank == judge.rank(scores, int(target_B[user]), seen, exclude_seen=exclude_seen), baseline.name


@pytest.mark.parametrize(("fit_users", "batch_size"), [(2048, 32), (10, 7), (10, 200)])
def test_half_life_and_weight_are_the_best_on_validation(task, monkeypatch, fit_users, batch_size):
    """Of the users asked, who are spread over the store: how many are read at a time does not show."""
    monkeypatch.setattr(baselines, "FIT_USERS", fit_users)
    judge = Judge(users_of(task), task.num_items)
    rows = np.concatenate([histories.rows for histories in task.histories(batch_size=50)])
    every = -(-len(rows) // fit_users)
    users = [items for row, items in zip(rows, users_of(task), strict=True) if row % every == 0]
    assert (len(users) < 2 * fit_users and every > 5) or users == users_of(task)

    def gain(name: str, **settings: float) -> float:
        total = 0.0
        for items in users:
            if len(items) >= 3:
                seen, target = items[:-2], items[-2]
                rank = judge.rank(judge.scores(name, seen, **settings), target, seen, exclude_seen=False)
                total += (rank < 10) / math.log2(rank + 2)
        return total

    *_, own, both = fit_baselines(task, batch_size=batch_size, exclude_seen=False)
    best = max(gain("frequency", half_life=h) for h in HALF_LIVES)
    assert gain("frequency", **own.settings) == pytest.approx(best)
    best = max(gain("markov_frequency", half_life=h, weight=w) for h in HALF_LIVES for w in WEIGHTS)
    assert gain("markov_frequency", **both.settings) == pytest.approx(best)


def test_no_more_pairs_are_kept_than_allowed_and_the_rarest_go():
    counter = PairCounter(3)
    for keys in ([7, 7, 7, 1], [2, 2, 9, 9, 9, 9], [5, 5, 5]):
        counter.add(np.array(keys))
    counter.merge()
    assert dict(zip(counter.keys.tolist(), counter.counts.tolist(), strict=True)) == {5: 3, 7: 3, 9: 4}
    assert counter.lost_up_to == 2


def test_what_is_dropped_again_and_again_adds_up():
    """Pair 1 comes three times, once before each merge, and is dropped three times."""
    counter = PairCounter(1)
    for _ in range(3):
        counter.add(np.array([1, 7, 7]))
        counter.merge()
    assert dict(zip(counter.keys.tolist(), counter.counts.tolist(), strict=True)) == {7: 6}
    assert counter.lost_up_to == 3


SCRIPT = """
import json, sys
import elastic_rec.models
from elastic_rec.pipeline.tasks.next_item.baselines import fit_baselines
from elastic_rec.pipeline.runtime.world import start_world
sys.path.insert(0, sys.argv[2])
from next_item import make_task
world = start_world("cpu")
found = fit_baselines(make_task(sys.argv[1], world), batch_size=48, exclude_seen=False)
counts = found[0].counts
tensors = [counts.counts_V, counts.next_P, counts.pair_count_P, counts.starts_V1]
with open(f"{sys.argv[3]}-{world.size}-{world.rank}.json", "w") as file:
    json.dump([[b.settings for b in found], *(each.tolist() for each in tensors)], file)
"""


def test_three_ranks_count_as_one(task, tmp_path):
    (tmp_path / "count.py").write_text(SCRIPT)
    arguments = [
        str(tmp_path / "count.py"),
        str(task.store.path),
        str(Path(helpers.__file__).parent),
        str(tmp_path / "found"),
    ]
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]):
        helpers.output_of([sys.executable, *launcher, *arguments])
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("found-*.json"))]
    assert len(found) == 4 and all(each == found[0] for each in found)
