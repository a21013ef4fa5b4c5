"""Models whose candidate attends over single events of its user, in blocks of bounded memory.

Deep Interest Network (Zhou et al. 2018, arXiv 1706.06978): over the newest events. SIM (Pi et al. 2020, arXiv
2006.05639), soft search: over those events only that a first stage found nearest to the candidate; the search takes the
model's own vectors, without a gradient (ours).

Legend: T events end to end, C candidates, D width, h hidden units; in a block c candidates, at most n events of each.

The activation unit's first layer sees (event, candidate, their product). With e the event and a the candidate,

    W_event e + W_candidate a + W_product (a * e)  =  e · (W_event + diag(a) W_product) + W_candidate a

so a block is one product of its events (c, n, D) with a D x h matrix per candidate; the pairs' products and gathered
halves are never there. Candidates come in order of length, so that rows of a block are nearly equally long. A block is
computed again in the backward pass: what is kept is O(T·D + C·D), beside one block of BLOCK_PAIRS pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCK_PAIRS = 1 << 15  # 4 MiB of hidden units: a CPU core's share of the cache


class ActivationUnit(nn.Module):
    """DIN's MLP on (event, candidate, product), a number per pair; softmax over a candidate's events, so that 50 and
    1,000 of them are on one scale (ours; the paper leaves the weights as they are)."""

    def __init__(self, width: int, hidden: int = 32):
        super().__init__()
        self.event = nn.Linear(width, hidden)
        self.candidate = nn.Linear(width, hidden, bias=False)
        self.product = nn.Linear(width, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, events_cnD: torch.Tensor, candidates_cD: torch.Tensor, seen_cn: torch.Tensor) -> torch.Tensor:
        """(c, D): what each candidate read. Every candidate must see an event."""
        by_candidate_cDh = self.event.weight.T + candidates_cD[:, :, None] * self.product.weight.T
        shift_c1h = (self.event.bias + self.candidate(candidates_cD))[:, None]
        scores_cn = self.score(F.gelu(torch.baddbmm(shift_c1h, events_cnD, by_candidate_cDh))).squeeze(-1)
        weights_cn = scores_cn.masked_fill(~seen_cn, -torch.inf).softmax(-1).to(events_cnD.dtype)
        return (weights_cn[:, None] @ events_cnD).squeeze(1)


class EventReader(nn.Module):
    """forward(events_TD, candidates_CD, batch) -> (C, 1, D): the candidate reads the newest last_n events that its
    impression sees or, with top_k, those top_k of them whose dot product with it is greatest (the newer of two equal
    ones first; without a gradient). Zeros where it sees none."""

    def __init__(self, width: int, last_n: int, top_k: int | None = None):
        super().__init__()
        self.unit, self.last_n, self.top_k = ActivationUnit(width), last_n, top_k

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        ends_C = batch.ends[batch.impression]
        lengths_C = (ends_C - batch.starts[batch.impression]).clamp_max(self.last_n)
        order_C = lengths_C.argsort(descending=True, stable=True)
        ends_C, lengths_C, candidates_CD = ends_C[order_C], lengths_C[order_C], candidates_CD.index_select(0, order_C)
        read = []
        for block in _blocks(lengths_C.tolist()):
            event_cn, seen_cn = _newest(ends_C[block], lengths_C[block])
            if self.top_k is not None:
                event_cn, seen_cn = self.nearest(events_TD, candidates_CD[block], event_cn, seen_cn)
            read.append(checkpoint(self.read, events_TD, candidates_CD[block], event_cn, seen_cn, use_reentrant=False))
        if not read:  # DDP waits for a gradient of every parameter
            return self._nothing(events_TD, candidates_CD)
        read_CD = torch.cat(read)
        read_CD = F.pad(read_CD, (0, 0, 0, len(order_C) - len(read_CD)))
        return read_CD.index_select(0, order_C.argsort())[:, None]

    def _nothing(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor) -> torch.Tensor:
        zero = 0 * (events_TD.sum() + sum(parameter.sum() for parameter in self.unit.parameters()))
        return (0 * candidates_CD + zero)[:, None]

    def read(self, events_TD, candidates_cD, event_cn, seen_cn) -> torch.Tensor:
        """What c candidates read of n events each, (c, D). event_cn: positions on the T axis."""
        events_cnD = events_TD.index_select(0, event_cn.flatten()).view(*event_cn.shape, -1)
        return self.unit(events_cnD, candidates_cD, seen_cn)

    @torch.no_grad()
    def nearest(self, events_TD, candidates_cD, event_cn, seen_cn) -> tuple[torch.Tensor, torch.Tensor]:
        """The top_k events of each candidate by dot product: positions and which are seen, both (c, k)."""
        events_cnD = events_TD.index_select(0, event_cn.flatten()).view(*event_cn.shape, -1)
        scores_cn = (events_cnD @ candidates_cD[:, :, None]).squeeze(-1).masked_fill(~seen_cn, -torch.inf)
        best_ck = scores_cn.sort(descending=True, stable=True).indices[:, : self.top_k]
        return event_cn.gather(1, best_ck), seen_cn.gather(1, best_ck)


def _blocks(lengths: list[int]) -> Iterator[slice]:
    """lengths, descending -> stretches of at most BLOCK_PAIRS pairs, padding included; lengths of 0 are left out."""
    start, num = 0, sum(length > 0 for length in lengths)
    while start < num:
        stop = min(num, start + max(1, BLOCK_PAIRS // lengths[start]))
        yield slice(start, stop)
        start = stop


def _newest(ends_c: torch.Tensor, lengths_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(c, n) places on the T axis, newest first, and which of them are seen; the first row is the longest."""
    back_n = torch.arange(int(lengths_c[0]), device=ends_c.device)
    return (ends_c[:, None] - 1 - back_n).clamp_min(0), back_n < lengths_c[:, None]
