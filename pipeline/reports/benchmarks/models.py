"""The models that suite=efficiency measures. Each turns N events of one user into that user's representation.

They have equal width, heads, layers, feed-forwards and dropout, and random float32 weights. The events' vectors are
given: there is no item table. Their lookup is measured by itself, as the bare gather.

inference: torch.inference_mode, eval mode.
training:  forward, a loss, backward into weights and events; no optimizer step. The loss is on every event's output,
           of the paper form on the summary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle

import torch
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.towers.base import build_tower
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.sasrec import Sasrec, naive, sdpa

MODES = ("inference", "training")
GATHER, SASREC = "gather", "sasrec"
ELASTIC = ("elastic", "elastic_causal")
# name -> its label in tables and plots. "Newest only": its last block computes the newest event's output alone, as a
# careful engineer would serve SASRec. Most code computes all of them.
MODELS = {
    "elastic": "ELASTIC",
    "elastic_causal": "ELASTIC causal",
    SASREC: "SASRec-SDPA",
    "sasrec_newest": "SASRec-SDPA, newest only",
    "naive": "naive N x N",
    GATHER: "gather",
}
INFERENCE_ONLY = ("sasrec_newest",)  # training asks for every event's output


@dataclass(frozen=True)
class Setup:
    """What all models share. gather_rows: rows of the table that the bare gather reads."""

    model: TowerConfig
    memory: MemoryConfig
    gather_rows: int
    device: str
    seed: int

    @cached_property
    def table_VD(self) -> torch.Tensor:
        """(gather_rows, width): the item table of the bare gather."""
        return torch.randn(self.gather_rows, self.model.width, device=self.device)

    def call(self, name: str, mode: str, events: int) -> Callable[[], None]:
        """A call that does the work of model `name` once, on one user with `events` events."""
        torch.manual_seed(self.seed)
        if name == GATHER:
            return self._gather(mode, events)
        if name in ELASTIC:
            config = replace(self.model, tower=name)
            model, all_positions = build_tower(config, self.memory), config.kind.is_causal and mode == "training"
        else:
            attention = naive if name == "naive" else sdpa
            model, all_positions = Sasrec(self.model, max_history=events, attention=attention), name != "sasrec_newest"
        return self._encode(model, mode, events, all_positions)

    def _encode(self, model: nn.Module, mode: str, events: int, all_positions: bool) -> Callable[[], None]:
        model = model.to(self.device).train(mode == "training")
        tokens_TD = torch.randn(events, self.model.width).to(self.device)
        offsets_B1 = torch.tensor([0, events], device=self.device)
        times_s_T = torch.randint(0, 3600, (events,)).cumsum(0).to(self.device)

        @torch.inference_mode()
        def infer() -> None:
            model(tokens_TD, offsets_B1, times_s_T, all_positions)

        def train() -> None:
            model.zero_grad(set_to_none=True)
            tokens_TD.grad = None
            output = model(tokens_TD.requires_grad_(True), offsets_B1, times_s_T, all_positions)
            (output.user_embedding if output.tokens is None else output.tokens).square().mean().backward()

        return train if mode == "training" else infer

    def _gather(self, mode: str, events: int) -> Callable[[], None]:
        """Each call reads other events, or a short history would be read from the processor's cache.

        Training is the gather and its sparse gradient; adding it to the table is the optimizer's work."""
        calls = max(2, 2**20 // events)
        ids = cycle(torch.randint(0, self.gather_rows, (calls, events)).to(self.device).unbind(0))
        grad_TD = torch.ones(events, self.model.width, device=self.device)

        @torch.inference_mode()
        def infer() -> None:
            F.embedding(next(ids), self.table_VD)

        def train() -> None:
            weight_VD = self.table_VD.detach().requires_grad_(True)
            F.embedding(next(ids), weight_VD, sparse=True).backward(grad_TD)

        return train if mode == "training" else infer


def has_mode(name: str, mode: str) -> bool:
    """Whether model `name` is measured in `mode`."""
    return mode == "inference" or name not in INFERENCE_ONLY
