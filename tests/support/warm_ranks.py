"""Verbs on real ranks, started in a second: each process is forked from a server that has imported everything."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

VERBS = ("train", "evaluate", "score")
LIMIT_S = 600


def run(verb: str, *overrides: str, ranks: int = 1) -> dict:
    """Run a verb to its end and return the JSON of its last line, with rank 0's "stderr"."""
    out, err = _start(_verb, (verb, overrides), ranks)
    return json.loads(out.strip().splitlines()[-1]) | {"stderr": err}


def call(function: Callable[[int, int, str], None], folder: str, *, ranks: int) -> None:
    """function(rank, ranks, folder) on each rank, with torchrun's variables."""
    _start(_call, (function, folder), ranks)


def _start(function: Callable, arguments: tuple, ranks: int) -> tuple[str, str]:
    """(stdout, stderr) of rank 0. When a rank fails, all are ended and AssertionError says what each of them wrote."""
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
        _wait(processes)
        codes, texts = [process.exitcode for process in processes], Path(folder)
        errors = [path.read_text() for path in sorted(texts.glob("err-*"))]
        assert not any(codes), "\n".join([f"exit codes {codes}", *(error[-4000:] for error in errors)])
        return (texts / "out-0").read_text(), errors[0]


def _wait(processes: list) -> None:
    """Until all have ended, or one has failed; none is left."""
    running = {process.sentinel for process in processes}
    try:
        while running and not any(process.exitcode for process in processes):
            ended = wait(running, LIMIT_S)
            assert ended, f"took more than {LIMIT_S} s"
            running -= set(ended)
    finally:
        for process in processes:
            process.kill()
            process.join()


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
