"""The configurations of score.py: one for each kind of scoring."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.ingestion.config import TimeUnit
from elastic_rec.feature_store.states.increments import LateEvents
from elastic_rec.pipeline.config.data import Seen, check_local
from elastic_rec.pipeline.config.evaluate import MOST_K
from elastic_rec.pipeline.config.parallel import ParallelConfig


class StateDtype(Enum):
    """Storage of the keys and values of users' states."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class ScoreConfig(Options):
    """What every scoring needs. Raises ValueError outside the bounds."""

    run: str = option("", "run folder of a trained model")
    out: str = option("", "folder for the Parquet parts")
    checkpoint: str = option("best", "best, last, or a step number")
    store: str = option("", "history store to score, its newest version; empty: the one the model was trained on")
    batch_size: int = option(256, "users per batch and rank", at_least=1)
    parallel: ParallelConfig = option(ParallelConfig, "ranks and devices")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(run=self.run, out=self.out)


@dataclass
class TopKConfig(ScoreConfig):
    """What the two scorings of task=next_item share."""

    k: int = option(10, "items per user; lists are held in memory", at_least=1, at_most=MOST_K)
    seen: Seen | None = option(None, "keep, exclude or auto, as data.seen; none: the run's policy")
    query_time: str = option(
        "",
        "moment for which the next item is asked: ISO time (UTC unless it says), seconds since 1970, or now; for runs "
        "with model.time=query, and only for them",
    )
    window: int = option(
        1024,
        "causal runs: events of a user in memory at a time, the state is carried; 0: all at once",
        at_least=0,
    )


@dataclass
class FullScoreConfig(TopKConfig):
    """Every user, from the history."""

    max_history: int | None = option(
        None,
        "newest events that reach the model; none: the run's data.max_history; 0: all, which is what the states of "
        "incremental scoring hold",
        at_least=0,
    )


@dataclass
class IncrementalScoreConfig(TopKConfig):
    """Every user, from the state that is kept beside the store, and the events since. Causal runs only."""

    late_events: LateEvents = option(
        LateEvents.reencode,
        "events older than a user's state: reencode the user from the whole history, or fold them in as if they had "
        "come just after",
    )
    state_dtype: StateDtype = option(StateDtype.float32, "storage of the states' keys and values")


@dataclass
class RankingScoreConfig(ScoreConfig):
    """Lists of candidates, for runs with task=ranking."""

    candidates: str = option("", "Parquet file, glob or folder with user_id, item_id (a list, or one) to be scored")
    timestamp_unit: TimeUnit = option(
        TimeUnit.s, "unit of numbers in the candidates' column timestamp: s, ms, us or ns"
    )
    part_rows: int = option(65536, "rows of the input in one part of the output", at_least=1, at_most=1 << 24)
    max_history: int | None = option(
        None, "newest events that reach the model; none: the run's data.max_history; 0: all", at_least=0
    )
