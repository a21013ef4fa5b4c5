"""What a user chooses about a benchmark. Each suite has its own section; configs/benchmark.yaml holds the targets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_rec.configs.options import Options, option
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.pipeline.reports.benchmarks.models import MODELS, MODES


class SuiteName(StrEnum):
    """suite=..."""

    efficiency = "efficiency"
    streaming = "streaming"
    far_back = "far_back"
    ranking = "ranking"
    feature_store = "feature_store"


class SuiteOptions(Options):
    """Options of a suite; its lists of numbers are given in ascending order, without repeats."""

    def _check_ascending(self, *names: str) -> None:
        for name in names:
            numbers = getattr(self, name)
            if not numbers or numbers != sorted(set(numbers)):
                raise ValueError(f"{self._prefix}{name}={numbers}: give one or more numbers in ascending order")


@dataclass
class EfficiencyTargets(Options, prefix="efficiency.targets."):
    """What check=true asks of suite=efficiency."""

    speedup_events: list[int] = option([], "history lengths at which inference has to be faster than SASRec-SDPA")
    speedups: list[float] = option([], "by how many times, one per length")
    no_slower_from: int = option(0, "inference no slower than SASRec-SDPA from this length on; 0: off", at_least=0)
    slope_from: int = option(1, "slopes are fitted to the lengths from this one on")
    slope_min: float = option(0.0, "least log-log slope of inference time against length")
    slope_max: float = option(0.0, "greatest log-log slope; 0: slopes are not judged")
    gather_from: int = option(1, "the gather ratio is judged from this length on")
    gather_ratio: float = option(
        0.0, "inference may take this many times the embedding gather of its events; 0: off", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.speedup_events) != len(self.speedups):
            raise ValueError(
                f"{self._prefix}speedup_events={self.speedup_events} and speedups={self.speedups}: "
                "give as many speed-ups as lengths"
            )


@dataclass
class EfficiencyConfig(SuiteOptions, prefix="efficiency."):
    """suite=efficiency: models, history lengths, and how long to measure."""

    events: list[int] = option([256], "history lengths N, ascending", at_least=1)
    models: list[str] = option(list(MODELS), "models to compare", choices=tuple(MODELS))
    modes: list[str] = option(list(MODES), "inference, training", choices=MODES)
    repetitions: int = option(7, "rounds over all models; a figure is a median of rounds", at_least=1)
    min_sample_s: float = option(0.02, "short calls are repeated until a sample takes this many seconds", at_least=0)
    rounds_s: float = option(10.0, "seconds for all rounds of a model at one length, but at least one round")
    max_call_s: float = option(60.0, "a call predicted to take more seconds is skipped", above=0)
    memory_limit_gib: float = option(8.0, "what a call may allocate; beyond it the table says 'out of memory'", above=0)
    gather_rows: int = option(1_000_000, "rows of the table that the bare gather reads", at_least=1)
    targets: EfficiencyTargets = option(EfficiencyTargets, "what check=true asks for")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ascending("events")


@dataclass
class StreamingTargets(Options, prefix="streaming.targets."):
    """What check=true asks of suite=streaming."""

    fold_ratio: float = option(
        0.0, "a new event's time, slowest over fastest number of past events; 0: off", at_least=0
    )
    pass_gib: float = option(0.0, "resident memory of the longest pass in GiB; 0: off", at_least=0)
    slope_min: float = option(0.0, "least log-log slope of a pass's time against its events")
    slope_max: float = option(0.0, "greatest log-log slope; 0: not judged")


@dataclass
class StreamingConfig(SuiteOptions, prefix="streaming."):
    """suite=streaming: past lengths of users who get a new event, and lengths of whole histories."""

    events: list[int] = option([1000], "past events of the users, ascending", at_least=1)
    repetitions: int = option(15, "rounds over all of them; a figure is a median of rounds", at_least=1)
    catalogue: int = option(10_000, "items that are ranked after each new event", at_least=1)
    pass_events: list[int] = option([1000], "lengths of the passes over a whole history, ascending", at_least=1)
    pass_repetitions: int = option(3, "passes per length, after one to warm up", at_least=1)
    targets: StreamingTargets = option(StreamingTargets, "what check=true asks for")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ascending("events", "pass_events")


@dataclass
class FarBackConfig(SuiteOptions, prefix="far_back."):
    """suite=far_back: the synthetic set (far_back_set.py), and how models are trained and evaluated on it."""

    distances: list[int] = option(
        [100, 1_000, 10_000, 100_000], "events from the deciding one to the question in evaluation", at_least=2
    )
    train_distance: int = option(10_000, "the greatest distance in training", at_least=16)
    window: int = option(1_000, "newest events that the models with a bounded history see", at_least=32)
    markers: int = option(100, "deciding events, and as many answers", at_least=2)
    noise_items: int = option(1_000, "items of the events that decide nothing", at_least=1)
    noise: float = option(0.1, "share of answers that are drawn at random", at_least=0, at_most=1)
    steps: int = option(800, "optimizer steps", at_least=1)
    step_events: int = option(16_384, "events per step, at least 16 users", at_least=1)
    learning_rate: float = option(0.002, "Adam's", above=0)
    users: int = option(1_000, "users evaluated per distance, fewer where max_events says so", at_least=1)
    max_events: int = option(10_000_000, "events evaluated per distance, at least 64 users", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ascending("distances")

    @property
    def num_items(self) -> int:
        """Markers, answers, noise items and the question."""
        return 2 * self.markers + self.noise_items + 1

    @property
    def bayes(self) -> float:
        """Hit rate of the best possible first guess."""
        return 1 - self.noise + self.noise / self.markers


@dataclass
class RankingTargets(Options, prefix="ranking.targets."):
    """What check=true asks of suite=ranking."""

    candidates_ratio: float = option(
        0.0, "the tower's time for the longest list over that for the shortest; 0: off", at_least=0
    )
    state_ratio: float = option(
        0.0, "scoring from a state, slowest over fastest number of past events; 0: off", at_least=0
    )


@dataclass
class RankingSuiteConfig(SuiteOptions, prefix="ranking."):
    """suite=ranking: numbers of candidates, and past lengths of users with a state."""

    events: int = option(1000, "history of the user whose candidates are scored", at_least=1)
    candidates: list[int] = option([1, 1000], "how many candidates are scored, ascending", at_least=1)
    state_events: list[int] = option([100, 1000], "past events of the users with a state, ascending", at_least=1)
    repetitions: int = option(21, "rounds over all calls; a figure is a median of rounds", at_least=1)
    targets: RankingTargets = option(RankingTargets, "what check=true asks for")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ascending("candidates", "state_events")


@dataclass
class StoreTargets(Options, prefix="feature_store.targets."):
    """What check=true asks of suite=feature_store."""

    reader_ratio: float = option(0.0, "users per second of the reader over those of a bare loop; 0: off", at_least=0)
    ingest_ratio: float = option(
        0.0, "events per second of an ingest over those of DuckDB's sorted COPY; 0: off", at_least=0
    )
    amplification: float = option(
        0.0, "bytes that all ranks decode in an epoch over bytes they use; 0: off", at_least=0
    )


@dataclass
class StoreBenchmarkConfig(SuiteOptions, prefix="feature_store."):
    """suite=feature_store: the size of the raw log, and how it is written and read."""

    num_users: int = option(100, "users of the log that is drawn (raw_events.py)", at_least=1)
    num_events: int = option(1000, "its events", at_least=1)
    num_items: int = option(100, "its items", at_least=1)
    memory_limit: str = option("1GB", "memory of DuckDB, in the ingest and in the COPY")
    batch_size: int = option(256, "users per batch of the reader and of ParquetFile.iter_batches", at_least=1)
    workers: list[int] = option([1, 2], "threads that decode ahead, ascending", at_least=1)
    repetitions: int = option(7, "rounds in which all take turns; figures are medians", at_least=1)
    ingest_repetitions: int = option(3, "rounds of ingest and COPY", at_least=1)
    readers: int = option(8, "ranks over which the read amplification is counted", at_least=1)
    targets: StoreTargets = option(StoreTargets, "what check=true asks for")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ascending("workers")


@dataclass
class BenchmarkConfig(Options):
    """Keys of pipeline/benchmark.py."""

    suite: SuiteName = option(SuiteName.efficiency, "what to measure")
    out: str = option("runs/benchmark", "folder for table, figures and plot")
    device: str = option("auto", "cpu, cuda, or auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPU threads; 0: torch's default (OMP_NUM_THREADS, or all cores)", at_least=0)
    seed: int = option(0, "seed of weights and events")
    check: bool = option(False, "exit with 1, naming them, if targets are missed")
    model: TowerConfig = option(TowerConfig, "the tower; SASRec has the same sizes")
    memory: MemoryConfig = option(MemoryConfig, "the tower's interest memory")
    efficiency: EfficiencyConfig = option(EfficiencyConfig, "suite=efficiency")
    streaming: StreamingConfig = option(StreamingConfig, "suite=streaming")
    far_back: FarBackConfig = option(FarBackConfig, "suite=far_back")
    ranking: RankingSuiteConfig = option(RankingSuiteConfig, "suite=ranking")
    feature_store: StoreBenchmarkConfig = option(StoreBenchmarkConfig, "suite=feature_store")
