"""What a user chooses about ranking: who looks at the history, how features cross, how several labels share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_rec.configs.options import Options, option


class History(StrEnum):
    """Who reads a user's history for a candidate."""

    tower = "tower"
    moments = "moments"
    none = "none"
    mean = "mean"
    din = "din"
    sim = "sim"


class Sharing(StrEnum):
    """What several labels share."""

    shared_bottom = "shared_bottom"
    mmoe = "mmoe"


@dataclass
class RankingConfig(Options, prefix="ranking."):
    """Keys of `ranking.*`. Raises ValueError where a key is out of bounds."""

    history: History = option(
        History.tower,
        "who reads the history. tower (model.*): the candidate attends over its K interests and reads its moments. "
        "moments: those alone. none. mean: pooling. din: the candidate attends over the newest last_n events. sim: "
        "over the top_k of them that are nearest to it",
    )
    last_n: int = option(50, "din, sim: newest events that are looked at", at_least=1)
    top_k: int = option(20, "sim: events kept by the first stage", at_least=1)
    cross_layers: int = option(2, "DCN-v2 cross layers", at_least=1)
    cross_rank: int = option(32, "rank of a cross layer's matrix", at_least=1)
    hidden: list[int] = option([128, 64], "widths of the shared MLP, one at least", at_least=1)
    sharing: Sharing = option(
        Sharing.shared_bottom,
        "several labels: shared_bottom (one MLP), or mmoe (a gate per label over mmoe_experts MLPs)",
    )
    mmoe_experts: int = option(4, "mmoe: how many MLPs", at_least=1)
    dropout: float = option(0.1, "dropout before each label's own layer", at_least=0, at_most=0.99)
    label_weights: list[float] = option(
        [], "weight of each label's loss, in the store's order; empty: all 1", at_least=0
    )
    pairwise: float = option(
        0.0,
        "weight of log(1 + e^(negative - positive)) over pairs of one impression's candidates; 0: cross entropy only",
        at_least=0,
    )
    max_impressions_per_user: int = option(
        16, "impressions of a user that share one pass over the user's history, at most", at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden:
            raise ValueError("ranking.hidden=[]: give at least one width")
