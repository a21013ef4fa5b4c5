"""What both tasks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World


def check_tables(task: Any, digests: dict[str, str]) -> None:
    """Refuse a store whose ids are not those of the run's tables, or those and newer ones.

    digests: of the vocabularies a run was trained with; runs from before there were digests have none.
    """
    for name, rows in task.rows.items():
        vocabulary = task.vocabulary(name)
        have = vocabulary.size
        same = have >= rows and vocabulary.digest(rows) == digests[name] if name in digests else have == rows
        if not same:
            raise ConfigError(
                f"store {task.store.path} has {have} ids in column {name!r}, the run's table {rows} rows: "
                "the ids would not mean the same items; use the store of the run, or train on this one"
            )
        if have > rows:
            task.world.say(
                f"column {name!r} has {have - rows} ids that are newer than the run: they count as unknown, and "
                "are not recommended"
            )


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """run.precision as what the model enters."""
    if precision == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if has_it else "float32"
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext


def length_names(edges: list[int]) -> list[str]:
    """[20, 50] -> 0-19, 20-49, 50+."""
    return [*(f"{low}-{high - 1}" for low, high in zip([0, *edges], edges, strict=False)), f"{[0, *edges][-1]}+"]


Item = TypeVar("Item")


def lockstep(items: Iterator[Item], world: World) -> Iterator[Item | None]:
    """This rank's items, then None until every rank has run out."""
    for number in count():
        world.pulse.beat(f"batch {number} of a part")
        item = next(items, None)
        someone = torch.tensor(int(item is not None), device=world.device)
        dist.all_reduce(someone, op=dist.ReduceOp.MAX)
        if not someone:
            return
        yield item
