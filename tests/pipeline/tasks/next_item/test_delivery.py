"""evaluate's figures are those of score.py's files: lists for the histories before the targets, judged in plain Python.

Day 0 is a store without each user's last event; a run is trained on it and scores it. Day 1 appends the last events to
a copy, which evaluate reads: its test targets are what happened after the lists were made.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import helpers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from files_data import score_config

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.utils.checked_json import read_checked
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.evaluate import run_evaluation
from elastic_rec.pipeline.runtime.errors import ConfigError, NonFiniteError
from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.score import score

NEW_ITEM = 999  # first seen on day 1: the run has no row for it
CAUSAL = ["model.tower=elastic_causal", "model.chunk=4", "data.targets=every_event", "data.max_history=64"]


class Served(NamedTuple):
    """before: user -> items of day 0 in order; after: user -> the item of day 1."""

    folder: Path
    before: dict[int, list[int]]
    after: dict[int, int]

    def evaluate(self, world: World, **settings) -> dict:
        settings = {"store": str(self.folder / "day1"), "checkpoint": "last", **settings}
        return run_evaluation(EvaluateConfig(run=str(self.folder / "run"), **settings), world)

    def score(self, world: World, out: str, *, kind: str = "full", **settings) -> dict[int, list[int]]:
        """user -> list, from the files."""
        out = self.folder / out
        score(score_config(kind, run=str(self.folder / "run"), out=str(out), checkpoint="last", **settings), world)
        rows = [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
        return {row["user_id"]: row["item_ids"] for row in rows}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    helpers.make_store(folder / "all")
    events = pq.read_table(folder / "all/events.parquet")
    users, items = events["user_id"].to_pylist(), events["item_id"].to_pylist()
    is_last = [user != after for user, after in zip(users, [*users[1:], None], strict=True)]
    before: dict[int, list[int]] = {user: [] for user in users}
    for user, item, last in zip(users, items, is_last, strict=True):
        if not last:
            before[user].append(item)
    after = {user: item for user, item, last in zip(users, items, is_last, strict=True) if last}
    after[17] = NEW_ITEM
    items = [NEW_ITEM if last and user == 17 else item for user, item, last in zip(users, items, is_last, strict=True)]
    events = events.set_column(events.column_names.index("item_id"), "item_id", pa.array(items))
    for name, keep in (("day0", [not last for last in is_last]), ("day1", is_last)):
        pq.write_table(events.filter(pa.array(keep)), folder / f"{name}.parquet")
    settings = {"context_columns": ["action"], "num_buckets": 3, "row_group_events": 300, "threads": 1}
    ingest(IngestConfig(input=[str(folder / "day0.parquet")], out=str(folder / "day0"), **settings))
    shutil.copytree(folder / "day0", folder / "day1")
    append(AppendConfig(input=[str(folder / "day1.parquet")], store=str(folder / "day1"), threads=1))
    helpers.run(
        "train", *helpers.SMALL_TRAIN, *CAUSAL, "optim.epochs=3", f"data.store={folder}/day0", f"run.dir={folder}/run"
    )
    return Served(folder, before, after)


@pytest.fixture(scope="module")
def world() -> World:
    yield start_world("cpu")
    dist.destroy_process_group()


def judge(served: Served, lists: dict[int, list[int]], users: list[int]) -> dict[str, float]:
    ranks = [lists[user].index(served.after[user]) if served.after[user] in lists[user] else None for user in users]
    found = [rank for rank in ranks if rank is not None]
    figures = {"users": len(users), "mrr": math.fsum(1 / (rank + 1) for rank in found) / len(users)}
    for k in (5, 10, 20):
        hits = [rank for rank in found if rank < k]
        figures[f"hr@{k}"] = len(hits) / len(users)
        figures[f"ndcg@{k}"] = math.fsum(1 / math.log2(rank + 2) for rank in hits) / len(users)
    return figures


def kind(served: Served, user: int) -> str:
    items, target = served.before[user], served.after[user]
    if target not in items:
        return "new"
    return "repeat_recent" if target in items[-64:] else "repeat_far"


def assert_delivered(served: Served, figures: dict, lists: dict[int, list[int]]) -> None:
    users = [user for user, item in served.after.items() if item != NEW_ITEM]
    assert {name: figures[name] for name in judge(served, lists, users)} == pytest.approx(
        judge(served, lists, users), rel=1e-12
    )
    assert figures["hr@10"] == judge(served, lists, users)["hr@10"] and 0 < figures["hr@10"] < 1
    for name, part in figures["by_target"].items():
        some = [user for user in users if kind(served, user) == name]
        want = {"share": len(some) / len(users), **judge(served, lists, some)}
        assert part == pytest.approx(want, rel=1e-12), name
    assert sum(part["users"] for part in figures["by_target"].values()) == len(users) == 119


@pytest.mark.parametrize("seen", ["keep", "exclude"])
def test_figures_are_those_of_the_files(served, world, seen):
    figures = served.evaluate(world, seen=seen)
    lists = served.score(world, f"scores-{seen}", k=100, seen=seen)
    assert_delivered(served, figures, lists)
    assert figures["seen"] == seen and figures["version"] == 1 and figures["unknown_targets"] == 1
    repeats = sum(kind(served, user) != "new" for user in served.after) / 119
    assert figures["seen_targets"] == pytest.approx(repeats) and repeats > 0.3
    policy, block = {"keep": ("exclude", "seen_excluded"), "exclude": ("keep", "seen_kept")}[seen]
    other = served.evaluate(world, seen=policy)
    assert figures[block] == {name: other[name] for name in figures[block]}
    if seen == "exclude":
        assert figures["by_target"]["repeat_recent"]["mrr"] == 0, "no list holds an item already seen"
        assert all(not set(lists[user]) & set(items) for user, items in served.before.items())
    assert json.loads((served.folder / f"run/metrics_day1_{seen}.json").read_text())["hr@10"] == figures["hr@10"]


def test_incremental_scores_and_the_runs_own_policy(served, world):
    lists = served.score(world, "scores-incremental", k=100, kind="incremental")
    figures = served.evaluate(world)
    assert figures["seen"] == "keep", "data.seen=auto, resolved by training: these users repeat items"
    assert_delivered(served, figures, lists)
    settings = json.loads((served.folder / "scores-incremental/_job.json").read_text())
    assert settings["seen"] == "keep"
    with pytest.raises(ConfigError, match="made with seen='keep', asked for now: 'exclude'"):
        served.score(world, "scores-incremental", k=100, kind="incremental", seen="exclude")


def _on_rank(rank: int, size: int, served: Served) -> None:
    dist.init_process_group("gloo", init_method=f"file://{served.folder}/meet", rank=rank, world_size=size)
    world = World(rank=rank, size=size, device=torch.device("cpu"))
    for seen in ("keep", "exclude"):
        figures = served.evaluate(world, seen=seen)
        lists = served.score(world, f"scores-two-{seen}", k=100, seen=seen)
        if rank == 0:
            assert_delivered(served, figures, lists)
    dist.destroy_process_group()


def test_figures_are_those_of_the_files_on_two_ranks(served):
    mp.spawn(_on_rank, args=(2, served), nprocs=2)


def test_the_checkpoint_is_chosen_by_what_is_delivered(served, world):
    """A validation's line of the log = evaluate on that checkpoint and stage; what auto came to is in the config."""
    lines = [json.loads(line) for line in (served.folder / "run/metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["kind"] == "valid"][-1:]
    figures = served.evaluate(world, store="", stage="valid", k=[10], length_edges=[50])
    assert last["step"] == figures["step"] and last["seen"] == figures["seen"] == "keep"
    for name in ("users", "hr@10", "ndcg@10", "mrr", "coverage@10", "by_target", "seen_kept", "seen_excluded"):
        assert last[name] == figures[name], name
    assert "seen: keep" in (served.folder / "run/config.yaml").read_text()
    known = read_checked(served.folder / "run/baselines.json")
    assert {name: known[name]["ndcg@10"] for name in known} == pytest.approx(
        {name: found["ndcg@10"] for name, found in figures["baselines"].items()}
    )
    best = max(known, key=lambda name: known[name]["ndcg@10"])
    below = best if last["ndcg@10"] < known[best]["ndcg@10"] else None
    assert last["below_baseline"] == figures["below_baseline"] == below


def test_a_broken_checkpoint_is_refused_by_evaluate_and_score(served, world, monkeypatch):
    from elastic_rec.pipeline.training.checkpoints import Checkpoints

    load = Checkpoints.load

    def broken(self, step, model, optimizer=None):
        progress = load(self, step, model, optimizer)
        next(iter(model.module.head.parameters())).data[3] = float("nan")
        return progress

    monkeypatch.setattr(Checkpoints, "load", broken)
    for ask in (served.evaluate, lambda world: served.score(world, "scores-broken")):
        with pytest.raises(NonFiniteError, match=r"step-0000.*: head\.norm\.weight is nan in row 3; give another"):
            ask(world)
    assert not list(served.folder.glob("scores-broken/part-*"))


def test_a_query_that_is_no_number_names_its_user(served, world, monkeypatch):
    from elastic_rec.models.retrieval.model import QueryHead

    forward = QueryHead.forward
    monkeypatch.setattr(QueryHead, "forward", lambda *args: forward(*args).index_fill(0, torch.tensor([0]), math.inf))
    for ask in (served.evaluate, lambda world: served.score(world, "scores-inf")):
        with pytest.raises(NonFiniteError, match=r"the query is inf in the row of user \d+"):
            ask(world)
    assert not list(served.folder.glob("scores-inf/part-*"))
