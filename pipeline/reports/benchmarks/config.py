"""What a user chooses about a benchmark. Each suite has its own section; configs/benchmark.yaml holds the targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.pipeline.reports.benchmarks.contestants import CONTESTANTS, MODES
from elastic_rec.pipeline.reports.benchmarks.far_back_set import FarBackConfig
from elastic_rec.pipeline.reports.benchmarks.store_config import StoreBenchmarkConfig


class Suite(StrEnum):
    efficiency = "efficiency"
    streaming = "streaming"
    far_back = "far_back"
    ranking = "ranking"
    feature_store = "feature_store"


@dataclass
class EfficiencyTargets:
    speedup_events: list[int] = field(
        default_factory=list, metadata={"help": "history lengths at which inference has to be faster than SASRec-SDPA"}
    )
    speedups: list[float] = field(default_factory=list, metadata={"help": "by how many times, one per length"})
    no_slower_from: int = field(
        default=0, metadata={"help": "inference no slower than SASRec-SDPA from here on; 0: off"}
    )
    slope_from: int = field(default=1, metadata={"help": "slopes are fitted to the lengths from here on"})
    slope_min: float = field(default=0.0, metadata={"help": "least log-log slope of inference time against length"})
    slope_max: float = field(default=0.0, metadata={"help": "greatest log-log slope; 0: slopes are not judged"})
    gather_from: int = field(default=1, metadata={"help": "the gather ratio is judged from here on"})
    gather_ratio: float = field(
        default=0.0, metadata={"help": "inference may take so many times the embedding gather of its events; 0: off"}
    )

    def __post_init__(self) -> None:
        if len(self.speedup_events) != len(self.speedups):
            raise ValueError(
                f"targets.speedup_events={self.speedup_events} and targets.speedups={self.speedups}: "
                "give as many speed-ups as lengths"
            )


@dataclass
class EfficiencyConfig:
    events: list[int] = field(default_factory=lambda: [256], metadata={"help": "history lengths N, ascending"})
    contestants: list[str] = field(default_factory=lambda: list(CONTESTANTS), metadata={"help": "who takes part"})
    modes: list[str] = field(default_factory=lambda: list(MODES), metadata={"help": "inference, training"})
    repetitions: int = field(default=7, metadata={"help": "rounds over all contestants; a cell is a median of rounds"})
    min_sample_s: float = field(
        default=0.02, metadata={"help": "short calls are repeated until a sample takes so long"}
    )
    rounds_s: float = field(default=10.0, metadata={"help": "seconds for all rounds of a cell, but at least one round"})
    max_cell_s: float = field(
        default=60.0, metadata={"help": "a cell predicted to take longer than so many seconds for one call is skipped"}
    )
    memory_limit_gib: float = field(
        default=8.0, metadata={"help": "what a call may allocate; beyond it the cell says 'out of memory'"}
    )
    gather_rows: int = field(default=1_000_000, metadata={"help": "rows of the table that the bare gather reads"})
    targets: EfficiencyTargets = field(default_factory=EfficiencyTargets, metadata={"help": "what check=true asks for"})

    def __post_init__(self) -> None:
        for name, known in (("contestants", tuple(CONTESTANTS)), ("modes", MODES)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"efficiency.{name}: {unknown} unknown, choose from {list(known)}")
        if not self.events or self.events != sorted(set(self.events)) or self.events[0] < 1:
            raise ValueError(f"efficiency.events={self.events}: give positive lengths in ascending order")
        if self.repetitions < 1:
            raise ValueError(f"efficiency.repetitions={self.repetitions}: must be at least 1")


@dataclass
class StreamingTargets:
    fold_ratio: float = field(
        default=0.0, metadata={"help": "a new event's time, slowest over fastest number of past events; 0: off"}
    )
    pass_gib: float = field(default=0.0, metadata={"help": "resident memory of the longest pass; 0: off"})
    slope_min: float = field(default=0.0, metadata={"help": "least log-log slope of a pass's time against its events"})
    slope_max: float = field(default=0.0, metadata={"help": "greatest log-log slope; 0: not judged"})


@dataclass
class StreamingConfig:
    events: list[int] = field(default_factory=lambda: [1000], metadata={"help": "past events of the users, ascending"})
    repetitions: int = field(default=15, metadata={"help": "rounds over all of them; a figure is a median of rounds"})
    catalogue: int = field(default=10_000, metadata={"help": "items that a fold ranks for its user"})
    pass_events: list[int] = field(
        default_factory=lambda: [1000], metadata={"help": "lengths of the passes over a whole history, ascending"}
    )
    pass_repetitions: int = field(default=3, metadata={"help": "passes per length, after one to warm up"})
    targets: StreamingTargets = field(default_factory=StreamingTargets, metadata={"help": "what check=true asks for"})

    def __post_init__(self) -> None:
        for name in ("events", "pass_events"):
            lengths = getattr(self, name)
            if not lengths or lengths != sorted(set(lengths)) or lengths[0] < 1:
                raise ValueError(f"streaming.{name}={lengths}: give positive lengths in ascending order")
        for name in ("repetitions", "pass_repetitions", "catalogue"):
            if getattr(self, name) < 1:
                raise ValueError(f"streaming.{name}={getattr(self, name)}: must be at least 1")


@dataclass
class RankingTargets:
    candidates_ratio: float = field(
        default=0.0, metadata={"help": "the tower's time for the longest list over that for the shortest; 0: off"}
    )
    state_ratio: float = field(
        default=0.0, metadata={"help": "scoring from a state, slowest over fastest number of past events; 0: off"}
    )


@dataclass
class RankingSuiteConfig:
    events: int = field(default=1000, metadata={"help": "history of the user whose candidates are scored"})
    candidates: list[int] = field(
        default_factory=lambda: [1, 1000], metadata={"help": "how many candidates are scored, ascending"}
    )
    state_events: list[int] = field(
        default_factory=lambda: [100, 1000], metadata={"help": "past events of the users with a state, ascending"}
    )
    repetitions: int = field(default=21, metadata={"help": "rounds over all cells; a figure is a median of rounds"})
    targets: RankingTargets = field(default_factory=RankingTargets, metadata={"help": "what check=true asks for"})

    def __post_init__(self) -> None:
        for name in ("candidates", "state_events"):
            numbers = getattr(self, name)
            if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 1:
                raise ValueError(f"ranking.{name}={numbers}: give positive numbers in ascending order")
        for name in ("repetitions", "events"):
            if getattr(self, name) < 1:
                raise ValueError(f"ranking.{name}={getattr(self, name)}: must be at least 1")


@dataclass
class BenchmarkConfig:
    suite: Suite = field(default=Suite.efficiency, metadata={"help": "what to measure"})
    out: str = field(default="runs/benchmark", metadata={"help": "folder for table, figures and plot"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: CUDA where there is one"})
    threads: int = field(
        default=0, metadata={"help": "CPU threads; 0: torch's default (OMP_NUM_THREADS, or all cores)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of weights and events"})
    check: bool = field(default=False, metadata={"help": "exit with 1, naming them, if targets are missed"})
    model: TowerConfig = field(
        default_factory=TowerConfig, metadata={"help": "the tower, and what SASRec copies of it"}
    )
    memory: MemoryConfig = field(default_factory=MemoryConfig, metadata={"help": "the tower's interest memory"})
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig, metadata={"help": "suite=efficiency"})
    streaming: StreamingConfig = field(default_factory=StreamingConfig, metadata={"help": "suite=streaming"})
    far_back: FarBackConfig = field(default_factory=FarBackConfig, metadata={"help": "suite=far_back"})
    ranking: RankingSuiteConfig = field(default_factory=RankingSuiteConfig, metadata={"help": "suite=ranking"})
    feature_store: StoreBenchmarkConfig = field(
        default_factory=StoreBenchmarkConfig, metadata={"help": "suite=feature_store"}
    )

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: set cpu, cuda or auto")
