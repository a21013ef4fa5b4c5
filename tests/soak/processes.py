"""Forked children that run verbs, and are struck by a signal at a chosen moment.

The process that forks imports and never computes: it owns no threads that a child would miss. A child starts in
milliseconds, so that a trial costs what the verb itself costs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

LIMIT_S = 180  # of a child that nothing disturbs; a child over it hangs
PEERS_S = 30  # for the other ranks after one has ended badly
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")

Call = Callable[[], Any]


class OutOfTime(Exception):
    """The time of the whole soak is over: the trial under way is cut and not counted."""


@dataclass(frozen=True)
class Strike:
    """A signal to all ranks, after `seconds`, or at the `change`-th change that `rank` makes to the file system."""

    signal: int
    seconds: float | None = None
    change: int | None = None
    rank: int = 0

    def __str__(self) -> str:
        at = f"{self.seconds:.2f} s" if self.change is None else f"change {self.change} of rank {self.rank}"
        return f"{signal.Signals(self.signal).name} at {at}"


@dataclass(frozen=True)
class Ended:
    """codes: exit code of each rank, negative for a signal. text: what they wrote. answer, changes: of each rank."""

    codes: list[int]
    text: str
    seconds: float
    answers: list[Any]
    changes: list[int]
    hung: bool

    @property
    def is_good(self) -> bool:
        return not any(self.codes)

    @property
    def failure(self) -> str:
        """How it ended badly, in a word."""
        if self.hung:
            return "hung"
        if min(self.codes) < 0:
            return f"died of {signal.Signals(-min(self.codes)).name}"
        return "traceback" if "Traceback (most recent call last)" in self.text else "one line"


class Processes:
    """Starts children. end: when the soak is over, on time.monotonic's clock."""

    def __init__(self, work: Path, *, end: float) -> None:
        self.work, self.end = work, end

    def run(self, *calls: Call, strike: Strike | None = None) -> Ended:
        """One child per call, as ranks of one world where there are several; waits for all."""
        log, answers = self.work / "log", [self.work / f"answer-{rank}.json" for rank in range(len(calls))]
        for path in (log, *answers):
            path.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        worlds, began, pids = _worlds(len(calls)), time.monotonic(), []
        try:
            for rank, call in enumerate(calls):
                if (pid := os.fork()) == 0:
                    group = pids[0] if pids else 0
                    _child(call, group, worlds[rank], strike if strike and strike.rank == rank else None, log, answers)
                pids.append(pid)
                with suppress(PermissionError, ProcessLookupError):
                    os.setpgid(pid, pids[0])
            codes, hung = self._wait(pids, began, strike)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(pids[0], signal.SIGKILL)
        told = [json.loads(path.read_text()) if path.exists() else [None, 0] for path in answers]
        text = log.read_text(errors="replace") if log.exists() else ""
        seconds = time.monotonic() - began
        return Ended(codes, text, seconds, [answer for answer, _ in told], [changes for _, changes in told], hung)

    def must(self, *calls: Call) -> Ended:
        """Run what nothing disturbs."""
        ended = self.run(*calls)
        if not ended.is_good:
            raise RuntimeError(f"undisturbed, and yet it ended with {ended.codes}:\n{ended.text[-4000:]}")
        return ended

    def _wait(self, pids: list[int], began: float, strike: Strike | None) -> tuple[list[int], bool]:
        codes, limit, hung = {}, began + LIMIT_S, False
        strike_at = began + strike.seconds if strike and strike.seconds is not None else None
        while len(codes) < len(pids):
            now = time.monotonic()
            if strike_at is not None and now >= strike_at:
                os.killpg(pids[0], strike.signal)
                strike_at = None
            if now > min(limit, self.end):
                hung = not codes and limit <= self.end
                os.killpg(pids[0], signal.SIGKILL)
            for pid in pids:
                if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(found[1])
                    if codes[pid]:
                        limit = min(limit, now + PEERS_S)
            time.sleep(0.002)
        if time.monotonic() > self.end and not hung:
            raise OutOfTime
        return [codes[pid] for pid in pids], hung


def verb(name: str, *overrides: str, then: Call | None = None) -> Call:
    """A call of a verb's command line in a child; then: computes the answer, after the verb said that all is well."""
    import_module(f"elastic_rec.pipeline.{name}")  # once, in the process that forks

    def call() -> Any:
        sys.argv = [f"{name}.py", *overrides]
        import_module(f"elastic_rec.pipeline.{name}").main()
        if then is None:
            return None
        try:
            return then()
        except Exception as error:  # the verb's word against what it wrote
            return f"unreadable: {error}"

    return call


def _worlds(size: int) -> list[dict[str, str]]:
    if size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _child(
    call: Call, group: int, world: dict[str, str], strike: Strike | None, log: Path, answers: list[Path]
) -> None:
    """Never returns."""
    code, changes = 1, 0
    try:
        os.setpgid(0, group)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        os.environ.update(world)

        def watch(event: str, args: tuple) -> None:
            nonlocal changes
            writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if event in CHANGES or writes:
                changes += 1
                if strike is not None and changes == strike.change:
                    os.killpg(os.getpgrp(), strike.signal)

        sys.addaudithook(watch)
        answer = call()
        answers[int(world.get("RANK", 0))].write_text(json.dumps([answer, changes]))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
