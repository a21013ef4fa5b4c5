"""Retrieval: which item comes next, over the whole catalogue.

Legend: B users, T their events laid end to end, R prefixes (several per user in training), P events of all prefixes
laid end to end, D width, C candidates.

    features -> embeddings (sharded) -> events (T, D) -> prefixes (P, D) -> tower -> query (R, D) -> softmax -> loss

The batch (feature_store's PrefixBatch) is taken by its fields: features, times_s, starts, ends, targets, weights,
log_q, normaliser, query_gap_s, window. `RetrievalModel` owns sharded tables, so TorchRec traces its forward: it only
calls sub-modules and functions under `torch.fx.wrap`. A sharded lookup is waited for where it is first indexed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from elastic_rec.models.dropout import Dropout
from elastic_rec.models.retrieval.softmax import SOFTMAX, SoftmaxKind
from elastic_rec.models.towers.base import TowerOutput, build_tower
from elastic_rec.models.towers.config import MemoryConfig, Time, TowerConfig
from elastic_rec.models.towers.elastic.recency import NUM_AGE_BUCKETS, age_bucket
from elastic_rec.models.towers.elastic.state import UserState
from elastic_rec.models.towers.elastic.windows import WindowedTower


@dataclass(frozen=True)
class EventTable:
    """One embedded column of an event: the key in the batch's features, and the ids it can take (0..num_rows-1)."""

    name: str
    num_rows: int


class EventEncoder(nn.Module):
    """What happened in an event: the sum of its columns' embeddings, normalised -> (T, D)."""

    def __init__(self, names: list[str], width: int, dropout: float):
        super().__init__()
        self.names = names
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, embedded: dict[str, JaggedTensor]) -> torch.Tensor:
        events_TD = embedded[self.names[0]].values()
        for name in self.names[1:]:
            events_TD = events_TD + embedded[name].values()
        return self.dropout(self.norm(events_TD))


class Prefixes(NamedTuple):
    """tokens_PD, offsets_R1, times_s_P: every prefix with its own copy of its events."""

    tokens_PD: torch.Tensor
    offsets_R1: torch.Tensor
    times_s_P: torch.Tensor


@torch.fx.wrap
def gather_prefixes(
    events_TD: torch.Tensor, times_s_T: torch.Tensor, starts_R: torch.Tensor, ends_R: torch.Tensor
) -> Prefixes:
    """Cut prefixes out of the shared T axis. Waits once for the device, to learn P."""
    lengths_R = ends_R - starts_R
    offsets_R1 = torch.cat([lengths_R.new_zeros(1), lengths_R.cumsum(0)])
    num_tokens = int(offsets_R1[-1])
    shift_P = torch.repeat_interleave(starts_R - offsets_R1[:-1], lengths_R, output_size=num_tokens)
    index_P = torch.arange(num_tokens, device=shift_P.device) + shift_P
    return Prefixes(events_TD.index_select(0, index_P), offsets_R1, times_s_T.index_select(0, index_P))


class QueryTime(nn.Module):
    """What a user wants depends on when they are asked: forward(asked_RD, gap_s_R) -> asked_RD, updated (ours).

        h = norm(asked) W1;   asked + gelu(h · (1 + scale[gap]) + shift[gap]) W2      gap in powers of two, -1: unknown

    After the tower, so that a user's state holds no query's time and one state serves queries at any time.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        hidden = 2 * config.width
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, hidden)
        self.by_gap = nn.Parameter(torch.zeros(NUM_AGE_BUCKETS + 1, 2 * hidden))
        self.down = nn.Linear(hidden, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, asked_RD: torch.Tensor, gap_s_R: torch.Tensor) -> torch.Tensor:
        bucket_R = age_bucket(gap_s_R).masked_fill(gap_s_R < 0, NUM_AGE_BUCKETS)
        scale_R2D, shift_R2D = F.embedding(bucket_R, self.by_gap).chunk(2, dim=-1)
        hidden_R2D = F.gelu(self.up(self.norm(asked_RD)) * (1 + scale_R2D) + shift_R2D)
        return asked_RD + self.dropout(self.down(hidden_R2D))


class QueryHead(nn.Module):
    """User embedding -> the vector whose dot product with an item's embedding is the item's score.

    every_position: in training, the output of every event instead, (P, D); a prefix's last one is its user embedding.
    """

    def __init__(self, config: TowerConfig, every_position: bool):
        super().__init__()
        self.time = QueryTime(config) if config.time is Time.query else None
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, config.width)
        self.every_position = every_position

    def forward(self, output: TowerOutput, query_gap_s_R: torch.Tensor) -> torch.Tensor:
        asked_RD = output.tokens if self.every_position and self.training else output.user_embedding
        if self.time is not None:
            asked_RD = self.time(asked_RD, query_gap_s_R)
        return self.project(self.norm(asked_RD))


class RetrievalLoss(nn.Module):
    """forward(query_RD, embedded, batch) -> (loss, per-row cross entropy, loss without graph).

    loss = sum(weights * cross entropy) / normaliser.
    """

    def __init__(self, kind: SoftmaxKind):
        super().__init__()
        self.softmax = SOFTMAX[kind]()

    def forward(self, query_RD: torch.Tensor, embedded: dict[str, JaggedTensor], batch) -> tuple[torch.Tensor, ...]:
        ids_C = batch.features["candidate"].values()
        candidates_CD = embedded["candidate"].values()
        total, loss_R = self.softmax(query_RD, candidates_CD, ids_C, batch.targets, batch.log_q, batch.weights)
        loss = total / batch.normaliser
        return loss, loss_R, loss.detach()


class RetrievalModel(nn.Module):
    """forward(batch) -> (loss, (query_RD, loss_R, detached loss)); query(batch) -> query_RD.

    score(item) = query . item_table[item].

    tables: "item" first, then one per further column of an event (the time gap is such a column).
    every_position: train on a target after every event: targets, weights, query_gap_s are (P,), and so is loss_R. For
        causal towers only.
    windows: histories come in windows (batch.window), and forward or query must be called with all of them in order;
        the last query is the users'. Causal only.
    max_history: events of the longest prefix, needed by SASRec's positions alone.
    autocast: entered around all that comes after the lookups, e.g. partial(torch.autocast, "cpu", torch.bfloat16).
    device: where tables are made ("meta": when sharded); dense parameters are always made on the CPU.
    """

    def __init__(
        self,
        *,
        tables: list[EventTable],
        tower: TowerConfig,
        memory: MemoryConfig,
        softmax: SoftmaxKind | str = SoftmaxKind.full,
        every_position: bool = False,
        windows: bool = False,
        max_history: int = 200,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        names = [table.name for table in tables]
        if not names or names[0] != "item" or len(set(names)) < len(names) or "candidate" in names:
            raise ValueError(f"tables {names}: put 'item' first, name each table once, and none 'candidate'")
        if every_position and not tower.kind.is_causal:
            raise ValueError(
                f"data.targets=every_event with model.tower={tower.tower} trains on the answer: set "
                "model.tower=elastic_causal (or another causal tower), or data.targets=sampled"
            )
        if windows and not tower.kind.has_states:
            raise ValueError(
                "windows that carry a state (data.window) need a tower that can be continued: set "
                "model.tower=elastic_causal (or another tower with user states), or data.window=0"
            )
        # Item embeddings are also the output layer. Half of 1/sqrt(D) keeps the first logits well below 1, so the first
        # loss is that of a uniform guess, log V, and no early step is spent on unlearning noise.
        init_fn = partial(nn.init.normal_, std=0.5 * tower.width**-0.5)
        self.embeddings = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=table.name,
                    num_embeddings=table.num_rows,
                    embedding_dim=tower.width,
                    feature_names=["item", "candidate"] if table.name == "item" else [table.name],
                    init_fn=init_fn,
                )
                for table in tables
            ],
            device=torch.device(device or "cpu"),
        )
        if tower.moments:
            raise ValueError(
                f"model.moments = {tower.moments}: candidates read them, in task=ranking; set it to 0 here"
            )
        self.events = EventEncoder(names, tower.width, tower.dropout)
        self.windows, self.autocast = windows, autocast
        if windows:
            self.tower = WindowedTower(tower, memory, device=device)
        else:
            self.tower = build_tower(tower, memory, max_history=max_history, device=device)
        self.head = QueryHead(tower, every_position)
        self.loss = RetrievalLoss(SoftmaxKind(softmax))

    def forward(self, batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        embedded = self.embeddings(batch.features)
        with self.autocast():
            query_RD = self.head(self._encode(embedded, batch), batch.query_gap_s)
            loss = self.loss(query_RD, embedded, batch)
        return loss[0], (query_RD, loss[1], loss[2])

    def query(self, batch) -> torch.Tensor:
        """Query vectors (R, D), float32, one per prefix; an item's score is its dot product with the item's row."""
        return self.ask(self.encode(batch), batch.query_gap_s)

    def step(self, batch, state: UserState) -> tuple[torch.Tensor, UserState]:
        """Causal only. The batch's events are those since `state`: (query_RD after them, the next states)."""
        output, state = self.fold(batch, state)
        return self.ask(output, batch.query_gap_s), state

    def fold(self, batch, state: UserState) -> tuple[TowerOutput, UserState]:
        """Causal only. The batch's events are those since `state`: (the tower's output after them, the next states)."""
        embedded = self.embeddings(batch.features)
        with self.autocast():
            tokens = gather_prefixes(self.events(embedded), batch.times_s, batch.starts, batch.ends)
            return self.tower.step(*tokens, state, all_positions=False)

    def ask(self, output: TowerOutput, query_gap_s_R: torch.Tensor) -> torch.Tensor:
        """The query (R, D) so many seconds after the newest event; -1: unknown."""
        with self.autocast():
            return self.head(output, query_gap_s_R).float()

    def encode(self, batch) -> TowerOutput:
        """The tower's output for each prefix."""
        embedded = self.embeddings(batch.features)
        with self.autocast():
            return self._encode(embedded, batch)

    def _encode(self, embedded: dict[str, JaggedTensor], batch) -> TowerOutput:
        events_TD = self.events(embedded)
        prefixes = gather_prefixes(events_TD, batch.times_s, batch.starts, batch.ends)
        # Else the tower may leave out all but the newest events.
        all_positions = self.head.every_position and self.training
        which = (batch.window,) if self.windows else ()
        return self.tower(prefixes.tokens_PD, prefixes.offsets_R1, prefixes.times_s_P, all_positions, *which)
