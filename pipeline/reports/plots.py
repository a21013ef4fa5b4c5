"""Pictures of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_run(run_dir: Path, target: Path, *, popularity: float) -> Path:
    """Training loss by step and validation HR@10 by epoch, beside popularity's test HR@10. Returns target."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    valid = [line for line in lines if line["kind"] == "valid"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(
        [line["epoch"] + line["epoch_share"] for line in train], [line["loss"] for line in train], color="#2a6f97"
    )
    left.set(xlabel="epoch", ylabel="training loss (cross entropy)")
    right.plot([line["epoch"] for line in valid], [line["hr@10"] for line in valid], "o-", ms=3, color="#2a6f97")
    right.axhline(popularity, ls="--", color="#bc4749")
    right.annotate("popularity (test)", (0.98, popularity), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    right.set(xlabel="epoch", ylabel="validation HR@10", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target
