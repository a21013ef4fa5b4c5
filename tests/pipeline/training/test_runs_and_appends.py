"""A run keeps to the store as it was when the run began; a new run sees what was appended."""

from __future__ import annotations

import helpers
import pyarrow as pa
import pyarrow.parquet as pq


def test_a_run_goes_on_after_a_day_was_appended(tmp_path):
    store, run = helpers.make_store(tmp_path), tmp_path / "run"
    arguments = [*helpers.SMALL_TRAIN, f"data.store={store}", f"run.dir={run}"]
    helpers.run("train", *arguments, "optim.max_steps=4")
    before = helpers.run("evaluate", f"run={run}", "checkpoint=last")

    day = {"user_id": [1, 2, 500], "item_id": [9001, 100, 9001], "timestamp": [9_000_000] * 3, "action": ["view"] * 3}
    pq.write_table(pa.table(day), tmp_path / "day.parquet")
    helpers.run("ingest", "append", f"store={store}", f"input=[{tmp_path}/day.parquet]")

    after = helpers.run("evaluate", f"run={run}", "checkpoint=last")
    assert {**after, "stderr": ""} == {**before, "stderr": ""}, "the same users, items and targets"
    again = helpers.run("train", *arguments, "optim.max_steps=8", "run.resume=true")
    assert again["steps"] == 8 and "[0, 62)" in again["stderr"] and "[0, 63)" not in again["stderr"]
    fresh = helpers.run("train", *arguments, "optim.max_steps=2", f"run.dir={tmp_path}/fresh")
    assert "[0, 63)" in fresh["stderr"], "the appended item has a row"
