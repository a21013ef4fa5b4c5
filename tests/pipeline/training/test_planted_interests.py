"""A generator with a known answer: the tower must find planted interests, and must find nothing where there is nothing.

Real verbs from end to end. The Bayes rate is the best hit rate any model can reach (feature_store/datasets/bayes.py);
synthetic users repeat items, so data.seen=auto keeps them: targets are ranked among all items.
"""

from __future__ import annotations

import json

import helpers
import pytest

from elastic_rec.feature_store.datasets import SyntheticConfig, generate

WORLD = dict(num_users=2000, num_items=256, num_interests=8, events_per_user_min=20, events_per_user_max=40)


@pytest.mark.parametrize(("noise", "epochs"), [(0.05, 10), (1.0, 4)])
def test_tower_against_the_bayes_rate(tmp_path, noise, epochs):
    events = generate(SyntheticConfig(noise=noise, **WORLD), tmp_path / "events")
    store, run = tmp_path / "store", tmp_path / "run"
    helpers.run("ingest", "data=files", f"data.ingest.input=[{events.events}]", f"data.store={store}")
    helpers.run(
        "train", "data=files", f"data.store={store}", f"run.dir={run}", f"optim.epochs={epochs}",
        "model.tower=elastic", "data.targets=sampled", "data.prefixes_per_user=4",
    "optim.global_batch_size=64", "optim.table_lr=0.1",
        "optim.warmup_steps=30",
    )  # fmt: skip
    figures = helpers.run("evaluate", f"run={run}")
    assert figures["seen"] == "keep"
    reached = figures["hr@10"]
    best = json.loads(events.bayes.read_text())["test"]
    print(f"noise {noise}: reached {reached:.4f}, Bayes {best['bayes_hit_rate']:.4f}, SE {best['standard_error']:.4f}")
    if noise < 1:
        assert reached >= 0.9 * best["bayes_hit_rate"]
        assert best["bayes_hit_rate"] > 1.5 * best["popularity_hit_rate"], "there is something to find"
    else:
        assert best["bayes_hit_rate"] == pytest.approx(best["popularity_hit_rate"])
        assert reached <= best["popularity_hit_rate"] + 3 * best["standard_error"]
