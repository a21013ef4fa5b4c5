"""The impressions of one row group of histories, joined to them as of their time and dealt into impression groups.

An impression group is a user with up to `max_impressions_per_user` of their impressions: what one row of a batch holds.
An impression sees the events of its user strictly before it, in the store's unit of time: what happened in the same
tick may be its outcome.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elastic_rec.feature_store.batches.examples import compact
from elastic_rec.feature_store.batches.impression_batch import Impressions
from elastic_rec.feature_store.batches.splits import TimeRange
from elastic_rec.feature_store.reading.row_groups import Users, concat_users, padding_histories
from elastic_rec.feature_store.table.impression_table import Rows
from elastic_rec.feature_store.utils.counter_hash import counter_hash
from elastic_rec.feature_store.utils.jagged import Bags, concat_bags, offsets_of, run_starts, span_indices

_DEAL = 6  # tells this use of counter_hash apart


def in_range(times: np.ndarray, range: TimeRange) -> np.ndarray:
    low = times >= range.low if range.low is not None else np.ones(len(times), bool)
    return low if range.high is None else low & (times < range.high)


def groups_per_user(starts: np.ndarray, chosen: np.ndarray, max_impressions_per_user: int) -> np.ndarray:
    """starts: where each user's rows begin; chosen: bool per row -> impression groups of each user, rounded up."""
    before = offsets_of(chosen)
    counts = np.diff(before[np.append(starts, len(chosen))])
    return -(-counts // max_impressions_per_user)


@dataclass(frozen=True)
class ImpressionGroups:
    """V groups of one row group. users: its decoded users. rows: its impressions as stored. user: (V,) number in
    `users`, -1 without a history. edges: (V+1,), group v has impressions picked[edges[v] : edges[v+1]] (numbers in
    `rows`). starts, ends: spans of the users' T axis for each of `picked`. owners, owner_candidates: of `picked`, see
    Impressions."""

    users: Users
    rows: Rows
    user: np.ndarray
    edges: np.ndarray
    picked: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    owners: np.ndarray
    owner_candidates: np.ndarray

    @property
    def keys(self) -> np.ndarray:
        """(V,) a number of its own for every group of the table, whatever the ranks: the row it starts with."""
        return self.rows.first_row + self.picked[self.edges[:-1]]


def group_impressions(
    users: Users,
    user_ids: pa.Array,
    rows: Rows,
    *,
    range: TimeRange,
    max_impressions_per_user: int,
    max_history: int,
    seed: int,
    epoch: int,
    shuffle: bool,
) -> ImpressionGroups:
    """user_ids: of `users`, in their order. Shuffled: (seed, epoch) deal a user's impressions to their groups."""
    starts_R = run_starts(rows.users) if len(rows.users) else np.zeros(0, np.int64)
    run_N = np.repeat(np.arange(len(starts_R)), np.diff(np.append(starts_R, len(rows.users))))
    picked = np.flatnonzero(in_range(rows.times, range))
    run = run_N[picked]
    if shuffle:
        keys = counter_hash(_DEAL, seed, epoch, rows.first_row + picked)
        order = np.lexsort((keys, run))
        picked, run = picked[order], run[order]
    slot = np.arange(len(run)) - np.searchsorted(run, run)
    edges = np.append(np.flatnonzero(slot % max_impressions_per_user == 0), len(run))
    group = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    picked = picked[np.lexsort((picked, group))]
    known = pc.index_in(rows.users.take(pa.array(starts_R)), value_set=user_ids)
    user_R = pc.fill_null(known, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = count_before(users, user_R[run], rows.times[picked])
    begins = np.where(user_R[run] >= 0, users.offsets[user_R[run]], 0)
    starts = np.maximum(begins, ends - max_history)
    owners = rows.first_row + starts_R[run]
    candidates_R = np.bincount(run, np.diff(rows.candidates.offsets)[picked], len(starts_R)).astype(np.int64)
    return ImpressionGroups(
        users, rows, user_R[run[edges[:-1]]], edges, picked, starts, ends, owners, candidates_R[run]
    )


def count_before(users: Users, user: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Position on the T axis after the last event of users[user] that is strictly before `times`; 0 for user -1.

    Times become ranks among the group's distinct times, so that (user, rank) fits one sorted int64 key.
    """
    distinct = np.unique(users.times)
    base = len(distinct) + 1
    owner_T = np.repeat(np.arange(len(users.rows)), np.diff(users.offsets))
    keys_T = owner_T * base + np.searchsorted(distinct, users.times)
    keys = user * base + np.searchsorted(distinct, times, side="left")
    return np.where(user >= 0, np.searchsorted(keys_T, keys, side="left"), 0)


def take_groups(
    source: ImpressionGroups, groups: np.ndarray, item_bags: dict[str, Bags], units_per_second: int
) -> Impressions:
    """The batch of some impression groups of a row group; events that no impression sees stay out."""
    lengths = np.diff(source.edges)[groups]
    edges = offsets_of(lengths)
    index = span_indices(source.edges[groups], lengths)
    picked, starts, ends = source.picked[index], source.starts[index], source.ends[index]
    low, high = np.minimum.reduceat(starts, edges[:-1]), np.maximum.reduceat(ends, edges[:-1])
    group = np.repeat(np.arange(len(groups)), lengths)
    user = source.user[groups]
    offsets = offsets_of(high - low)
    shift = (offsets[:-1] - low)[group]
    keep, starts, ends = compact(starts + shift, ends + shift, int(offsets[-1]))
    events = span_indices(low, high - low)[keep]
    users = Users(
        np.where(user >= 0, source.users.rows[user] if len(source.users.rows) else -1, -1),
        offsets_of(keep)[offsets],
        source.users.times[events],
        {name: values[events] for name, values in source.users.columns.items()},
    )
    candidates = source.rows.candidates.take(picked)
    places = span_indices(source.rows.candidates.offsets[picked], np.diff(candidates.offsets))
    return Impressions(
        histories=users.histories(units_per_second, num_global_users=0),
        group=group,
        starts=starts,
        ends=ends,
        times_s=source.rows.times[picked] // units_per_second,
        rows=source.rows.first_row + picked,
        owners=source.owners[index],
        owner_candidates=source.owner_candidates[index],
        candidate_offsets=candidates.offsets,
        candidates=candidates.values,
        labels=source.rows.labels[places],
        context={name: bags.take(picked) for name, bags in source.rows.context.items()},
        item_context={name: bags.take(candidates.values) for name, bags in item_bags.items()},
    )


def concat_impressions(parts: list[Impressions]) -> Impressions:
    if len(parts) == 1:
        return parts[0]
    histories = [part.histories for part in parts]
    groups = offsets_of(np.array([len(h.rows) for h in histories]))[:-1]
    events = offsets_of(np.array([len(h.times_s) for h in histories]))[:-1]
    joined = concat_users([Users(h.rows, h.offsets, h.times_s, h.columns) for h in histories])

    def shifted(name: str, by: np.ndarray) -> np.ndarray:
        return np.concatenate([getattr(part, name) + shift for part, shift in zip(parts, by, strict=True)])

    def joint(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    def bags(name: str) -> dict[str, Bags]:
        return {key: concat_bags([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    return Impressions(
        histories=joined.histories(1, num_global_users=0),
        group=shifted("group", groups),
        starts=shifted("starts", events),
        ends=shifted("ends", events),
        times_s=joint("times_s"),
        rows=joint("rows"),
        owners=joint("owners"),
        owner_candidates=joint("owner_candidates"),
        candidate_offsets=offsets_of(np.concatenate([np.diff(part.candidate_offsets) for part in parts])),
        candidates=joint("candidates"),
        labels=joint("labels"),
        context=bags("context"),
        item_context=bags("item_context"),
    )


def padding_impressions(
    columns: list[str], *, num_labels: int, context: list[str], item_context: list[str]
) -> Impressions:
    """A padding group with one padding impression, which has no candidates."""
    zero, empty = np.zeros(1, np.int64), np.zeros(0, np.int64)
    return Impressions(
        histories=padding_histories(columns).histories(1, num_global_users=0),
        group=zero,
        starts=zero.copy(),
        ends=zero.copy(),
        times_s=zero.copy(),
        rows=np.full(1, -1, np.int64),
        owners=np.full(1, -1, np.int64),
        owner_candidates=zero.copy(),
        candidate_offsets=np.zeros(2, np.int64),
        candidates=empty,
        labels=np.zeros((0, num_labels), np.float32),
        context={name: Bags(np.zeros(2, np.int64), empty) for name in context},
        item_context={name: Bags(np.zeros(1, np.int64), empty) for name in item_context},
    )
