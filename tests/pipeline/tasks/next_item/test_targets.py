"""What is predicted: kinds of target, what seen=auto comes to, and stages without a target."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import SplitConfig
from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.evaluate import run_evaluation
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import start_world
from elastic_rec.pipeline.tasks.next_item.targets import (
    KINDS,
    held_out_targets,
    is_repeat,
    require_targets,
    resolve_seen,
    survey,
    target_kinds,
)
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask
from elastic_rec.pipeline.train import train


@pytest.fixture(scope="module")
def world():
    yield start_world("cpu")
    dist.destroy_process_group()


def histories_of(*users: list[int]) -> Sequences:
    items = np.array([item for user in users for item in user], np.int64)
    offsets = np.cumsum([0, *(len(user) for user in users)])
    return Sequences(np.arange(len(users)), offsets, np.arange(len(items)), {"item": items})


def store_of(folder, *users: list[int]) -> str:
    """A store of users with an event a day."""
    rows = [(user, item, 86_400 * day) for user, items in enumerate(users) for day, item in enumerate(items)]
    table = pa.table(
        dict(zip(("user_id", "item_id", "timestamp"), map(pa.array, zip(*rows, strict=True)), strict=True))
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "e.parquet")
    ingest(IngestConfig(input=[str(folder / "e.parquet")], out=str(folder / "s"), num_buckets=2, threads=1))
    return str(folder / "s")


def config_of(store: str, **split) -> TrainConfig:
    config = TrainConfig()
    config.data.store, config.data.split = store, SplitConfig(**split)
    return config


def test_kinds_by_how_far_back_the_item_lies():
    filler = list(range(100, 163))  # 63 events
    users = [
        [7, *filler, 7],  # 64 events before: 7 is the oldest of the newest 64
        [7, 99, *filler, 7],  # 65 before
        [7, 5, 7, 6, 7],  # the newest occurrence counts
        [*filler, 7],  # new
        [7],  # nothing before
    ]
    histories = histories_of(*users)
    before = np.array([len(user) - 1 for user in users])
    found = target_kinds(histories, before, np.full(5, 7))
    assert [KINDS[kind] for kind in found] == ["repeat_recent", "repeat_far", "repeat_recent", "new", "new"]
    assert target_kinds(histories, np.zeros(5, np.int64), np.full(5, 7)).tolist() == [KINDS.index("new")] * 5


def test_repeats_are_within_a_user():
    assert is_repeat(histories_of([4, 5, 4, 4], [], [4, 6], [9])).tolist() == [False, False, True, True] + [False] * 3
    assert is_repeat(histories_of([])).tolist() == []


def test_held_out_targets_name_what_is_not_ranked():
    """Items below 2 are padding and unknown; a user of one event has no test target."""
    held = held_out_targets(histories_of([4, 5, 4], [3], [4, 1]), SplitConfig(), "test")
    assert held.before.tolist() == [2, 0, 1] and held.item.tolist() == [4, 0, 1]
    assert held.ranked.tolist() == [True, False, False] and held.num_unknown == 1
    assert KINDS[held.kind[0]] == "repeat_recent"


def test_a_survey_counts_targets_and_repeats_of_training(world, tmp_path):
    """Leave-one-out: of [1 2 1 2 | 9 | 1] the training targets are 2, 1, 2, of which the last two are repeats."""
    store = store_of(tmp_path, [1, 2, 1, 2, 9, 1], [1, 2, 3], [1, 1], [5])
    found = survey(NextItemTask(config_of(store), world=world))
    assert (found.train, found.repeats, found.valid, found.test) == (3, 2, 2, 3)
    assert found.users_by_events == [0, 1, 1, 1, 1] and (found.first_s, found.last_s) == (0, 5 * 86_400)


@pytest.mark.parametrize(("repeats", "choice"), [(3, Seen.exclude), (6, Seen.keep)])
def test_auto_goes_by_the_share_of_repeats(world, tmp_path, capsys, repeats, choice):
    """100 training targets in 4 users, 3 or 6 of them repeats; the held-out events of all users are repeats."""
    users = [[*range(26), 0, 0] for _ in range(4)]
    for number in range(repeats):
        users[number % 4][25 - number // 4] = 0
    task = NextItemTask(config_of(store_of(tmp_path, *users)), world=world)
    assert resolve_seen(task, Seen.auto) is choice
    assert f"{repeats}.0% of the training targets" in (said := capsys.readouterr().err)
    assert f"seen={choice.value}" in said and "data.seen=keep or exclude overrides" in said
    assert resolve_seen(task, Seen.keep) is Seen.keep and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("events", "split", "message"),
    [
        (
            1,
            {},
            "has a training target: its users by events are 9 with 1; data.split.kind=leave_one_out trains on users",
        ),
        (2, {}, "has a training target: its users by events are 9 with 2"),
        (3, {}, "has a training target: its users by events are 9 with 3"),
        (
            8,
            {"kind": "global_time", "valid_time": "1970-02-01", "test_time": "1970-03-01"},
            r"has a validation target: .* 9 with 4 or more; data.split.valid_time=1970-02-01, test_time=1970-03-01, "
            r"and events are from 1970-01-01T00:00:00 to 1970-01-08T00:00:00 \(UTC\)",
        ),
        (8, {"kind": "global_time", "valid_time": "1970-01-02", "test_time": "1973-01-01"}, "has a training target"),
    ],
)
def test_training_without_targets_is_refused_before_anything_is_built(world, tmp_path, events, split, message):
    config = config_of(store_of(tmp_path, *([list(range(events))] * 9)), **split)
    config.run.dir = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"no user of .* {message}"):
        train(config, world)
    assert not (tmp_path / "run").exists()


def test_evaluation_of_an_empty_stage_is_refused_before_a_model_is_built(world, tmp_path, monkeypatch):
    config = config_of(store_of(tmp_path / "a", *([list(range(8))] * 9)))
    config.run.dir, config.memory.num_keys, config.optim.max_steps = str(tmp_path / "run"), 4, 1
    config.model.width, config.model.heads, config.model.layers, config.model.experts = 8, 2, 1, 2
    train(config, world)
    other = store_of(tmp_path / "b", list(range(8)), *([[user] for user in range(8)] * 2))
    found = run_evaluation(EvaluateConfig(run=config.run.dir, store=other, stage="valid"), world)
    assert found["users"] == 1
    monkeypatch.setattr(NextItemTask, "build_model", lambda self: pytest.fail("a model was built"))
    other = store_of(tmp_path / "c", *([[item] for item in range(8)] * 2))
    with pytest.raises(ConfigError, match="has a test target: its users by events are 16 with 1"):
        run_evaluation(EvaluateConfig(run=config.run.dir, store=other), world)


def test_targets_of_an_earlier_version_were_trained_on(world, tmp_path):
    """Day 8 is appended before training, so that the last events of version 0 are training events."""
    store = store_of(tmp_path, *([list(range(8))] * 9))
    day = pa.table({"user_id": range(9), "item_id": [3] * 9, "timestamp": [8 * 86_400] * 9})
    pq.write_table(day, tmp_path / "day8.parquet")
    append(AppendConfig(input=[str(tmp_path / "day8.parquet")], store=store, threads=1))
    config = config_of(store)
    config.run.dir, config.memory.num_keys, config.optim.max_steps = str(tmp_path / "run"), 4, 1
    config.model.width, config.model.heads, config.model.layers, config.model.experts = 8, 2, 1, 2
    train(config, world)
    for where in ("", store):
        with pytest.raises(ConfigError, match=r"version 0 of .* is earlier than the run's, 1: with .* trained on"):
            run_evaluation(EvaluateConfig(run=config.run.dir, store=where, version=0), world)
    assert run_evaluation(EvaluateConfig(run=config.run.dir, version=1), world)["users"] == 9


def test_survey_of_two_stages_names_the_first_that_is_empty(world, tmp_path):
    task = NextItemTask(config_of(store_of(tmp_path, [1, 2], [3, 4])), world=world)
    found = survey(task)
    require_targets(task, found, ["test"])
    with pytest.raises(ConfigError, match="has a validation target"):
        require_targets(task, found, ["test", "valid"])
