"""Interest memory: a large bank of interest vectors, of which each user reads a few.

Legend: B users, T events, D width, K experts, M = num_keys^2 slots, S = memory heads * top_r slots read per expert.

    c_k     = one aggregate pass of the seed over the user's events, without the seed itself: added, it outweighs the
              user, every user reads the same slots, and half the bank stays dead (docs/lab-log.md)        (B, K, D)
    query_k = LayerNorm(c_k Wq), per memory head; product keys -> top_r slot ids, weights = softmax of their scores
    P0_k    = seed_k + sum_s weight_s · bank[slot_s]

Paper: the idea. Ours: the formulas above. The sum is weighted by score, which is how the query net and the sub-keys
get gradients. The bank is a TorchRec table whose ids are made in forward, so a planner shards it like any other.

`InterestMemory` owns an EmbeddingCollection, hence TorchRec's pipelines trace its forward: it only calls sub-modules
and the wrapped function `read_slots`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from elastic_rec.models.ops.product_key import product_key_topk
from elastic_rec.models.tiles import TileLayout
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.layer import Aggregate

if TYPE_CHECKING:
    from elastic_rec.models.towers.elastic.causal_layer import LayerSums
    from elastic_rec.models.towers.elastic.timeline import Timeline


class Seeds(nn.Module):
    """K learned experts, the same in every row: forward(num_rows) -> (num_rows, K, D)."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.seeds_KD = nn.Parameter(torch.randn(config.experts, config.width))

    def forward(self, num_rows: int) -> torch.Tensor:
        return self.seeds_KD.expand(num_rows, -1, -1)


class Selection(NamedTuple):
    """features: KeyedJaggedTensor, key "slot", B rows of K*S slot ids. weights_BKS. seeds_BKD."""

    features: KeyedJaggedTensor
    weights_BKS: torch.Tensor
    seeds_BKD: torch.Tensor


class SlotChooser(nn.Module):
    """From contexts to slots, what both towers' selection shares. In training, counts the picks (`usage`)."""

    def add_query(self, config: TowerConfig, memory: MemoryConfig) -> None:
        """Makes the query map, the sub-keys and the counts. Called last, after what else the class makes."""
        self.heads, self.top_r = memory.heads, memory.top_r
        width, half = config.width, config.width // 2
        self.query = nn.Linear(width, memory.heads * width, bias=False)
        self.norm_query = nn.LayerNorm(width)
        self.subkeys = nn.Parameter(torch.randn(memory.heads, 2, memory.num_keys, half) * half**-0.5)
        self.register_buffer("counts", torch.zeros(memory.num_slots, dtype=torch.int32), persistent=False)

    def choose(self, context_BKD: torch.Tensor, seeds_BKD: torch.Tensor, has_events_B: torch.Tensor) -> Selection:
        """The slots that rows of contexts ask for. has_events_B: rows that count as use of their slots."""
        B, K, D = context_BKD.shape
        query_QHD = self.norm_query(self.query(context_BKD).view(B * K, self.heads, D))
        slot_ids_QHr, scores_QHr = product_key_topk(query_QHD, self.subkeys, self.top_r)
        slot_ids = slot_ids_QHr.reshape(-1)
        per_user = K * self.heads * self.top_r
        if self.training:  # a row without events, such as a padding user's, is no use of a slot
            hits_B = has_events_B.to(self.counts.dtype)
            self.counts.index_add_(0, slot_ids, hits_B.repeat_interleave(per_user, output_size=B * per_user))
        features = KeyedJaggedTensor(
            keys=["slot"],
            values=slot_ids,
            lengths=torch.full((B,), per_user, dtype=torch.int64, device=slot_ids.device),
            offsets=torch.arange(B + 1, device=slot_ids.device) * per_user,
            stride=B,
        )
        return Selection(features, scores_QHr.softmax(-1).reshape(B, K, -1), seeds_BKD)


class SlotSelector(SlotChooser):
    """forward(tokens_TD, layout) -> Selection.

    A user without events asks with the query of a zero vector, the norm's bias, and gets finite gradients."""

    def __init__(self, config: TowerConfig, memory: MemoryConfig):
        super().__init__()
        self.seeds = Seeds(config)
        self.norm_seeds = nn.LayerNorm(config.width)
        self.norm_tokens = nn.LayerNorm(config.width)
        self.aggregate = Aggregate(config.width, config.heads)
        self.add_query(config, memory)

    def forward(self, tokens_TD: torch.Tensor, layout: TileLayout) -> Selection:
        seeds_BKD = self.seeds(layout.num_users)
        context_BKD = self.aggregate(self.norm_seeds(seeds_BKD), self.norm_tokens(tokens_TD), layout)
        return self.choose(context_BKD, seeds_BKD, layout.offsets_B1.diff() > 0)


class CausalSlotSelector(SlotChooser):
    """forward(layer_sums, timeline) -> Selection with a row per boundary: each chunk's slots are asked for by the first
    layer's sums over the chunks before it (causal_layer.LayerSums), so no aggregate of its own is needed."""

    def __init__(self, config: TowerConfig, memory: MemoryConfig):
        super().__init__()
        self.seeds = Seeds(config)
        self.add_query(config, memory)

    def forward(self, layer_sums: LayerSums, timeline: Timeline) -> Selection:
        has_events_R = layer_sums.sums.norm_RHK.flatten(1).sum(1) > 0
        return self.choose(layer_sums.mean_RKD, self.seeds(layer_sums.mean_RKD.shape[0]), has_events_R)


@torch.fx.wrap
def read_slots(looked_up: dict[str, JaggedTensor], weights_BKS: torch.Tensor, seeds_BKD: torch.Tensor) -> torch.Tensor:
    """The first experts (B, K, D)."""
    B, K, S = weights_BKS.shape
    slots_XSD = looked_up["slot"].values().view(B * K, S, -1)  # a sharded lookup is waited for
    dtype = torch.promote_types(slots_XSD.dtype, weights_BKS.dtype)
    with torch.autocast(slots_XSD.device.type, enabled=False):  # casting the rows costs more than adding them up
        read_X1D = torch.bmm(weights_BKS.to(dtype).view(B * K, 1, S), slots_XSD.to(dtype))
    return seeds_BKD + read_X1D.view(B, K, -1).to(seeds_BKD.dtype)


class InterestMemory(nn.Module):
    """forward(tokens_TD, layout) -> the experts that the first layer starts from (B, K, D).
    Causal: forward(layer_sums, timeline) -> (R, K, D), experts at every boundary.

    device: where the bank is made ("meta": when it is sharded); everything else is made on the CPU.
    """

    def __init__(
        self,
        config: TowerConfig,
        memory: MemoryConfig,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.select = CausalSlotSelector(config, memory) if causal else SlotSelector(config, memory)
        self.bank = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name="bank",
                    num_embeddings=memory.num_slots,
                    embedding_dim=config.width,
                    feature_names=["slot"],
                    init_fn=partial(nn.init.normal_, std=config.width**-0.5),
                )
            ],
            device=torch.device(device or "cpu"),
        )

    def forward(self, events: torch.Tensor | LayerSums, layout: TileLayout | Timeline) -> torch.Tensor:
        selection = self.select(events, layout)
        looked_up = self.bank(selection.features)
        return read_slots(looked_up, selection.weights_BKS, selection.seeds_BKD)

    def usage(self, *, reset: bool = False) -> dict[str, float]:
        """Use of the slots in training since the last reset; see `slot_usage`. For several ranks add up
        `memory.select.counts` over the ranks and call `slot_usage` yourself."""
        figures = slot_usage(self.select.counts)
        if reset:
            self.select.counts.zero_()
        return figures


def slot_usage(counts_M: torch.Tensor) -> dict[str, float]:
    """share: slots hit at least once / M. effective: exp of the entropy of the hits, M if all are hit alike (0: none).

    O(M) and one host sync: call it per epoch.
    """
    counts_M = counts_M.double()
    p_M = counts_M / counts_M.sum().clamp_min(1)
    entropy = -torch.special.xlogy(p_M, p_M).sum()
    effective = entropy.exp() * (counts_M.sum() > 0)
    return {"share": (counts_M > 0).double().mean().item(), "effective": effective.item()}
