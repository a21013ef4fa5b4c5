"""What a user chooses about ranking: who looks at the history, how features cross, how several labels share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class History(StrEnum):
    tower = "tower"
    moments = "moments"
    none = "none"
    mean = "mean"
    din = "din"
    sim = "sim"


class Sharing(StrEnum):
    shared_bottom = "shared_bottom"
    mmoe = "mmoe"


@dataclass
class RankingConfig:
    history: History = field(
        default=History.tower,
        metadata={
            "help": "who reads the history: tower (model.*: the candidate attends over its K interests and reads its "
            "moments), moments (those alone), or a peer: none, mean (pooling), din (the candidate attends over the "
            "newest last_n events), sim (over the top_k of them that are nearest to it)"
        },
    )
    last_n: int = field(default=50, metadata={"help": "din, sim: newest events that are looked at"})
    top_k: int = field(default=20, metadata={"help": "sim: events kept by the first stage"})
    cross_layers: int = field(default=2, metadata={"help": "DCN-v2 cross layers"})
    cross_rank: int = field(default=32, metadata={"help": "rank of a cross layer's matrix"})
    hidden: list[int] = field(default_factory=lambda: [128, 64], metadata={"help": "widths of the shared MLP"})
    sharing: Sharing = field(
        default=Sharing.shared_bottom,
        metadata={"help": "several labels: shared_bottom (one MLP), or mmoe (a gate per label over mmoe_experts MLPs)"},
    )
    mmoe_experts: int = field(default=4, metadata={"help": "mmoe: how many MLPs"})
    dropout: float = field(default=0.1, metadata={"help": "dropout in front of each label's own layer"})
    label_weights: list[float] = field(
        default_factory=list, metadata={"help": "weight of each label's loss, in the store's order; empty: all 1"}
    )
    pairwise: float = field(
        default=0.0,
        metadata={
            "help": "weight of log(1 + e^(negative - positive)) over pairs of an impression; 0: cross entropy only"
        },
    )
    max_impressions_per_user: int = field(
        default=16, metadata={"help": "impressions of a user that share one pass over the user's history, at most"}
    )

    def __post_init__(self) -> None:
        self.history, self.sharing = History(self.history), Sharing(self.sharing)
        for name in ("last_n", "top_k", "cross_layers", "cross_rank", "mmoe_experts", "max_impressions_per_user"):
            if getattr(self, name) < 1:
                raise ValueError(f"ranking.{name}={getattr(self, name)}: set it to 1 or more")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"ranking.hidden={self.hidden}: give at least one width")
        if not 0.0 <= self.dropout < 1.0 or self.pairwise < 0 or any(weight < 0 for weight in self.label_weights):
            raise ValueError("ranking: dropout lies in [0, 1), pairwise and label_weights are not negative")
