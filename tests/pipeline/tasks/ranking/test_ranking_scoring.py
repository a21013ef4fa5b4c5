"""score.py ranking: the model's own scores in the input's order, on any number of ranks, resumed by part."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from ranking_data import RANKING, make_ranking_store

from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.vocabulary import Vocabulary
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.config.parallel import ParallelConfig
from elastic_rec.pipeline.config.score import RankingScoreConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import start_world
from elastic_rec.pipeline.tasks.ranking.scoring import _context, _plan
from elastic_rec.pipeline.training.run_folder import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    store = make_ranking_store(folder, num_users=30)
    helpers.run("train", *RANKING, f"data.store={store}", f"run.dir={folder}/run", "optim.max_steps=6")
    return folder


def impression_lists(folder: Path) -> pa.Table:
    """The test impressions' own rows, in an order of their own."""
    rows = pq.read_table(folder / "impressions.parquet", columns=["user_id", "item_id", "timestamp", "device"])
    return rows.take(np.random.default_rng(0).permutation(len(rows)))


def read(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))])


def test_scores_are_those_of_evaluation_in_the_input_order_and_resumed(run):
    lists = impression_lists(run)
    pq.write_table(lists, run / "lists.parquet", row_group_size=50)
    arguments = ["ranking", f"run={run}/run", f"candidates={run}/lists.parquet", "part_rows=20", "batch_size=7"]
    figures = helpers.run("score", *arguments, f"out={run}/scores")
    scored = read(run / "scores")
    assert scored["user_id"].to_pylist() == lists["user_id"].to_pylist()
    assert scored["item_id"].to_pylist() == lists["item_id"].to_pylist()
    assert figures["rows"] == len(lists) and figures["candidates_per_s"] > 0 and figures["unknown_candidates"] == 0

    # On two ranks, with the same moments in milliseconds.
    in_ms = lists.set_column(2, "timestamp", pa.array(lists["timestamp"].to_numpy() * 1000))
    pq.write_table(in_ms, run / "lists_ms.parquet", row_group_size=50)
    of_ms = [f"candidates={run}/lists_ms.parquet", "timestamp_unit=ms"]
    two = helpers.run("score", *arguments[:2], *of_ms, *arguments[3:], f"out={run}/two", ranks=2)
    for label in ("click", "kept"):
        one, other = (pc.list_flatten(read(run / name)[label]).to_numpy() for name in ("scores", "two"))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert two["candidates"] == figures["candidates"] == sum(map(len, lists["item_id"].to_pylist()))

    (run / "scores/part-00002.parquet").unlink()
    again = helpers.run("score", *arguments, f"out={run}/scores")
    assert again["skipped_parts"] == figures["parts"] - 1 and again["candidates"] < figures["candidates"]
    assert read(run / "scores").equals(scored)
    code, text = helpers.fail("score", *arguments, f"out={run}/scores", "part_rows=10")
    assert code == 2 and "part_rows" in text

    wanted = by_the_reader(run)
    found = dict(zip(keys(scored, lists), scored["click"].to_pylist(), strict=True))
    assert found.keys() == wanted.keys()
    for key, probabilities in wanted.items():
        np.testing.assert_allclose(found[key], probabilities, rtol=1e-3, atol=1e-5)


def keys(scored: pa.Table, lists: pa.Table) -> list[tuple]:
    columns = (lists["user_id"], lists["timestamp"], map(tuple, scored["item_id"].to_pylist()))
    return [(int(str(user)), int(str(time)), items) for user, time, items in zip(*columns, strict=True)]


def by_the_reader(run: Path) -> dict[tuple, list[float]]:
    """The same impressions as training reads them, one per group."""
    world = start_world("cpu")
    task, model, _ = load_model(f"{run}/run", checkpoint="best", world=world, parallel=ParallelConfig(device="cpu"))
    table, items = ImpressionTable(task.store), task.store.vocabulary("item")
    rows = [table.read(file, 0, len(table.users_and_times(file)[0])) for file in range(len(table.manifest.files))]
    about = [(u, t) for part in rows for u, t in zip(part.users.to_pylist(), part.times.tolist(), strict=True)]
    found = {}
    for stage in ("train", "valid", "test"):
        for batch in task.held_out(stage, batch_size=8):
            with torch.no_grad():
                click_C = torch.sigmoid(model.score(batch))[:, 0]
            for i, row in enumerate(batch.impression_rows.tolist()):
                if row >= 0:
                    mine = batch.impression == i
                    shown = items.decode(batch.features["candidate"].values()[mine].numpy()).to_pylist()
                    found[(*about[row], tuple(shown))] = click_C[mine].tolist()
    torch.distributed.destroy_process_group()
    return found


def test_without_times_the_whole_history_counts_and_strangers_are_scored(run):
    # A folder as Hive and warehouses write it: no suffixes, decimals, a part without rows.
    some = pa.table({"user_id": [3.0, 999.0, 3.0, 5.0], "item_id": [Decimal(i) for i in (101, 101, 102, 77777)]})
    (run / "lists/dt=1").mkdir(parents=True)
    (run / "lists/_SUCCESS").touch()
    pq.write_table(some, run / "lists/dt=1/000000_0")
    pq.write_table(some.slice(0, 0), run / "lists/000001_0")
    figures = helpers.run("score", "ranking", f"run={run}/run", f"candidates={run}/lists", f"out={run}/single")
    scored = read(run / "single")
    assert scored["item_id"].to_pylist() == [101, 101, 102, 77777] and scored.schema.field("click").type == pa.float32()
    assert figures["unknown_candidates"] == 1 and figures["rows_without_history"] == 1
    assert "no context column device" in figures["stderr"]
    assert len(set(scored["click"].to_pylist())) == 4
    assert Store.open(str(run / "store")).num_users == 30


def test_mistakes_are_named(run):
    base = ["ranking", f"run={run}/run", f"out={run}/x"]
    code, text = helpers.fail("score", *base)
    assert code == 2 and "candidates=''" in text
    for command in ([], ["full"], ["incremental"]):
        code, text = helpers.fail("score", *command, *base[1:])
        assert code == 2 and "trained with task=ranking: use score.py ranking" in text
    code, text = helpers.fail("score", *base, f"candidates={run}/items.parquet")
    assert code == 2 and "no column 'user_id'" in text
    for candidates, match in ((run / "none", "no file matches"), (run / "mixed", r"b\.csv: is named csv")):
        (run / "mixed").mkdir(exist_ok=True)
        (run / "mixed/b.csv").write_text("user_id,item_id\n1,2\n")
        with pytest.raises(ConfigError, match=f"candidates: .*{match}"):
            _plan(None, RankingScoreConfig(run="r", out="o", candidates=str(candidates)))
    pq.write_table(pa.table({"user_id": ["a"], "item_id": [101]}), run / "strings.parquet")
    code, text = helpers.fail("score", *base, f"candidates={run}/strings.parquet")
    assert code == 2 and "not of the store's type" in text


def test_context_of_other_types():
    """Whole numbers that a null made doubles are the numbers; numbers for text are refused, with the file."""
    ids = {"hour": pa.array([7, 8]), "device": pa.array(["tv", "phone"])}
    known = {name: Vocabulary(column=name, ids=values, counts=np.ones(2)) for name, values in ids.items()}
    table = pa.table({"hour": [8.0, None], "device": [[1.0], []]})
    assert _context(table, known["hour"], "lists.parquet").values.tolist() == [3, 1]
    with pytest.raises(DataError, match=r"^lists\.parquet: device is double, not of the store's type \(string\)"):
        _context(table, known["device"], "lists.parquet")
