"""Verbs as real processes, cheaply: a server imports the product once and forks a process per verb.

As a module: `Verbs`, what tests use. As a script: the server; a line of JSON on stdin asks, one on stdout answers.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parents[2]


class Done(NamedTuple):
    """code: exit status, or minus the signal. last: the last line on stderr."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class Verbs:
    """The server, and what it has started. Logs go to `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        command = [sys.executable, __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(command, text=True, env=environment, **pipes)

    def start(self, verb: str, *overrides: str, at: tuple[str, int, int] | None = None, **limits: int) -> Job:
        """limits: of the resource module, as FSIZE=1000. at=("step 12", 1, SIGTERM): at the first such beat of its
        pulse the process gets the signal."""
        self.number += 1
        log = self.folder / f"{self.number}-{verb}"
        pid = self._ask(verb=verb, overrides=overrides, limits=limits, at=at, log=str(log))
        return Job(self, pid, log)

    def run(self, verb: str, *overrides: str, **how) -> Done:
        return self.start(verb, *overrides, **how).wait()

    def good(self, verb: str, *overrides: str) -> dict:
        """The figures of a verb that must end well."""
        done = self.run(verb, *overrides)
        assert done.code == 0, done.err
        return json.loads(done.out.splitlines()[-1])

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()

    def _ask(self, **request) -> int:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


class Job(NamedTuple):
    verbs: Verbs
    pid: int
    log: Path

    def signal(self, number: int, *, after: Callable[[], bool]) -> Done:
        """Sends it once after() is true, and waits for the end."""

        def ready() -> bool:
            assert Path(f"/proc/{self.pid}/stat").read_text().split()[2] != "Z", f"ended before:\n{self.err()}"
            return after()

        wait_until(ready)
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> Done:
        code = self.verbs._ask(wait=self.pid)
        return Done(code, self.log.with_suffix(".out").read_text(), self.err())

    def err(self) -> str:
        return self.log.with_suffix(".err").read_text()


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    import elastic_rec.pipeline.evaluate
    import elastic_rec.pipeline.score
    import elastic_rec.pipeline.train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                run(**request)
        print(answer, file=answers, flush=True)


def run(verb: str, overrides: list[str], limits: dict[str, int], at: list | None, log: str) -> None:
    """In the child: as `python pipeline/VERB.py OVERRIDES` under limits."""
    for descriptor, suffix in ((0, None), (1, ".out"), (2, ".err")):
        path = Path(log).with_suffix(suffix) if suffix else Path(os.devnull)
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    from elastic_rec.pipeline.runtime import interrupts

    interrupts.GRACE_S = 240.0  # the machine may be loaded
    if at:
        signal_at(*at)
    sys.argv = [f"pipeline/{verb}.py", *overrides]
    code = 0
    try:
        runpy.run_path(str(REPO / sys.argv[0]), run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def signal_at(beat: str, nth: int, number: int) -> None:
    from elastic_rec.pipeline.runtime.pulse import Pulse

    really, left = Pulse.beat, [nth]

    def wrapped(pulse: Pulse, at: str) -> None:
        left[0] -= at == beat
        if at == beat and left[0] == 0:
            os.kill(os.getpid(), number)
        really(pulse, at)

    Pulse.beat = wrapped


if __name__ == "__main__":
    serve()
