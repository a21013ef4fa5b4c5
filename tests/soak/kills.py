"""Jobs struck by a signal at a random moment, then run again: the result is that of the undisturbed job."""

from __future__ import annotations

import random
from collections.abc import Callable

from soak.jobs import Job, Jobs, Reference
from soak.kinds import Outcome, Result
from soak.lab import Lab
from soak.processes import Ended, Strike
from soak.recovery import is_through, recover
from soak.trees import fresh, tree


class Kills:
    """signal: sent to all ranks of the job, up to twice: the second time to the rerun."""

    def __init__(
        self, name: str, lab: Lab, make: Callable[[Lab], list[Job]], *, signal: int, per_turn: int = 1
    ) -> None:
        self.name, self.lab, self.signal, self.per_turn = name, lab, signal, per_turn
        self.jobs = Jobs(lab, make)

    def trial(self, number: int, draw: random.Random) -> Outcome:
        job, reference = self.jobs.draw(number)
        fresh(self.lab.trial, job.pristine())
        strikes = [self._strike(reference, draw) for _ in range(draw.choice((1, 1, 2)))]
        what, hows = f"{job.name}, {' and '.join(map(str, strikes))}", []
        for calls, strike in zip((job.start, job.again), strikes, strict=False):
            ended = self.lab.processes.run(*calls, strike=strike)
            hows.append(how := self._how(job, ended))
            if how is None:
                return Outcome(Result.lost, ended.failure, what, text=ended.text)
            if not job.is_whole(tree(self.lab.trial), reference.before, reference.after):
                return Outcome(Result.silent, "torn in between", what)
        how = next((how for how in hows if how != "finished before"), hows[0])
        return recover(self.lab, job, reference, how=how, what=what)

    def _strike(self, reference: Reference, draw: random.Random) -> Strike:
        rank = draw.randrange(len(reference.changes))
        if draw.random() < 0.6:
            return Strike(self.signal, change=draw.randint(1, max(1, reference.changes[rank])), rank=rank)
        return Strike(self.signal, seconds=draw.uniform(0, 0.9 * reference.seconds))

    def _how(self, job: Job, ended: Ended) -> str | None:
        """How the struck job ended; None where it ended as it should not."""
        if is_through(job, ended):
            return "finished before"
        if -self.signal in ended.codes:
            return "killed"
        if 75 not in ended.codes or ended.hung:
            return None
        others = sorted({*ended.codes} - {75})  # 4: a rank that takes the other one's end for a loss
        return f"code 75{f', another rank {others}' if others else ''}"
