"""TorchRec's types, imported after the check that it belongs to this torch. No other module of the room imports
TorchRec: what only moves events (an ingest, Spark's executors) needs neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self

import numpy as np
import torch

from elastic_rec.configs.stack import check_stack

check_stack()

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402
from torchrec.streamable import Pipelineable  # noqa: E402

__all__ = ["KeyedJaggedTensor", "TensorBatch", "keyed_jagged"]


class TensorBatch(Pipelineable):
    """Base of dataclasses that move to a device as one: their tensors and KeyedJaggedTensors do, what else they hold
    stays as it is."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The batch on a device."""
        return self._each(lambda part: part.to(device=device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory of all parts until what `stream` has to do now is done."""
        for part in self._parts().values():
            part.record_stream(stream)

    def pin_memory(self) -> Self:
        """The batch in pinned memory, from which copies to a GPU run beside other work."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, function: Callable[[Any], Any]) -> Self:
        return replace(self, **{name: function(part) for name, part in self._parts().items()})

    def _parts(self) -> dict[str, Any]:
        values = {about.name: getattr(self, about.name) for about in fields(self)}
        return {name: part for name, part in values.items() if isinstance(part, (torch.Tensor, KeyedJaggedTensor))}


def keyed_jagged(features: list[tuple[str, np.ndarray, np.ndarray]]) -> KeyedJaggedTensor:
    """(key, lengths (B,), values (sum of lengths,)) of each feature, all of the same stride B; at least one feature.

    [("item", [2, 1], [7, 8, 9]), ("gap", [2, 1], [0, 3, 0])]: lengths 2 1 2 1, values 7 8 9 0 3 0. One feature is not
    copied.
    """
    keys, lengths, values = zip(*features, strict=True)
    joined = np.concatenate(values) if len(keys) > 1 else np.require(values[0], requirements="W")
    return KeyedJaggedTensor(
        keys=list(keys), values=torch.from_numpy(joined), lengths=torch.from_numpy(np.concatenate(lengths))
    )
