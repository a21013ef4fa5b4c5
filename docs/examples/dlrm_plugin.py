"""ELASTIC inside TorchRec's own DLRM: a dozen lines more (marked +), and a user's history counts.

    torchrun --nproc-per-node 2 docs/examples/dlrm_plugin.py

Nothing of elastic_rec is used but its models. The rest is a plain TorchRec script: tables declared, sharded by the
planner, updated in backward; it trains twice, without the tower and with it, on the same planted clicks.

Planted: each user likes one of 8 groups of 10 items, and only the history tells which. A click is likely on a
candidate of that group; a dense feature, the candidate's quality, adds something for both models.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from elastic_rec.models import ElasticTower, MemoryConfig, TowerConfig  # +

NUM_GROUPS, PER_GROUP, NUM_COUNTRIES, NUM_DENSE, WIDTH = 8, 10, 30, 4, 16
NUM_ITEMS = NUM_GROUPS * PER_GROUP


class HistoryDLRM(torch.nn.Module):
    """DLRM that also sees how the candidate meets the embedding of the user's history, beside its dense features."""

    def __init__(self, *, with_tower: bool):
        super().__init__()
        bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(NUM_ITEMS, WIDTH, name="candidate", feature_names=["candidate"]),
                EmbeddingBagConfig(NUM_COUNTRIES, WIDTH, name="country", feature_names=["country"]),
            ]
        )
        self.tower = None
        if with_tower:
            table = EmbeddingConfig(NUM_ITEMS, WIDTH, name="item", feature_names=["history", "shown"])  # +
            self.items = EmbeddingCollection(tables=[table])  # +
            self.norm = torch.nn.LayerNorm(WIDTH)  # + the tower wants events of unit scale
            self.tower = ElasticTower(TowerConfig(width=WIDTH, experts=4), MemoryConfig(num_keys=16))  # +
        num_dense = NUM_DENSE + with_tower * WIDTH  # +
        self.dlrm = DLRM(bags, num_dense, dense_arch_layer_sizes=[32, WIDTH], over_arch_layer_sizes=[32, 1])

    def forward(self, dense, sparse, history, times_s):
        if self.tower is not None:
            items = self.items(history)  # + the history's items, and the candidate from the same table
            events, shown = items["history"], self.norm(items["shown"].values())  # +
            user = self.tower(self.norm(events.values()), events.offsets(), times_s).user_embedding  # +
            dense = torch.cat([dense, user * shown], dim=1)  # +
        return self.dlrm(dense, sparse).squeeze(1)


def draw(num_users: int, seed: int):
    """One impression per user: ((dense, sparse, history, times_s), clicks, probability of a click)."""
    g = torch.Generator().manual_seed(seed)
    liked = torch.randint(NUM_GROUPS, (num_users,), generator=g)
    lengths = torch.randint(20, 61, (num_users,), generator=g)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    events = int(offsets[-1])
    by_taste = torch.rand(events, generator=g) < 0.4
    taste = liked.repeat_interleave(lengths) * PER_GROUP + torch.randint(PER_GROUP, (events,), generator=g)
    items = torch.where(by_taste, taste, torch.randint(NUM_ITEMS, (events,), generator=g))
    times_s = torch.randint(1, 3600, (events,), generator=g).cumsum(0)

    fits = torch.rand(num_users, generator=g) < 0.5
    group = torch.where(fits, liked, torch.randint(NUM_GROUPS, (num_users,), generator=g))
    candidate = group * PER_GROUP + torch.randint(PER_GROUP, (num_users,), generator=g)
    country = torch.randint(NUM_COUNTRIES, (num_users,), generator=g)
    dense = torch.randn(num_users, NUM_DENSE, generator=g)
    chance = torch.sigmoid(torch.where(group == liked, 1.5, -1.5) + 0.5 * dense[:, 0])
    clicks = (torch.rand(num_users, generator=g) < chance).float()
    ones = torch.ones(2 * num_users, dtype=torch.int64)
    sparse = KeyedJaggedTensor(["candidate", "country"], torch.cat([candidate, country]), lengths=ones)
    history = KeyedJaggedTensor(
        ["history", "shown"], torch.cat([items, candidate]), lengths=torch.cat([lengths, ones[:num_users]])
    )
    return (dense, sparse, history, times_s), clicks, chance


def train(model: torch.nn.Module, *, steps: int, batch_size: int) -> DistributedModelParallel:
    for name, parameter in model.named_parameters():
        if any(name.endswith(f"{table}.weight") for table in ("candidate", "country", "item", "bank")):
            apply_optimizer_in_backward(RowWiseAdagrad, [parameter], {"lr": 0.2})
    rank, world = dist.get_rank(), dist.get_world_size()
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=world, compute_device="cpu"))
    plan = planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan)
    if rank == 0:
        print(model.plan, flush=True)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = CombinedOptimizer(
        [model.fused_optimizer, KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adam(parameters, lr=1e-2))]
    )
    for step in range(steps):
        inputs, clicks, _ = draw(batch_size, seed=1000 + step * world + rank)
        loss = binary_cross_entropy_with_logits(model(*inputs), clicks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def test_auc(model: DistributedModelParallel) -> tuple[float, float]:
    """(AUC of the model, of the true probabilities) on users that training has not seen; the same on every rank."""
    inputs, clicks, chance = draw(4000, seed=1)
    return auc(model.eval()(*inputs), clicks), auc(chance, clicks)


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of (click, no click) pairs in the right order; scores are taken to be distinct."""
    rank = scores.argsort().argsort().double() + 1
    positives = labels.sum().double()
    wins = rank[labels > 0].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * (len(labels) - positives)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128, help="users per step and rank")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for with_tower in (False, True):
        torch.manual_seed(0)
        model = train(HistoryDLRM(with_tower=with_tower), steps=arguments.steps, batch_size=arguments.batch_size)
        found, best = test_auc(model)
        if dist.get_rank() == 0:
            name = "with the tower" if with_tower else "without the tower"
            print(f"AUC {name}: {found:.4f} (the planted probabilities: {best:.4f})", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
