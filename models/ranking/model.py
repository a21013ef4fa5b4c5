"""Ranking: candidates shown to a user at a moment, scored for each label (click, like, ...).

Legend: B impression groups, T their events end to end, I impressions, C candidates of all impressions, L labels,
D width,
F vectors that the history reader gives per candidate, X numbers in a candidate's row, S heads.

    features -> EmbeddingCollection (sharded) -> events (T, D), candidates (C, D)
    events, candidates -> history reader (histories.py) -> (C, F, D)
    bags of impression and item attributes -> EmbeddingBagCollection (sharded) -> (C, n, D)
        all of them, and candidate * what was read -> (C, X) -> DCN-v2 cross ; MLP -> a logit per label -> loss

A reader may have several views of what it read, for a head each: S heads, each trained by itself, their logits
averaged. The tower has two, all it read and the moments alone: in one head the rest drowns them (docs/lab-log.md).

The batch (feature_store's ImpressionBatch, with one empty bag after item_context) is taken by its fields. A user's
events are embedded and encoded once, however many impressions and candidates they have in the batch. `RankingModel`
owns sharded tables, so TorchRec traces its forward: sub-modules and functions under `torch.fx.wrap` only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import JaggedTensor

from elastic_rec.models.dropout import Dropout
from elastic_rec.models.ranking.config import RankingConfig, Sharing
from elastic_rec.models.ranking.histories import QueryGap, build_history
from elastic_rec.models.retrieval.model import EventEncoder, EventTable
from elastic_rec.models.towers.base import TowerOutput
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.state import UserState


class EventInteraction(EventEncoder):
    """What happened in an event, and how it went: item + rest + sqrt(D) · item * rest, normalised -> (T, D), where rest
    is the sum of the other columns (rating, action, gap). With the sum alone a liked and a disliked item differ by the
    same vector whatever the item, and no mean over events can tell one taste from its opposite (ours)."""

    def forward(self, embedded: dict[str, JaggedTensor]) -> torch.Tensor:
        item_TD = embedded[self.names[0]].values()
        if len(self.names) == 1:
            return self.dropout(self.norm(item_TD))
        rest_TD = sum(embedded[name].values() for name in self.names[1:])
        return self.dropout(self.norm(item_TD + rest_TD + item_TD.shape[1] ** 0.5 * item_TD * rest_TD))


class Candidates(nn.Module):
    """The C axis of a looked-up batch, normalised like an event."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, embedded) -> torch.Tensor:
        return self.norm(embedded["candidate"].values())


class CandidateFeatures(nn.Module):
    """All that is known of a candidate, one row each: forward -> (C, X).

    context, item_context: names of columns. Looked-up bags are taken by name: a sharded EmbeddingBagCollection returns
    its keys in the order of the ranks that hold their tables, so a column's position depends on the number of ranks.
    """

    def __init__(self, context: list[str], item_context: list[str]):
        super().__init__()
        self.context, self.item_context = context, item_context

    def forward(self, candidates_CD, history_CFD, gap_C1D, context, item_context, batch) -> torch.Tensor:
        C = candidates_CD.shape[0]
        parts = [candidates_CD[:, None], history_CFD, candidates_CD[:, None] * history_CFD, gap_C1D]
        parts += [context[name].index_select(0, batch.impression)[:, None] for name in self.context]
        parts += [item_context[name][:C, None] for name in self.item_context]
        return torch.cat(parts, dim=1).flatten(1)


class MultiTaskHead(nn.Module):
    """(C, X) -> logits (C, L): DCN-v2 (Wang et al. 2021, arXiv 2008.13535), parallel, beside what the labels share:
    one MLP, or MMoE (Ma et al. 2018), a gate per label over several."""

    def __init__(self, config: RankingConfig, in_width: int, num_labels: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_width)
        self.cross = LowRankCrossNet(in_width, config.cross_layers, config.cross_rank)
        num_mlps = config.mmoe_experts if config.sharing is Sharing.mmoe else 1
        self.mlps = nn.ModuleList(MLP(in_width, list(config.hidden), activation="relu") for _ in range(num_mlps))
        self.gates = nn.Linear(in_width, num_labels * num_mlps) if num_mlps > 1 else None
        self.dropout = Dropout(config.dropout)
        self.out = nn.Parameter(torch.zeros(num_labels, in_width + config.hidden[-1]))
        self.bias = nn.Parameter(torch.zeros(num_labels))
        self.num_labels = num_labels
        nn.init.normal_(self.out, std=0.5 * self.out.shape[1] ** -0.5)

    def forward(self, x_CX: torch.Tensor) -> torch.Tensor:
        x_CX = self.norm(x_CX)
        mlp_CEh = torch.stack([mlp(x_CX) for mlp in self.mlps], dim=1)
        if self.gates is None:
            shared_CLh = mlp_CEh.expand(-1, self.num_labels, -1)
        else:
            shared_CLh = self.gates(x_CX).unflatten(1, (self.num_labels, -1)).softmax(-1) @ mlp_CEh
        cross_CLX = self.cross(x_CX)[:, None].expand(-1, self.num_labels, -1)
        return (self.dropout(torch.cat([cross_CLX, shared_CLh], -1)) * self.out).sum(-1) + self.bias


class Heads(nn.Module):
    """forward(what CandidateFeatures takes) -> logits (S, C, L): a head for each view of what the reader read.

    features: what each head's row is made of, beside its view the same for all."""

    def __init__(
        self, config: RankingConfig, views: list[slice], features: CandidateFeatures, width: int, num_labels: int
    ):
        super().__init__()
        self.views, self.features = views, features
        num_others = 1 + 1 + len(features.context) + len(features.item_context)  # the candidate, the gap
        sizes = [num_others + 2 * (view.stop - view.start) for view in views]
        self.heads = nn.ModuleList(MultiTaskHead(config, size * width, num_labels) for size in sizes)

    def forward(self, candidates_CD, history_CFD, *rest) -> torch.Tensor:
        x_SCX = [self.features(candidates_CD, history_CFD[:, view], *rest) for view in self.views]
        return torch.stack([head(x_CX) for head, x_CX in zip(self.heads, x_SCX, strict=True)])


class RankingLoss(nn.Module):
    """forward(logits_SCL, batch) -> (loss, loss per label without graph (L,), loss without graph).

    sum over labels of label_weight · (sum of weight · cross entropy + pairwise · pairs) / normaliser. pairs: for each
    impression the mean of log(1 + e^(negative - positive)), counted as often as it has labelled candidates. The mean
    over heads.
    """

    def __init__(self, config: RankingConfig, num_labels: int):
        super().__init__()
        weights = config.label_weights or [1.0] * num_labels
        if len(weights) != num_labels:
            raise ValueError(
                f"ranking.label_weights has {len(weights)} numbers, the impressions {num_labels} labels: one for each"
            )
        self.register_buffer("weights_L", torch.tensor(weights), persistent=False)
        self.pairwise = config.pairwise

    def forward(self, logits_SCL: torch.Tensor, batch) -> tuple[torch.Tensor, ...]:
        logits_SCL = logits_SCL.float()
        labels_SCL = batch.labels.expand_as(logits_SCL)
        entropy_SCL = F.binary_cross_entropy_with_logits(logits_SCL, labels_SCL, reduction="none")
        sum_L = (batch.label_weights * entropy_SCL.mean(0)).sum(0)
        if self.pairwise:
            pairs_SL = torch.stack([pair_loss(logits_CL, batch) for logits_CL in logits_SCL])
            sum_L = sum_L + self.pairwise * pairs_SL.mean(0)
        loss_L = sum_L / batch.normaliser
        loss = (self.weights_L * loss_L).sum()
        return loss, loss_L.detach(), loss.detach()


def pair_loss(logits_CL: torch.Tensor, batch) -> torch.Tensor:
    """(L,). Work is the sum over impressions of candidates squared."""
    impression_C, num = batch.impression, batch.group.numel()
    length_I = torch.bincount(impression_C, minlength=num)
    start_I = length_I.cumsum(0) - length_I
    first_P = torch.repeat_interleave(length_I[impression_C])
    within_P = torch.arange(first_P.numel(), device=first_P.device)
    offset_C = length_I[impression_C].cumsum(0) - length_I[impression_C]
    second_P = start_I[impression_C[first_P]] + within_P - offset_C[first_P]
    is_labelled_CL = batch.label_weights > 0
    positive_CL, negative_CL = is_labelled_CL & (batch.labels > 0.5), is_labelled_CL & (batch.labels <= 0.5)
    counted_PL = (positive_CL[first_P] & negative_CL[second_P]).to(logits_CL.dtype)
    loss_PL = counted_PL * F.softplus(logits_CL[second_P] - logits_CL[first_P])
    zeros_IL = logits_CL.new_zeros(num, logits_CL.shape[1])
    impression_P = impression_C[first_P]
    pairs_IL = zeros_IL.index_add(0, impression_P, counted_PL)
    loss_IL = zeros_IL.index_add(0, impression_P, loss_PL)
    labelled_IL = zeros_IL.index_add(0, impression_C, is_labelled_CL.to(logits_CL.dtype))
    return (labelled_IL * loss_IL / pairs_IL.clamp_min(1)).sum(0)


class RankingModel(nn.Module):
    """forward(batch) -> (loss, (logits_CL, loss_L, detached loss)); score(batch) -> logits (C, L), float32.

    tables: "item" first, then one per further column of an event. context, item_context: attributes of impressions and
    items, a bag of ids each, summed. device: where tables are made ("meta": when sharded).
    max_history: events of the longest prefix, needed by SASRec's positions alone.
    """

    def __init__(
        self,
        *,
        tables: list[EventTable],
        context: list[EventTable],
        item_context: list[EventTable],
        num_labels: int,
        tower: TowerConfig,
        memory: MemoryConfig,
        ranking: RankingConfig,
        max_history: int = 200,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        names, width = [table.name for table in tables], tower.width
        if not names or names[0] != "item" or len(set(names)) < len(names) or "candidate" in names:
            raise ValueError(f"tables {names}: put 'item' first, name each table once, and none 'candidate'")
        init_fn = partial(nn.init.normal_, std=0.5 * width**-0.5)
        self.embeddings = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=table.name,
                    num_embeddings=table.num_rows,
                    embedding_dim=width,
                    feature_names=["item", "candidate"] if table.name == "item" else [table.name],
                    init_fn=init_fn,
                )
                for table in tables
            ],
            device=torch.device(device or "cpu"),
        )
        self.context = _bags(context, width, init_fn, device)
        self.item_context = _bags(item_context, width, init_fn, device)
        self.events = EventInteraction(names, width, tower.dropout)
        self.candidates = Candidates(width)
        self.history, views = build_history(ranking, tower, memory, max_history=max_history, device=device)
        self.gap = QueryGap(width)
        features = CandidateFeatures([table.name for table in context], [table.name for table in item_context])
        self.heads = Heads(ranking, views, features, width, num_labels)
        self.loss = RankingLoss(ranking, num_labels)
        self.autocast = autocast

    @property
    def tower(self) -> nn.Module | None:
        """The sequence tower; None for other models."""
        return getattr(self.history, "tower", None)

    def forward(self, batch) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        logits_SCL = self.logits(batch)
        loss = self.loss(logits_SCL, batch)
        return loss[0], (logits_SCL.mean(0), loss[1], loss[2])

    def score(self, batch, output: TowerOutput | None = None) -> torch.Tensor:
        """Logits (C, L), float32: the mean over heads. output: as `logits` takes it."""
        return self.logits(batch, output).float().mean(0)

    def fold(self, batch, state: UserState) -> tuple[TowerOutput, UserState]:
        """With a causal tower only. The batch's events are those since `state`, a user per row: (the tower's output
        after them, for `score`; the next states)."""
        embedded = self.embeddings(batch.features)
        with self.autocast():
            offsets_B1 = batch.features["item"].offsets()
            return self.tower.step(self.events(embedded), offsets_B1 - offsets_B1[0], batch.times_s, state, False)

    def logits(self, batch, output: TowerOutput | None = None) -> torch.Tensor:
        """(S, C, L). output: of the impressions' users as `fold` gave it, in the place of the batch's events."""
        embedded = self.embeddings(batch.features)
        context = None if self.context is None else self.context(batch.context)
        item_context = None if self.item_context is None else self.item_context(batch.item_context)
        with self.autocast():
            candidates_CD = self.candidates(embedded)
            if output is None:
                history_CFD = self.history(self.events(embedded), candidates_CD, batch)
            else:
                history_CFD = self.history.read(output, candidates_CD, batch.impression)
            gap_C1D = self.gap(batch)
            return self.heads(candidates_CD, history_CFD, gap_C1D, context, item_context, batch)


def _bags(tables: list[EventTable], width: int, init_fn, device) -> EmbeddingBagCollection | None:
    if not tables:
        return None
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_rows,
                embedding_dim=width,
                feature_names=[table.name],
                pooling=PoolingType.SUM,
                init_fn=init_fn,
            )
            for table in tables
        ],
        device=torch.device(device or "cpu"),
    )
