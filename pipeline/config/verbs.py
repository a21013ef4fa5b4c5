"""The typed configuration of every verb: YAML files in configs/ pick values, unknown keys and wrong types fail here.

Each part's dataclass stands beside the code it configures; this file puts them together (data_schema.py: those that
need no torch).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from elastic_rec.feature_store.batches.splits import Targets
from elastic_rec.feature_store.ingestion.config import TimeUnit
from elastic_rec.feature_store.states.increments import LateEvents
from elastic_rec.models.ranking.config import RankingConfig
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.pipeline.config.data import DataConfig, Seen, check_local
from elastic_rec.pipeline.config.training import LossConfig, OptimConfig, ParallelConfig, RunConfig

MOST_K = 100_000  # the longest list of items


class Task(StrEnum):
    next_item = "next_item"
    ranking = "ranking"


class ScoreMode(Enum):
    full = "full"
    incremental = "incremental"


class StateDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class TrainConfig:
    task: Task = field(
        default=Task.next_item,
        metadata={"help": "next_item: which item follows a history. ranking: labels of candidates shown (impressions)"},
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: TowerConfig = field(default_factory=TowerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.memory.enabled and not self.model.kind.has_memory:
            raise ValueError(f"model.tower={self.model.tower} has no interest memory: set memory=off")
        self.task = Task(self.task)
        every_event = self.task is Task.next_item and self.data.targets is Targets.every_event
        if every_event and not self.model.kind.is_causal:
            raise ValueError(
                f"data.targets=every_event with model.tower={self.model.tower} would train on the answer: set "
                "model.tower=elastic_causal, or data.targets=sampled"
            )


@dataclass
class EvaluateConfig:
    run: str = field(default="", metadata={"help": "run folder of a trained model"})
    checkpoint: str = field(default="best", metadata={"help": "best, last, or a step number"})
    store: str = field(
        default="",
        metadata={"help": "another history store with the run's ids, or those and newer ones; empty: the run's own"},
    )
    version: int | None = field(
        default=None, metadata={"help": "version of the store; none: the run's, of another store the newest"}
    )
    seen: Seen | None = field(
        default=None, metadata={"help": "task=next_item: keep, exclude or auto, as data.seen; none: the run's policy"}
    )
    stage: str = field(default="test", metadata={"help": "test or valid targets"})
    k: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "list lengths of HR, NDCG, coverage"})
    length_edges: list[int] = field(
        default_factory=lambda: [20, 50, 100, 200],
        metadata={"help": "edges of the history-length buckets metrics are also reported by"},
    )
    batch_size: int = field(default=256, metadata={"help": "users per batch, over all ranks"})
    max_history: int = field(
        default=0,
        metadata={
            "help": "task=ranking: newest events an impression sees, each encoded by itself; 0: as trained, with "
            "histories shared"
        },
    )
    min_item_count: int = field(
        default=0,
        metadata={"help": "also report a catalogue of only the items that occur at least so often; 0: do not"},
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_local(run=self.run)
        self.seen = self.seen and Seen(self.seen)
        if self.stage not in ("test", "valid"):
            raise ValueError(f"stage={self.stage!r}: set test or valid")
        if self.max_history < 0:
            raise ValueError(f"max_history={self.max_history}: set at least 1, or 0 for as many as in training")
        if not all(1 <= k <= MOST_K for k in self.k):
            raise ValueError(f"k={self.k}: set each to 1 or more, at most {MOST_K}")
        if 10 not in self.k:
            raise ValueError(f"k={self.k}: must contain 10, the length models are compared by")


@dataclass
class ScoreConfig:
    run: str = field(default="", metadata={"help": "run folder of a trained model"})
    out: str = field(default="", metadata={"help": "folder for the Parquet parts"})
    task: Task | None = field(default=None, metadata={"help": "the run's task; given another, scoring refuses"})
    candidates: str = field(
        default="",
        metadata={"help": "ranking: Parquet file, glob or folder with user_id, item_id (a list, or one) to be scored"},
    )
    timestamp_unit: TimeUnit = field(
        default=TimeUnit.s,
        metadata={"help": "ranking: unit of numbers in the candidates' column timestamp: s, ms, us or ns"},
    )
    part_rows: int = field(default=65536, metadata={"help": "ranking: rows of the input in one part of the output"})
    mode: ScoreMode = field(
        default=ScoreMode.full,
        metadata={
            "help": "full: every user, from the history. incremental: continue the user states that are kept beside "
            "the store, causal runs only"
        },
    )
    checkpoint: str = field(default="best", metadata={"help": "best, last, or a step number"})
    store: str = field(
        default="",
        metadata={"help": "history store to score, its newest version; empty: the one the model was trained on"},
    )
    k: int = field(default=10, metadata={"help": "items per user"})
    seen: Seen | None = field(
        default=None, metadata={"help": "task=next_item: keep, exclude or auto, as data.seen; none: the run's policy"}
    )
    query_time: str = field(
        default="",
        metadata={
            "help": "moment for which the next item is asked: ISO time (UTC unless it says), seconds since 1970, or "
            "now; for runs with model.time=query, and only for them"
        },
    )
    max_history: int | None = field(
        default=None,
        metadata={
            "help": "full: newest events that reach the model; none: the run's data.max_history; 0: all, which is what "
            "the states of mode=incremental hold"
        },
    )
    window: int = field(
        default=1024,
        metadata={"help": "causal runs: events of a user in memory at a time, the state is carried; 0: all at once"},
    )
    late_events: LateEvents = field(
        default=LateEvents.reencode,
        metadata={
            "help": "incremental, events older than a user's state: reencode the user from the whole history, or fold "
            "them in as if they had come just after"
        },
    )
    state_dtype: StateDtype = field(
        default=StateDtype.float32, metadata={"help": "incremental: storage of the states' keys and values"}
    )
    batch_size: int = field(default=256, metadata={"help": "users per batch and rank"})
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_local(run=self.run, out=self.out)
        self.mode, self.late_events = ScoreMode(self.mode), LateEvents(self.late_events)
        self.state_dtype, self.seen = StateDtype(self.state_dtype), self.seen and Seen(self.seen)
        if not 1 <= self.part_rows <= 1 << 24:
            raise ValueError(f"part_rows={self.part_rows}: set it to 1 or more, at most {1 << 24}")
        if self.k > MOST_K:
            raise ValueError(f"k={self.k}: set it to at most {MOST_K}; lists of users are held in memory")
        if self.k < 1 or self.batch_size < 1 or self.window < 0 or (self.max_history or 0) < 0:
            raise ValueError(
                f"k={self.k}, batch_size={self.batch_size}, window={self.window}, max_history={self.max_history}: set "
                "k and batch_size to at least 1, the others to at least 0"
            )
        if self.mode is ScoreMode.incremental and self.max_history:
            raise ValueError(
                f"max_history={self.max_history} with mode=incremental: a state holds all events; leave max_history "
                "out, or set mode=full"
            )


@dataclass
class DemoConfig:
    data: str = field(default="ml100k", metadata={"help": "a name both in configs/data and in configs/experiment"})
    out: str = field(default="runs/demo", metadata={"help": "folder for store, run, scores and plot; emptied first"})
    ranks: int = field(default=2, metadata={"help": "training and scoring processes"})
    train: list[str] = field(default_factory=list, metadata={"help": "more overrides for train.py"})

    def __post_init__(self) -> None:
        check_local(out=self.out)
