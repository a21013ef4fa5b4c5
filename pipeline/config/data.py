"""The typed configuration of data, and of the verbs that only move it. Imports no torch, which ingest does without."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

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
class DataConfig:
    store: str = field(default="", metadata={"help": "folder of the history store that ingest writes and others read"})
    version: int | None = field(
        default=None,
        metadata={"help": "version of the store to read; none: the newest, to which a run keeps"},
    )
    columns: list[str] = field(
        default_factory=list, metadata={"help": "event columns to embed beside the item, e.g. [action]"}
    )
    max_history: int = field(default=200, metadata={"help": "newest events of a prefix that reach the model"})
    targets: Targets = field(
        default=Targets.every_event,
        metadata={
            "help": "every_event: train on a target after every event (a causal model.tower). sampled: on prefixes drawn "
            "per user and step, each with its target; model.tower=elastic needs it"
        },
    )
    prefixes_per_user: int = field(
        default=4, metadata={"help": "targets=sampled: prefixes drawn per user and step, each with its target"}
    )
    window: int = field(
        default=0,
        metadata={
            "help": "read a history in windows of so many events that carry the user's state, an optimiser step per "
            "window: memory is bounded by it, whatever max_history is; targets=every_event and causal only. 0: in one "
            "pass"
        },
    )
    seen: Seen = field(
        default=Seen.auto,
        metadata={
            "help": "items of the user's own history in validation, evaluation and scoring. keep: candidates like any "
            "other. exclude: left out, and a target among them is a miss. auto: exclude where fewer than 5 % of the "
            "training targets are such repeats"
        },
    )
    split: SplitConfig = field(default_factory=SplitConfig, metadata={"help": "how targets are held out"})
    dataset: DatasetConfig = field(default_factory=DatasetConfig, metadata={"help": "where raw events come from"})
    ingest: IngestConfig = field(
        default_factory=lambda: IngestConfig(out="${data.store}"),
        metadata={"help": "how raw events become a history store"},
    )
    impressions: ImpressionConfig = field(
        default_factory=ImpressionConfig, metadata={"help": "labelled impressions beside the histories, for ranking"}
    )
    impression_split: ImpressionSplit = field(
        default_factory=ImpressionSplit, metadata={"help": "how impressions are split by time"}
    )

    def __post_init__(self) -> None:
        self.seen = Seen(self.seen)
        self.targets = Targets(self.targets)
        for name in ("max_history", "prefixes_per_user"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: set at least 1")
        if self.window < 0:
            raise ValueError(f"data.window={self.window}: set events per window, or 0 to read histories in one pass")
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
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class VacuumConfig(Options):
    store: str = option("", "history store to clear of old versions")
    retention_hours: float = option(
        24.0, "keep versions that were current so many hours ago, for their open readers", at_least=0
    )


@dataclass
class RestoreConfig(Options):
    store: str = option("", "history store whose version to choose")
    version: int | None = option(None, "version to make the current one", at_least=0)


@dataclass
class DescribeConfig:
    store: str = field(default="", metadata={"help": "history store to describe"})
    version: int | None = field(default=None, metadata={"help": "version to describe; none: the current one"})
    out: str = field(default="", metadata={"help": "HTML file to write; empty: STORE.html, beside a local store"})
    max_history: list[int] = field(
        default_factory=lambda: [50, 200, 1000],
        metadata={"help": "limits on the history for which to say what they would cut"},
    )

    def __post_init__(self) -> None:
        if not self.max_history or min(self.max_history) < 1:
            raise ValueError(f"max_history={self.max_history}: give limits of at least 1 event")
        self.max_history = sorted(set(self.max_history))


@dataclass
class VerifyConfig:
    store: str = field(default="", metadata={"help": "history store to verify, with its impressions and states"})
    run: str = field(default="", metadata={"help": "run folder whose checkpoints to verify"})
    scores: str = field(default="", metadata={"help": "folder of scores to verify"})
