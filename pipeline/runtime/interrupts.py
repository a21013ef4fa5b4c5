"""SIGTERM and Ctrl-C: a verb ends with one line and exit code 75, and the same command goes on later.

The first signal raises Interrupted in the main thread, so that temporary folders are cleared. Inside `deferred()` it is
only remembered, for code that ends at a better moment (the training loop, after a checkpoint). A second signal ends the
process at once. So does a thread after GRACE_S, where the main thread is stuck in foreign code, as in a collective.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
GRACE_S = 25.0  # torchrun and Kubernetes kill after 30
# timeout(1), Slurm and torchrun may deliver one wish to end twice.
SAME_SIGNAL_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal asked the process to end. The message says what is kept and how to go on."""


class _State:
    """What signals have come: one per process, as signal handlers are."""

    name: str | None = None
    num_deferred: int = 0
    end: int | None = None  # the writing end of the thread's wake-up call


def listen() -> None:
    """Begin to handle the signals; in the main thread, once per process. A signal that is ignored stays ignored."""
    if _State.end is not None or threading.current_thread() is not threading.main_thread():
        return
    awake, end = socket.socketpair()
    end.setblocking(False)
    _State.end = end.detach()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, _handle)
    signal.set_wakeup_fd(_State.end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(awake,), name="signals", daemon=True).start()


def requested() -> str | None:
    """The name of the signal that has come, or None."""
    return _State.name


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a first signal does not raise: the caller asks `requested` and ends by itself."""
    _State.num_deferred += 1
    try:
        yield
    finally:
        _State.num_deferred -= 1


def _handle(number: int, frame: FrameType | None) -> None:
    is_first, _State.name = _State.name is None, signal.Signals(number).name
    if is_first and not _State.num_deferred:
        raise Interrupted(f"interrupted by {_State.name}; what is committed stays: run the same command again")


def _watch(awake: socket.socket) -> None:
    """Ends the process after a second signal, or GRACE_S after the first; sees signals while the main thread cannot."""
    first_s = None
    while True:
        ready, _, _ = select.select([awake], [], [], None if first_s is None else 0.5)
        come = [signal.Signals(number) for number in awake.recv(64) if number in SIGNALS] if ready else []
        now_s = time.monotonic()
        if first_s is None:
            first_s = now_s if come else None
        elif come and now_s - first_s > SAME_SIGNAL_S:
            _end(f"interrupted by a second {come[0].name}: ended at once")
        elif now_s - first_s > GRACE_S and not _State.num_deferred:
            _end(f"interrupted by {_State.name or 'a signal'}: still busy after {GRACE_S:.0f} s, ended")


def _end(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)
