"""Synthetic events: the Bayes-optimal hit rate against brute force, the planted structure against its definition."""

import dataclasses
import itertools
import json
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from elastic_rec.feature_store.datasets import (
    DatasetConfig,
    DatasetKind,
    SyntheticConfig,
    generate,
    prepare,
    synthetic,
    world,
)
from elastic_rec.feature_store.datasets.bayes import bayes_hit_rate, next_interests, top_k
from elastic_rec.feature_store.utils.errors import DataError

SMALL = SyntheticConfig(num_users=60, num_items=40, num_interests=4, events_per_user_min=3, events_per_user_max=9)


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def read(files):
    table = pq.read_table(files.events)
    return {name: table[name].to_numpy() for name in table.column_names}


def emission(config, rank_probs_S, c, r, a, b):
    """P(item of interest c and rank r | major a, minor b), as the definition says it."""
    w, popular = config.major_weight, rank_probs_S[r] / config.num_interests
    own = (w * (a == c) + (1 - w) * (b == c)) * rank_probs_S[r]
    return config.noise * popular + (1 - config.noise) * own


def drift_steps(config, a, b):
    """(probability, state) after one event's drift."""
    yield 1 - config.drift, (a, b)
    for new in set(range(config.num_interests)) - {b}:
        yield config.drift / (config.num_interests - 1), (b, new)


@pytest.mark.parametrize(
    ("noise", "drift", "weight"), [(0.2, 0.3, 0.7), (0.0, 0.5, 0.6), (0.9, 1.0, 1.0), (0.1, 0.0, 0.5)]
)
def test_filter_equals_the_sum_over_all_hidden_paths(noise, drift, weight):
    """Every path of (major, minor) over 4 events, each with its probability; whole items, not only their interests."""
    config = SyntheticConfig(num_items=6, num_interests=3, noise=noise, drift=drift, major_weight=weight)
    p_S = world.World.of(config).rank_probs_S
    paths = [(1 / 6, (state,)) for state in itertools.permutations(range(3), 2)]
    drifted = [(p * q, (after,)) for p, (state,) in paths for q, after in drift_steps(config, *state)]
    paths = drifted
    for _ in range(3):
        paths = [(p * q, (*path, after)) for p, path in paths for q, after in drift_steps(config, *path[-1])]

    def joint(items):
        return sum(
            p * np.prod([emission(config, p_S, c, r, *state) for (c, r), state in zip(items, path, strict=False)])
            for p, path in paths
        )

    checked = 0
    for seen in [((0, 0), (1, 1), (0, 1)), ((2, 0), (2, 1), (2, 0)), ((0, 1), (1, 0), (1, 1))]:
        for n in range(4):  # n items are seen, the next is predicted
            if joint(seen[:n]) == 0:
                continue  # cannot happen without noise
            expected = [[joint((*seen[:n], (c, r))) / joint(seen[:n]) for r in range(2)] for c in range(3)]
            interests = np.array([[c for c, _ in seen] + [0]])
            q_C = next_interests(config, interests, np.array([n + 1]), back=1)[0, 0]
            np.testing.assert_allclose(q_C[:, None] * p_S, expected, rtol=1e-12, atol=1e-15)
            checked += 1
    assert checked >= 6


def test_filter_equals_a_plain_loop_for_many_users_of_unequal_length():
    config = SyntheticConfig(num_items=12, num_interests=4, noise=0.15, drift=0.2, major_weight=0.65)
    rng = np.random.default_rng(5)
    lengths_B = np.array([2, 30, 3, 17, 2, 30, 8])
    seen_BL = rng.integers(0, 4, (7, 30))
    q_BKC = next_interests(config, seen_BL, lengths_B, back=2)
    states = list(itertools.permutations(range(4), 2))
    for user, length in enumerate(lengths_B):
        belief = dict.fromkeys(states, 1 / len(states))
        for t in range(length):
            moved = dict.fromkeys(states, 0.0)
            for state, p in belief.items():
                for q, after in drift_steps(config, *state):
                    moved[after] += p * q
            if t >= length - 2:
                q_C = [sum(p * emission(config, [1.0], c, 0, *s) for s, p in moved.items()) for c in range(4)]
                np.testing.assert_allclose(q_BKC[user, length - 1 - t], q_C, rtol=1e-12)
            seen = {s: p * emission(config, [1.0], seen_BL[user, t], 0, *s) for s, p in moved.items()}
            belief = {s: p / sum(seen.values()) for s, p in seen.items()}


@pytest.mark.parametrize("k", [1, 3, 10, 11, 100])
def test_top_k_equals_sorting_the_whole_catalogue(k):
    rng = np.random.default_rng(0)
    p_S = np.sort(rng.dirichlet(np.ones(11)))[::-1]
    q_NC = np.repeat(rng.dirichlet(np.ones(4), 60), 2, axis=0)
    q_NC[:20] = 0.25  # ties between interests
    c_N, r_N = rng.integers(0, 4, 120), rng.integers(0, 11, 120)
    mass_N, hit_N = top_k(q_NC, p_S, c_N, r_N, k)
    for q_C, c, r, mass, hit in zip(q_NC, c_N, r_N, mass_N, hit_N, strict=True):
        order = sorted((-q_C[i] * p_S[j], i, j) for i in range(4) for j in range(11))[:k]
        assert mass == pytest.approx(-sum(p for p, _, _ in order))
        assert hit == ((c, r) in {(i, j) for _, i, j in order})
    assert 0 < hit_N.sum() < 120 or k == 100


@pytest.mark.parametrize(
    "knobs",
    [{}, {"drift": 0.4}, {"noise": 0.6}, {"major_weight": 1.0}, {"zipf_exponent": 0.0}, {"lag": 7, "num_segments": 3}],
    ids=str,
)
def test_realised_hits_are_within_three_standard_errors_of_the_exact_rate(tmp_path, knobs):
    base = SyntheticConfig(
        num_users=6000,
        num_items=200,
        num_interests=8,
        events_per_user_min=5,
        events_per_user_max=25,
        noise=0.1,
        drift=0.1,
    )
    files = generate(changed(base, **knobs), tmp_path / "set")
    report = json.loads(files.bayes.read_text())
    assert report["k"] == 10 and report["mode"] == ("lag" if "lag" in knobs else "drift")
    for place in ("test", "validation"):
        got = report[place]
        assert got["num_users"] == 6000 and 0 < got["standard_error"] < 0.007
        assert abs(got["bayes_hit_rate_realised"] - got["bayes_hit_rate"]) < 3 * got["standard_error"]
        popular = got["popularity_hit_rate"]
        assert abs(got["popularity_hit_rate_realised"] - popular) < 3 * (popular * (1 - popular) / 6000) ** 0.5
        assert got["bayes_hit_rate"] > 1.05 * popular


def test_a_wrong_model_of_the_same_events_hits_less(tmp_path):
    """The reported optimum is one: filters with other knobs predict the same events worse."""
    config = SyntheticConfig(num_users=8000, num_items=160, num_interests=8, drift=0.2, noise=0.1, major_weight=0.7)
    files = generate(config, tmp_path / "set")
    true = bayes_hit_rate(config, files.events)["test"]["bayes_hit_rate_realised"]
    for wrong in ({"drift": 0.0}, {"drift": 1.0}, {"major_weight": 0.3}):
        assert bayes_hit_rate(changed(config, **wrong), files.events)["test"]["bayes_hit_rate_realised"] < true - 0.005


@pytest.mark.parametrize("lag", [0, 5])
def test_pure_noise_leaves_nothing_but_popularity(tmp_path, lag):
    config = changed(SMALL, noise=1.0, num_users=500, lag=lag, num_segments=2)
    for got in bayes_hit_rate(config, generate(config, tmp_path / "set").events).values():
        assert got["bayes_hit_rate"] == pytest.approx(got["popularity_hit_rate"], rel=1e-12)
        assert got["bayes_hit_rate_realised"] == got["popularity_hit_rate_realised"] > 0


def test_one_interest_without_drift_or_noise_has_a_rate_known_by_hand(tmp_path):
    config = changed(SMALL, noise=0.0, drift=0.0, major_weight=1.0, zipf_exponent=1.0)
    got = bayes_hit_rate(config, generate(config, tmp_path / "set").events, k=3)["test"]
    harmonic = sum(1 / r for r in range(1, 11))  # 10 items in the one interest that the first event tells
    assert got["bayes_hit_rate"] == pytest.approx((1 + 1 / 2 + 1 / 3) / harmonic)
    assert got["popularity_hit_rate"] == pytest.approx(3 / 4 / harmonic)  # the first ranks of 3 of the 4 interests


def test_drift_makes_the_minor_interest_the_major_one():
    """The loopless generator against its definition, seen with major_weight 1 (the major shows) and 0 (the minor)."""
    config = changed(SMALL, noise=0.0, drift=0.3, major_weight=1.0)
    start = np.arange(400) % 4, (np.arange(400) + 1) % 4
    major_BL, last_major, last_minor = synthetic.drifting_interests(config, np.random.default_rng(1), *start, 500)
    minor_BL, *_ = synthetic.drifting_interests(
        changed(config, major_weight=0.0), np.random.default_rng(1), *start, 500
    )
    moved_BL = np.diff(major_BL, axis=1) != 0
    assert abs(moved_BL.mean() - 0.3) < 0.005
    assert (major_BL[:, 1:][moved_BL] == minor_BL[:, :-1][moved_BL]).all()
    assert (minor_BL != major_BL).all()
    assert (np.diff(minor_BL, axis=1)[~moved_BL] == 0).all()
    assert (last_major == major_BL[:, -1]).all() and (last_minor == minor_BL[:, -1]).all()
    fresh = (minor_BL[:, 1:] - major_BL[:, 1:])[moved_BL] % 4  # uniform over the other three
    assert abs(np.bincount(fresh, minlength=4) / len(fresh) - [0, 1 / 3, 1 / 3, 1 / 3]).max() < 0.01


def test_events_have_the_promised_form(tmp_path):
    files = generate(SMALL, tmp_path / "set")
    got = read(files)
    assert list(got) == ["user_id", "item_id", "timestamp"] and {str(v.dtype) for v in got.values()} == {"int64"}
    assert files.num_events == len(got["user_id"])
    users, lengths = np.unique(got["user_id"], return_counts=True)
    assert (users == np.arange(1, 61)).all() and (np.diff(got["user_id"]) >= 0).all()
    assert lengths.min() == 3 and lengths.max() == 9
    assert got["item_id"].min() >= 1 and got["item_id"].max() <= 40
    assert (np.diff(got["timestamp"])[np.diff(got["user_id"]) == 0] >= 1).all()
    items = pq.read_table(files.items).to_pydict()
    assert items["item_id"] == list(range(1, 41)) and np.bincount(items["interest"]).tolist() == [10] * 4


@pytest.mark.parametrize(("lag", "segments"), [(1, 1), (1, 3), (2, 2), (50, 3), (333, 2)])
def test_the_deciding_pin_lies_exactly_lag_events_before_its_answer(tmp_path, monkeypatch, lag, segments):
    # Blocks of 64 events: the longer histories are made in many pieces.
    for module in (synthetic, world):
        monkeypatch.setattr(module, "BLOCK_EVENTS", 64)
    config = changed(SMALL, num_users=40, noise=0.0, lag=lag, num_segments=segments)
    files = generate(config, tmp_path / "set")
    got, interest = read(files), np.array([-1, *pq.read_table(files.items)["interest"].to_pylist()])
    actions = got["action"].reshape(40, segments, lag + 1)
    assert (actions[:, :, 0] == "pin").all() and (actions[:, :, lag] == "answer").all()
    assert (actions[:, :, 1:lag] == "view").all()
    assert (got["user_id"].reshape(40, -1) == np.arange(1, 41)[:, None]).all()
    assert (np.diff(got["timestamp"].reshape(40, -1), axis=1) >= 1).all()
    by_place = interest[got["item_id"]].reshape(40, segments, lag + 1)
    assert (by_place[:, :, 0] == by_place[:, :, lag]).all()
    if segments > 1:  # a fresh interest in every segment
        assert 0.1 < (by_place[:, 0, 0] == by_place[:, 1, 0]).mean() < 0.5
    if lag == 333:  # the event before the answer's pin, or any filler, says nothing of it
        assert abs((by_place[:, :, 1:lag] == by_place[:, :, lag:]).mean() - 0.25) < 0.05
        assert (np.diff(by_place[:, 0, 1:lag], axis=1) == 0).mean() > 0.4  # fillers stay in the drifting interests


def test_noisy_answers_follow_the_closed_form(tmp_path):
    config = changed(SMALL, num_users=20000, noise=0.4, lag=2)
    files = generate(config, tmp_path / "set")
    interest = np.array([-1, *pq.read_table(files.items)["interest"].to_pylist()])
    by_place = interest[read(files)["item_id"]].reshape(20000, 3)
    same = (by_place[:, 0] == by_place[:, 2]).mean()
    assert abs(same - (0.6 + 0.4 / 4)) < 3 * (0.7 * 0.3 / 20000) ** 0.5
    report = bayes_hit_rate(config, files.events, k=2)
    assert list(report) == ["test"]  # one segment: no earlier answer to validate on
    harmonic = sum(1 / r for r in range(1, 11))
    assert report["test"]["bayes_hit_rate"] == pytest.approx((0.6 + 0.4 / 4) * (1 + 1 / 2) / harmonic)


def test_same_seed_same_bytes_and_a_finished_set_is_not_made_again(tmp_path):
    for lag in (0, 3):
        one, two = (generate(changed(SMALL, lag=lag), tmp_path / f"{name}{lag}") for name in "ab")
        other = generate(changed(SMALL, lag=lag, seed=1), tmp_path / f"c{lag}")
        assert one.events.read_bytes() == two.events.read_bytes() != other.events.read_bytes()
        assert one.bayes.read_bytes() == two.bayes.read_bytes()
        before = one.events.stat().st_mtime_ns
        assert generate(changed(SMALL, lag=lag), tmp_path / f"a{lag}") == one
        assert one.events.stat().st_mtime_ns == before
    replaced = generate(changed(SMALL, seed=1), tmp_path / "a0")  # another set in a folder of ours
    assert replaced.events.read_bytes() == (tmp_path / "c0" / "events.parquet").read_bytes()


def test_memory_grows_with_neither_users_nor_lag(tmp_path, monkeypatch):
    for module in (synthetic, world):
        monkeypatch.setattr(module, "BLOCK_EVENTS", 1 << 13)

    def peak_bytes(**knobs):
        config = changed(SMALL, **knobs)
        tracemalloc.start()
        try:
            total = sum(len(block["item_id"]) for block in synthetic.event_blocks(config, world.World.of(config)))
            return total, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, small = peak_bytes(num_users=2000)
    many, large = peak_bytes(num_users=40000)
    assert many > 15 * few and large < 1.2 * small
    short, small = peak_bytes(num_users=1, lag=20_000)
    long, large = peak_bytes(num_users=1, lag=1_000_000)
    assert long > 40 * short and large < 1.2 * small < 300 * (1 << 13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 41}, "num_items=41 must be a multiple of num_interests=4; set 40"),
        ({"num_items": 2}, "set 4"),
        ({"num_interests": 1}, "set at least 2"),
        ({"num_users": 0}, "num_users=0"),
        ({"noise": 1.5}, "noise=1.5: set at least 0, at most 1"),
        ({"drift": float("nan")}, "drift=nan: set at least 0, at most 1"),
        ({"zipf_exponent": -1.0}, "zipf_exponent=-1.0"),
        ({"lag": 1_000_001}, "lag=1000001"),
        ({"lag": -1}, "lag=-1"),
        ({"lag": 1_000_000, "num_segments": 200}, "num_segments=200 with lag=1000000"),
        ({"events_per_user_min": 2}, "events_per_user_min=2.*3 <= min"),
        ({"events_per_user_max": 2}, "events_per_user_max=2"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_do_not_fit_say_what_to_set(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(SMALL, **changes)


def test_every_knob_has_help_and_the_config_works_as_a_hydra_schema():
    for config in (DatasetConfig, SyntheticConfig):
        assert all(f.metadata.get("help") for f in dataclasses.fields(config))
    schema = OmegaConf.structured(DatasetConfig)
    merged = OmegaConf.merge(schema, {"kind": "synthetic", "synthetic": {"lag": 9}, "source": None})
    config = OmegaConf.to_object(merged)
    assert config.kind is DatasetKind.synthetic and config.synthetic == SyntheticConfig(lag=9)
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(schema, {"synthetic": {"lags": 9}})
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"kind": "ml2m"})


def test_prepare_keeps_one_folder_per_setting_and_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_REC_CACHE", str(tmp_path / "cache"))
    config = DatasetConfig(kind=DatasetKind.synthetic, synthetic=SMALL)
    first, other = prepare(config), prepare(changed(config, synthetic=changed(SMALL, seed=3)))
    assert first.events.parent.parent == tmp_path / "cache" and first.events.parent != other.events.parent
    assert prepare(config) == first
    assert prepare(config, tmp_path / "here").events == tmp_path / "here" / "events.parquet"
    with pytest.raises(DataError, match="nothing to prepare"):
        prepare(DatasetConfig(kind=DatasetKind.files))
    with pytest.raises(DataError, match="source=x means nothing with kind=synthetic"):
        prepare(changed(config, source="x"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "events.csv").write_text("mine")
    with pytest.raises(DataError, match="holds other things"):
        prepare(config, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["events.csv"]


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "write_bayes", broken)  # the last step: events are written by then
    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
