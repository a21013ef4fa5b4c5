"""task=ranking in real processes: any number of ranks trains and evaluates alike, a run goes on, mistakes are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers
import pytest
from ranking_data import RANKING, make_ranking_store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_ranking_store(tmp_path_factory.mktemp("data"), num_users=120)


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory) -> tuple[Path, dict]:
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    return run_dir, helpers.run("train", *RANKING, f"data.store={store}", f"run.dir={run_dir}", ranks=2)


def test_one_rank_and_two_ranks_have_the_same_losses_and_metrics(store, two_ranks, tmp_path):
    two, output = two_ranks
    helpers.run("train", *RANKING, f"data.store={store}", f"run.dir={tmp_path}/one")
    one, losses = helpers.train_lines(tmp_path / "one"), helpers.train_lines(two)
    assert sorted(one) == sorted(losses) == list(range(1, output["steps"] + 1))
    for step in range(1, 31):  # later on rounding has grown: which slots the memory reads is a yes or no
        assert one[step] == pytest.approx(losses[step], rel=1e-4), step
    figures = [helpers.run("evaluate", f"run={two}", "length_edges=[10]", ranks=ranks) for ranks in (1, 2)]
    for name in ("auc", "gauc", "ne", "calibration", "ndcg", "log_loss"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-5), name
    assert figures[0]["label"] == "click" and figures[0]["auc"] > 0.6, "it learns"
    assert figures[0]["labels"]["kept"]["candidates"] < figures[0]["candidates"], "missing labels are not counted"
    assert sum(part["candidates"] for part in figures[0]["by_length"].values()) == figures[0]["candidates"]
    short = helpers.run("evaluate", f"run={two}", "length_edges=[4]", "max_history=3")
    assert short["candidates"] == figures[0]["candidates"] and list(short["by_length"]) == ["0-3"]
    assert short["auc"] < figures[0]["auc"], "it reads further back than 3 events"
    for table in ("embeddings.item", "context.device", "item_context.tags"):
        assert table in output["stderr"]


def test_a_run_goes_on_where_it_was(store, two_ranks, tmp_path):
    run_dir = tmp_path / "moved"
    shutil.copytree(two_ranks[0], run_dir)
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in (run_dir / "checkpoints").glob("step-*"))
    shutil.rmtree(run_dir / f"checkpoints/step-{steps[-1]:08d}")
    output = helpers.run("train", *RANKING, f"data.store={store}", f"run.dir={run_dir}", "run.resume=true", ranks=2)
    assert f"resuming at step {steps[-2]}" in output["stderr"]
    assert helpers.train_lines(run_dir) == helpers.train_lines(two_ranks[0])
    code, text = helpers.fail(
        "train", *RANKING, f"data.store={store}", f"run.dir={run_dir}", "run.resume=true", "ranking.history=din"
    )
    assert code == 2 and "ranking.history" in text


def test_mistakes_are_named(store, two_ranks, tmp_path):
    bare = helpers.make_store(tmp_path / "bare", num_users=5)
    code, text = helpers.fail("train", *RANKING, f"data.store={bare}", f"run.dir={tmp_path}/x")
    assert code == 2 and "impressions" in text
    code, text = helpers.fail(
        "train", *RANKING, f"data.store={store}", f"run.dir={tmp_path}/x", "ranking.label_weights=[1]"
    )
    assert code == 2 and "2 labels" in text
    rows = "parallel.row_wise_tables=[item,bank,device]"
    code, text = helpers.fail("train", *RANKING, f"data.store={store}", f"run.dir={tmp_path}/y", rows)
    assert code == 2 and "'device', a column of impressions or items" in text
    assert not (tmp_path / "x").exists()
