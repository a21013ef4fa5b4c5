"""The training loop: epochs of steps, validation and a checkpoint after each, early stop, exact resume."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from elastic_rec.feature_store.utils.atomic_write import at_place
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime import interrupts
from elastic_rec.pipeline.runtime.errors import NonFiniteError
from elastic_rec.pipeline.runtime.finite import require_finite_state
from elastic_rec.pipeline.runtime.pulse import AllStop
from elastic_rec.pipeline.tasks.base import Batch, Reader, Task, Validation
from elastic_rec.pipeline.tasks.denominator import mean_over_windows
from elastic_rec.pipeline.training.checkpoints import Checkpoints
from elastic_rec.pipeline.training.metrics_log import MetricsLog, memory_usage
from elastic_rec.pipeline.training.optimizers import set_step


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint. epoch and batch name the next batch to train on; cursor is the
    same for the reader, with the hash of what it reads. to_validate: the weights are to be validated before that."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None  # None: no validation has given a figure
    best_step: int | None = None
    bad_epochs: int = 0
    to_validate: bool = False
    cursor: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Trains a sharded model of `task` on the batches of `reader`, and judges it by `validation`.

    Each rank's loss is its share of the global batch's loss, times ranks. A batch may come in windows: an update of the
    weights each, but one step of the run (schedule, log, checkpoint), after the last of them, where no state is
    carried.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        *,
        task: Task,
        reader: Reader,
        validation: Validation,
        checkpoints: Checkpoints,
        log: MetricsLog,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.task, self.reader, self.validation = task, reader, validation
        self.checkpoints, self.log = checkpoints, log
        self.config, self.world, self.num_batches = task.config, task.world, reader.num_batches
        self.progress = Progress()
        self.total_steps = planned_steps(self.config, self.num_batches)

    def resume(self) -> bool:
        """Go on from the newest complete checkpoint; False where there is none."""
        step = self.checkpoints.latest()
        if step is None:
            self.log.forget_after(0)
            return False
        saved = self.checkpoints.load(step, self.model, self.optimizer)
        self.progress = Progress(**saved["progress"])
        set_step(self.scheduler, step)
        self.log.forget_after(step)
        self.world.log(f"resuming at step {step} (epoch {self.progress.epoch}, batch {self.progress.batch})")
        return True

    def run(self) -> Progress:
        """Train to the end, and return where it ended.

        Raises Interrupted after a signal, a checkpoint later. Raises NonFiniteError for a loss, weight, query or score
        that is no number; what it names is in no checkpoint.
        """
        with self._last_checkpoint_named(), interrupts.deferred():  # to the end of the last checkpoint
            try:
                with self.world.pulse.voting():
                    return self._run()
            except AllStop:
                self._require_finite()
                self._save()
                raise interrupts.Interrupted(
                    f"interrupted by {interrupts.requested() or 'a signal to another rank'} at step "
                    f"{self.progress.step}, which is saved: go on with the same command and run.resume=true"
                ) from None

    def _run(self) -> Progress:
        optim, progress = self.config.optim, self.progress
        while progress.to_validate or (progress.step < self.total_steps and not self._out_of_patience()):
            if not progress.to_validate:
                self._train_epoch()
                progress.to_validate = True
                if progress.batch == self.num_batches:  # else max_steps fell inside the epoch
                    progress.epoch, progress.batch = progress.epoch + 1, 0
            self._require_finite()
            figures = {**self.validation.figures(self.model.module), **memory_usage(self.model.module)}
            progress.to_validate = False
            self._judge(figures.get(self.task.metric), is_whole=progress.batch == 0)
            self.log.write("valid", step=progress.step, epoch=progress.epoch, **figures)
            self._save()
        if self._out_of_patience():
            self.world.log(f"early stop: no better validation for {optim.patience} epochs")
        return progress

    def _judge(self, value: float | None, *, is_whole: bool) -> None:
        """Notes a validation's figure. An undefined one does not count for patience."""
        progress, metric = self.progress, self.task.metric
        if value is None or math.isnan(value):
            self.world.log(
                f"validation at step {progress.step}: {metric} is undefined on these targets (for auc: one class only);"
                " the checkpoint is kept, and patience does not count it"
            )
        elif progress.best is None or value > progress.best:
            progress.best, progress.best_step, progress.bad_epochs = value, progress.step, 0
        else:
            progress.bad_epochs += is_whole

    def _train_epoch(self) -> None:
        """Steps from progress.batch to the end of the epoch, or to the last step of all."""
        run, progress = self.config.run, self.progress
        self.model.train()
        # A pipeline rewrites the forward of sharded modules while it lives: one per epoch, detached before validation.
        pipeline = self._pipeline()
        epoch = progress.epoch
        batches = self.task.train_batches(self.reader, epoch=epoch, start_batch=progress.batch)
        source = TimedIterator(batches, self.total_steps - progress.step)
        watch, losses, denominators = LossWatch(self.task.user_ids), [], []
        while True:
            seed = (run.seed * 1_000_003 + progress.step) * 4099 + self.world.rank  # dropout resumes alike
            torch.manual_seed(seed + (len(losses) << 48))
            try:
                _, _, loss = pipeline.progress(source)
            except StopIteration:
                break
            batch = source.handed_out.popleft()
            losses.append(loss.detach())
            denominators.append(batch.normaliser)
            if not batch.is_last_window:
                continue
            self.scheduler.step()
            progress.step, progress.batch = progress.step + 1, progress.batch + 1
            watch.add(progress.step, mean_over_windows(losses, denominators), batch.rows)
            losses, denominators = [], []
            if progress.step % run.log_every == 0 or progress.batch == self.num_batches:
                self._log_steps(watch, source, epoch)
            if self._is_due(progress):
                watch.check()
                self._require_finite()
                self._save()
            if progress.batch < self.num_batches:
                self._beat(watch)
        watch.check()
        if hasattr(pipeline, "detach"):
            pipeline.detach()

    def _is_due(self, progress: Progress) -> bool:
        """Whether a checkpoint is written between validations, which write their own."""
        every = self.config.run.checkpoint_every
        is_last = progress.batch == self.num_batches or progress.step == self.total_steps
        return bool(every) and progress.step % every == 0 and not is_last

    def _beat(self, watch: LossWatch) -> None:
        try:
            self.world.pulse.beat(f"step {self.progress.step + 1}")
        except AllStop:
            watch.check()  # no checkpoint of broken weights
            raise

    def _require_finite(self) -> None:
        """Refuse to validate or save broken weights: an update after a finite loss can overflow. Collective."""
        require_finite_state({"": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, self.world)

    @contextmanager
    def _last_checkpoint_named(self) -> Iterator[None]:
        """Adds to a NonFiniteError what to go on from."""
        try:
            yield
        except NonFiniteError as error:
            steps, last = self.checkpoints.complete_steps(), "There is no checkpoint yet"
            if steps:
                last = f"The last checkpoint, {self.checkpoints.folder(steps[-1])}, has finite weights"
            raise NonFiniteError(
                f"found after step {self.progress.step}: {error}. {last}: lower optim.dense_lr, optim.table_lr or "
                "optim.bank_lr and start again with run.resume=true, or look at the users' events"
            ) from None

    def _pipeline(self) -> TrainPipelineBase:
        kind = TrainPipelineSparseDist if self.config.run.pipelined else TrainPipelineBase
        return kind(self.model, self.optimizer, self.world.device)

    def _log_steps(self, watch: LossWatch, source: TimedIterator, epoch: int) -> None:
        sums = torch.tensor([watch.check(), *source.counts()], dtype=torch.float64, device=self.world.device)
        dist.all_reduce(sums)
        loss, samples, events, waited, elapsed = (sums / self.world.size).tolist()
        self.log.write(
            "train",
            step=self.progress.step,
            epoch=epoch,
            epoch_share=self.progress.batch / self.num_batches,
            loss=loss,
            lr=self.scheduler.get_last_lr()[-1],
            samples_per_s=samples * self.world.size / elapsed,
            events_per_s=events * self.world.size / elapsed,
            data_wait_share=waited / elapsed,
        )

    def _save(self) -> None:
        self.progress.cursor = asdict(self.reader.cursor(self.progress.epoch, self.progress.batch))
        saved = {"step": self.progress.step, "progress": asdict(self.progress)}
        self.log.sync()
        with at_place(self.checkpoints.folder(self.progress.step)):
            self.checkpoints.save(self.model, self.optimizer, saved, best_step=self.progress.best_step)

    def _out_of_patience(self) -> bool:
        patience = self.config.optim.patience
        return bool(patience) and self.progress.bad_epochs >= patience


def planned_steps(config: TrainConfig, num_batches: int) -> int:
    """Steps of the whole run if validation never stops it early."""
    steps = config.optim.epochs * num_batches
    return min(steps, config.optim.max_steps) if config.optim.max_steps else steps


class HandedOut(NamedTuple):
    """What is asked of a batch after its step."""

    rows: torch.Tensor
    normaliser: torch.Tensor
    is_last_window: bool


class TimedIterator:
    """At most `limit` batches, with all their windows; counts samples, events and seconds spent waiting for them."""

    def __init__(self, batches: Iterator[Batch], limit: int) -> None:
        self.batches, self.left = batches, limit
        self.handed_out: deque[HandedOut] = deque()  # batches whose step has not ended yet
        self._reset()

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Batch:
        if self.left <= 0:
            raise StopIteration
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        self.left -= batch.is_last_window
        self.samples += int((batch.weights > 0).sum())
        self.events += int((batch.ends - batch.starts).sum())
        self.handed_out.append(HandedOut(batch.rows, batch.normaliser, batch.is_last_window))
        return batch

    def counts(self) -> tuple[float, float, float, float]:
        """(samples, events, seconds waited, seconds) since the last call."""
        figures = self.samples, self.events, self.waited, time.perf_counter() - self.start
        self._reset()
        return figures

    def _reset(self) -> None:
        self.samples = self.events = 0
        self.waited, self.start = 0.0, time.perf_counter()


class LossWatch:
    """Keeps losses on the device and looks at them now and then, so that no step waits for the host."""

    def __init__(self, user_ids: Callable[[torch.Tensor], list]) -> None:
        self.user_ids = user_ids
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.last_mean = float("nan")

    def add(self, step: int, loss: torch.Tensor, rows: torch.Tensor) -> None:
        """loss: (); rows: (R,) rows of the batch's users."""
        self.pending.append((step, loss.detach(), rows))

    def check(self) -> float:
        """Mean loss since the last check. Raises NonFiniteError naming the first bad step and its users."""
        if not self.pending:
            return self.last_mean
        losses = torch.stack([loss for _, loss, _ in self.pending]).double().cpu()
        for (step, _, rows), loss in zip(self.pending, losses.tolist(), strict=True):
            if loss != loss or loss in (float("inf"), float("-inf")):
                users = self.user_ids(rows)
                raise NonFiniteError(f"loss is {loss} at step {step}; users of this rank's batch: {users}")
        self.pending.clear()
        self.last_mean = float(losses.mean())
        return self.last_mean
