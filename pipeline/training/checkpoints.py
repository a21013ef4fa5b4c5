"""Step folders written aside, renamed, and only then marked complete.

    RUN/checkpoints/step-00000420.tmp/      being written (checkpoint_files.py, all ranks)
    RUN/checkpoints/step-00000420/          synced, then renamed by rank 0
        complete.json                       the commit marker, last: progress, the best step so far, sha256 of each file

A folder without complete.json is never read: `latest` passes over it and says so, `load` refuses it. Every file is
checked before a load. Checkpoints load at any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from elastic_rec.feature_store.utils.atomic_write import make_folder, remove_leftovers, sync
from elastic_rec.feature_store.utils.checked_json import describe_file, fault_in, read_checked, write_checked
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.runtime.errors import CheckpointError
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.training.checkpoint_files import PLAN, PlanReader, PlanWriter, TensorsOnly

MARKER = "complete.json"


class Checkpoints:
    """The checkpoints of one run; save, load, latest and best are collective, the rest is not."""

    def __init__(self, run_dir: Path, *, world: World, keep_last: int = 2) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.world = world
        self.keep_last = keep_last
        self._held: int | None = None  # the step whose weights training has: just saved, or resumed from
        self._whole: set[int] = set()  # steps whose files have been checked
        self._undone: set[int] = set()  # steps after the one that training was resumed from

    def save(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        saved: dict[str, Any],
        *,
        best_step: int | None,
    ) -> None:
        """Write one step folder; saved (JSON-able, with "step") goes into the marker. best_step: of the run so far,
        None before a validation. Of a step that is there already with these weights only the marker is replaced."""
        step = saved["step"]
        files = self.marker(step)["files"] if step == self._held else self._write(step, model, optimizer)
        self._held = step
        if self.world.is_main:
            write_checked(self.folder(step) / MARKER, {**saved, "best_step": best_step, "files": files})
            self._undone.discard(step)
            self._forget(best_step)
        dist.barrier()

    def _write(
        self, step: int, model: DistributedModelParallel, optimizer: CombinedOptimizer
    ) -> dict[str, dict[str, Any]]:
        """The step folder without its marker; returns what `_describe` says of its files. Collective."""
        final = self.folder(step)
        aside = final.with_suffix(".tmp")
        if self.world.is_main:
            make_folder(self.root)
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        dcp.save({"model": model.state_dict(), "optimiser": optimizer.state_dict()}, storage_writer=PlanWriter(aside))
        files = self._describe(aside)
        if self.world.is_main:
            sync(aside)
            self._remove(final)
            aside.rename(final)
            sync(self.root)
        self._whole.discard(step)
        return files

    def load(self, step: int, model: nn.Module, optimizer: CombinedOptimizer | None = None) -> dict[str, Any]:
        """Load in place and return the marker. model: sharded, or whole in one process.

        Raises CheckpointError when the folder has no marker, is damaged, or does not fit the model.
        """
        folder, marker = self.folder(step), self.marker(step)
        if step not in self._whole and (fault := self._fault(step)):
            others = [each for each in self.complete_steps() if each != step]
            raise CheckpointError(f"{fault}. Choose another checkpoint, by its step: {others or 'there is none'}")
        state: dict[str, Any] = {"model": model.state_dict()}
        if optimizer is not None:
            state["optimiser"] = optimizer.state_dict()
        try:
            reader = PlanReader(folder, files=marker["files"])
            with warnings.catch_warnings():  # one process by choice is no accident
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(state, storage_reader=reader, planner=TensorsOnly(), no_dist=self.world.size == 1)
        except CheckpointException as error:  # a BaseException, so `except Exception` would miss it
            causes = {str(cause[0]) for cause in error.failures.values()}
            raise CheckpointError(
                f"{folder} does not fit this model or is damaged: {'; '.join(sorted(causes))}. "
                f"Use the settings in {self.root.parent / 'config.yaml'}, or another checkpoint"
            ) from None
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimiser"])
            self._held = step
            self._undone = {each for each in self.complete_steps() if each > step}
        return marker

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint; half-written and damaged ones are named and passed over. Collective.

        Raises CheckpointError when all are damaged.
        """
        for folder in self._half_written():
            self.world.log(f"checkpoint {folder} is half-written (no {MARKER}): not read")
        steps = self.world.agreed(self.complete_steps())  # a training may write here while ranks look
        for step in reversed(steps):
            fault = self._fault(step)
            if not fault:
                self._whole.add(step)
                return step
            self.world.log(f"{fault}: the checkpoint of step {step} is not read, the next older one is taken")
        if steps:
            raise CheckpointError(
                f"{self.root}: all checkpoints are damaged, of steps {steps}: restore one, or remove that folder and "
                "start the run from the beginning"
            )
        return None

    def best(self) -> int:
        """Step of the best checkpoint by validation, as the newest marker that can be read has it; of the newest whole
        checkpoint where no validation has given a figure. Collective."""
        step = self.world.agreed(self._best_noted() if self.world.is_main else None)
        if step is None:
            step = self.latest()
            self.world.log(f"{self.root}: no validation has given a figure: best is the newest checkpoint, step {step}")
        return step

    def _best_noted(self) -> int | None:
        for step in reversed(self.complete_steps()):
            try:
                return self.marker(step)["best_step"]
            except CheckpointError as error:
                self.world.log(f"{error}: which checkpoint is best is read from the next older marker")
        raise CheckpointError(f"{self.root} has no complete checkpoint that can be read")

    def marker(self, step: int) -> dict[str, Any]:
        """What complete.json of a step says. Raises CheckpointError where there is none, or it is damaged."""
        marker = self.folder(step) / MARKER
        if not marker.exists():
            state = "is half-written" if marker.parent.exists() else "does not exist"
            raise CheckpointError(
                f"checkpoint {marker.parent} {state} (no {MARKER}); complete ones: {self.complete_steps() or 'none'}"
            )
        try:
            return read_checked(marker)
        except DataError as error:
            raise CheckpointError(str(error)) from error

    def fingerprint(self, step: int) -> str:
        """Of the weights, hexadecimal: a digest of the tensors' files. The same weights, saved by another number of
        ranks, have another."""
        tensors = {name: about for name, about in self.marker(step)["files"].items() if name.endswith(".distcp")}
        return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()

    def sweep(self) -> None:
        """Removes what killed trainings left. For the one process that holds the run folder."""
        for folder in self._half_written():
            self.world.log(f"checkpoint {folder} is half-written (no {MARKER}): removed")
            shutil.rmtree(folder)
        for folder in (self.root, *self.root.glob("step-*")):  # what an evaluation may be writing is beside them
            remove_leftovers(folder)

    def folder(self, step: int) -> Path:
        """Of a step, there or not."""
        return self.root / f"step-{step:08d}"

    def complete_steps(self) -> list[int]:
        """Steps that have a marker, ascending."""
        names = (marker.parent.name.removeprefix("step-") for marker in self.root.glob(f"step-*/{MARKER}"))
        return sorted(int(name) for name in names if name.isdigit())  # others are a user's copies

    def _half_written(self) -> list[Path]:
        return [folder for folder in sorted(self.root.glob("step-*")) if not (folder / MARKER).exists()]

    def _describe(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Bytes and sha256 of each file; each rank reads those it has written. Collective."""
        paths = list(folder.glob(f"__{self.world.rank}_*.distcp"))
        if self.world.is_main:
            paths += [folder / PLAN, folder / ".metadata"]
        described = self.world.of_all({path.name: describe_file(path) for path in paths})
        return dict(sorted(item for each in described for item in each.items()))

    def _fault(self, step: int) -> str:
        """The first fault that any rank finds; each reads its share of the files. Collective."""
        return next(filter(None, self.world.of_all(self._fault_of(step, self.world.rank, self.world.size))), "")

    def _fault_of(self, step: int, part: int, num_parts: int) -> str:
        try:
            files = self.marker(step)["files"]
        except CheckpointError as error:
            return str(error)
        mine = sorted(files)[part::num_parts]
        return fault_in(self.folder(step), {name: files[name] for name in mine})

    def _forget(self, best_step: int | None) -> None:
        """Keeps the best and the newest; those that a resume has undone go as soon as there is a newer one again."""
        complete = self.complete_steps()
        kept = {best_step, *[each for each in complete if each not in self._undone][-self.keep_last :]}
        for each in complete:
            if each not in kept:
                self._remove(self.folder(each))
        self._undone = set()

    def _remove(self, folder: Path) -> None:
        if folder.exists():
            (folder / MARKER).unlink(missing_ok=True)  # first: a folder half removed must not look complete
            sync(folder)
            shutil.rmtree(folder)
