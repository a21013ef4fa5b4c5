"""One layer of linear dispatcher attention: experts gather from events, events read from experts.

Legend: B users, T events of all users, D width, H heads, d = D/H, K experts, Q = H*K.

    P' = P + Wo1 · aggregate(P Wq1, X Wk1, X Wv1);   P'' = P' + FFN(P')
    X' = X + Wo2 · dispatch(X Wq2, P'' Wk2, P'' Wv2);   X'' = X' + FFN(X')

Paper: the two attentions. Ours: pre-norm residuals on both streams, both feed-forwards, the output projections Wo, and
the order of the products. No event is ever projected: (P Wq)(X Wk)^T = (P Wq Wk^T) X^T, so every projection moves to
the K experts, and heads become H*K queries against one unprojected event. With Q <= D this is less work (4·D·Q against
4·D·D + 4·D·K per event) and stores no key, value or query of an event for the backward pass.
"""

from __future__ import annotations

import torch
from torch import nn

from elastic_rec.models.dropout import Dropout
from elastic_rec.models.ops.lda import lda_aggregate, lda_dispatch
from elastic_rec.models.tiles import TileLayout
from elastic_rec.models.towers.config import TowerConfig


class FeedForward(nn.Sequential):
    """LayerNorm, two linear maps with a GELU between them, dropout: (..., D) -> (..., D)."""

    def __init__(self, width: int, multiple: int, dropout: float = 0.0):
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, multiple * width),
            nn.GELU(),
            nn.Linear(multiple * width, width),
            Dropout(dropout),
        )


class Projections(nn.Module):
    """Wq, Wk, Wv (D, D) seen as (H, d, D), and Wo. No biases: an empty history must add exactly nothing."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def split(self, linear: nn.Linear) -> torch.Tensor:
        """The weight by heads, (H, d, D)."""
        return linear.weight.view(self.heads, -1, linear.weight.shape[1])


class Aggregate(Projections):
    """Experts read events: update of the experts (B, K, D). Both inputs come normalised."""

    def forward(self, experts_BKD: torch.Tensor, tokens_TD: torch.Tensor, layout: TileLayout) -> torch.Tensor:
        B, K, D = experts_BKD.shape
        H, d = self.heads, D // self.heads
        query_BKHd = self.query(experts_BKD).view(B, K, H, d) * d**-0.5
        query_BHKD = torch.einsum("bkhd,hdD->bhkD", query_BKHd, self.split(self.key))
        tokens_T1D = tokens_TD[:, None]
        mix_B1QD = lda_aggregate(query_BHKD.reshape(B, 1, H * K, D), tokens_T1D, tokens_T1D, layout)
        value_BKHd = torch.einsum("bhkD,hdD->bkhd", mix_B1QD.view(B, H, K, D), self.split(self.value))
        return self.out(value_BKHd.reshape(B, K, D))


class Dispatch(Projections):
    """Events read experts: update of the events (T, D). Both inputs come normalised."""

    def forward(self, tokens_TD: torch.Tensor, experts_BKD: torch.Tensor, layout: TileLayout) -> torch.Tensor:
        B, K, D = experts_BKD.shape
        H, d = self.heads, D // self.heads
        key_BKHd = self.key(experts_BKD).view(B, K, H, d) * d**-0.5
        key_BHKD = torch.einsum("bkhd,hdD->bhkD", key_BKHd, self.split(self.query))
        value_BKHd = self.value(experts_BKD).view(B, K, H, d)
        value_BHKD = torch.einsum("bkhd,Dhd->bhkD", value_BKHd, self.out.weight.view(D, H, d))
        shape = (B, 1, H * K, D)
        out_T1D = lda_dispatch(tokens_TD[:, None], key_BHKD.reshape(shape), value_BHKD.reshape(shape), layout, groups=H)
        return out_T1D.squeeze(1)


class LDALayer(nn.Module):
    """forward(tokens_TD, experts_BKD, layout) -> (tokens_TD, experts_BKD).

    last: only the experts are wanted afterwards, so the tokens come back as they were and their half isn't built.
    """

    def __init__(self, config: TowerConfig, *, last: bool):
        super().__init__()
        width, multiple = config.width, config.ffn_multiple
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_experts = nn.LayerNorm(width)
        self.aggregate = Aggregate(width, config.heads)
        self.dropout = Dropout(config.dropout)
        self.expert_ffn = FeedForward(width, multiple, config.dropout)
        self.last = last
        if not last:
            self.norm_dispatch = nn.LayerNorm(width)
            self.dispatch = Dispatch(width, config.heads)
            # No dropout on the events' own stream: on a CPU its random numbers cost as much as three D x D products
            # per event (30 ms for 65k events of width 64), and the events were dropped out when embedded.
            self.token_ffn = FeedForward(width, multiple)

    def forward(
        self, tokens_TD: torch.Tensor, experts_BKD: torch.Tensor, layout: TileLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed_TD = self.norm_tokens(tokens_TD)
        experts_BKD = experts_BKD + self.dropout(self.aggregate(self.norm_experts(experts_BKD), normed_TD, layout))
        experts_BKD = experts_BKD + self.expert_ffn(experts_BKD)
        if not self.last:
            tokens_TD = tokens_TD + self.dispatch(normed_TD, self.norm_dispatch(experts_BKD), layout)
            tokens_TD = tokens_TD + self.token_ffn(tokens_TD)
        return tokens_TD, experts_BKD


class LDAStack(nn.Module):
    """All layers -> experts (B, K, D). A module of its own, not a ModuleList in the tower: TorchRec's tracer takes the
    list for the leaf, never finds it called, and would trace into the layers' tensor code."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(LDALayer(config, last=i == config.layers - 1) for i in range(config.layers))

    def forward(self, tokens_TD: torch.Tensor, experts_BKD: torch.Tensor, layout: TileLayout) -> torch.Tensor:
        for layer in self.layers:
            tokens_TD, experts_BKD = layer(tokens_TD, experts_BKD, layout)
        return experts_BKD
