"""Lists in Arrow columns, flat and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastic_rec.feature_store.utils.jagged import offsets_of


def is_list(type: pa.DataType) -> bool:
    """Is it a type of lists, of whatever kind?"""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(of_type(type) for of_type in lists)


def flat_list(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """A list column -> (lengths, flat values); a null list is an empty one."""
    lists = column.combine_chunks()
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False), pc.list_flatten(lists)


def flat_bags(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """A column of lists or of single values -> (lengths, flat values)."""
    return flat_list(column) if is_list(column.type) else (np.ones(len(column), np.int64), column.combine_chunks())


def list_array(lengths: np.ndarray, values: pa.Array, type: pa.ListType) -> pa.ListArray:
    """(N,) lengths and the flat values of all lists -> an array of N lists."""
    return pa.ListArray.from_arrays(pa.array(offsets_of(lengths), pa.int32()), values, type=type)
