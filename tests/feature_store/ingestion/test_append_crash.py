"""Real processes, really killed: no moment of an append or a vacuum loses, doubles or tears anything.

One helper process imports everything once and forks a child per trial, which is killed (SIGKILL) at its k-th change to
the file system, for every k, or after a random time.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from feature_store_reference import make_store, pick, random_events, reference_histories, stored_histories, write_events
from helpers import fail, run

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.versions import vacuum

NAMES = ["timestamp", "item"]
# argv: a JSON list of trials {config, step?, seconds?, signal}; prints how each child ended (-9: killed, 0: finished).
FORKER = """
import json, os, signal, sys, time
from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.table.versions import vacuum
from elastic_rec.feature_store.ingestion.config import AppendConfig

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime")

def child(trial):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in CHANGES or (event == "open" and args[1] == "wb"):
            seen += 1
            if seen == trial.get("step"):
                os.kill(os.getpid(), trial["signal"])
    sys.addaudithook(hook)
    settings = trial["config"]
    try:
        vacuum(**settings) if "retention_hours" in settings else append(AppendConfig(**settings))
    except DataError as error:
        print(error, file=sys.stderr)
        os._exit(2)
    os._exit(0)

ends = []
for line in sys.stdin:
    trial = json.loads(line)
    pid = os.fork()
    if pid == 0:
        child(trial)
    if "seconds" in trial:
        time.sleep(trial["seconds"])
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, os.WUNTRACED)[1]
    print(json.dumps([pid, -19 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)]), flush=True)
"""
KILL, STOP = 9, 19


class Forker:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, **trial) -> tuple[int, int]:
        """(pid, how it ended)"""
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return tuple(json.loads(line))


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.process.stdin.close()
    forker.process.wait(timeout=60)
    forker.process.stdout.close()
    forker.process.stderr.close()


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """A store of one day, the file of the next, and the histories before and after it."""
    root, events = tmp_path_factory.mktemp("day"), random_events(500)
    store = make_store(root, events[:300], num_buckets=2)
    before, after = (pick(reference_histories(part), NAMES) for part in (events[:300], events))
    return Path(store.path), write_events(root / "day.parquet", events[300:]), before, after


def copy_of(day, path):
    """(the store at `path`, settings of the append, histories before, after)"""
    store, source, before, after = day
    shutil.copytree(store, path)
    return path, {"input": [source], "store": str(path), "threads": 1}, before, after


def read(path, version=None):
    store = Store.open(path, version=version)
    store.verify()
    return pick(stored_histories(store, ["item"]), NAMES)


def finish(config) -> bool:
    """Runs an append again; False where the killed one had finished (the input is known: refused, not doubled)."""
    try:
        append(AppendConfig(**config))
    except Exception as error:
        assert "the same bytes were taken before" in str(error)
        return False
    return True


def kill_append(forker, day, folder, **moment) -> tuple[int, bool]:
    path, config, before, after = copy_of(day, folder)
    _, end = forker(config=config, signal=KILL, **moment)
    now = read(path)
    assert now in (before, after)
    assert read(path, 0) == before
    assert finish(config) == (now == before)
    assert read(path) == after
    vacuum(str(path), retention_hours=0)
    assert read(path) == after
    kept = {p.name.split("-")[0] for p in path.iterdir()}
    assert kept <= {"manifest.json", "manifest", "vocab", "bucket=0000", "bucket=0001"}, kept
    named = len(Store.open(path).manifest.named_files())
    assert len([p for p in path.rglob("*.parquet")]) == named  # no litter either
    return end, now == after


def test_sigkill_at_every_step_of_an_append(tmp_path, forker, day):
    outcomes = []
    for step in range(1, 100):
        end, went_in = kill_append(forker, day, tmp_path / str(step), step=step)
        outcomes.append(went_in)
        if end == 0:
            break
        assert end == -9
    assert len(outcomes) > 15
    assert outcomes == sorted(outcomes)  # out, ..., out, in, ..., in
    assert outcomes.count(True) >= 2  # killed after the commit, too, while it cleared up


def test_sigkill_at_20_random_moments_of_an_append_or_a_vacuum(tmp_path, forker, day):
    draw = random.Random(0)
    ends = [kill_append(forker, day, tmp_path / str(n), seconds=draw.uniform(0, 0.3))[0] for n in range(14)]
    assert set(ends) <= {0, -9} and -9 in ends
    for n in range(14, 20):
        path, config, _, after = copy_of(day, tmp_path / str(n))
        append(AppendConfig(**config))
        settings = {"store": str(path), "retention_hours": 0.0}
        end = forker(config=settings, signal=KILL, seconds=draw.uniform(0, 0.01))[1]
        assert end in (0, -9)
        assert read(path) == after
        assert forker(config=settings, signal=KILL)[1] == 0 and read(path) == after


def test_sigkill_at_many_steps_of_a_vacuum(tmp_path, forker, day):
    path, config, _, after = copy_of(day, tmp_path / "store")
    append(AppendConfig(**config))
    settings = {"store": str(path), "retention_hours": 0.0}
    # Each killed vacuum goes on where the one before it was killed: at its k-th change, whatever is left.
    events = random_events(120, seed=5)
    ends = []
    for step in (1, 2, 3, 4, 5, 6, 7, 1, 1, 1, 2, 2):
        extra = write_events(tmp_path / f"{len(ends)}.parquet", events[len(ends) * 10 :][:10])
        append(AppendConfig(**{**config, "input": [extra]}))
        want = read(path)
        ends.append(forker(config=settings, signal=KILL, step=step)[1])
        assert read(path) == want
        assert sum(map(len, want.values())) == sum(map(len, after.values())) + 10 * len(ends)
    assert ends.count(-9) == len(ends)
    assert forker(config=settings, signal=KILL)[1] == 0
    assert read(path) == want
    named = len(Store.open(path).manifest.named_files())
    assert len(list(path.rglob("*.parquet"))) == named


def test_two_appends_at_once_and_a_reader_between(tmp_path, forker, day):
    """The first one is stopped (SIGSTOP) with its data files in place and its manifest unwritten, then goes on."""
    path, config, before, after = copy_of(day, tmp_path / "store")
    pid, end = forker(config=config, signal=STOP, step=13)
    assert end == -19
    assert len(list(path.glob("bucket=*/*.parquet"))) > 2  # it stands in the middle of things
    reader = HistoryReader(Store.open(path), columns=[], global_batch_size=9, shuffle=True)
    batches = reader.epoch(0)
    first = next(batches)
    other = write_events(tmp_path / "other.parquet", random_events(30, seed=8))
    with pytest.raises(Exception, match="another append, vacuum or restore is at work there; run again when"):
        append(AppendConfig(**{**config, "input": [other]}))
    assert read(path) == before
    subprocess.run(["kill", "-CONT", str(pid)], check=True)
    for _ in range(1000):
        if Store.open(path).version == 1:
            break
        subprocess.run(["sleep", "0.02"], check=True)
    assert read(path) == after
    rest = [len(first.rows), *(len(batch.rows) for batch in batches)]
    assert sum(rest) == len(before)  # the reader saw its own version to the end


def test_the_command_appends_and_tells_the_cost(tmp_path, day):
    path, config, _, after = copy_of(day, tmp_path / "store")
    figures = run("ingest", "append", f"store={path}", f"input=[{config['input'][0]}]")
    assert (figures["version"], figures["appended_events"], figures["events"]) == (1, 200, 500)
    assert figures["write_amplification"] > 1 and read(path) == after


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["append", "store={}", "overwrite=true"], 1, "'overwrite' not in 'AppendConfig'"),
        (["append", "store={}", "num_buckets=8"], 1, "'num_buckets' not in 'AppendConfig'"),
        (["restore", "store={}"], 2, "version is not set"),
        (["vacuum", "store={}", "input=[x]"], 1, "'input' not in 'VacuumConfig'"),
        (["vacuum", "store={}", "retention_hours=-1.0"], 2, "retention_hours=-1.0: set at least 0"),
        (["data.store={}", "data.ingest.force=true"], 1, "'force' not in 'IngestConfig'"),
        (["compact", "store={}"], 2, "compact: neither a command (append, vacuum, restore, impressions) nor key=value"),
    ],
)
def test_each_command_takes_its_own_keys_alone(tmp_path, arguments, code, text):
    found, stderr = fail("ingest", *(argument.format(tmp_path) for argument in arguments))
    assert found == code and text in stderr, stderr
