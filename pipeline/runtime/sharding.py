"""From a plain model to a sharded one: init, planner, DistributedModelParallel, and the plan as a table.

Item and bank tables are sharded row-wise (each rank owns a contiguous range of rows); small context tables sit
whole on one rank. Only FBGEMM's fused kernel is used: on CPU the dense one is broken (docs/explanation/training.md).
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from elastic_rec.pipeline.config.parallel import ParallelConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World

GIB = 1 << 30


def init_device(table_rows: int, width: int, config: ParallelConfig) -> torch.device:
    """Where to create the tables before sharding: on the host (same values for any world size) or on meta."""
    return torch.device("cpu" if table_rows * width * 4 <= config.host_init_gib * GIB else "meta")


def shard(model: nn.Module, *, world: World, config: ParallelConfig, seed: int) -> DistributedModelParallel:
    """Shard every collection of tables in `model` by a planner-made plan and wrap the dense rest in DDP.

    Table optimizers must have been attached before (optimizers.attach_table_optimizers).
    Raises ConfigError for a row-wise table with fewer rows than ranks or when the tables do not fit.
    """
    sharders: list[ModuleSharder] = [
        kind(fused_params={"bounds_check_mode": BoundsCheckMode.FATAL})
        for kind in (EmbeddingCollectionSharder, EmbeddingBagCollectionSharder)
    ]
    plan = make_plan(model, sharders, world=world, config=config)
    # Tables made on meta are filled shard by shard: with one seed for all ranks, all shards would be equal.
    torch.manual_seed(seed + 1 + world.rank)
    bags = {name: module for name, module in model.named_modules() if isinstance(module, EmbeddingBagCollection)}
    on_host = {name: bag.state_dict() for name, bag in bags.items() if bag.device.type != "meta"}
    sharded = DistributedModelParallel(model, device=world.device, plan=plan, sharders=sharders)
    for name, weights in on_host.items():  # TorchRec keeps an EmbeddingCollection's values, but on a CPU not these
        sharded.module.get_submodule(name).load_state_dict(weights)
    return sharded


def make_plan(model: nn.Module, sharders: list[ModuleSharder], *, world: World, config: ParallelConfig) -> ShardingPlan:
    """Row-wise for config.row_wise_tables, whole for the others. Raises ConfigError as `shard` does. Collective."""
    constraints = {}
    for table in tables(model):
        row_wise = table.name in config.row_wise_tables
        if row_wise and table.num_embeddings < world.size:
            raise ConfigError(
                f"table {table.name!r} has {table.num_embeddings} rows, fewer than the {world.size} ranks: "
                f"start at most {table.num_embeddings} ranks, or take it out of parallel.row_wise_tables"
            )
        if row_wise and world.device.type == "cpu" and isinstance(table, EmbeddingBagConfig):
            raise ConfigError(
                f"parallel.row_wise_tables names {table.name!r}, a column of impressions or items: on a CPU TorchRec "
                "can only place such a table whole, take it out"
            )
        constraints[table.name] = ParameterConstraints(
            sharding_types=["row_wise"] if row_wise else ["table_wise"], compute_kernels=["fused"]
        )
    cap = int(config.device_memory_gib * GIB)
    on_cuda = world.device.type == "cuda"
    topology = Topology(
        world_size=world.size,
        compute_device=world.device.type,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
        **({"hbm_cap": cap} if on_cuda else {"ddr_cap": cap}),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.1),
    )
    try:
        return planner.collective_plan(model, sharders, dist.group.WORLD)
    except PlannerError as error:
        rows = ", ".join(f"{table.name} {table.num_embeddings} x {table.embedding_dim}" for table in tables(model))
        raise ConfigError(
            f"the tables ({rows}) do not fit into parallel.device_memory_gib={config.device_memory_gib:g} of each of "
            f"{world.size} ranks: raise it, start more ranks, or lower memory.num_keys and model.width"
        ) from error


def tables(model: nn.Module) -> list:
    """The config of every table of an unsharded model."""
    found = []
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            found += module.embedding_configs()
        elif isinstance(module, EmbeddingBagCollection):
            found += module.embedding_bag_configs()
    return found


def plan_table(plan: ShardingPlan) -> str:
    """The plan as aligned text: one line per table and rank."""
    lines = [f"{'table':<28}{'sharding':<12}{'kernel':<8}{'rank':<6}rows"]
    for path, parameters in plan.plan.items():
        for name, how in parameters.items():
            for part in how.sharding_spec.shards:
                first, num_rows = part.shard_offsets[0], part.shard_sizes[0]
                rank = part.placement.rank()
                lines.append(
                    f"{path + '.' + name:<28}{how.sharding_type:<12}{how.compute_kernel:<8}{rank:<6}"
                    f"[{first}, {first + num_rows})"
                )
    return "\n".join(lines)


def local_rows(model: nn.Module, table: str) -> tuple[int, torch.Tensor]:
    """This rank's part of a row-wise (or unsharded) table: (first row, (rows, width) weights, not a copy)."""
    ending = f"embeddings.{table}.weight"
    (value,) = (value for name, value in model.state_dict().items() if name.endswith(ending))
    if hasattr(value, "local_shards"):  # ShardedTensor
        shards = value.local_shards()
        if not shards:
            return 0, torch.empty(0, value.size()[1])
        return shards[0].metadata.shard_offsets[0], shards[0].tensor
    return 0, value
