"""Settings of training: what a run writes, its loss, its optimizers, and where its tables go."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic_rec.pipeline.config.data import check_local


@dataclass
class ParallelConfig:
    device: str = field(default="auto", metadata={"help": "auto (CUDA where there is one), cpu or cuda"})
    row_wise_tables: list[str] = field(
        default_factory=lambda: ["item", "bank"],
        metadata={"help": "tables whose rows are spread over all ranks; the planner places the others whole"},
    )
    device_memory_gib: float = field(
        default=8.0, metadata={"help": "memory per rank the planner may fill with tables (GPU memory on CUDA), GiB"}
    )
    host_init_gib: float = field(
        default=2.0,
        metadata={
            "help": "tables up to this size are initialised whole on every host, so that the start does not depend "
            "on the number of ranks; larger ones are initialised shard by shard"
        },
    )

    timeout_s: float = field(
        default=600.0,
        metadata={
            "help": "seconds that ranks wait for one that does not arrive, before the job ends and names it; more than "
            "the slowest rank needs for a checkpoint"
        },
    )

    def __post_init__(self) -> None:
        if not 1 <= self.timeout_s <= 7 * 86400:
            raise ValueError(f"parallel.timeout_s={self.timeout_s:g}: set 1 to 604800 (a week)")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"parallel.device={self.device!r}: set auto, cpu or cuda")


@dataclass
class OptimConfig:
    global_batch_size: int = field(default=128, metadata={"help": "users per step, over all ranks"})
    epochs: int = field(default=20, metadata={"help": "passes over the users, at most"})
    max_steps: int = field(default=0, metadata={"help": "stop after this many steps; 0: no limit"})
    patience: int = field(
        default=5, metadata={"help": "stop when validation has not improved for this many epochs; 0: never"}
    )
    dense_lr: float = field(default=1e-3, metadata={"help": "AdamW learning rate of everything that is not a table"})
    dense_weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay, on matrices only"})
    table_lr: float = field(default=0.05, metadata={"help": "row-wise Adagrad learning rate of the event tables"})
    bank_lr: float = field(default=0.1, metadata={"help": "row-wise Adagrad learning rate of the interest memory"})
    table_eps: float = field(default=1e-8, metadata={"help": "row-wise Adagrad epsilon"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up of every learning rate"})
    final_lr_ratio: float = field(
        default=0.1, metadata={"help": "learning rates fall on a cosine to this share of their start by the last step"}
    )
    clip_norm: float = field(default=1.0, metadata={"help": "largest norm of the dense gradient"})

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "epochs", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be above 0")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"optim.final_lr_ratio={self.final_lr_ratio}: set a share between 0 and 1")


@dataclass
class LossConfig:
    softmax: str = field(
        default="full", metadata={"help": "full (up to about 50,000 items) or sampled (shared negatives, logQ)"}
    )
    num_negatives: int = field(default=1024, metadata={"help": "negatives per step of the sampled softmax"})
    popularity_power: float = field(
        default=0.75, metadata={"help": "negatives are drawn in proportion to (item count) ** this"}
    )

    def __post_init__(self) -> None:
        if self.softmax not in ("full", "sampled"):
            raise ValueError(f"loss.softmax={self.softmax!r}: set full or sampled")
        if self.num_negatives < 1:
            raise ValueError(f"loss.num_negatives={self.num_negatives}: must be at least 1")


@dataclass
class RunConfig:
    dir: str = field(default="runs/default", metadata={"help": "run folder: config, plan, checkpoints, metrics"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order, training targets and dropout"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest complete checkpoint, if there is one"})
    checkpoint_every: int = field(
        default=0, metadata={"help": "also write a checkpoint every so many steps; 0: at the end of each epoch only"}
    )
    keep_last: int = field(default=2, metadata={"help": "newest checkpoints kept; the best is always kept"})
    baselines: bool = field(
        default=True,
        metadata={"help": "task=next_item: measure counting baselines on validation once, and warn of a model below"},
    )
    log_every: int = field(default=20, metadata={"help": "steps between two lines of metrics"})
    pipelined: bool = field(
        default=True,
        metadata={"help": "overlap input and all-to-all with compute (TorchRec's TrainPipelineSparseDist)"},
    )

    precision: str = field(
        default="float32",
        metadata={
            "help": "of the products in tower, head and loss: float32; bfloat16 (autocast: weights, sums, softmax and "
            "times stay float32 or wider); auto: bfloat16 on a CUDA device that has it"
        },
    )

    def __post_init__(self) -> None:
        check_local(run__dir=self.dir)
        if self.precision not in ("float32", "bfloat16", "auto"):
            raise ValueError(f"run.precision={self.precision!r}: set float32, bfloat16 or auto")
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"run.seed={self.seed}: set it from 0 to {(1 << 31) - 1}")
        if self.keep_last < 1:
            raise ValueError(
                f"run.keep_last={self.keep_last}: keep at least 1, a run without a checkpoint cannot resume"
            )
