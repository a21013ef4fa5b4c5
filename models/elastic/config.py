"""What a user chooses about the tower and its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Attention(StrEnum):
    bidirectional = "bidirectional"
    causal = "causal"


@dataclass
class TowerConfig:
    width: int = field(default=64, metadata={"help": "Width D of event embeddings, experts and queries."})
    heads: int = field(default=2, metadata={"help": "Attention heads; width must be a multiple."})
    layers: int = field(default=2, metadata={"help": "LDA layers; the last one only aggregates."})
    experts: int = field(default=8, metadata={"help": "Interest experts K per user."})
    ffn_multiple: int = field(default=2, metadata={"help": "Hidden width of the feed-forwards, in widths."})
    dropout: float = field(
        default=0.1, metadata={"help": "Dropout on event embeddings and on every update of the experts."}
    )

    attention: Attention = field(
        default=Attention.bidirectional,
        metadata={
            "help": "bidirectional: the paper's form, one target behind each prefix. causal: no event sees a later "
            "one, so every position has an output and a user's state can be continued."
        },
    )
    chunk: int = field(
        default=32,
        metadata={"help": "causal: events per chunk; an event sees its own and the previous chunk directly."},
    )
    half_life: bool = field(
        default=True, metadata={"help": "causal: each expert learns in which time old events lose half their weight."}
    )

    def __post_init__(self) -> None:
        self.attention = Attention(self.attention)
        for name in ("width", "heads", "layers", "experts", "ffn_multiple", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: set it to 1 or more")
        if self.width % self.heads:
            nearest = max(self.heads, round(self.width / self.heads) * self.heads)
            raise ValueError(
                f"model.width = {self.width} is no multiple of model.heads = {self.heads}: set width = {nearest}"
            )
        if self.width % 4:
            raise ValueError(
                f"model.width = {self.width} is no multiple of 4, which embedding tables need: "
                f"set width = {(self.width + 3) // 4 * 4}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: set it in [0, 1)")


@dataclass
class MemoryConfig:
    enabled: bool = field(default=True, metadata={"help": "Start experts from a retrieved memory, not only seeds."})
    num_keys: int = field(default=64, metadata={"help": "Sub-keys per half; the bank has num_keys^2 slots."})
    heads: int = field(default=2, metadata={"help": "Memory heads: independent retrievals per expert, added up."})
    top_r: int = field(default=4, metadata={"help": "Slots that each head reads per expert."})

    def __post_init__(self) -> None:
        for name in ("num_keys", "heads", "top_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} = {getattr(self, name)}: set it to 1 or more")
        if self.top_r > self.num_keys:
            raise ValueError(
                f"memory.top_r = {self.top_r} exceeds memory.num_keys = {self.num_keys}: set top_r <= {self.num_keys}"
            )

    @property
    def num_slots(self) -> int:
        return self.num_keys**2
