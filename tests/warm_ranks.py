"""Verbs on real ranks, started in a second: each process is forked from a server that has imported everything."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

VERBS = ("train", "evaluate", "score")
LIMIT_S = 600


def run(verb: str, *overrides: str, ranks: int = 1) -> dict:
    """Run a verb to its end and return the JSON of its last line, with rank 0's "stderr"."""
    codes, out, err = _start(_verb, (verb, overrides), ranks)
    assert not any(codes), f"exit codes {codes}: {err[-8000:]}"
    return json.loads(out.strip().splitlines()[-1]) | {"stderr": err}


def fail(verb: str, *overrides: str, ranks: int = 1) -> tuple[int, str]:
    """Run a verb that must fail on every rank; returns (exit code, stderr of rank 0)."""
    codes, out, err = _start(_verb, (verb, overrides), ranks)
    assert all(codes), out
    return codes[0], err


def call(function: Callable[[int, int, str], None], folder: str, *, ranks: int) -> None:
    """function(rank, ranks, folder) on each rank, with torchrun's variables."""
    codes, _, err = _start(_call, (function, folder), ranks)
    assert not any(codes), f"exit codes {codes}: {err[-8000:]}"


def _start(function: Callable, arguments: tuple, ranks: int) -> tuple[list[int], str, str]:
    """(exit codes, stdout and stderr of rank 0)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"elastic_rec.pipeline.{name}" for name in VERBS])
    with TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment = {**address, **{name: str(number) for name, number in place.items()}, "OMP_NUM_THREADS": "1"}
            processes.append(context.Process(target=_on_rank, args=(function, arguments, environment, folder)))
            processes[-1].start()
        for process in processes:
            process.join(LIMIT_S)
            process.kill()
            process.join()
        out, err = ((Path(folder) / f"{name}-0").read_text() for name in ("out", "err"))
    return [process.exitcode for process in processes], out, err


def _on_rank(function: Callable, arguments: tuple, environment: dict[str, str], folder: str) -> None:
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}-{environment['RANK']}", os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)


def _verb(verb: str, overrides: tuple[str, ...]) -> None:
    sys.argv = [f"{verb}.py", *overrides]
    import_module(f"elastic_rec.pipeline.{verb}").main()


def _call(function: Callable[[int, int, str], None], folder: str) -> None:
    function(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder)
