"""Histories of single users, by id: the bucket by hash, the row group by the ids in its footer, then one is decoded."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.reading.row_groups import Decoder, Users, concat_users, padding_user
from elastic_rec.feature_store.table.schema import ITEM
from elastic_rec.feature_store.table.store import Store, first_users

_KEPT_GROUPS = 16


class HistoryLookup:
    """Random access for serving and tests. The index (first user of each row group) is read once, from the footers."""

    def __init__(self, store: Store, *, columns: list[str]) -> None:
        self.store = store
        self.columns = list(dict.fromkeys([ITEM, *columns]))
        self._decoder = Decoder(store, self.columns)
        self._decode = lru_cache(maxsize=_KEPT_GROUPS)(self._decode_group)
        self._firsts = first_users(store)
        self._first_group = {}
        for number, group in enumerate(self._decoder.groups):
            self._first_group.setdefault(store.files[group.file].bucket, number)

    def histories(self, user_ids: list) -> Histories:
        """One row per id, in their order; a user the store does not know has row -1 and no events."""
        return self.users(user_ids).histories(self._decoder.units_per_second, num_global_users=len(user_ids))

    def users(self, user_ids: list) -> Users:
        """As histories, with times in the store's unit."""
        wanted = defaultdict(list)
        for place, user in enumerate(user_ids):
            if (group := self._group_of(user)) is not None:
                wanted[group].append(place)
        parts, source = [padding_user(self.columns)], np.zeros(len(user_ids), np.int64)
        taken = 1
        for group, places in wanted.items():
            users, ids = self._decode(group)
            asked = pa.array([user_ids[place] for place in places], ids.type)
            found = pc.fill_null(pc.index_in(asked, value_set=ids), -1).to_numpy(zero_copy_only=False)
            source[places] = np.where(found >= 0, taken + found, 0)
            parts.append(users)
            taken += len(users.rows)
        return concat_users(parts).take(source)

    def _group_of(self, user: int | str) -> int | None:
        """Row group that holds a user if any does."""
        bucket = bucket_of(user, self.store.manifest.num_buckets)
        number = bisect_right(self._firsts.get(bucket, []), user) - 1
        return self._first_group[bucket] + number if number >= 0 else None

    def _decode_group(self, group: int):
        return self._decoder.decode(group), self._decoder.user_ids(group)


def bucket_of(user: int | str, num_buckets: int) -> int:
    """The bucket that every engine puts a user in."""
    if isinstance(user, str):
        return int(hashlib.md5(user.encode()).hexdigest()[:15], 16) % num_buckets
    return user % num_buckets
