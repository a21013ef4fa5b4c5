"""Batch scoring with real processes: any number of ranks writes the same parts, a killed job goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import helpers
import pyarrow.parquet as pq
import pytest

from elastic_rec.feature_store.table.store import Store

FEW_STEPS = ["optim.max_steps=8", "data.seen=exclude"]
SAMPLED = ["loss.softmax=sampled", "loss.num_negatives=16"]  # the one whole run through the sampled softmax


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(store of 5 parts, a run trained on it for a few steps, its scores by 2 ranks: uneven)."""
    folder = tmp_path_factory.mktemp("score")
    store, run, scores = helpers.make_store(folder), folder / "run", folder / "scores"
    helpers.run("train", *helpers.SMALL_TRAIN, f"data.store={store}", f"run.dir={run}", *FEW_STEPS, *SAMPLED)
    figures = helpers.run("score", f"run={run}", f"out={scores}", "k=7", "batch_size=16", ranks=2)
    assert figures["users"] == 120 and figures["parts"] == 5
    return store, run, scores


def rows(folder: Path) -> list[dict]:
    parts = sorted(folder.glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_every_user_once_with_k_unseen_items_best_first(job):
    store, _, scores = job
    table = rows(scores)
    store = Store.open(store)
    assert sorted(row["user_id"] for row in table) == list(range(1, 121))
    seen: dict[int, set] = {}
    raw = pq.read_table(scores.parent / "events.parquet").to_pydict()
    for user, item in zip(raw["user_id"], raw["item_id"], strict=True):
        seen.setdefault(user, set()).add(item)
    for row in table:
        assert len(row["item_ids"]) == len(set(row["item_ids"])) == 7
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert not seen[row["user_id"]] & set(row["item_ids"])
    assert json.loads((scores / "_manifest.json").read_text())["users"] == 120


def test_one_rank_gives_the_same_scores_and_a_rerun_skips_what_is_there(job, tmp_path):
    _, run, scores = job
    out = tmp_path / "scores"
    shutil.copytree(scores, out)
    for name in ("part-00001.parquet", "part-00004.parquet", "_manifest.json"):
        (out / name).unlink()
    (out / "part-00001.tmp").write_bytes(b"half a part")  # what kill -9 in the middle of a write leaves
    kept = (out / "part-00000.parquet").stat().st_mtime_ns
    figures = helpers.run("score", f"run={run}", f"out={out}", "k=7", "batch_size=50")
    assert figures["skipped_parts"] == 3 and (out / "_manifest.json").exists()
    assert (out / "part-00000.parquet").stat().st_mtime_ns == kept
    for got, want in zip(rows(out), rows(scores), strict=True):
        assert got["user_id"] == want["user_id"] and got["item_ids"] == want["item_ids"]
        assert got["scores"] == pytest.approx(want["scores"], rel=1e-4, abs=1e-5)


def test_refusals(job, tmp_path):
    _, run, scores = job
    code, text = helpers.fail("score", f"run={run}", f"out={scores}", "k=3")
    assert code == 2 and "made with k=7, asked for now: 3" in text
    (tmp_path / "mine").write_text("precious")
    code, text = helpers.fail("score", f"run={run}", f"out={tmp_path}")
    assert code == 2 and "is not empty" in text and (tmp_path / "mine").read_text() == "precious"
    other = helpers.make_store(tmp_path / "other", num_items=20)
    code, text = helpers.fail("score", f"run={run}", f"out={tmp_path}/s", f"store={other}")
    assert code == 2 and "ids would not mean the same items" in text and not (tmp_path / "s").exists()
