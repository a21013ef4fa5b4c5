"""The configuration of train.py: everything that a run is, and that its config.yaml keeps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.batches.splits import Targets
from elastic_rec.models.ranking.config import RankingConfig
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.pipeline.config.data import DataConfig, check_local
from elastic_rec.pipeline.config.parallel import ParallelConfig


class TaskName(StrEnum):
    """A run's task; tasks/registry.py has the class of each."""

    next_item = "next_item"
    ranking = "ranking"


@dataclass
class OptimConfig(Options, prefix="optim."):
    """Steps, learning rates and schedule."""

    global_batch_size: int = option(128, "users (task=ranking: impression groups) per step, over all ranks", at_least=1)
    epochs: int = option(20, "passes over the users, at most", at_least=1)
    max_steps: int = option(0, "stop after this many steps; 0: no limit", at_least=0)
    patience: int = option(5, "stop when validation has not improved for this many epochs; 0: never", at_least=0)
    dense_lr: float = option(1e-3, "AdamW learning rate of everything that is not a table")
    dense_weight_decay: float = option(0.01, "AdamW weight decay, on matrices only")
    table_lr: float = option(0.05, "row-wise Adagrad learning rate of the event tables")
    bank_lr: float = option(0.1, "row-wise Adagrad learning rate of the interest memory")
    table_eps: float = option(1e-8, "row-wise Adagrad epsilon")
    warmup_steps: int = option(100, "steps of linear warm-up of every learning rate", at_least=0)
    final_lr_ratio: float = option(
        0.1, "learning rates fall on a cosine to this share of their start by the last step", at_least=0, at_most=1
    )
    clip_norm: float = option(1.0, "largest norm of the dense gradient", above=0)


@dataclass
class LossConfig(Options, prefix="loss."):
    """The softmax of task=next_item."""

    softmax: str = option(
        "full",
        "full (up to about 50,000 items) or sampled (shared negatives, logQ)",
        choices=("full", "sampled"),
    )
    num_negatives: int = option(1024, "negatives per step of the sampled softmax", at_least=1)
    popularity_power: float = option(0.75, "negatives are drawn in proportion to (item count) ** this")


@dataclass
class RunConfig(Options, prefix="run."):
    """The run folder, and how steps are done."""

    dir: str = option("runs/default", "run folder: config, plan, checkpoints, metrics")
    seed: int = option(0, "seed of weights, order, training targets and dropout", at_least=0, at_most=(1 << 31) - 1)
    resume: bool = option(False, "go on from the newest complete checkpoint, if there is one")
    checkpoint_every: int = option(
        0, "also write a checkpoint every so many steps; 0: at the end of each epoch only", at_least=0
    )
    keep_last: int = option(2, "newest checkpoints kept; the best is always kept", at_least=1)
    baselines: bool = option(
        True, "task=next_item: measure counting baselines on validation once, and warn of a model below"
    )
    log_every: int = option(20, "steps between two lines of metrics", at_least=1)
    pipelined: bool = option(True, "overlap input and all-to-all with compute (TorchRec's TrainPipelineSparseDist)")
    precision: str = option(
        "float32",
        "of the products in tower, head and loss: float32; bfloat16 (autocast: weights, sums, softmax and times stay "
        "float32 or wider); auto: bfloat16 on a CUDA device that has it",
        choices=("float32", "bfloat16", "auto"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(run__dir=self.dir)


@dataclass
class TrainConfig(Options):
    """All of a run. Raises ValueError for settings that exclude each other."""

    task: TaskName = option(
        TaskName.next_item,
        "next_item: which item follows a history. ranking: labels of candidates shown (impressions)",
    )
    data: DataConfig = option(DataConfig, "what is read, and how it is split")
    model: TowerConfig = option(TowerConfig, "the tower")
    memory: MemoryConfig = option(MemoryConfig, "the interest memory")
    ranking: RankingConfig = option(RankingConfig, "the ranking head")
    loss: LossConfig = option(LossConfig, "the loss of task=next_item")
    optim: OptimConfig = option(OptimConfig, "optimizers and schedule")
    parallel: ParallelConfig = option(ParallelConfig, "ranks and devices")
    run: RunConfig = option(RunConfig, "the run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory.enabled and not self.model.kind.has_memory:
            raise ValueError(f"model.tower={self.model.tower} has no interest memory: set memory=off")
        every_event = self.task is TaskName.next_item and self.data.targets is Targets.every_event
        if every_event and not self.model.kind.is_causal:
            raise ValueError(
                f"data.targets=every_event with model.tower={self.model.tower} would train on the answer: set "
                "model.tower=elastic_causal (or another causal tower), or data.targets=sampled"
            )
