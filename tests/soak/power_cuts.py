"""Jobs whose disk loses power at a random sync, rename or deletion, then run again (tests/support/power_cut.py)."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

from soak.jobs import Job, Jobs
from soak.kinds import Outcome, Result
from soak.lab import Lab
from soak.processes import Call
from soak.recovery import difference, recover
from soak.trees import clear, fresh

ENDED = "ended"


class PowerCuts:
    """Each job is recorded once; each trial draws one of the images that its disk may have held."""

    name, per_turn = "power-cut", 3

    def __init__(self, lab: Lab, make: list[Callable[[Lab], list[Job]]]) -> None:
        self.lab, self._images = lab, {}
        self.jobs = Jobs(lab, lambda lab: [job for each in make for job in each(lab)])

    def trial(self, number: int, draw: random.Random) -> Outcome:
        job, reference = self.jobs.draw(number)
        trial, images = self.lab.trial, self._recorded(job)
        cut = draw.randrange(len(images))
        image, has_ended = images[cut]
        _restore(trial, image)
        what = f"{job.name}, image {cut} of {len(images)}"
        if has_ended:  # what was deleted may still be there
            kept = {name: value for name, value in job.result(trial).items() if name in reference.want}
            if lost := difference(kept, reference.want):
                return Outcome(Result.silent, "lost after the job had ended", what, text=lost)
        return recover(self.lab, job, reference, how="cut", what=what)

    def _recorded(self, job: Job) -> list[tuple[dict, bool]]:
        """(what the disk may have held, whether the job had ended), of an undisturbed job."""
        if job.name not in self._images:
            fresh(self.lab.trial, job.pristine())
            kept = self.lab.work / "moments"
            (start,) = job.start
            self.lab.processes.must(_record(start, self.lab.trial, kept))
            self._images[job.name] = pickle.loads(kept.read_bytes())
        return self._images[job.name]


def _record(call: Call, root: Path, kept: Path) -> Call:
    def recorded() -> None:
        from power_cut import PowerCut

        with PowerCut(root) as cut:
            call()
            cut.acknowledge(ENDED)
        moments = [(moment.image, ENDED in moment.acknowledged) for moment in cut.moments()]
        kept.write_bytes(pickle.dumps(moments))

    return recorded


def _restore(root: Path, image: dict[str, bytes | None]) -> None:
    """The folder that an image of PowerCut describes: content by path, None for a folder."""
    clear(root)
    for name, content in sorted(image.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
