"""Jobs of two ranks in which rank 1 fails in many ways: `python tests/support/jobs_ranks.py FOLDER WAY ...`.

Ranks are forked, so that torch is imported once. All ways run at the same time. Prints, per way, the exit code of each
rank (minus the signal that killed it); stderr is FOLDER/WAY-RANK.
"""

import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_rec.pipeline.config.parallel import ParallelConfig
from elastic_rec.pipeline.runtime import interrupts
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World, run_in_world

TIMEOUT_S = 5


@dataclass
class JobConfig:
    way: str
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(device="cpu", timeout_s=TIMEOUT_S))


def main(config: JobConfig, world: World) -> dict:
    if config.way == "same mistake":
        raise ConfigError("k=0: set it to 1 or more")
    for step in range(8):
        world.pulse.beat(f"step {step}")
        if step == 3 and world.rank == 1:
            fail(config.way)
        dist.all_reduce(torch.ones(1))
    return {"steps": step + 1}


def fail(way: str) -> None:
    if way == "mistake":
        raise ConfigError("k=0: set it to 1 or more")
    elif way == "bug":
        raise KeyError("a fault of the program")
    elif way == "disk":
        Path("/dev/full").write_text("x" * 100_000)
    elif way in ("SIGKILL", "SIGSTOP", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, way))
    elif way == "sleep":
        time.sleep(600)


def keep_store() -> tuple[int, int]:
    """Forks a keeper of a store, which outlives the ranks as torchrun's agent does: its process id, the port."""
    readable, writable = os.pipe()
    process = os.fork()
    if not process:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writable, str(store.port).encode())
        signal.pause()
    return process, int(os.read(readable, 16))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(folder: Path, way: str, port: int, *, is_kept: bool) -> list[int]:
    """Forks the two ranks; their process ids. port: of the store, which rank 0 makes unless it is kept for them."""
    processes = []
    for rank in range(2):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        with (folder / f"{way}-{rank}").open("w") as log:
            os.dup2(log.fileno(), 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": str(is_kept)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        interrupts.listen()
        run_in_world(main, JobConfig(way), report=lambda figures: print(figures, file=sys.stderr))
        os._exit(0)
    return processes


def wait(jobs: dict[str, list[int]]) -> dict[str, list[int]]:
    """A rank that is stuck is killed some seconds after the other has ended, as torchrun does."""
    codes: dict[int, int] = {}
    ended_s: dict[str, float] = {}
    processes = [process for pair in jobs.values() for process in pair]
    while len(codes) < len(processes):
        for way, pair in jobs.items():
            for process in set(pair) - set(codes):
                if (done := os.waitpid(process, os.WNOHANG))[0]:
                    codes[process] = os.waitstatus_to_exitcode(done[1])
                    ended_s[way] = time.monotonic()
                elif way in ended_s and time.monotonic() - ended_s[way] > 8:
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    return {way: [codes[process] for process in pair] for way, pair in jobs.items()}


if __name__ == "__main__":
    folder, ways = Path(sys.argv[1]), sys.argv[2:]
    keeper, kept_port = (
        keep_store()
    )  # for ranks that fail together: one asks after the other has ended who has told why
    kept = {way: start(folder, way, kept_port, is_kept=True) for way in ways if way == "same mistake"}
    started = {way: start(folder, way, free_port(), is_kept=False) for way in ways if way not in kept}
    print(json.dumps(wait(kept | started)))
    os.kill(keeper, signal.SIGKILL)
