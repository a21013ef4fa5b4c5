"""What a user chooses about the tower and its memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from elastic_rec.configs.options import Options, option
from elastic_rec.models.towers.registry import TOWERS, tower_class

if TYPE_CHECKING:
    from elastic_rec.models.towers.base import SequenceTower


class Time(StrEnum):
    """What a tower knows of time."""

    none = "none"
    past = "past"
    query = "query"


class Reads(StrEnum):
    """What an event of the causal tower attends to."""

    both = "both"
    experts = "experts"
    events = "events"


@dataclass
class TowerConfig(Options, prefix="model."):
    """Keys of `model.*`. Raises ValueError where a key is out of bounds or two do not fit together.

    Upper bounds are far beyond any use: over them a number is a slip, for one layer alone would not fit any machine."""

    tower: str = option(
        "elastic_causal",
        "elastic_causal: no event sees a later one, so every position has an output, and a user's state can be "
        "continued. elastic: the paper's bidirectional form, one target after each prefix. sasrec: softmax attention "
        "over all earlier events, the baseline; quadratic cost and no memory.",
        choices=tuple(TOWERS),
    )
    width: int = option(64, "Width D of event embeddings, experts and queries.", at_least=1, at_most=1 << 14)
    heads: int = option(2, "Attention heads; width must be a multiple.", at_least=1, at_most=1 << 8)
    layers: int = option(2, "Layers. elastic: the last one only aggregates.", at_least=1, at_most=1 << 8)
    experts: int = option(8, "Interest experts K per user.", at_least=1, at_most=1 << 16)
    ffn_multiple: int = option(2, "Hidden width of the feed-forwards, in widths.", at_least=1, at_most=64)
    dropout: float = option(
        0.1, "Dropout on event embeddings and on every update of the experts.", at_least=0, at_most=0.99
    )
    time: Time = option(
        Time.past,
        "none: only the order of events counts. past: also the times between them. query: also the time for which the "
        "next item is asked, as seconds since the newest event.",
    )
    chunk: int = option(
        32,
        "elastic_causal: events per chunk; an event sees its own and the previous chunk directly.",
        at_least=1,
        at_most=1 << 20,
    )
    half_life: bool = option(
        True, "elastic_causal, time not none: each expert learns in which time old events lose half their weight."
    )
    moments: int = option(
        0,
        "elastic_causal: directions in which the covariance of a user's events is kept, for candidates to read; 0: "
        "only the mean.",
        at_least=0,
    )
    reads: Reads = option(
        Reads.both,
        "elastic_causal: what an event attends to: both its experts and the events near it, or one of them alone, to "
        "see what each is worth.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moments > self.width:
            raise ValueError(f"model.moments={self.moments}: set at most model.width={self.width}")
        if self.moments and not self.kind.has_states:
            raise ValueError(
                f"model.moments={self.moments} with model.tower={self.tower}, which keeps none: set "
                "model.tower=elastic_causal (or another tower with user states), or model.moments=0"
            )
        if self.width % self.heads:
            nearest = max(self.heads, round(self.width / self.heads) * self.heads)
            raise ValueError(
                f"model.width={self.width} is no multiple of model.heads={self.heads}: set model.width={nearest}"
            )
        if self.width % 4:
            raise ValueError(
                f"model.width={self.width} is no multiple of 4, which embedding tables need: "
                f"set model.width={(self.width + 3) // 4 * 4}"
            )

    @property
    def kind(self) -> type[SequenceTower]:
        """The tower's class, which tells what the tower can do."""
        return tower_class(self.tower)


@dataclass
class MemoryConfig(Options, prefix="memory."):
    """Keys of `memory.*`. Raises ValueError where a key is out of bounds or top_r exceeds num_keys."""

    enabled: bool = option(True, "Start experts from a retrieved memory, not only seeds.")
    num_keys: int = option(64, "Sub-keys per half; the bank has num_keys^2 slots.", at_least=1, at_most=1 << 15)
    heads: int = option(2, "Memory heads: independent retrievals per expert, added up.", at_least=1, at_most=1 << 15)
    top_r: int = option(4, "Slots that each head reads per expert.", at_least=1, at_most=1 << 15)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_r > self.num_keys:
            raise ValueError(
                f"memory.top_r={self.top_r} exceeds memory.num_keys={self.num_keys}: set memory.top_r={self.num_keys}"
            )

    @property
    def num_slots(self) -> int:
        """Rows of the bank."""
        return self.num_keys**2
