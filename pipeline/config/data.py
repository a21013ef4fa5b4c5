"""The typed configuration of data, and of the verbs that only move it. Imports no torch, which ingest does without."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.batches.splits import ImpressionSplit, SplitConfig, Targets
from elastic_rec.feature_store.datasets import DatasetConfig
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig  # noqa: F401 (commands.py)
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.utils.credentials import mask_credentials


class Seen(StrEnum):
    """What becomes of the items that a user has in the history."""

    keep = "keep"
    exclude = "exclude"
    auto = "auto"


@dataclass
class DataConfig(Options, prefix="data."):
    """What is read, how much of it, and how targets are held out. Raises ValueError outside the bounds."""

    store: str = option("", "folder of the history store that ingest writes and others read")
    version: int | None = option(None, "version of the store to read; none: the newest, to which a run keeps")
    columns: list[str] = option([], "event columns to embed beside the item, e.g. [action]")
    max_history: int = option(200, "newest events of a prefix that reach the model", at_least=1)
    targets: Targets = option(
        Targets.every_event,
        "every_event: train on a target after every event (a causal model.tower). sampled: on prefixes drawn per user "
        "and step, each with its target; model.tower=elastic needs it",
    )
    prefixes_per_user: int = option(
        4, "targets=sampled: prefixes drawn per user and step, each with its target", at_least=1
    )
    window: int = option(
        0,
        "cut histories into windows of this many events. The user's state goes on from window to window; weights are "
        "updated after each. Memory depends on the window, not on max_history. Needs targets=every_event and "
        "model.tower=elastic_causal (or another tower with user states). 0: one pass",
        at_least=0,
    )
    seen: Seen = option(
        Seen.auto,
        "items of the user's own history in validation, evaluation and scoring. keep: candidates like any other. "
        "exclude: left out, and a target among them is a miss. auto: exclude where fewer than 5 % of the training "
        "targets are such repeats",
    )
    split: SplitConfig = option(SplitConfig, "how targets are held out")
    dataset: DatasetConfig = option(DatasetConfig, "where raw events come from")
    ingest: IngestConfig = option(partial(IngestConfig, out="${data.store}"), "how raw events become a history store")
    impressions: ImpressionConfig = option(ImpressionConfig, "labelled impressions beside the histories, for ranking")
    impression_split: ImpressionSplit = option(ImpressionSplit, "how impressions are split by time")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.targets is Targets.sampled:
            raise ValueError(
                f"data.window={self.window} with data.targets=sampled: a window has a target after every event, "
                "set data.targets=every_event, or data.window=0"
            )


def check_local(**folders: str) -> None:
    """Raises ValueError for a URL where a folder on the local disk is needed. folders: values by key, dots as __."""
    for name, value in folders.items():
        if re.match(r"[A-Za-z][\w+.-]*:/", value):
            key = name.replace("__", ".")
            raise ValueError(
                f"{key}={mask_credentials(value)}: runs and scores are on the local disk, only stores and what is read "
                "may be elsewhere: give a local path, and copy"
            )


@dataclass
class IngestVerbConfig:
    """The keys of ingest.py, and of `ingest.py impressions`."""

    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class VacuumConfig(Options):
    """The keys of `ingest.py vacuum`."""

    store: str = option("", "history store to clear of old versions")
    retention_hours: float = option(
        24.0, "keep versions that were current so many hours ago, for their open readers", at_least=0
    )


@dataclass
class RestoreConfig(Options):
    """The keys of `ingest.py restore`."""

    store: str = option("", "history store whose version to choose")
    version: int | None = option(None, "version to make the current one", at_least=0)
