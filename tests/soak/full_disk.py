"""Jobs that write to a disk which is too small, then run again on one that is not: nothing is lost, nothing is torn."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from soak.jobs import Job, Jobs
from soak.kinds import Outcome, Result
from soak.lab import Lab
from soak.processes import Call
from soak.recovery import recover
from soak.trees import clear, fresh

PAGE, PLENTY = 4096, 1 << 30


class FullDisk:
    """The trial folder is a small tmpfs where this user may mount one; elsewhere files have a largest size."""

    name, per_turn = "full-disk", 3

    def __init__(self, lab: Lab, make: list[Callable[[Lab], list[Job]]]) -> None:
        self.lab = lab
        self.jobs = Jobs(lab, lambda lab: [job for each in make for job in each(lab)])
        self.may_mount: bool | None = None

    def trial(self, number: int, draw: random.Random) -> Outcome:
        job, reference = self.jobs.draw(number)
        share = draw.random()
        with self._disk():
            fresh(self.lab.trial, job.pristine())
            if self.may_mount:
                room = int(share * 1.5 * max(reference.grown_bytes, 32 * PAGE))
                self._resize(shutil.disk_usage(self.lab.trial).used + room // PAGE * PAGE)
                ended, what = self.lab.processes.run(*job.start), f"{job.name}, a disk with {room} bytes left"
                self._resize(PLENTY)
            else:
                limit = int(share * reference.largest_bytes)
                calls = [_limited(call, limit) for call in job.start]
                ended, what = self.lab.processes.run(*calls), f"{job.name}, files of {limit} bytes at most"
            how = "had room" if ended.is_good else f"refused: {ended.failure}"
            if ended.hung:
                return Outcome(Result.lost, how, what, text=ended.text)
            is_plain = ended.is_good or ended.failure == "one line"
            return recover(self.lab, job, reference, how=how, what=what, text=ended.text, rank=int(not is_plain))

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """A disk of its own at the trial folder, where that is allowed."""
        clear(self.lab.trial)
        command = ["mount", "-t", "tmpfs", "-o", f"size={PLENTY}", "soak", str(self.lab.trial)]
        self.may_mount = self.may_mount is not False and not subprocess.run(command, capture_output=True).returncode
        try:
            yield
        finally:
            if self.may_mount:
                subprocess.run(["umount", str(self.lab.trial)], check=True)

    def _resize(self, size: int) -> None:
        command = ["mount", "-o", f"remount,size={size}", str(self.lab.trial)]
        subprocess.run(command, check=True, capture_output=True)


def _limited(call: Call, limit: int) -> Call:
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return call()

    return limited
