"""Refusals of NaN and infinite numbers: they compare with nothing, so that a rank by one is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from elastic_rec.pipeline.runtime.errors import NonFiniteError
from elastic_rec.pipeline.runtime.world import World

MOST_NAMED = 3


def require_finite(value: torch.Tensor, what: str, *, row_name: Callable[[int], str] = "row {}".format) -> None:
    """Raises NonFiniteError naming `what`, the first bad row (axis 0) and the number there. Not collective.

    One reduction without a copy. The host waits for it.
    """
    if not is_finite(value):
        row, number = _first_bad(value)
        raise NonFiniteError(f"{what} is {number} in {row_name(row)}")


def require_finite_state(state: dict[str, Any], world: World) -> None:
    """`state`: nested dicts of tensors and sharded tensors, as state_dict() gives them. Each rank reads its own shards.

    Raises NonFiniteError on every rank when a number is bad on any. Collective.
    """
    bad = [(name, first_row, value) for name, first_row, value in _tensors(state) if not is_finite(value)]
    some = sum(world.of_all(len(bad)))
    if not some:
        return
    mine = [f"{name} is {number} in row {first_row + row}" for name, first_row, value in bad[:MOST_NAMED]
            for row, number in [_first_bad(value)]]  # fmt: skip
    named = sorted({text for texts in world.of_all(mine) for text in texts})
    more = f", and {some - MOST_NAMED} more" if some > MOST_NAMED else ""
    raise NonFiniteError("; ".join(named[:MOST_NAMED]) + more)


def is_finite(value: torch.Tensor) -> bool:
    """Whether all numbers are finite."""
    if not value.numel() or not value.is_floating_point():
        return True
    return bool(torch.stack(torch.aminmax(value.detach())).isfinite().all())  # a NaN goes into both


def _first_bad(value: torch.Tensor) -> tuple[int, float]:
    """(row, number) of the first bad number; one row at most is copied."""
    rows = value.detach().reshape(len(value), -1) if value.dim() else value.detach().reshape(1, 1)
    low, high = rows.aminmax(dim=1)
    row = int((~(low.isfinite() & high.isfinite())).int().argmax())
    return row, float(rows[row][~rows[row].isfinite()][0])


def _tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, int, torch.Tensor]]:
    """(name, number of its first row, this rank's part) of each tensor in a nested state."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, ".".join(part for part in (prefix, str(key)) if part))
    elif hasattr(state, "local_shards"):
        for shard in state.local_shards():
            yield prefix, shard.metadata.shard_offsets[0], shard.tensor
    elif isinstance(state, torch.Tensor):
        yield prefix, 0, state
