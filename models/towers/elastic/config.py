"""What a user chooses about the tower and its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Attention(StrEnum):
    bidirectional = "bidirectional"
    causal = "causal"
    full = "full"


class Time(StrEnum):
    none = "none"
    past = "past"
    query = "query"


class Reads(StrEnum):
    both = "both"
    experts = "experts"
    events = "events"


# Beyond these a number is a slip: one layer alone would not fit any machine.
MOST = {"width": 1 << 14, "heads": 1 << 8, "layers": 1 << 8, "experts": 1 << 16, "ffn_multiple": 64, "chunk": 1 << 20}
MOST_KEYS = 1 << 15


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
            "one, so every position has an output and a user's state can be continued. full: SASRec, softmax attention "
            "over all earlier events: the peer to compare with, at quadratic cost and without a memory."
        },
    )
    time: Time = field(
        default=Time.past,
        metadata={
            "help": "none: only the order of events counts. past: also the times between them. query: also the time "
            "for which the next item is asked, as seconds since the newest event."
        },
    )
    chunk: int = field(
        default=32,
        metadata={"help": "causal: events per chunk; an event sees its own and the previous chunk directly."},
    )
    half_life: bool = field(
        default=True,
        metadata={"help": "causal, time not none: each expert learns in which time old events lose half their weight."},
    )
    moments: int = field(
        default=0,
        metadata={
            "help": "causal: directions in which the covariance of a user's events is kept, for candidates to read; "
            "0: only the mean."
        },
    )
    reads: Reads = field(
        default=Reads.both,
        metadata={
            "help": "causal: what an event attends to: both its experts and the events near it, or one of them alone, "
            "to see what each is worth."
        },
    )

    def __post_init__(self) -> None:
        self.attention, self.time, self.reads = Attention(self.attention), Time(self.time), Reads(self.reads)
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"model.{name} = {getattr(self, name)}: set it to 1 or more, at most {most}")
        if not 0 <= self.moments <= self.width:
            raise ValueError(f"model.moments = {self.moments}: set it between 0 and model.width = {self.width}")
        if self.moments and self.attention is not Attention.causal:
            raise ValueError(f"model.moments = {self.moments} wants model.attention=causal: set it, or moments = 0")
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
            if not 1 <= getattr(self, name) <= MOST_KEYS:
                raise ValueError(
                    f"memory.{name} = {getattr(self, name)}: set it to 1 or more, at most {MOST_KEYS} (the bank has "
                    "num_keys^2 slots)"
                )
        if self.top_r > self.num_keys:
            raise ValueError(
                f"memory.top_r = {self.top_r} exceeds memory.num_keys = {self.num_keys}: set top_r <= {self.num_keys}"
            )

    @property
    def num_slots(self) -> int:
        return self.num_keys**2
