"""The configuration of demo.py."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_rec.configs.options import Options, option
from elastic_rec.pipeline.config.data import check_local


@dataclass
class DemoConfig(Options):
    """Which data set goes through the whole pipeline, and where to."""

    data: str = option("ml100k", "a name both in configs/data and in configs/experiment")
    out: str = option("runs/demo", "folder for store, run, scores and plot; emptied first")
    ranks: int = option(2, "training and scoring processes", at_least=1)
    train: list[str] = option([], "more overrides for train.py")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(out=self.out)
