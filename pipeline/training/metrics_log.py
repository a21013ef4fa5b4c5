"""Figures of a run: metrics.jsonl always, TensorBoard where it is installed, and something to watch on rank 0."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from elastic_rec.feature_store.utils.atomic_write import at_place, sync, to_json, write_text
from elastic_rec.models.towers.elastic.memory import slot_usage
from elastic_rec.pipeline.runtime.world import World

SHOWN = ("hr@10", "ndcg@10", "mrr", "auc", "gauc", "ne")  # of a validation, on the screen
LINE_EVERY_S = 10.0  # between two lines where there is no terminal


class MetricsLog:
    """write(kind, step=..., **figures): rank 0 keeps and shows them, other ranks do nothing."""

    def __init__(self, run_dir: Path, *, world: World, total_steps: int) -> None:
        self.world = world
        self.path = Path(run_dir) / "metrics.jsonl"
        self.board = _tensorboard(Path(run_dir) / "tensorboard", world) if world.is_main else None
        on_terminal = world.is_main and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, unit="step", file=sys.stderr, disable=not on_terminal)
        self.next_line = time.monotonic()

    def write(self, kind: str, *, step: int, epoch: int, **figures) -> None:
        """Adds a line of figures; kind is train or valid."""
        if not self.world.is_main:
            return
        with at_place(self.path), self.path.open("a") as file:
            file.write(to_json({"kind": kind, "step": step, "epoch": epoch, **figures}) + "\n")
        if self.board:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, step)
        self._show(kind, step, epoch, figures)

    def sync(self) -> None:
        """Makes the lines written so far last through a power cut."""
        if self.world.is_main and self.path.exists():
            sync(self.path)
            sync(self.path.parent)

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will do again."""
        if self.world.is_main and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in lines))

    def close(self) -> None:
        """Ends the progress bar and TensorBoard's writer."""
        self.bar.close()
        if self.board:
            self.board.close()

    def _show(self, kind: str, step: int, epoch: int, figures: dict) -> None:
        if kind == "train":
            text = (
                f"loss {figures['loss']:.4f}  {figures['samples_per_s']:.0f} samples/s  "
                f"{figures['events_per_s'] / 1e3:.1f}k events/s  data wait {figures['data_wait_share']:.0%}"
            )
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text, refresh=False)
            if not self.bar.disable or time.monotonic() < self.next_line:
                return
            self.next_line = time.monotonic() + LINE_EVERY_S
            self.world.log(f"step {step}/{self.bar.total}  epoch {epoch}  {text}")
        else:
            shown = "  ".join(f"{name} {figures[name]:.4f}" for name in SHOWN if name in figures)
            tqdm.write(f"epoch {epoch}  {kind}: {shown}", file=sys.stderr)


def _step(line: str) -> int:
    """Step of a line; a line cut short by a crash counts as one to drop."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return sys.maxsize


def _tensorboard(folder: Path, world: World):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        world.log("no TensorBoard here, figures go to metrics.jsonl only; pip install elastic-rec[tensorboard]")
        return None
    return SummaryWriter(str(folder))


def memory_usage(model: nn.Module) -> dict[str, float]:
    """Use of the memory's slots over all ranks since the last call: share hit, effective number. Collective."""
    memory = getattr(model.tower, "memory", None)  # peers, and their absent towers, have none
    if memory is None:
        return {}
    counts_M = memory.select.counts
    dist.all_reduce(counts_M)
    usage = slot_usage(counts_M)
    counts_M.zero_()
    return {f"memory_{name}": value for name, value in usage.items()}
