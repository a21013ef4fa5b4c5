"""The files of one checkpoint: torch.distributed.checkpoint's, with a plan in JSON in the place of its pickle.

    __0_0.distcp, __1_0.distcp    tensors, a file per rank; read with torch.load(weights_only=True)
    tensors.json                  which tensor is where: what load reads
    .metadata                     the same as a pickle, for PyTorch's own tools; nothing here reads it

A pickle runs whatever code its author put into it. tensors.json can only name tensors, and only inside the
checkpoint's own files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from elastic_rec.feature_store.utils.atomic_write import to_json, write_text
from elastic_rec.pipeline.runtime.errors import CheckpointError

PLAN = "tensors.json"


class PlanWriter(FileSystemWriter):
    """Also writes tensors.json, on the coordinating rank. Files are synced, their folder is not."""

    def finish(self, metadata: Metadata, results: list) -> None:
        """Called by PyTorch on the coordinating rank, after all tensors are written."""
        super().finish(metadata, results)
        write_text(Path(self.path) / PLAN, to_json(plan_of(metadata)))


class PlanReader(FileSystemReader):
    """Reads tensors.json, never the pickle. files: the names that tensors may be in.

    Raises CheckpointError where the plan is no plan, or points elsewhere.
    """

    def __init__(self, folder: Path, *, files: Iterable[str]) -> None:
        super().__init__(folder)
        self._files = {name for name in files if name == Path(name).name}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Called by PyTorch before a load. Raises CheckpointError."""
        path = Path(self.path) / PLAN
        try:
            metadata = metadata_of(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no plan of a checkpoint: {error!r}") from error
        strange = {info.relative_path for info in metadata.storage_data.values()} - self._files
        if strange:
            raise CheckpointError(f"{path} names {sorted(strange)[0]!r}, which is not of this checkpoint")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class TensorsOnly(DefaultLoadPlanner):
    """Refuses entries that are no tensors: PyTorch unpickles those."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Called by PyTorch for what is no tensor. Raises CheckpointError."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor: refused, it would have to be unpickled")


def plan_of(metadata: Metadata) -> dict[str, Any]:
    """{name: {dtype, size, chunks: [[offsets, sizes, file, first byte, bytes]]}}"""
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"{name} is no tensor: a checkpoint holds tensors only, put the rest into its marker")
        chunks = []
        for chunk in entry.chunks:
            where = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            place = [where.relative_path, where.offset, where.length]
            chunks.append([list(chunk.offsets), list(chunk.sizes), *place])
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
    return tensors


def metadata_of(plan: dict[str, Any]) -> Metadata:
    """The metadata that a plan stands for. Raises TypeError, KeyError or ValueError where it is no plan."""
    tensors, places = {}, {}
    for name, entry in plan.items():
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} has no dtype but {entry['dtype']}")
        chunks = []
        for offsets, sizes, file, start, length in entry["chunks"]:
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            places[MetadataIndex(name, torch.Size(offsets))] = _StorageInfo(str(file), int(start), int(length))
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["size"]), chunks)
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())
