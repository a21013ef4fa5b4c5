"""Impressions of the data sets, made by the verb: counts, labels and context against the raw files; what is planted."""

from __future__ import annotations

import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest

from elastic_rec.feature_store.batches.splits import ImpressionSplit
from elastic_rec.feature_store.datasets import DatasetUnavailable, movielens
from elastic_rec.feature_store.datasets.world import SyntheticConfig, World
from elastic_rec.feature_store.reading.impression_reader import ImpressionReader
from elastic_rec.feature_store.table.store import Store

SPLIT = ImpressionSplit(valid_time="2090-01-01", test_time="2091-01-01")


def read(store: Store, columns: list[str], **settings) -> list:
    settings = {"global_batch_size": 64, "max_impressions_per_user": 8, "max_history": 50, **settings}
    return list(
        ImpressionReader(store, columns=columns, split=SPLIT, stage="train", shuffle=False, **settings).epoch(0)
    )


def test_planted_impressions_are_known_by_their_history_only(tmp_path):
    synthetic = {"num_users": 300, "num_items": 64, "num_interests": 4, "drift": 0.02, "noise": 0.05}
    settings = [f"data.dataset.synthetic.{name}={value}" for name, value in synthetic.items()]
    paths = [f"data.store={tmp_path}/store", f"data.dataset.cache_dir={tmp_path}"]
    out = helpers.run("ingest", "data=synthetic_ranking", *paths, *settings, "data.dataset.planted.per_user=5")
    assert 1400 < out["impressions"]["impressions"] <= 300 * 5 and out["impressions"]["unknown_candidates"] < 200
    store, world = Store.open(tmp_path / "store"), World.of(SyntheticConfig(**synthetic))
    raw_ids = np.array(store.vocabulary("item").decode(np.arange(store.vocabulary("item").size)).fill_null(0))
    clicks, last_interest, click_rate = [], [], {}
    for b in read(store, ["item"]):
        assert np.all(b.candidates.lengths == 10)
        click, kindred = b.labels.T.reshape(2, -1, 10)
        assert np.all(click <= kindred)
        assert np.all(b.ends > b.starts), "an impression always has an event before it"
        candidates = raw_ids[b.candidates.values].reshape(-1, 10)
        newest = raw_ids[b.histories.columns["item"][b.ends - 1]]
        is_clicked = click.sum(axis=1) > 0
        last_interest += (world.interest_V1[newest][:, None] == world.interest_V1[candidates])[is_clicked].tolist()
        clicks += (click[is_clicked] > 0).tolist()
        for device in np.unique(b.context["device"].values):
            click_rate.setdefault(int(device), []).extend(is_clicked[b.context["device"].values == device])
    clicks, last_interest = np.array(clicks), np.array(last_interest)
    assert last_interest[clicks].mean() > 1.6 * last_interest[~clicks].mean(), "the newest event tells of the click"
    rates = sorted(np.mean(rate) for rate in click_rate.values())
    assert rates[0] == pytest.approx(0.5, abs=0.08) and rates[1] == 1, "and so does the device"


def test_movielens_as_ranking(tmp_path):
    """The whole set, from wherever it can be had: a user's history is his impressions, seen in order of time."""
    try:
        files = movielens("ml100k")
    except DatasetUnavailable as error:
        pytest.skip(str(error))
    helpers.run("ingest", "data=ml100k_ranking", f"data.store={tmp_path}/store")
    store = Store.open(tmp_path / "store")
    batches = read(store, ["item", "rating"], max_impressions_per_user=1000, max_history=1000)
    events = pq.read_table(files.events).to_pydict()
    requests = {(u, t) for u, t in zip(events["user_id"], events["timestamp"], strict=True)}
    assert sum(len(b.rows) for b in batches) == len(requests)
    labels = np.concatenate([b.labels[:, 0] for b in batches])
    assert len(labels) == 100_000 and labels.sum() == sum(r >= 4 for r in events["rating"])
    graded = np.concatenate([b.labels for b in batches])
    for column, lowest in enumerate((4, 5, 3)):  # liked, loved, passable
        assert graded[:, column].sum() == sum(r >= lowest for r in events["rating"])
    rating = store.vocabulary("rating")
    for b in batches[:3]:
        assert b.context["gender"].values.min() >= 2 and set(b.item_context) == {"genres", "release_year"}
        for v in range(len(b.histories.rows)):
            rows = np.flatnonzero(b.group == v)
            order = rows[np.argsort(b.times_s[rows], kind="stable")]
            spans = [b.candidates.take(np.array([i])).values for i in order]
            before = np.concatenate([[0], np.cumsum([len(s) for s in spans])])
            assert (b.ends[order] - b.starts[order]).tolist() == before[:-1].tolist()
            events_seen = b.histories.columns["item"][b.histories.offsets[v] : b.histories.offsets[v + 1]]
            assert events_seen.tolist() == np.concatenate(spans)[: len(events_seen)].tolist()
    assert set(rating.ids.to_pylist()) == {1, 2, 3, 4, 5}


def test_refusals(tmp_path):
    store = helpers.make_store(tmp_path)
    code, text = helpers.fail("ingest", "impressions", f"data.store={store}")
    assert code == 2 and "set data.impressions.input" in text
    arguments = ["impressions", f"data.store={store}", "data.impressions.input=[x.parquet]"]
    code, text = helpers.fail("ingest", *arguments)
    assert code == 2 and "label_columns is empty" in text
    code, text = helpers.fail("ingest", *arguments, "data.impressions.label_columns=[click]")
    assert code == 2 and "no file matches" in text
