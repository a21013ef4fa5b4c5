"""SASRec: causal softmax attention of every event over all events before it, the baseline most papers compare with.

Legend: B users (or prefixes), U of them with events, T events of all users, D width, H heads, d = D/H,
S slots: events and padding of all groups (see `Groups`), N longest history of a group.

    X = tokens + position;   per block   X = X + Attention(LN X),   X = X + FFN(LN X);   out = LN X

Source: Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018). As there: learned positions counted from the
end (the paper pads on the left), causal attention, the newest event's output is the user. Ours: plain pre-norm blocks
(the paper normalises the queries but not the keys), GELU, and no dropout on the attention weights, because torch's
fused CPU kernel has none and would silently give way to N x N scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.dropout import Dropout
from elastic_rec.models.towers.base import SequenceTower, TowerOutput
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig


@dataclass(frozen=True)
class Groups:
    """Users of like length side by side: lengths in (2^(i-1), 2^i] form a group, padded on the right to its longest.

        tokens  a a a | b | c c c c | d        groups  {b, d}: [b] [d]    {a, c}: [a a a .] [c c c c]

    Under half of all slots are padding, whatever the lengths. A padding slot repeats the user's last event: causal
    attention never looks to the right, so no event sees it, and its own output is dropped.

    shapes: (users, N) of each group.  token_S: the token in each slot.  slot_T: the slot of each token.
    order_U: users with events, group by group.  lengths_U: their lengths.  plain: the slots are the tokens, in order.
    """

    shapes: list[tuple[int, int]]
    token_S: torch.Tensor
    slot_T: torch.Tensor
    order_U: torch.Tensor
    lengths_U: torch.Tensor
    plain: bool

    @staticmethod
    def build(offsets_B1: torch.Tensor) -> Groups:
        """Waits once for the device, then works on the host: a few groups, however many users there are."""
        device, offsets_B1 = offsets_B1.device, offsets_B1.to("cpu", torch.int64)
        starts_B, lengths_B = offsets_B1[:-1], offsets_B1.diff()
        doubling_B = torch.frexp((lengths_B - 1).double()).exponent  # 1 -> 0, 2 -> 1, 3 and 4 -> 2, 5 to 8 -> 3
        shapes, orders, tokens, valid = [], [], [], []
        for doubling in doubling_B[lengths_B > 0].unique().tolist():
            users = ((doubling_B == doubling) & (lengths_B > 0)).nonzero()[:, 0]
            longest = int(lengths_B[users].max())
            place_N = torch.arange(longest)
            shapes.append((users.numel(), longest))
            orders.append(users)
            tokens.append((starts_B[users, None] + torch.minimum(place_N, lengths_B[users, None] - 1)).flatten())
            valid.append((place_N < lengths_B[users, None]).flatten())
        none = offsets_B1[:0]
        token_S, order_U = torch.cat([*tokens, none]), torch.cat([*orders, none])
        valid_S = torch.cat([*valid, none.bool()]).nonzero()[:, 0]
        slot_T = torch.empty(valid_S.numel(), dtype=torch.int64)
        slot_T[token_S[valid_S]] = valid_S
        plain = torch.equal(token_S, torch.arange(slot_T.numel()))
        arrays = (token_S, slot_T, order_U, lengths_B[order_U])
        return Groups(shapes, *(array.to(device) for array in arrays), plain)

    def to_slots(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Padding slots are copies; nothing reads their output, so they send back exact zeros."""
        return x_TD if self.plain else x_TD.index_select(0, self.token_S)

    def to_tokens(self, x_SD: torch.Tensor) -> torch.Tensor:
        """(S, D) -> (T, D): padding slots are dropped."""
        return x_SD if self.plain else x_SD.index_select(0, self.slot_T)


def sdpa(query_BHNd, key_BHNd, value_BHNd, *, causal: bool, mask: torch.Tensor | None = None) -> torch.Tensor:
    """torch's fused kernel: N x N work, but no N x N tensor."""
    return F.scaled_dot_product_attention(query_BHNd, key_BHNd, value_BHNd, attn_mask=mask, is_causal=causal)


def naive(query_BHNd, key_BHNd, value_BHNd, *, causal: bool, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The same with the N x N scores written out, as SASRec's first implementations do."""
    scores_BHNN = (query_BHNd * query_BHNd.shape[-1] ** -0.5) @ key_BHNd.transpose(-1, -2)
    if causal:
        N = scores_BHNN.shape[-1]
        mask = torch.ones(N, N, dtype=torch.bool, device=scores_BHNN.device).tril_()
    if mask is not None:
        scores_BHNN = scores_BHNN.masked_fill(~mask, -torch.inf)
    return scores_BHNN.softmax(-1) @ value_BHNd


class Block(nn.Module):
    """A pre-norm block: forward(x_TD, groups) -> (T, D); `newest` gives the newest events' outputs alone."""

    def __init__(self, config: TowerConfig, attention: Callable[..., torch.Tensor]):
        super().__init__()
        width, hidden = config.width, config.ffn_multiple * config.width
        self.heads, self.attention = config.heads, attention
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(config.dropout)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, width),
            Dropout(config.dropout),
        )

    def forward(self, x_TD: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Every event over all events up to itself."""
        qkv_SX = groups.to_slots(self.qkv(self.norm(x_TD)))
        mixed, start = [], 0
        for users, longest in groups.shapes:
            qkv_BHNX = self._split(qkv_SX[start : start + users * longest], users, longest)
            mixed.append(self.attention(*qkv_BHNX, causal=True).transpose(1, 2).flatten(0, 1).flatten(1))
            start += users * longest
        mixed_SD = torch.cat(mixed) if len(mixed) != 1 else mixed[0]
        return self._update(x_TD, groups.to_tokens(mixed_SD))

    def newest(self, x_TD: torch.Tensor, groups: Groups, last_U: torch.Tensor) -> torch.Tensor:
        """Each user's newest event over all of that user's -> (U, D), in the order of groups.order_U."""
        normed_TD = self.norm(x_TD)
        width = x_TD.shape[1]
        query_UD = F.linear(normed_TD.index_select(0, last_U), self.qkv.weight[:width], self.qkv.bias[:width])
        kv_SX = groups.to_slots(F.linear(normed_TD, self.qkv.weight[width:], self.qkv.bias[width:]))
        mixed, start, first = [], 0, 0
        for users, longest in groups.shapes:
            query_BH1d = self._split(query_UD[first : first + users], users, 1)[0]
            key_BHNd, value_BHNd = self._split(kv_SX[start : start + users * longest], users, longest)
            mask = None  # a padding slot lies after the newest event, but without causal=True it would be seen
            if not groups.plain:
                place_N = torch.arange(longest, device=x_TD.device)
                mask = (place_N < groups.lengths_U[first : first + users, None])[:, None, None]
            mixed.append(self.attention(query_BH1d, key_BHNd, value_BHNd, causal=False, mask=mask).flatten(1))
            start, first = start + users * longest, first + users
        return self._update(x_TD.index_select(0, last_U), torch.cat(mixed))

    def _split(self, x_SX: torch.Tensor, users: int, longest: int) -> tuple[torch.Tensor, ...]:
        """(users*N, parts*D) -> parts of (users, H, N, d)."""
        d = self.out.in_features // self.heads
        return x_SX.view(users, longest, -1, self.heads, d).permute(2, 0, 3, 1, 4).contiguous().unbind(0)

    def _update(self, x_TD: torch.Tensor, mixed_TD: torch.Tensor) -> torch.Tensor:
        x_TD = x_TD + self.dropout(self.out(mixed_TD))
        return x_TD + self.ffn(x_TD)


class Sasrec(SequenceTower):
    """forward(tokens_TD, offsets_B1, times_s_T, all_positions=True) -> TowerOutput.

    times_s_T is not used: SASRec knows the order of events only. user_embedding (B, D) is the output of the user's
    newest event, zeros for a user without events, and interests (B, 1, D) the same again. all_positions=False leaves
    out most of the last block as well.
    Positions count from the end of each history, so an event's output depends on how many events follow, never on
    which. ValueError: a history of more than max_history events.
    attention: `sdpa`, or `naive` to see what the fused kernel saves.
    """

    is_causal = has_positions = True

    def __init__(self, config: TowerConfig, *, max_history: int = 200, attention: Callable[..., torch.Tensor] = sdpa):
        super().__init__()
        self.position = nn.Parameter(torch.randn(max_history, config.width) * 0.5)  # as the ELASTIC tower's
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    @classmethod
    def build(
        cls, config: TowerConfig, memory: MemoryConfig, *, max_history: int, device: torch.device | str | None
    ) -> Sasrec:
        return cls(config, max_history=max_history)

    def forward(
        self, tokens_TD: torch.Tensor, offsets_B1: torch.Tensor, times_s_T: torch.Tensor, all_positions: bool = True
    ) -> TowerOutput:
        groups = Groups.build(offsets_B1)
        longest = max((n for _, n in groups.shapes), default=0)
        if longest > len(self.position):
            raise ValueError(
                f"a history of {longest} events, but SASRec was made with positions for {len(self.position)}: give "
                "each user's newest ones, or train with data.max_history set higher"
            )
        user_BD = tokens_TD.new_zeros(offsets_B1.numel() - 1, tokens_TD.shape[1])
        if not groups.shapes:
            return TowerOutput(user_BD[:, None], user_BD, tokens_TD if all_positions else None)
        T = tokens_TD.shape[0]
        end_T = offsets_B1[1:].repeat_interleave(offsets_B1.diff(), output_size=T)
        position_T = end_T - 1 - torch.arange(T, device=tokens_TD.device)
        x_TD = tokens_TD + F.embedding(position_T, self.position)
        last_U = offsets_B1[groups.order_U + 1] - 1
        for block in self.blocks[:-1]:
            x_TD = block(x_TD, groups)
        if all_positions:
            outputs_TD = self.norm(self.blocks[-1](x_TD, groups))
            newest_UD = outputs_TD.index_select(0, last_U)
        else:
            outputs_TD, newest_UD = None, self.norm(self.blocks[-1].newest(x_TD, groups, last_U))
        user_BD = user_BD.to(newest_UD.dtype).index_copy(0, groups.order_U, newest_UD)
        return TowerOutput(user_BD[:, None], user_BD, outputs_TD)
