"""Step folders written aside, renamed, and only then marked complete.

    RUN/checkpoints/step-00000420.tmp/      being written (torch.distributed.checkpoint, all ranks)
    RUN/checkpoints/step-00000420/          renamed by rank 0
        complete.json                       the commit marker: progress, schedule, validation figures; written last
    RUN/checkpoints/best.json               {"step": ...}, replaced atomically

A folder without complete.json is never read: `latest` passes over it and says so, `load` refuses it.
Checkpoints load at any number of ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from elastic_rec.feature_store.atomic_write import write_json
from elastic_rec.pipeline.errors import CheckpointError
from elastic_rec.pipeline.world import World

MARKER = "complete.json"


class Checkpoints:
    """The checkpoints of one run; save and load are collective, the rest is not."""

    def __init__(self, run_dir: Path, *, world: World, keep_last: int = 2) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.world = world
        self.keep_last = keep_last

    def save(
        self, model: DistributedModelParallel, optimiser: CombinedOptimizer, progress: dict[str, Any], *, is_best: bool
    ) -> None:
        """Write one step folder; progress (JSON-able, with "step") goes into the marker."""
        final = self.folder(progress["step"])
        aside = final.with_suffix(".tmp")
        if self.world.is_main:
            for stale in (aside, final):
                shutil.rmtree(stale, ignore_errors=True)
            self.root.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dcp.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, checkpoint_id=aside)
        if self.world.is_main:
            aside.rename(final)
            write_json(final / MARKER, progress)
            if is_best:
                write_json(self.root / "best.json", {"step": progress["step"]})
            self._forget_old()
        dist.barrier()

    def load(
        self, step: int, model: DistributedModelParallel, optimiser: CombinedOptimizer | None = None
    ) -> dict[str, Any]:
        """Load in place and return the marker's progress.

        Raises CheckpointError when the folder has no marker or does not fit the model.
        """
        folder = self.folder(step)
        progress = self.progress(step)
        state: dict[str, Any] = {"model": model.state_dict()}
        if optimiser is not None:
            state["optimiser"] = optimiser.state_dict()
        try:
            dcp.load(state, checkpoint_id=folder)
        except CheckpointException as error:  # a BaseException, so `except Exception` would miss it
            causes = {str(cause[0]) for cause in error.failures.values()}
            raise CheckpointError(
                f"{folder} does not fit this model or is damaged: {'; '.join(sorted(causes))}. "
                f"Use the settings in {self.root.parent / 'config.yaml'}, or another checkpoint"
            ) from None
        model.load_state_dict(state["model"])
        if optimiser is not None:
            optimiser.load_state_dict(state["optimiser"])
        return progress

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; half-written ones are named and passed over."""
        complete = self._complete_steps()
        for folder in sorted(self.root.glob("step-*")):
            if not (folder / MARKER).exists():
                self.world.say(f"checkpoint {folder} is half-written (no {MARKER}): not read")
        return complete[-1] if complete else None

    def best(self) -> int:
        """Step of the best checkpoint by validation; of the newest where no validation has given a figure."""
        pointer = self.root / "best.json"
        if not pointer.exists():
            step = self.latest()
            if step is None:
                raise CheckpointError(f"{self.root} has no complete checkpoint yet")
            self.world.say(
                f"{self.root}: no validation has given a figure, so best is the newest checkpoint, step {step}"
            )
            return step
        return json.loads(pointer.read_text())["step"]

    def progress(self, step: int) -> dict[str, Any]:
        marker = self.folder(step) / MARKER
        if not marker.exists():
            state = "is half-written" if marker.parent.exists() else "does not exist"
            raise CheckpointError(
                f"checkpoint {marker.parent} {state} (no {MARKER}); complete ones: {self._complete_steps() or 'none'}"
            )
        return json.loads(marker.read_text())

    def folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _complete_steps(self) -> list[int]:
        return sorted(int(marker.parent.name.removeprefix("step-")) for marker in self.root.glob(f"step-*/{MARKER}"))

    def _forget_old(self) -> None:
        pointer = self.root / "best.json"
        best = json.loads(pointer.read_text())["step"] if pointer.exists() else None
        for step in self._complete_steps()[: -self.keep_last]:
            if step != best:
                folder = self.folder(step)
                (folder / MARKER).unlink()  # first: a folder half removed must not look complete
                shutil.rmtree(folder)
