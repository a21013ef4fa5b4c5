"""The stored form of impressions, and where their row groups end.

user_id | timestamp | candidates: list<struct<item, label ...>> | context: list<int64> ...
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa

from elastic_rec.feature_store.ingestion.writer import BUCKET
from elastic_rec.feature_store.table.schema import ARROW_TYPES, USER
from elastic_rec.feature_store.utils.arrow import flat_list
from elastic_rec.feature_store.utils.jagged import offsets_of, run_starts


def impression_schema(user_type: str, labels: list[str], context: list[str]) -> pa.Schema:
    """Arrow schema of the data files. user_type: "int64" or "string"; a label may be null, nothing else."""
    leaves = [pa.field("item", pa.int64(), nullable=False), *(pa.field(name, pa.float32()) for name in labels)]
    candidates = pa.list_(pa.field("element", pa.struct(leaves), nullable=False))
    bag = pa.list_(pa.field("element", pa.int64(), nullable=False))
    return pa.schema(
        [
            pa.field(USER, ARROW_TYPES[user_type], nullable=False),
            pa.field("timestamp", pa.int64(), nullable=False),
            pa.field("candidates", candidates, nullable=False),
            *(pa.field(name, bag, nullable=False) for name in context),
        ]
    )


class IdSequence:
    """Arrow ids as bisect wants them: it looks at a few, and nobody makes a Python list of all."""

    def __init__(self, ids: pa.Array) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> int | str:
        return self.ids[index].as_py()


def group_edges(users: pa.Array, firsts: list) -> list[int]:
    """Ascending user ids, and first ids of history row groups -> edges[g] : edges[g+1] are the rows of group g. Users
    without a history lie between those who have one; the first group takes all before it."""
    sequence = IdSequence(users)
    return [0, *(bisect_left(sequence, first) for first in firsts[1:]), len(users)]


def cut_impressions(
    batches: Iterable[pa.RecordBatch], firsts: dict[int, list], *, cap: int
) -> Iterator[tuple[int, pa.Table]]:
    """(bucket, rows of one row group): cut where bucket or history row group change, and at `cap` candidates. Where the
    groups end depends on the data only, not on how the stream was cut into batches."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        table = pa.Table.from_batches([*pending, batch]).combine_chunks()
        done = yield from _cut(table, firsts, cap, is_last=False)
        pending = table.slice(done).to_batches()
    if pending:
        yield from _cut(pa.Table.from_batches(pending).combine_chunks(), firsts, cap, is_last=True)


def _cut(table: pa.Table, firsts: dict[int, list], cap: int, *, is_last: bool):
    """Yields every row group that is sure to be complete; returns the number of rows used up."""
    buckets, users = table[BUCKET].chunk(0), table[USER].chunk(0)
    bucket_edges = [*run_starts(buckets).tolist(), len(table)]
    edges = {len(table)}
    for begin, end in pairwise(bucket_edges):
        known = firsts.get(buckets[begin].as_py(), [None])
        edges |= {begin + edge for edge in group_edges(users.slice(begin, end - begin), known)}
    segments = np.array(sorted(edges))
    candidates = offsets_of(flat_list(table["candidates"])[0])
    begin = 0
    while begin < len(table):
        segment_end = int(segments[np.searchsorted(segments, begin, side="right")])
        fits = int(np.searchsorted(candidates, candidates[begin] + cap, side="right")) - 1
        end = min(segment_end, max(begin + 1, fits))
        if end == len(table) and not is_last:
            break
        yield buckets[begin].as_py(), table.slice(begin, end - begin)
        begin = end
    return begin
