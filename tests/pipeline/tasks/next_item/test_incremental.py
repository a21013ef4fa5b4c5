"""Incremental scoring: thirty days folded in one by one are one full pass; kills, late events, other models, ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files_data import score_config

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.states.files import StateFile
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.score import score

DAYS, BUCKETS, DAY_S = 31, 4, 86_400
CAUSAL = [
    *helpers.SMALL_TRAIN, "model.tower=elastic_causal", "model.chunk=4", "data.targets=every_event",
    "data.columns=[action]",
]  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    import torch.distributed as dist

    yield start_world("cpu")
    dist.destroy_process_group()


def day_file(folder: Path, day: int, *, late: bool = False) -> str:
    """A day's events of some users; from day 10 on also of new users and of items the run does not know."""
    rng = np.random.default_rng([day, late])
    num = 400 if day == 0 else 60
    user = rng.integers(0, 40, num) + (rng.random(num) < 0.2) * day * 2
    if day % 7 == 3:
        user = user // BUCKETS * BUCKETS  # a thin day: one bucket
    item = rng.integers(0, 50 + (day >= 10) * 5, num)
    time = day * DAY_S + rng.integers(0, DAY_S // 60, num) * 60 - late * 2 * DAY_S  # minutes: there are ties
    action = np.where(rng.random(num) < 0.5, "view", "buy")
    events = pa.table({"user_id": user, "item_id": item, "timestamp": 1_000_000 + time, "action": action})
    path = folder / f"day-{day}{'-late' * late}.parquet"
    pq.write_table(events, path)
    return str(path)


def add(store: Path, path: str) -> None:
    append(AppendConfig(input=[path], store=str(store), threads=1))


class Setting:
    """A store of one day, and a run trained on it for a few steps."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.store, self.run = folder, folder / "store", folder / "run"
        source = [day_file(folder, 0)]
        settings = {"context_columns": ["action"], "num_buckets": BUCKETS, "row_group_events": 60, "threads": 1}
        ingest(IngestConfig(input=source, out=str(self.store), **settings))
        steps = ["optim.max_steps=12", "run.checkpoint_every=6", "run.keep_last=9"]
        helpers.run("train", *CAUSAL, *steps, *overrides, f"data.store={self.store}", f"run.dir={self.run}")

    def score(self, world: World, out: str, *, kind: str = "full", **settings) -> dict:
        settings = {"batch_size": 8, "k": 6, "checkpoint": "last", "store": str(self.store), **settings}
        return score(score_config(kind, run=str(self.run), out=str(self.folder / out), **settings), world)

    def files(self, *names: str) -> dict[str, bytes]:
        """Content of scores and states; the manifest of scores too."""
        paths = [path for name in names for path in sorted((self.folder / name).rglob("*")) if path.is_file()]
        return {str(path): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("incremental"))


def rows(folder: Path) -> dict[int, dict]:
    found = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert len({row["user_id"] for row in found}) == len(found)
    return {row["user_id"]: row for row in found}


def assert_same(got: dict[int, dict], want: dict[int, dict], *, atol: float = 1e-4) -> None:
    assert got.keys() == want.keys() and len(got) > 20
    for user, row in got.items():
        assert row["item_ids"] == want[user]["item_ids"], user
        assert row["scores"] == pytest.approx(want[user]["scores"], abs=atol)


def differing(got: dict[int, dict], want: dict[int, dict]) -> list[int]:
    return [user for user, row in got.items() if row["scores"] != pytest.approx(want[user]["scores"], abs=1e-4)]


@pytest.fixture(scope="module")
def thirty_days(setting, world) -> Setting:
    """The store after 30 appends, each scored incrementally into OUT/daily."""
    for day in range(DAYS):
        if day:
            add(setting.store, day_file(setting.folder, day))
        figures = setting.score(world, "daily", kind="incremental")
        assert figures["late_events"] == 0 and figures["version"] == day
        if day:
            assert 0 < figures["folded_events"] <= 60 and figures["skipped_parts"] < BUCKETS
        if day % 7 == 3:
            assert figures["skipped_parts"] == BUCKETS - 1, "buckets without events are left alone"
    return setting


def test_thirty_days_are_one_full_pass(thirty_days, world):
    figures = thirty_days.score(world, "full", max_history=0, window=0)
    assert figures["users"] > 60
    daily, full = rows(thirty_days.folder / "daily"), rows(thirty_days.folder / "full")
    assert_same(daily, full)
    in_windows = thirty_days.score(world, "windows", max_history=0, window=7)
    assert in_windows["users"] == figures["users"]
    assert_same(rows(thirty_days.folder / "windows"), full)
    longest = thirty_days.score(world, "newest", max_history=5)
    assert longest["users"] == figures["users"] and differing(rows(thirty_days.folder / "newest"), full)


def test_a_finished_day_again_changes_nothing(thirty_days, world):
    before = thirty_days.files("daily", "store")
    figures = thirty_days.score(world, "daily", kind="incremental")
    assert figures["skipped_parts"] == BUCKETS and figures["folded_events"] == figures["read_bytes"] == 0
    assert thirty_days.files("daily", "store") == before


def test_another_folder_is_scored_from_the_states_alone(thirty_days, world):
    figures = thirty_days.score(world, "elsewhere", kind="incremental", seen="keep")
    assert figures["folded_events"] == figures["users_with_new_events"] == 0 and figures["skipped_parts"] == 0
    thirty_days.score(world, "full-seen", max_history=0, seen="keep")
    assert_same(rows(thirty_days.folder / "elsewhere"), rows(thirty_days.folder / "full-seen"))


@pytest.mark.parametrize("where", ["a page of states", "the footer", "a clock"])
def test_damaged_states_are_made_again_and_said_so(thirty_days, world, capsys, where):
    path = sorted(thirty_days.store.glob("states/*/*.parquet"))[1]
    whole, last = path.read_bytes(), pq.read_metadata(path).num_row_groups - 1
    page = pq.read_metadata(path).row_group(last).column(2 if where == "a clock" else 4)
    end = page.data_page_offset + page.total_compressed_size
    at = len(whole) - 200 if where == "the footer" else end - 4
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    figures = thirty_days.score(world, f"after {where}", kind="incremental")
    assert figures["remade_buckets"] == 1 and 0 < figures["folded_events"] < figures["store_events"]
    said = [line for line in capsys.readouterr().err.splitlines() if "encoded again" in line]
    assert len(said) == 1 and str(path) in said[0]
    assert_same(rows(thirty_days.folder / f"after {where}"), rows(thirty_days.folder / "daily"))
    StateFile(open_location(path)).verify()


def test_two_ranks_and_a_first_encoding_in_windows(thirty_days, world):
    names = [f"run={thirty_days.run}", "checkpoint=last", f"out={thirty_days.folder}/two", "k=6", "batch_size=5"]
    shutil.move(thirty_days.store / "states", thirty_days.folder / "states-aside")
    try:
        figures = helpers.run("score", "incremental", *names, "window=7", ranks=2)
        assert figures["new_users"] == figures["users"] and figures["folded_events"] == figures["store_events"]
        assert "newer than the run: they count as unknown" in figures["stderr"]
        assert_same(rows(thirty_days.folder / "two"), rows(thirty_days.folder / "daily"))
    finally:
        shutil.rmtree(thirty_days.store / "states")
        shutil.move(thirty_days.folder / "states-aside", thirty_days.store / "states")


FORKER = """
import json, os, signal, sys
from pathlib import Path
from elastic_rec.pipeline.runtime.world import start_world
from elastic_rec.pipeline.config.score import IncrementalScoreConfig
from elastic_rec.pipeline.score import score

def child(trial):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event == "os.rename":
            seen += 1
            if seen == trial["step"]:
                os.kill(os.getpid(), signal.SIGKILL)
    world = start_world("cpu")
    sys.addaudithook(hook)
    score(IncrementalScoreConfig(**trial["config"]), world)
    sys.stderr.write(f"{seen} changes")
    os._exit(0)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_kill_at_any_commit_and_a_rerun_give_the_same(thirty_days):
    """A day with events in all buckets; its process is killed at its k-th rename; the last is the manifest's."""
    setting, saved = thirty_days, thirty_days.folder / "saved"
    add(setting.store, day_file(setting.folder, DAYS + 1))
    for name in ("daily", "store"):
        shutil.copytree(setting.folder / name, saved / name)
    config = {"run": str(setting.run), "out": str(setting.folder / "daily"), "checkpoint": "last", "k": 6}
    config |= {"batch_size": 8, "store": str(setting.store)}
    with subprocess.Popen([sys.executable, "-c", FORKER], stdin=-1, stdout=-1, text=True) as forker:

        def trial(step: int) -> int:
            forker.stdin.write(json.dumps({"step": step, "config": config}) + "\n")
            forker.stdin.flush()
            return int(forker.stdout.readline())

        assert trial(0) == 0
        want, changes = setting.files("daily", "store"), 2 * BUCKETS + 1
        for step in (1, 2, 3, 6, 8, changes):
            for name in ("daily", "store"):
                shutil.rmtree(setting.folder / name)
                shutil.copytree(saved / name, setting.folder / name)
            assert trial(step) == -9
            assert setting.files("daily", "store") != want
            assert trial(changes + 1) == 0
            assert setting.files("daily", "store") == want, step
        forker.stdin.close()


@pytest.mark.parametrize("late", ["reencode", "fold"])
def test_late_events(setting, world, tmp_path, late):
    own = Setting.__new__(Setting)
    own.folder, own.store, own.run = tmp_path, tmp_path / "store", setting.run
    shutil.copytree(setting.store, own.store, ignore=shutil.ignore_patterns("states"))
    own.score(world, "daily", kind="incremental", late_events=late)
    add(own.store, day_file(tmp_path, 50, late=True))
    own.score(world, "daily", kind="incremental", late_events=late)
    add(own.store, day_file(tmp_path, 49, late=True))
    figures = own.score(world, "daily", kind="incremental", late_events=late)
    assert figures["late_events"] > 10 and figures["late_users"] > 5
    own.score(world, "full", max_history=0)
    daily, full = rows(tmp_path / "daily"), rows(tmp_path / "full")
    if late == "reencode":
        assert figures["reencoded_users"] == figures["late_users"]
        assert_same(daily, full)
    else:
        assert figures["reencoded_users"] == 0
        assert 0 < len(differing(daily, full)) <= figures["late_users"], "only users with late events differ"


def test_half_precision_states_come_close(setting, world):
    setting.score(world, "bf16", kind="incremental", state_dtype="bfloat16")
    add(setting.store, day_file(setting.folder, DAYS + 2))
    setting.score(world, "bf16", kind="incremental", state_dtype="bfloat16")
    setting.score(world, "bf16-full", max_history=0)
    got, want = rows(setting.folder / "bf16"), rows(setting.folder / "bf16-full")
    worst = max(abs(np.subtract(row["scores"], want[user]["scores"])).max() for user, row in got.items())
    assert 0 < worst < 0.05


def test_the_moment_asked_for_is_asked_of_every_user(world, tmp_path):
    setting = Setting(tmp_path, "model.time=query")
    first, later = 1_000_000 + 2 * DAY_S, 1_000_000 + 90 * DAY_S
    setting.score(world, "daily", kind="incremental", query_time=str(1_000_000 + DAY_S))
    add(setting.store, day_file(tmp_path, 1))
    for asked in (first, later):
        figures = setting.score(world, "daily", kind="incremental", query_time=str(asked))
        assert (figures["folded_events"] > 0) == (asked == first), "the later question needs no event"
        setting.score(world, f"full-{asked}", max_history=0, query_time=str(asked))
        assert_same(rows(tmp_path / "daily"), rows(tmp_path / f"full-{asked}"))
    assert differing(rows(tmp_path / f"full-{first}"), rows(tmp_path / f"full-{later}"))
    with pytest.raises(ConfigError, match="depend on when they are asked for: set query_time"):
        setting.score(world, "refused", kind="incremental")
    with pytest.raises(ConfigError, match="is before the store's newest event"):
        setting.score(world, "refused", kind="incremental", query_time="1970-01-05")


def test_refusals(setting, world, tmp_path):
    with pytest.raises(ConfigError, match=r"query_time=now, but the run was trained with model.time=past"):
        setting.score(world, "refused", query_time="now")
    with pytest.raises(ConfigError, match="made with step=12, asked for now: 6"):
        setting.score(world, "daily", kind="incremental", checkpoint="6")
    with pytest.raises(ConfigError, match="made with mode='incremental', asked for now: 'full'"):
        setting.score(world, "daily")
    with pytest.raises(TypeError, match="max_history"):  # a state holds all events
        score_config("incremental", max_history=50)
