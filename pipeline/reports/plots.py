"""How pictures look, and the picture of a training run. Import pyplot from here: no window, one style."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE, LIGHT_BLUE, RED, ORANGE, VIOLET, GREY = "#2a6f97", "#61a5c2", "#bc4749", "#e09f3e", "#6d597a", "#8a8f98"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "svg.hashsalt": "elastic-rec",  # the same figures give the same bytes
}
plt.rcParams.update(STYLE)


def save(figure: Figure, target: Path) -> None:
    """Writes a picture and frees its memory; the kind follows from the name, .png or .svg."""
    figure.savefig(target)
    plt.close(figure)


def plot_run(run_dir: Path, target: Path, *, popularity: float) -> Path:
    """Training loss by step and validation HR@10 by epoch, from metrics.jsonl. Returns target.

    popularity: test HR@10 of that baseline, drawn as a line.
    """
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    valid = [line for line in lines if line["kind"] == "valid"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    left.plot([line["epoch"] + line["epoch_share"] for line in train], [line["loss"] for line in train], color=BLUE)
    left.set(xlabel="epoch", ylabel="training loss (cross entropy)")
    right.plot([line["epoch"] for line in valid], [line["hr@10"] for line in valid], "o-", ms=3, color=BLUE)
    right.axhline(popularity, ls="--", color=RED)
    right.annotate("popularity (test)", (0.98, popularity), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    right.set(xlabel="epoch", ylabel="validation HR@10", ylim=(0, None))
    save(figure, target)
    return target
