"""The Python API of a trained run: what score.py says of users in the store, and answers for users outside of it.

The runs are trained for a few steps in this process; `load` itself needs no process group (last test).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import files_data
import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from ranking_data import make_ranking_store

import elastic_rec
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.models.towers.elastic.state import StateError
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.runtime.errors import CheckpointError, ConfigError
from elastic_rec.pipeline.runtime.world import World, start_world

FEW = ["optim.max_steps=6", "optim.epochs=1", "run.baselines=false", "data.columns=[action]"]
RANKING = [*FEW, "task=ranking", "data.impression_split.valid_time=70%", "data.impression_split.test_time=85%"]
AFTER = 2_000_000  # seconds, later than every event of the stores


@pytest.fixture(scope="module")
def world() -> World:
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    helpers.make_store(folder, num_users=40)
    make_ranking_store(folder / "shown", num_users=30)
    return folder


@pytest.fixture(scope="module")
def trained(world, folder):
    """name -> run folder, trained when it is first asked for."""
    kinds = {
        "causal": ("store", files_data.CAUSAL, FEW),
        "windows": ("store", files_data.CAUSAL, [*FEW, "data.window=8"]),
        "query": ("store", files_data.CAUSAL, [*FEW, "model.time=query", "run.seed=1"]),
        "bidirectional": ("store", helpers.SMALL_TRAIN, FEW),
        "ranking": ("shown/store", files_data.CAUSAL, [*RANKING, "model.moments=4"]),
        "din": ("shown/store", files_data.CAUSAL, [*RANKING, "ranking.history=din"]),
    }

    def get(name: str) -> Path:
        store, base, overrides = kinds[name]
        if not (folder / name).exists():
            files_data.train_run(world, folder / store, folder / name, *overrides, base=base)
        return folder / name

    return get


@pytest.fixture(scope="module")
def loaded(trained):
    runs = {}

    def get(name: str) -> elastic_rec.Run:
        if name not in runs:
            runs[name] = elastic_rec.load(trained(name), checkpoint="last")
        return runs[name]

    return get


def events_of(path: Path) -> dict[int, dict[str, list]]:
    """user -> items, times and columns, in the store's order."""
    table = pq.read_table(path).sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending"), ("item_id", "ascending")]
    )
    users = {}
    for row in table.to_pylist():
        user = users.setdefault(row["user_id"], {"items": [], "times": [], "columns": {"action": []}})
        user["items"].append(row["item_id"])
        user["times"].append(row["timestamp"])
        user["columns"]["action"].append(row["action"])
    return users


def batched(users: list[dict]) -> dict:
    return {
        "items": [user["items"] for user in users],
        "times": [user["times"] for user in users],
        "columns": {"action": [user["columns"]["action"] for user in users]},
    }


def some_user(num_events: int = 30, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "items": (100 + rng.integers(0, 60, num_events)).tolist(),
        "times": np.sort(rng.integers(1_000_000, 1_100_000, num_events)).tolist(),
        "columns": {"action": rng.choice(["view", "buy"], num_events).tolist()},
    }


def part(user: dict, start: int, stop: int | None) -> dict:
    return {
        "items": user["items"][start:stop],
        "times": user["times"][start:stop],
        "columns": {"action": user["columns"]["action"][start:stop]},
    }


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    assert [item for item, _ in found] == [item for item, _ in expected]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["causal", "windows", "query", "bidirectional"])
@pytest.mark.parametrize("seen", list(Seen)[:2])
def test_lists_are_those_of_score_py(name, seen, world, trained, loaded, folder, tmp_path):
    """All users at once; a causal state holds all events, as score.py's max_history=0."""
    settings = {} if name == "bidirectional" else {"max_history": 0}
    at = {"at": AFTER} if name == "query" else {}
    query = {"query_time": str(AFTER)} if name == "query" else {}
    files_data.score_run(world, trained(name), tmp_path / "scores", seen=seen, **settings, **query)
    expected = {
        row["user_id"]: list(zip(row["item_ids"], row["scores"], strict=True))
        for path in (tmp_path / "scores").glob("part-*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    users, run = events_of(folder / "events.parquet"), loaded(name)
    states = run.observe(None, **batched(list(users.values())))
    exclude = {"exclude": [user["items"] for user in users.values()]} if seen is Seen.exclude else {}
    found = run.recommend(states, k=5, **exclude, **at)
    assert len(found) == len(expected) == 40
    for user, items in zip(users, found, strict=True):
        assert_same(items, expected[user])


@pytest.mark.parametrize("name", ["ranking", "din"])
@pytest.mark.parametrize("with_time", [False, True])
def test_scores_are_those_of_score_py(name, with_time, world, trained, loaded, folder, tmp_path):
    users, rng = events_of(folder / "shown" / "events.parquet"), np.random.default_rng(0)
    shown = [(100 + rng.integers(0, 24, rng.integers(1, 6))).tolist() for _ in users]
    device = [["tv", "phone"][i % 2] for i in range(len(users))]
    table = {"user_id": list(users), "item_id": shown, "device": device}
    table |= {"timestamp": [AFTER] * len(users)} if with_time else {}
    pq.write_table(pa.table(table), tmp_path / "lists.parquet")
    about = {
        "kind": "ranking",
        "candidates": str(tmp_path / "lists.parquet"),
        "max_history": 0 if name == "ranking" else None,
    }
    files_data.score_run(world, trained(name), tmp_path / "scores", **about)
    expected = pq.read_table(next((tmp_path / "scores").glob("part-*.parquet"))).to_pylist()
    run = loaded(name)
    assert run.labels == ["click", "kept"]
    states = run.observe(None, **batched(list(users.values())))
    found = run.rank(states, shown, {"device": device}, at=AFTER if with_time else None)
    for row, scores in zip(expected, found, strict=True):
        for label in run.labels:
            np.testing.assert_allclose(scores[label], row[label], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("cuts", [(0, 5), (1, 2, 29), (13,), (4, 8, 12, 16, 20, 24, 28)])
def test_a_state_goes_on_from_anywhere(cuts, loaded):
    """One pass over 30 events, or in parts, stored as bytes in between: the same list."""
    run, user = loaded("causal"), some_user()
    whole = run.recommend(run.observe(None, **user), k=8)
    state = None
    for start, stop in zip([0, *cuts], [*cuts, None], strict=True):
        state = run.observe(state, **part(user, start, stop))
        data = state.to_bytes()
        state = run.state_from_bytes(data)
        assert isinstance(data, bytes)
    assert_same(run.recommend(state, k=8), whole)
    assert int(state.newest_s_B[0]) == user["times"][-1]


def test_several_users_are_each_as_alone(loaded):
    """Also one without events, and one that goes on while the other does not."""
    run, users = loaded("causal"), [some_user(30, 1), part(some_user(), 0, 0), some_user(3, 2)]
    states = run.observe(None, **batched(users))
    assert len(states) == 3
    for user, items in zip(users, run.recommend(states, k=6), strict=True):
        assert_same(items, run.recommend(run.observe(None, **user), k=6))
    states = run.observe(states, **batched([part(users[0], 0, 0), some_user(2, 5), part(users[0], 0, 0)]))
    found = run.recommend(run.state_from_bytes(states.to_bytes()), k=6)
    for user, items in zip([users[0], some_user(2, 5), users[2]], found, strict=True):
        assert_same(items, run.recommend(run.observe(None, **user), k=6))


def test_exclude_and_allow(loaded):
    run, user = loaded("causal"), some_user()
    state = run.observe(None, **user)
    everything = run.recommend(state, k=1000)
    assert len({item for item, _ in everything}) == len(everything) == run.task.num_items - 2
    assert run.recommend(state, k=3) == everything[:3]
    left_out = [everything[0][0], everything[2][0], 999_999]
    assert run.recommend(state, k=2, exclude=left_out) == [everything[1], everything[3]]
    allowed = [everything[7][0], everything[3][0], everything[3][0], 999_999]
    assert_same(run.recommend(state, k=10, allow=allowed), [everything[3], everything[7]])
    assert_same(run.recommend(state, k=10, allow=allowed, exclude=[everything[3][0]]), [everything[7]])
    assert run.recommend(state, allow=[999_999]) == run.recommend(state, allow=[]) == []
    states = run.observe(None, **batched([user, user]))
    found = run.recommend(states, k=1, exclude=[[everything[0][0]], []])
    assert [items[0][0] for items in found] == [everything[1][0], everything[0][0]]


def test_unknown_ids_are_counted_and_read_as_one(loaded):
    run, user = loaded("causal"), some_user(4)
    user["items"][1], user["columns"]["action"][2] = 31337, "wishlist"
    other = {**user, "items": [*user["items"][:1], 4711, *user["items"][2:]]}
    states = run.observe(None, **batched([user, some_user(4)]))
    assert states.num_unknown_B.tolist() == [2, 0]
    assert run.recommend(run.observe(None, **user)) == run.recommend(run.observe(None, **other))


def test_times_may_be_datetimes_arrays_or_floats(loaded):
    run, user = loaded("causal"), some_user(6)
    plain = run.observe(None, **user)
    for times in (
        [np.datetime64(second, "s").item() for second in user["times"]],
        np.array(user["times"]).astype("datetime64[s]").astype("datetime64[ns]"),
        [second + 0.75 for second in user["times"]],
    ):
        state = run.observe(None, **{**user, "items": np.array(user["items"]), "times": times})
        assert state.to_bytes() == plain.to_bytes()


def test_one_moment_or_one_per_user(loaded):
    run, users = loaded("query"), [some_user(5, 1), some_user(7, 2)]
    states = run.observe(None, **batched(users))
    minute = [user["times"][-1] + 60 for user in users]
    soon, late = run.recommend(states, at=minute), run.recommend(states, at=AFTER)
    assert soon != late
    for found, expected in zip(run.recommend(states, at=[minute[0], AFTER]), [soon[0], late[1]], strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"times": [40_000_030, 40_000_020]},
            "user 0 of the call: an event of 1971-04-08T23:07:00Z comes after one of 1971-04-08T23:07:10",
        ),
        ({"times": [1]}, "times: 1 values for the 2 items of user 0"),
        ({"times": [1e12, 2e12]}, "they are seconds since 1970, up to the year 2200: convert them"),
        ({"times": ["now", "later"]}, "times: give seconds since 1970, or datetimes"),
        ({"columns": {}}, r"columns=\[\], but the run reads \['action'\] beside the item"),
        ({"columns": {"action": [["view", "buy"]]}}, "action: lists of 1 users, where one flat list is wanted"),
        ({"items": ["101", "102"]}, r"items is string, not of the store's type \(int64\)"),
        ({"items": [101, "102"]}, "items: give ids of one type"),
    ],
)
def test_events_that_cannot_be_meant_are_refused(changes, message, loaded):
    events = {"items": [101, 102], "times": [10, 20], "columns": {"action": ["view", "buy"]}}
    with pytest.raises((ValueError, DataError), match=message):
        loaded("causal").observe(None, **{**events, **changes})


def test_what_a_run_cannot_answer_is_refused(trained, loaded):
    user = some_user(5)
    causal, other, ranking, query = (loaded(name) for name in ("causal", "bidirectional", "ranking", "query"))
    state = causal.observe(None, **user)
    with pytest.raises(ValueError, match="comes after one of"):
        causal.observe(state, **part(user, 0, 1))
    with pytest.raises(ValueError, match="lists of 2 users, where one flat list is wanted"):
        causal.observe(state, **batched([user, user]))
    with pytest.raises(ValueError, match=r"trained with model.time=past: leave `at` out"):
        causal.recommend(state, at=AFTER)
    with pytest.raises(ValueError, match=r"trained with model.time=query: its scores depend .* give at="):
        query.recommend(query.observe(None, **user))
    with pytest.raises(ValueError, match=r"at=1970-01-12T13:46:40Z is before the newest event of user 0"):
        query.recommend(query.observe(None, **user), at=1_000_000)
    with pytest.raises(ValueError, match="predicts the next item"):
        causal.rank(state, [101])
    with pytest.raises(ValueError, match="k=0"):
        causal.recommend(state, k=0)
    with pytest.raises(StateError, match="made by model"):
        query.state_from_bytes(state.to_bytes())
    with pytest.raises(StateError, match="cut off or damaged"):
        causal.state_from_bytes(state.to_bytes()[:-4])
    bounded = other.observe(None, **user)
    for call in (bounded.to_bytes, lambda: other.observe(bounded, **user), lambda: other.state_from_bytes(b"")):
        with pytest.raises(ValueError, match="not causal"):
            call()
    shown = ranking.observe(None, **user)
    with pytest.raises(ValueError, match="a ranking run scores candidates"):
        ranking.recommend(shown)
    with pytest.raises(ValueError, match=r"context=\['page'\], but the run's impressions have \['device'\]"):
        ranking.rank(shown, [101], {"page": "top"})


def test_context_of_one_user_is_a_value_or_a_list(loaded):
    run = loaded("ranking")
    state = run.observe(None, **some_user(5))
    one, bag = run.rank(state, [101, 102], {"device": "tv"}), run.rank(state, [101, 102], {"device": ["tv"]})
    assert one["click"].shape == (2,) and np.array_equal(one["click"], bag["click"])
    without = run.rank(run.state_from_bytes(state.to_bytes()), [101, 102])
    assert without["click"].dtype == np.float32 and not np.array_equal(one["click"], without["click"])
    assert run.rank(state, [])["kept"].shape == (0,)


def test_a_moved_or_changed_run_says_what_to_do(trained, folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        elastic_rec.load(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(trained("causal"), run)
    shutil.move(folder / "store", tmp_path / "moved")
    try:
        with pytest.raises(DataError, match="If the run's store was moved: load"):
            elastic_rec.load(run)
        elastic_rec.load(run, store=str(tmp_path / "moved"))
    finally:
        shutil.move(tmp_path / "moved", folder / "store")
    other = helpers.make_store(tmp_path / "other", num_users=20, seed=3)
    with pytest.raises(ConfigError, match="the ids would not mean the same items"):
        elastic_rec.load(run, store=str(other))
    tensors = next(run.glob("checkpoints/step-*/*.distcp"))
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sha256|changed"):
        elastic_rec.load(run, checkpoint="last")


def test_no_process_group_is_needed_or_made(trained, tmp_path):
    code = (
        "import elastic_rec, torch.distributed as dist\n"
        f"run = elastic_rec.load({str(trained('causal'))!r})\n"
        "state = run.observe(None, items=[101], times=[5], columns={'action': ['buy']})\n"
        "print(len(run.recommend(state)), dist.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=helpers.environment()
    )
    assert done.stdout.strip() == "10 False", done.stderr
    assert "Warning" not in done.stderr


def test_gradients_are_not_kept(loaded):
    run = loaded("causal")
    state = run.observe(None, **some_user(5))
    assert torch.is_grad_enabled() and not state.state.newest_BD.requires_grad
