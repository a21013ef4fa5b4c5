"""What ranks tell each other beside their collectives: where each stands, who ended the job, who has had a signal.

    rank 0   beat("step 412")   all_reduce ............................ waits
    rank 1   beat("step 412")   reads from a disk that hangs
                                      |
    each rank's thread writes to the store, once a second: where it stands, how many collectives it has begun
    rank 0's thread, after timeout_s without progress: rank 1 began one collective less, it is the one that is missed

Keys of the store (torch's TCPStore, below a prefix per attempt of torchrun):
    at/1      {"at": "step 412", "collectives": 1234, "line": "store.py:88", "sign": 61}     written by rank 1
    ending    {"rank": 1, "code": 2}                                                          by who ends first
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from elastic_rec.pipeline.runtime import interrupts
from elastic_rec.pipeline.runtime.endings import EXIT_LOST_RANK, Ending, end, quit_now

Item = TypeVar("Item")
ROOT = str(Path(__file__).parents[2])
LOST_S = 3.0  # three signs of life
VOTE_S, MOST_BEATS = 0.05, 8  # a vote so often, or after so many beats


class AllStop(Exception):
    """Every rank has learned at the same beat that one of them had a signal."""


class Pulse:
    """One rank's pulse.

    job: its own connection to the store, which the main thread does not use; None for a group of one.
    attempt: of torchrun, from 0. timeout_s: how long a rank waits for another.
    """

    def __init__(
        self, job: dist.Store | None = None, *, attempt: int = 0, rank: int = 0, size: int = 1, timeout_s: float = 0.0
    ) -> None:
        self.job, self.rank, self.size, self.timeout_s = job, rank, size, timeout_s
        self.store = None if job is None else dist.PrefixStore(f"attempt-{attempt}", job)
        self.at = "the start"
        self._votes: Votes | None = None
        if size > 1:
            threading.Thread(target=self._watch, name="pulse", daemon=True).start()

    def beat(self, at: str) -> None:
        """Say where this rank stands, as "step 412". Inside `voting` collective: raises AllStop on all ranks alike."""
        self.at = at
        if self._votes is not None and self._votes.ask():
            raise AllStop

    def pace(self, items: Iterable[Item], what: str) -> Iterator[Item]:
        """items, with a beat before each; all ranks have equally many."""
        for number, item in enumerate(items):
            self.beat(f"batch {number} of {what}")
            yield item

    @contextmanager
    def voting(self) -> Iterator[None]:
        """Inside, a signal to any rank makes the next beats raise AllStop on every rank. For use in
        interrupts.deferred(), so that it does nothing else."""
        self._votes = Votes(self.size)
        try:
            yield
            self._votes.settle()
        finally:
            self._votes = None

    def ends_first(self, code: int) -> int | None:
        """Claim the job's end. None: this rank is to say why; else the exit code of the rank that says it."""
        claim = json.dumps({"rank": self.rank, "code": code})
        if self.store is None:
            return None
        try:
            made = json.loads(self.store.compare_set("ending", "", claim))
        except (RuntimeError, ValueError):  # rank 0 kept the store, and has ended
            return None
        return None if made["rank"] == self.rank else made["code"]

    def await_ending(self) -> str:
        """After a collective broke: give the rank that broke it time to say why. Returns who is silent, as text."""
        others, until = Others(self), time.monotonic() + LOST_S
        try:
            while time.monotonic() < until and not self.store.check(["ending"]):
                others.look()
                time.sleep(0.1)
            silent = others.silent(LOST_S * 0.6)
        except RuntimeError:
            return "rank 0, which kept the store,"
        return " and ".join(f"rank {rank}" for rank in silent) or "another rank"

    def remember(self, fact: str) -> None:
        """Keep `fact` over restarts by torchrun, whose agent keeps the store."""
        if self.store is not None:
            self.job.set(fact, "1")

    def remembers(self, fact: str) -> bool:
        """Whether an earlier attempt kept `fact`."""
        return self.store is not None and self.job.check([fact])

    def _watch(self) -> None:
        """The thread: tell where this rank stands, and end the job when it waits too long for another."""
        others = Others(self)
        interval_s = min(1.0, self.timeout_s / 5)
        before, since = None, time.monotonic()
        try:
            for sign in count():
                now = {"at": self.at, "collectives": _collectives()}
                if now != before:
                    before, since = now, time.monotonic()
                stands_s = time.monotonic() - since
                self.store.set(f"at/{self.rank}", json.dumps({**now, "sign": sign, "line": _main_line()}))
                seen = stands_s >= self.timeout_s / 4 and others.look()
                if seen and stands_s >= self.timeout_s and (missing := others.missing(now["collectives"])):
                    self._end(others.describe(missing), stands_s)
                time.sleep(interval_s)
        except (RuntimeError, ValueError):
            return  # the store is gone, and the job with it

    def _end(self, missing: str, stands_s: float) -> None:
        code = self.ends_first(EXIT_LOST_RANK)
        if code is not None:
            quit_now(code)
        line = (
            f"error: {missing}; the others have waited for {stands_s:.0f} s at {self.at}. Look at that rank's machine "
            f"and disk, then run again with run.resume=true; if it was only slow, raise parallel.timeout_s "
            f"({self.timeout_s:g})"
        )
        end(Ending(EXIT_LOST_RANK, line), rank=self.rank, size=self.size)


class Others:
    """What a rank's thread knows of the other ranks."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse
        self.ranks = [rank for rank in range(pulse.size) if rank != pulse.rank]
        self.told: dict[int, dict[str, Any]] = {}
        self.signed: dict[int, tuple[int, float]] = {}  # the last sign of life, and when it was first seen
        self.moved: dict[int, tuple[Any, float]] = {}  # the last place, and when it was first seen

    def look(self) -> bool:
        """Read what they told. False where some rank has not begun: the process group's own timeout is for that."""
        store, now = self.pulse.store, time.monotonic()
        keys = [f"at/{rank}" for rank in self.ranks]
        if not store.check(keys):
            return False
        for rank, text in zip(self.ranks, store.multi_get(keys), strict=True):
            told = self.told[rank] = json.loads(text)
            for seen, value in ((self.signed, told["sign"]), (self.moved, (told["at"], told["collectives"]))):
                if rank not in seen or seen[rank][0] != value:
                    seen[rank] = (value, now)
        return True

    def silent(self, seconds: float) -> list[int]:
        """Ranks without a sign of life for so long."""
        return [rank for rank, (_, since) in self.signed.items() if time.monotonic() - since >= seconds]

    def missing(self, collectives: int) -> list[int]:
        """Ranks that stand, and have begun fewer collectives than this one; without them, those that are silent."""
        enough_s, now = self.pulse.timeout_s / 2, time.monotonic()
        stand = [rank for rank in self.ranks if now - self.moved[rank][1] >= enough_s]
        behind = [rank for rank in stand if self.told[rank]["collectives"] < collectives]
        return sorted(behind, key=lambda rank: self.told[rank]["collectives"]) or self.silent(enough_s)

    def describe(self, missing: list[int]) -> str:
        """Where these ranks were seen last, as text."""
        now, told = time.monotonic(), []
        for rank in missing[:8]:
            silent_s = now - self.signed[rank][1]
            last = self.told[rank]
            state = f"at {last['line']}" if silent_s < LOST_S else f"no sign of life for {silent_s:.0f} s"
            told.append(f"rank {rank} has not arrived (last seen at {last['at']}, {state})")
        more = f", and {len(missing) - 8} more" if len(missing) > 8 else ""
        return ", ".join(told) + more


class Votes:
    """Has any rank had a signal? Asked at a beat and answered at a later one, so that no step waits for it.

    Where beats are short not every beat asks. How many pass is told by the votes themselves, so ranks agree on it.
    """

    def __init__(self, size: int) -> None:
        is_nccl = size > 1 and dist.get_backend() == "nccl"
        self.size, self.group = size, dist.new_group(backend="gloo") if is_nccl else None
        self.open: tuple[torch.Tensor, dist.Work] | None = None
        self.every, self.beats, self.asked_s = 1, 0, time.monotonic()

    def ask(self) -> bool:
        """Whether any rank has had a signal, as far as is known. Collective."""
        mine = interrupts.requested() is not None
        if self.size == 1:
            return mine
        self.beats += 1
        if self.beats < self.every:
            return False
        if self.settle():
            return True
        now_s = time.monotonic()
        vote = torch.tensor([float(mine), (now_s - self.asked_s) / self.beats], dtype=torch.float64)
        self.open = vote, dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.beats, self.asked_s = 0, now_s
        return False

    def settle(self) -> bool:
        """The answer to the last question."""
        if self.open is None:
            return False
        vote, work = self.open
        work.wait()
        self.open = None
        is_any, beat_s = vote.tolist()
        self.every = max(1, min(MOST_BEATS, int(VOTE_S / max(beat_s, 1e-6))))
        return bool(is_any)


def _collectives() -> int:
    """How many collectives this rank has begun."""
    return dist.group.WORLD._get_sequence_number_for_group() if dist.is_initialized() else 0


def _main_line() -> str:
    """Where the main thread is: the innermost line of this package."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    for found in reversed(traceback.extract_stack(frame)):
        path = os.path.relpath(found.filename, ROOT)
        if not path.startswith("..") and "site-packages" not in path:
            return f"{path}:{found.lineno} in {found.name}"
    return "its start"
