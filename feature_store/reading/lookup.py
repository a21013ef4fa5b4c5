"""Histories of single users by id. A hash gives the bucket, the ids in its footer the row group, which is decoded."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.reading.row_groups import Decoder
from elastic_rec.feature_store.table.schema import ITEM
from elastic_rec.feature_store.table.store import Store, first_users

_KEPT_GROUPS = 16


class HistoryLookup:
    """Random access for serving and tests. The index (first user of each row group) is read once, from the footers.

    columns: event columns to read; "item" is read whether named or not.
    """

    def __init__(self, store: Store, *, columns: list[str]) -> None:
        self.store = store
        self.columns = list(dict.fromkeys([ITEM, *columns]))
        self._decoder = Decoder(store, self.columns)
        self._decode = lru_cache(maxsize=_KEPT_GROUPS)(self._decode_group)
        self._firsts = first_users(store)

    def histories(self, user_ids: list[int] | list[str]) -> Sequences:
        """One history per id, in their order; of a user whom the store does not know: row -1, no events."""
        wanted = defaultdict(list)
        for place, user in enumerate(user_ids):
            if (group := self._group_of(user)) is not None:
                wanted[group].append(place)
        parts, source, num_found = [self._decoder.padding], np.zeros(len(user_ids), np.int64), 1
        for group, places in wanted.items():
            users, ids = self._decode(group)
            asked = pa.array([user_ids[place] for place in places], ids.type)
            found = pc.fill_null(pc.index_in(asked, value_set=ids), -1).to_numpy(zero_copy_only=False)
            known = np.array(places)[found >= 0]
            source[known] = num_found + np.arange(len(known))
            parts.append(users.take(found[found >= 0]))
            num_found += len(known)
        return replace(Sequences.concat(parts).take(source), num_global_rows=len(user_ids))

    def _group_of(self, user: int | str) -> int | None:
        """Row group that holds a user if any does."""
        bucket = bucket_of(user, self.store.manifest.num_buckets)
        number = bisect_right(self._firsts.get(bucket, []), user) - 1
        return self._decoder.first_groups[bucket] + number if number >= 0 else None

    def _decode_group(self, group: int) -> tuple[Sequences, pa.Array]:
        return self._decoder.decode(group), self._decoder.user_ids(group)


def bucket_of(user: int | str, num_buckets: int) -> int:
    """The bucket that every engine puts a user in."""
    if isinstance(user, str):
        return int(hashlib.md5(user.encode()).hexdigest()[:15], 16) % num_buckets
    return user % num_buckets
