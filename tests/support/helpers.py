"""What several test files use: real processes, a real small store, one process group of one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest

REPO = Path(__file__).parents[2]
# Small enough that 50 steps take seconds, dropout off so that losses can be compared across ranks.
SMALL_TRAIN = [
    "model.width=16", "model.experts=4", "model.dropout=0", "memory.num_keys=16", "data.max_history=32",
    "model.tower=elastic", "data.targets=sampled", "data.prefixes_per_user=2",
    "optim.global_batch_size=16", "optim.warmup_steps=5",
    "optim.table_lr=0.2", "optim.dense_lr=0.005", "run.log_every=1",
]  # fmt: skip


def make_store(folder: Path, *, num_users: int = 120, num_items: int = 60, seed: int = 0, num_buckets: int = 5) -> Path:
    """A store of users with 2 to 40 events each, four in five of them among six items of the user's own."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 41, num_users)
    user = np.repeat(np.arange(1, num_users + 1), lengths)
    place = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    home = np.repeat(rng.integers(0, max(1, num_items // 6), num_users) * 6, lengths) + rng.integers(0, 6, len(user))
    item = np.where(rng.random(len(user)) < 0.2, rng.integers(0, num_items, len(user)), home % num_items) + 100
    events = pa.table(
        {
            "user_id": user,
            "item_id": item,
            "timestamp": 1_000_000 + place * 60 + rng.integers(0, 60, len(user)),
            "action": np.where(rng.random(len(user)) < 0.5, "view", "buy"),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(events, folder / "events.parquet")
    ingest(
        IngestConfig(
            input=[str(folder / "events.parquet")],
            context_columns=["action"],
            num_buckets=num_buckets,
            row_group_events=300,
            out=str(folder / "store"),
        )
    )
    return folder / "store"


def command(verb: str, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, str(REPO / "pipeline" / f"{verb}.py"), *overrides]


def start(verb: str, *overrides: str, ranks: int = 1, log: Path) -> subprocess.Popen:
    """Start a verb in the background; its stderr goes to `log`."""
    arguments = command(verb, *overrides, ranks=ranks)
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log.open("w"), env=environment())


def kill_9(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all its descendants (torchrun puts its ranks in sessions of their own)."""
    found = [process.pid]
    for pid in found:
        found += [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def run(verb: str, *overrides: str, ranks: int = 1) -> dict:
    """Run a verb to its end and return the JSON of its last line."""
    done = subprocess.run(
        command(verb, *overrides, ranks=ranks), capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr[:8000]
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"stderr": done.stderr}


def output_of(command: list[str]) -> str:
    """Run a command that must succeed; returns its stdout."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[:8000]
    return done.stdout


def fail(verb: str, *overrides: str, ranks: int = 1) -> tuple[int, str]:
    """Run a verb that must fail; returns (exit code, stderr)."""
    done = subprocess.run(
        command(verb, *overrides, ranks=ranks), capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode != 0, done.stdout
    return done.returncode, done.stderr


def train_lines(run_dir: Path) -> dict[int, float]:
    """step -> loss, from metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def claim_rows(path: Path, rows: int, claimed: int) -> None:
    """Let a Parquet file's footer say `claimed` wherever it says `rows`."""
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - length : -8].replace(_varint(rows), _varint(claimed))
    path.write_bytes(content[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def _varint(number: int) -> bytes:
    """As Thrift's compact protocol writes an i64."""
    number, out = number << 1, bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def flip(path: Path, rng: random.Random) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
