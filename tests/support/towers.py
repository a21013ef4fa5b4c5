"""Small causal towers, their events, and what they allocate."""

from __future__ import annotations

import torch
from retrieval import make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_rec.models.towers.base import build_tower
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.state import UserState


class Allocations(TorchDispatchMode):
    """Remembers the largest tensor that any op gives back, forward or backward."""

    def __init__(self):
        super().__init__()
        self.largest, self.shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.largest:
                self.largest, self.shape = leaf.numel(), (str(func), *leaf.shape)
        return out


D, K, H, C = 16, 4, 2, 4


LENGTHS = [0, 1, C - 1, C, C + 1, 2 * C + 1, 37]


def make_tower(*, memory=True, layers=2, dropout=0.0, chunk=C, half_life=True, moments=0):
    torch.manual_seed(0)
    config = TowerConfig(
        width=D,
        heads=H,
        experts=K,
        layers=layers,
        dropout=dropout,
        tower="elastic_causal",
        chunk=chunk,
        half_life=half_life,
        moments=moments,
    )
    return build_tower(config, MemoryConfig(enabled=memory, num_keys=8, heads=2, top_r=3))


def events(lengths, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
    T = int(offsets_B1[-1])
    gaps_s = torch.exp(16 * torch.rand(T, generator=g)).long()  # seconds to a hundred days
    return torch.randn(T, D, generator=g).to(dtype), offsets_B1, 1_600_000_000 + gaps_s.cumsum(0)


def every_batch(seed=0):
    """One stretch per user, with the following event as each event's target."""
    batch = make_batch(seed)
    lengths_R = batch.ends - batch.starts
    P = int(lengths_R.sum())
    g = torch.Generator().manual_seed(seed)
    batch.targets, batch.weights = torch.randint(2, 102, (P,), generator=g), torch.ones(P)
    batch.weights[::3] = 0
    batch.query_gap_s = torch.randint(-1, 10**6, (P,), generator=g)
    batch.normaliser = batch.weights.sum()
    return batch


def run(tower, tokens_TD, offsets_B1, times_s_T, cuts, *, dtype=torch.float32, through_bytes=False, all_positions=True):
    """Feed all users at once. cuts: at step i each user has had its first cuts[i] events (a list: one per user)."""
    starts, ends = offsets_B1[:-1], offsets_B1[1:]
    state = tower.init_state(len(starts), dtype=dtype)
    tokens, done = torch.zeros_like(tokens_TD), starts
    for cut in cuts:
        until = torch.minimum(starts + torch.tensor(cut), ends)
        rows = torch.cat([torch.arange(a, b) for a, b in zip(done.tolist(), until.tolist(), strict=True)])
        new_B1 = torch.cat([torch.zeros(1, dtype=torch.int64), (until - done).cumsum(0)])
        out, state = tower.step(tokens_TD[rows], new_B1, times_s_T[rows], state, all_positions)
        if through_bytes:
            state = UserState.from_bytes(state.to_bytes(), tower)
        tokens = tokens.index_copy(0, rows, out.tokens) if all_positions else tokens
        done = until
    return tokens, out, state
