"""What has happened in a bucket since its users' states were made, span by span, for whoever continues the states.

    history now    a b c d | e f          folded: the first 4, so first = 4 and the new events are e f
    no state           | a b c            a new user: first = 0
    x is late      a b x c | d            fold: a b c | x d, x given c's time;   reencode: | a b x c d, from no state

Row groups whose users' clocks add up to all their events have nothing new; of them only user ids are read. In the
others whole leaves are decoded, Parquet offering no way into the middle of a list: what is saved there is the model's
work, not the reading. `Increments.counts` says how much was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import numpy as np
import pyarrow as pa

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.states.files import Clocks, DamagedStates, StateFile
from elastic_rec.feature_store.states.late_events import added_events
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.manifest import check_digest
from elastic_rec.feature_store.table.own_files import DATA_FILE
from elastic_rec.feature_store.table.schema import EVENT_ID, EVENTS, ITEM, TIMESTAMP, UNITS_PER_SECOND, USER, leaf_path
from elastic_rec.feature_store.table.store import Store, StoreFile, one_array, read_row_groups
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import offsets_of, span_indices

SPAN = 8  # a span has at most so many users per user of a batch: their states are in memory together
_FOLDED, _LATE, _NEW = 0, 1, 2


class LateEvents(Enum):
    reencode = "reencode"
    fold = "fold"


@dataclass(frozen=True)
class Span:
    """Consecutive users of a bucket, (U,), and the histories (T,) of those that are active: the others have none here.

    state_row_U: row in the bucket's StateFile to go on from, -1: from no events. clocks: after this span's events.
    first_U: events of a history that the state holds. active_U: with new events, or to be scored again.
    """

    user_ids: pa.Array
    row_U: np.ndarray
    state_row_U: np.ndarray
    clocks: Clocks
    first_U: np.ndarray
    active_U: np.ndarray
    offsets: np.ndarray
    times_s: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.row_U)

    @property
    def histories(self) -> Histories:
        """Of the A active users, in order; their first_U[active_U] events are those the states hold."""
        kept = offsets_of(np.diff(self.offsets)[self.active_U])
        rows = self.row_U[self.active_U]
        return Histories(rows, kept, self.columns, self.times_s, len(rows))

    def slice(self, start: int, stop: int) -> Span:
        events = slice(self.offsets[start], self.offsets[stop])
        return Span(
            self.user_ids[start:stop],
            self.row_U[start:stop],
            self.state_row_U[start:stop],
            self.clocks.take(np.arange(start, stop)),
            self.first_U[start:stop],
            self.active_U[start:stop],
            self.offsets[start : stop + 1] - self.offsets[start],
            self.times_s[events],
            {name: values[events] for name, values in self.columns.items()},
        )

    @staticmethod
    def concat(spans: list[Span]) -> Span:
        if len(spans) == 1:
            return spans[0]
        joined = {
            name: np.concatenate([getattr(span, name) for span in spans])
            for name in ("row_U", "state_row_U", "first_U", "active_U", "times_s")
        }
        return Span(
            user_ids=pa.concat_arrays([span.user_ids for span in spans]),
            clocks=Clocks.concat([span.clocks for span in spans]),
            offsets=offsets_of(np.concatenate([np.diff(span.offsets) for span in spans])),
            columns={name: np.concatenate([s.columns[name] for s in spans]) for name in spans[0].columns},
            **joined,
        )


@dataclass
class _Group:
    """A decoded row group; times in the store's unit."""

    offsets: np.ndarray
    time_T: np.ndarray
    columns: dict[str, np.ndarray]
    event_id_T: pa.Array | None

    @property
    def owner_T(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @property
    def place_T(self) -> np.ndarray:
        return np.arange(len(self.time_T)) - self.offsets[self.owner_T]


class Increments:
    """Iterates over the spans of one data file, all its users in order, at most `batch_size` active ones a span.

    states: the bucket's, None: there are none yet. rescore: every user is active, with or without new events.
    counts, complete after the last span: users by kind, late_events, folded_events (that a state has to take in),
    decoded_events, read_bytes (compressed, of the leaves read). DamagedStates: start over with states=None.
    """

    def __init__(
        self,
        store: Store,
        file: StoreFile,
        *,
        columns: list[str],
        states: StateFile | None,
        late_events: LateEvents,
        rescore: bool,
        batch_size: int,
    ) -> None:
        store.check_columns(columns)
        self.store, self.file, self.states = store, file, states
        self.columns = list(dict.fromkeys([ITEM, *columns]))
        self.late_events, self.rescore, self.batch_size = late_events, rescore, batch_size
        self.has_event_ids = EVENT_ID in store.manifest.schema.events
        self.counts: Counter[str] = Counter()
        self._parquet = file.open()
        groups = list(range(len(file.row_groups)))
        self.user_ids = one_array(self._read(groups, [USER])[USER])

    def __iter__(self) -> Iterator[Span]:
        pending: list[Span] = []
        users = active = 0
        for group in self._groups():
            at = 0
            while at < len(group):
                ahead = np.cumsum(group.active_U[at:])
                fitting = int(np.searchsorted(ahead, self.batch_size - active, side="right"))
                stop = at + min(fitting, SPAN * self.batch_size - users)
                pending.append(group.slice(at, stop))
                users, active = users + stop - at, active + int(group.active_U[at:stop].sum())
                if stop < len(group) or users == SPAN * self.batch_size:
                    yield Span.concat(pending)
                    pending, users, active = [], 0, 0
                at = stop
        if users:
            yield Span.concat(pending)

    def _groups(self) -> Iterator[Span]:
        state_row = self.states.find(self.user_ids) if self.states else np.full(len(self.user_ids), -1, np.int64)
        at = 0
        for group, (num_users, num_events) in enumerate(self.file.row_groups):
            users = slice(at, at + num_users)
            row_U = self.file.first_row + np.arange(at, at + num_users)
            yield self._group(group, num_events, self.user_ids[users], row_U, state_row[users])
            at += num_users

    def _group(
        self, group: int, num_events: int, user_ids: pa.Array, row_U: np.ndarray, state_row_U: np.ndarray
    ) -> Span:
        num_users, is_known = len(row_U), state_row_U >= 0
        clocks = self.states.clocks.take(state_row_U) if self.states else Clocks(*[np.zeros(num_users, np.int64)] * 3)
        self.counts["users"] += num_users
        self.counts["new_users"] += num_users - int(is_known.sum())
        if is_known.all() and clocks.num_events.sum() == num_events:
            return self._quiet(group, user_ids, row_U, state_row_U, clocks)
        events = self._decode(group, num_users)
        first_U, late_U = self._place(events, clocks, is_known)
        after = _clocks_at_end(events)
        self.counts["late_users"] += int((late_U > 0).sum())
        self.counts["late_events"] += int(late_U.sum())
        if late_U.any():
            again_U = late_U > 0
            if self.late_events is LateEvents.fold and self._folded_file is not None:
                events = self._fold_late(events, user_ids, clocks, first_U, again_U)
                first_U, again_U = np.where(again_U, clocks.num_events, first_U), np.zeros_like(again_U)
            first_U, state_row_U = np.where(again_U, 0, first_U), np.where(again_U, -1, state_row_U)
            self.counts["reencoded_users"] += int(again_U.sum())
        new_U = np.diff(events.offsets) - first_U
        self.counts["users_with_new_events"] += int((new_U > 0).sum())
        self.counts["folded_events"] += int(new_U.sum())
        active_U = (new_U > 0) | self.rescore
        return self._span(user_ids, row_U, state_row_U, after, first_U, active_U, events)

    @cached_property
    def _folded_file(self) -> Location | None:
        """The data file that the states reflect; None where a vacuum deleted it, or it is not as it was."""
        path, digest = self.states.about["path"], self.states.about["data"]
        if not DATA_FILE.fullmatch(path) or not (self.store.path / path).is_file():
            return None
        try:
            check_digest(self.store.path / path, digest)
        except DataError:
            return None
        return self.store.path / path

    def _quiet(self, group: int, user_ids, row_U: np.ndarray, state_row_U: np.ndarray, clocks: Clocks) -> Span:
        """No new events. To score these users again takes their items, which are not to be recommended."""
        active_U = np.full(len(row_U), self.rescore)
        if self.rescore:
            events = self._decode(group, len(row_U), items_only=True)
        else:
            nothing = np.zeros(0, np.int64)
            events = _Group(np.zeros(len(row_U) + 1, np.int64), nothing, dict.fromkeys(self.columns, nothing), None)
        return self._span(user_ids, row_U, state_row_U, clocks, clocks.num_events, active_U, events)

    def _place(self, events: _Group, clocks: Clocks, is_known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(U,) each: where in a history the new events begin, and how many before that are late."""
        owner_T, num_users = events.owner_T, len(is_known)
        before_U = np.bincount(owner_T[events.time_T < clocks.time[owner_T]], minlength=num_users)
        at_U = clocks.num_at_time
        if self.has_event_ids:  # one of the clock's own time may stand before one that is folded in: all count as late
            at_U = np.bincount(owner_T[events.time_T == clocks.time[owner_T]], minlength=num_users)
        first_U = np.where(is_known, before_U + at_U, 0)
        late_U = np.where(is_known, first_U - clocks.num_events, 0)
        if (late_U < 0).any():
            raise DamagedStates(
                f"{self.states.path}: {int((late_U < 0).sum())} users have more events folded in than "
                f"{self.file.path} holds"
            )
        return first_U, late_U

    def _fold_late(
        self, events: _Group, user_ids: pa.Array, clocks: Clocks, first_U: np.ndarray, late_U: np.ndarray
    ) -> _Group:
        """Late events moved behind the folded ones, as if they had come at the clock's time."""
        owner_T, kind_T = events.owner_T, np.where(events.place_T < first_U[events.owner_T], _FOLDED, _NEW)
        of_late_T = late_U[owner_T]
        ids_T = events.event_id_T
        added_T = added_events(
            self._folded_file,
            user_ids.filter(pa.array(late_U)),
            offsets_of(np.diff(events.offsets)[late_U]),
            events.time_T[of_late_T],
            ids_T.filter(pa.array(of_late_T)) if ids_T is not None else None,
        )
        in_T = np.zeros(len(kind_T), bool)
        in_T[of_late_T] = added_T
        kind_T[in_T & (kind_T == _FOLDED)] = _LATE
        time_T = np.where(kind_T == _LATE, clocks.time[owner_T], events.time_T)
        order = np.lexsort((kind_T, owner_T))  # stable: the order in time within a kind
        columns = {name: values[order] for name, values in events.columns.items()}
        return replace(events, time_T=time_T[order], columns=columns, event_id_T=None)

    def _span(self, user_ids, row_U, state_row_U, clocks, first_U, active_U, events: _Group) -> Span:
        """Drops the events of users who are not active."""
        lengths = np.where(active_U, np.diff(events.offsets), 0)
        keep = span_indices(events.offsets[:-1], lengths)
        time_T = events.time_T[keep] // UNITS_PER_SECOND[self.store.time_unit]
        columns = {name: values[keep] for name, values in events.columns.items()}
        offsets = offsets_of(lengths)
        return Span(user_ids, row_U, state_row_U, clocks, first_U, active_U, offsets, time_T, columns)

    def _decode(self, group: int, num_users: int, *, items_only: bool = False) -> _Group:
        """The leaves of a row group; items_only: the others are zeros."""
        ids = [EVENT_ID] if self.has_event_ids else []
        leaves = [ITEM] if items_only else [TIMESTAMP, *self.columns, *ids]
        lists = one_array(self._read([group], [leaf_path(name) for name in leaves])[EVENTS])
        offsets = lists.offsets.to_numpy().astype(np.int64)
        flat = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
        if (len(lists), len(flat)) != (num_users, self.file.row_groups[group][1]):
            raise DataError(f"{self.file.path}: row group {group} does not have what the manifest says; rerun ingest")
        self.counts["decoded_events"] += len(flat)
        read = {name: flat.field(name).to_numpy() for name in leaves if name != EVENT_ID}
        zeros = np.zeros(len(flat), np.int64)
        columns = {name: read.get(name, zeros) for name in self.columns}
        event_id_T = flat.field(EVENT_ID) if EVENT_ID in leaves else None
        return _Group(offsets - offsets[0], read.get(TIMESTAMP, zeros), columns, event_id_T)

    def _read(self, groups: list[int], leaves: list[str]) -> pa.Table:
        for group in groups:
            about = self._parquet.metadata.row_group(group)
            chunks = (about.column(i) for i in range(about.num_columns))
            self.counts["read_bytes"] += sum(c.total_compressed_size for c in chunks if c.path_in_schema in leaves)
        return read_row_groups(self._parquet, groups, leaves, self.file.path)


def _clocks_at_end(events: _Group) -> Clocks:
    last_U = events.time_T[events.offsets[1:] - 1]
    is_last_T = events.time_T == last_U[events.owner_T]
    return Clocks(
        last_U, np.diff(events.offsets), np.bincount(events.owner_T[is_last_T], minlength=len(last_U)).astype(np.int64)
    )
