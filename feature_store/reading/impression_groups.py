"""The impressions of one row group of histories, joined to them as of their time and dealt into impression groups.

An impression group is a user with up to `max_impressions_per_user` of their impressions: what one row of a batch holds.
An impression sees the events of its user strictly before it, in the store's unit of time: what happened in the same
tick may be its outcome.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastic_rec.feature_store.batches.examples import covered
from elastic_rec.feature_store.batches.impression_batch import Impressions
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import TimeRange
from elastic_rec.feature_store.reading.epoch_order import Order
from elastic_rec.feature_store.table.impression_table import Rows
from elastic_rec.feature_store.utils.counter_hash import counter_hash
from elastic_rec.feature_store.utils.jagged import Bags, offsets_of, run_starts, span_indices

_DEAL = 6  # tells this use of counter_hash apart


def in_range(times: np.ndarray, range: TimeRange) -> np.ndarray:
    """(N,) bool: which times are in the range, both in the store's unit."""
    low = times >= range.low if range.low is not None else np.ones(len(times), bool)
    return low if range.high is None else low & (times < range.high)


def groups_per_user(starts: np.ndarray, chosen: np.ndarray, max_impressions_per_user: int) -> np.ndarray:
    """Impression groups of each user. starts: where each user's rows begin; chosen: bool per row.

    starts [0, 3], chosen [1, 1, 1, 0, 1], at most 2: [2, 1].
    """
    before = offsets_of(chosen)
    counts = np.diff(before[np.append(starts, len(chosen))])
    return -(-counts // max_impressions_per_user)


@dataclass(frozen=True)
class ImpressionGroups:
    """The impression groups of one row group of histories.

    users: the decoded users, then one without events for all whose histories the row group does not hold.
    rows: the impressions as stored. user: (V,) number in `users` of each group. offsets: (V+1,); group v has the
    impressions offsets[v] to offsets[v + 1] - 1 of the following, (N,) each: picked, numbers in `rows`; starts, ends,
    spans of the users' T axis; owners, owner_candidates, see Impressions.
    """

    users: Sequences
    rows: Rows
    user: np.ndarray
    offsets: np.ndarray
    picked: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    owners: np.ndarray
    owner_candidates: np.ndarray

    @property
    def keys(self) -> np.ndarray:
        """(V,) a number of its own for every group of the table, whatever the ranks: the row it starts with."""
        return self.rows.first_row + self.picked[self.offsets[:-1]]


def group_impressions(
    users: Sequences,
    user_ids: pa.Array,
    rows: Rows,
    *,
    range: TimeRange,
    max_impressions_per_user: int,
    max_history: int,
    order: Order,
) -> ImpressionGroups:
    """user_ids: of `users`, in their order. Where `order` shuffles, it deals a user's impressions to their groups."""
    users = replace(users, rows=np.append(users.rows, -1), offsets=np.append(users.offsets, len(users.times)))
    starts_R = run_starts(rows.users) if len(rows.users) else np.zeros(0, np.int64)
    run_N = np.repeat(np.arange(len(starts_R)), np.diff(np.append(starts_R, len(rows.users))))
    picked = np.flatnonzero(in_range(rows.times, range))
    run = run_N[picked]
    if order.shuffle:
        dealt = np.lexsort((counter_hash(_DEAL, order.seed, order.epoch, rows.first_row + picked), run))
        picked, run = picked[dealt], run[dealt]
    slot = np.arange(len(run)) - np.searchsorted(run, run)
    offsets = np.append(np.flatnonzero(slot % max_impressions_per_user == 0), len(run))
    group = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    picked = picked[np.lexsort((picked, group))]
    known = pc.index_in(rows.users.take(pa.array(starts_R)), value_set=user_ids)
    user_R = pc.fill_null(known, len(user_ids)).to_numpy(zero_copy_only=False).astype(np.int64)
    user = user_R[run]
    ends = count_before(users, user, rows.times[picked])
    starts = np.maximum(users.offsets[user], ends - max_history)
    candidates_R = np.bincount(run, rows.candidates.lengths[picked], len(starts_R)).astype(np.int64)
    owners = rows.first_row + starts_R[run], candidates_R[run]
    return ImpressionGroups(users, rows, user[offsets[:-1]], offsets, picked, starts, ends, *owners)


def count_before(users: Sequences, user: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(N,) place on the T axis after the last event of users[user] that is strictly before `times`, in their unit.

    Times become ranks among the users' distinct times, so that (user, rank) fits one sorted int64 key.
    """
    distinct = np.unique(users.times)
    base = len(distinct) + 1
    keys_T = users.owners * base + np.searchsorted(distinct, users.times)
    keys = user * base + np.searchsorted(distinct, times, side="left")
    return np.searchsorted(keys_T, keys, side="left")


def take_groups(source: ImpressionGroups, groups: np.ndarray, item_bags: dict[str, Bags]) -> Impressions:
    """The impressions of some groups, by their numbers; events that no impression sees stay out."""
    first = source.offsets[groups]
    lengths = source.offsets[groups + 1] - first
    edges, index = offsets_of(lengths), span_indices(first, lengths)
    picked, starts, ends = source.picked[index], source.starts[index], source.ends[index]
    low, high = np.minimum.reduceat(starts, edges[:-1]), np.maximum.reduceat(ends, edges[:-1])
    group = np.repeat(np.arange(len(groups)), lengths)
    offsets = offsets_of(high - low)
    shift = (offsets[:-1] - low)[group]
    keep, places = covered(starts + shift, ends + shift, int(offsets[-1]))
    events = span_indices(low, high - low)[keep]
    candidates = source.rows.candidates.take(picked)
    return Impressions(
        histories=source.users.pick(events, rows=source.users.rows[source.user[groups]], offsets=places[offsets]),
        group=group,
        starts=places[starts + shift],
        ends=places[ends + shift],
        times=source.rows.times[picked],
        rows=source.rows.first_row + picked,
        owners=source.owners[index],
        owner_candidates=source.owner_candidates[index],
        candidates=candidates,
        labels=source.rows.labels[span_indices(source.rows.candidates.offsets[picked], candidates.lengths)],
        context={name: bags.take(picked) for name, bags in source.rows.context.items()},
        item_context={name: bags.take(candidates.values) for name, bags in item_bags.items()},
    )


def concat_impressions(parts: list[Impressions]) -> Impressions:
    """The impressions of all parts, of which there is at least one, over the histories of all parts."""
    if len(parts) == 1:
        return parts[0]
    groups = offsets_of(np.array([len(part.histories.rows) for part in parts])).tolist()
    events = offsets_of(np.array([len(part.histories.times) for part in parts])).tolist()
    moved = [
        replace(part, group=part.group + groups[n], starts=part.starts + events[n], ends=part.ends + events[n])
        for n, part in enumerate(parts)
    ]
    return Impressions(*(_joined([getattr(part, about.name) for part in moved]) for about in fields(Impressions)))


def _joined(values: list) -> Any:
    if isinstance(values[0], dict):
        return {name: _joined([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], (Bags, Sequences)):
        return type(values[0]).concat(values)
    return np.concatenate(values)


def padding_impressions(
    columns: list[str], *, num_labels: int, context: list[str], item_context: list[str]
) -> Impressions:
    """A padding group with one padding impression, which has no candidates. The arguments name the columns."""
    zero, empty = np.zeros(1, np.int64), np.zeros(0, np.int64)
    return Impressions(
        histories=Sequences.padding(columns),
        group=zero,
        starts=zero.copy(),
        ends=zero.copy(),
        times=zero.copy(),
        rows=np.full(1, -1, np.int64),
        owners=np.full(1, -1, np.int64),
        owner_candidates=zero.copy(),
        candidates=Bags(np.zeros(2, np.int64), empty),
        labels=np.zeros((0, num_labels), np.float32),
        context={name: Bags(np.zeros(2, np.int64), empty) for name in context},
        item_context={name: Bags(np.zeros(1, np.int64), empty) for name in item_context},
    )
