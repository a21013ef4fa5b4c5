"""Which events of a user came late: into the middle of a history whose end is folded into a state already.

    before    a  b  c     d            stored when the state was made
    now       a  b  c  x  d  e  f      x came late; e and f are new

A watermark alone only says how many there are. Which ones is told by the data file the state was made from, which
stands on disk until a vacuum deletes it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.schema import EVENT_ID, EVENTS, TIMESTAMP, USER, leaf_path
from elastic_rec.feature_store.table.store import one_array, open_data_file, read_row_groups
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import flat_structs


def added_events(
    before: Location, user_ids: pa.Array, offsets: np.ndarray, time_T: np.ndarray, event_id_T: pa.Array | None
) -> np.ndarray:
    """(T,) bool: which events of these users' histories now are not in the data file `before`.

    offsets: (U+1,), [0, 3, 5] for users with 3 and 2 events now. time_T: in the store's unit. event_id_T: in a store
    that has event ids. Without them, of events of equal time the last ones are the added ones.
    Raises DataError where the file lacks one of the users.
    """
    old_offsets, old_time, old_event_id = _read_users(before, user_ids, with_ids=event_id_T is not None)
    num_old = len(old_time)
    parts = [np.repeat(np.arange(len(o) - 1), np.diff(o)) for o in (old_offsets, offsets)]
    keys = [np.concatenate(parts), np.concatenate([old_time, time_T])]
    if event_id_T is not None:
        keys.append(pa.chunked_array([old_event_id, event_id_T]).to_numpy())
    key = np.zeros(len(keys[0]), np.int64)
    for values in keys:
        _, code = np.unique(values, return_inverse=True)
        key = np.unique(key * (code.max(initial=0) + 1) + code, return_inverse=True)[1]
    old = np.sort(key[:num_old])
    now = key[num_old:]
    order = np.argsort(now, kind="stable")
    rank = np.empty(len(now), np.int64)  # an event's index among equal events, 0 for the first
    rank[order] = np.arange(len(now)) - np.searchsorted(now[order], now[order], side="left")
    return rank >= np.searchsorted(old, now, side="right") - np.searchsorted(old, now, side="left")


def _read_users(
    path: Location, user_ids: pa.Array, *, with_ids: bool
) -> tuple[np.ndarray, np.ndarray, pa.Array | None]:
    """(offsets, times, event ids) of some users of a data file, in their order there, which is that of user_ids."""
    file = open_data_file(path)
    groups = list(range(file.metadata.num_row_groups))
    edges = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in groups)])
    users = one_array(read_row_groups(file, groups, [USER], path)[USER])
    row_U = np.asarray(pc.fill_null(pc.index_in(user_ids, value_set=users), -1)).astype(np.int64)
    if (row_U < 0).any():
        raise DataError(
            f"{path}: lacks users whose states were made from it; remove the states, then all users are encoded again"
        )
    needed = np.unique(np.searchsorted(edges, row_U, side="right") - 1)
    leaves = [leaf_path(TIMESTAMP), *([leaf_path(EVENT_ID)] if with_ids else [])]
    lists = read_row_groups(file, needed.tolist(), leaves, path)[EVENTS]
    first = np.cumsum([0, *(edges[needed + 1] - edges[needed])])
    group_U = np.searchsorted(edges[needed], row_U, side="right") - 1
    offsets, flat = flat_structs(lists.take(pa.array(row_U - edges[needed][group_U] + first[group_U])))
    return offsets, flat.field(TIMESTAMP).to_numpy(), flat.field(EVENT_ID) if with_ids else None
