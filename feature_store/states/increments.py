"""What has happened in a bucket since its users' states were made, span by span.

    history now    a b c d | e f          folded: the first 4, so first = 4 and the new events are e f
    no state           | a b c            a new user: first = 0
    x is late      a b x c | d            fold: a b c | x d, x given c's time;   reencode: | a b x c d, from no state

Row groups whose users' watermarks add up to all their events have nothing new: of them only user ids are read. Of the
others whole columns are decoded, for Parquet has no way into the middle of a list. There the model's work is saved, not
the reading. `Increments.counts` says how much was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cached_property

import numpy as np
import pyarrow as pa

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.states.files import DamagedStates, StateFile, Watermarks
from elastic_rec.feature_store.states.late_events import added_events
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.manifest import check_digest
from elastic_rec.feature_store.table.own_files import DATA_FILE
from elastic_rec.feature_store.table.schema import EVENT_ID, EVENTS, ITEM, TIMESTAMP, UNITS_PER_SECOND, USER, leaf_path
from elastic_rec.feature_store.table.store import Store, StoreFile, one_array, read_row_groups
from elastic_rec.feature_store.utils.errors import DAMAGED, DataError
from elastic_rec.feature_store.utils.jagged import flat_structs, offsets_of

SPAN = 8  # a span has at most so many users per user of a batch: their states are in memory together
_FOLDED, _LATE, _NEW = 0, 1, 2
_NOTHING = Watermarks(*[np.zeros(0, np.int64)] * 3)


class LateEvents(Enum):
    """What to do with an event that came late: encode its user again, or fold it in as if it were new."""

    reencode = "reencode"
    fold = "fold"


@dataclass(frozen=True)
class Span:
    """Consecutive users of a bucket, (U,).

    events: the U users' histories; those who are not active have no events here. state_row_U: row in the bucket's
    StateFile to go on from, -1: from no events. watermarks: after this span's events. first_U: events of a history that
    the state holds. active_U: bool, with new events, or to be scored again.
    """

    user_ids: pa.Array
    events: Sequences
    state_row_U: np.ndarray
    watermarks: Watermarks
    first_U: np.ndarray
    active_U: np.ndarray

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def histories(self) -> Sequences:
        """Of the A active users, in order; their first_U[active_U] events are those the states hold."""
        offsets = offsets_of(self.events.lengths[self.active_U])
        return replace(self.events, rows=self.events.rows[self.active_U], offsets=offsets)

    def slice(self, start: int, stop: int) -> Span:
        """Users start to stop - 1."""
        users = slice(start, stop)
        return Span(
            self.user_ids[users],
            self.events.slice(start, stop),
            self.state_row_U[users],
            self.watermarks.take(np.arange(start, stop)),
            self.first_U[users],
            self.active_U[users],
        )

    @staticmethod
    def concat(spans: list[Span]) -> Span:
        """The users of all spans, of which there is at least one."""
        if len(spans) == 1:
            return spans[0]
        joined = {"user_ids": pa.concat_arrays, "events": Sequences.concat, "watermarks": Watermarks.concat}
        parts = {about.name: [getattr(span, about.name) for span in spans] for about in fields(Span)}
        return Span(**{name: joined.get(name, np.concatenate)(values) for name, values in parts.items()})


class Increments:
    """Iterates over the spans of one data file, all its users in order, at most `batch_size` active ones a span.

    columns: event columns to read; "item" is read whether named or not. states: the bucket's; None: there are none yet.
    rescore: every user is active, with or without new events.
    counts, complete after the last span: users by kind, late_events, folded_events (that a state has to take in),
    decoded_events, read_bytes (compressed, of the columns read).
    Raises DamagedStates, after which to start again with states=None.
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
        self._padding = Sequences.padding(self.columns, UNITS_PER_SECOND[store.time_unit])
        groups = list(range(len(file.row_groups)))
        self.user_ids = one_array(self._read(groups, [USER])[USER])

    def __iter__(self) -> Iterator[Span]:
        pending: list[Span] = []
        users = active = 0
        for group in self._groups():
            at = 0
            while at < len(group):
                num_active = np.cumsum(group.active_U[at:])
                fitting = int(np.searchsorted(num_active, self.batch_size - active, side="right"))
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
        watermarks = (self.states.watermarks if self.states else _NOTHING).take(state_row_U)
        self.counts["users"] += num_users
        self.counts["new_users"] += num_users - int(is_known.sum())
        if is_known.all() and watermarks.num_events.sum() == num_events:
            return self._quiet(group, user_ids, row_U, state_row_U, watermarks)
        events, event_id_T = self._decode(group, row_U)
        first_U, late_U = self._place(events, watermarks, is_known)
        after = _watermarks_at_end(events)
        self.counts["late_users"] += int((late_U > 0).sum())
        self.counts["late_events"] += int(late_U.sum())
        if late_U.any():
            again_U = late_U > 0
            if self.late_events is LateEvents.fold and self._folded_file is not None:
                events = self._fold_late(events, event_id_T, user_ids, watermarks, first_U, again_U)
                first_U, again_U = np.where(again_U, watermarks.num_events, first_U), np.zeros_like(again_U)
            first_U, state_row_U = np.where(again_U, 0, first_U), np.where(again_U, -1, state_row_U)
            self.counts["reencoded_users"] += int(again_U.sum())
        new_U = events.lengths - first_U
        self.counts["users_with_new_events"] += int((new_U > 0).sum())
        self.counts["folded_events"] += int(new_U.sum())
        active_U = (new_U > 0) | self.rescore
        return self._span(user_ids, events, state_row_U, after, first_U, active_U)

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

    def _quiet(self, group: int, user_ids, row_U: np.ndarray, state_row_U: np.ndarray, watermarks: Watermarks) -> Span:
        """No new events. To score these users again takes their items, which are not to be recommended."""
        active_U = np.full(len(row_U), self.rescore)
        if self.rescore:
            events, _ = self._decode(group, row_U, items_only=True)
        else:
            events = replace(self._padding, rows=row_U, offsets=np.zeros(len(row_U) + 1, np.int64))
        return self._span(user_ids, events, state_row_U, watermarks, watermarks.num_events, active_U)

    def _place(self, events: Sequences, watermarks: Watermarks, is_known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(U,) each: where in a history the new events begin, and how many before that are late."""
        owner_T, num_users = events.owners, len(is_known)
        before_U = np.bincount(owner_T[events.times < watermarks.time[owner_T]], minlength=num_users)
        at_U = watermarks.num_at_time
        if (
            self.has_event_ids
        ):  # one of the watermark's own time may stand before one that is folded in: all count as late
            at_U = np.bincount(owner_T[events.times == watermarks.time[owner_T]], minlength=num_users)
        first_U = np.where(is_known, before_U + at_U, 0)
        late_U = np.where(is_known, first_U - watermarks.num_events, 0)
        if (late_U < 0).any():
            raise DamagedStates(
                f"{self.states.path}: {int((late_U < 0).sum())} users have more events folded in than "
                f"{self.file.path} holds"
            )
        return first_U, late_U

    def _fold_late(
        self,
        events: Sequences,
        event_id_T: pa.Array | None,
        user_ids: pa.Array,
        watermarks: Watermarks,
        first_U: np.ndarray,
        late_U: np.ndarray,
    ) -> Sequences:
        """Late events moved to after the folded ones, as if they had come at the watermark's time."""
        owner_T = events.owners
        kind_T, of_late_T = np.where(events.places < first_U[owner_T], _FOLDED, _NEW), late_U[owner_T]
        added_T = added_events(
            self._folded_file,
            user_ids.filter(pa.array(late_U)),
            offsets_of(events.lengths[late_U]),
            events.times[of_late_T],
            event_id_T.filter(pa.array(of_late_T)) if event_id_T is not None else None,
        )
        in_T = np.zeros(len(kind_T), bool)
        in_T[of_late_T] = added_T
        kind_T[in_T & (kind_T == _FOLDED)] = _LATE
        times = np.where(kind_T == _LATE, watermarks.time[owner_T], events.times)
        order = np.lexsort((kind_T, owner_T))  # stable: the order in time within a kind
        return replace(events, times=times).pick(order, rows=events.rows, offsets=events.offsets)

    def _span(self, user_ids, events: Sequences, state_row_U, watermarks, first_U, active_U) -> Span:
        """Drops the events of users who are not active."""
        starts = events.offsets[:-1]
        kept = events.spans(starts, starts + np.where(active_U, events.lengths, 0))
        return Span(user_ids, kept, state_row_U, watermarks, first_U, active_U)

    def _decode(self, group: int, row_U: np.ndarray, *, items_only: bool = False) -> tuple[Sequences, pa.Array | None]:
        """The histories of a row group and their event ids; items_only: times and other columns are zeros."""
        ids = [EVENT_ID] if self.has_event_ids else []
        leaves = [ITEM] if items_only else [TIMESTAMP, *self.columns, *ids]
        offsets, flat = flat_structs(self._read([group], [leaf_path(name) for name in leaves])[EVENTS])
        if (len(offsets) - 1, len(flat)) != (len(row_U), self.file.row_groups[group][1]):
            raise DataError(f"{self.file.path}: row group {group} does not have what the manifest says; {DAMAGED}")
        self.counts["decoded_events"] += len(flat)
        read = {name: flat.field(name).to_numpy() for name in leaves if name != EVENT_ID}
        zeros = np.zeros(len(flat), np.int64)
        columns = {name: read.get(name, zeros) for name in self.columns}
        times = read.get(TIMESTAMP, zeros)
        events = replace(self._padding, rows=row_U, offsets=offsets, times=times, columns=columns)
        return events, flat.field(EVENT_ID) if EVENT_ID in leaves else None

    def _read(self, groups: list[int], leaves: list[str]) -> pa.Table:
        for group in groups:
            about = self._parquet.metadata.row_group(group)
            chunks = (about.column(i) for i in range(about.num_columns))
            self.counts["read_bytes"] += sum(c.total_compressed_size for c in chunks if c.path_in_schema in leaves)
        return read_row_groups(self._parquet, groups, leaves, self.file.path)


def _watermarks_at_end(events: Sequences) -> Watermarks:
    last_U = events.times[events.offsets[1:] - 1]
    at_last = events.owners[events.times == np.repeat(last_U, events.lengths)]
    return Watermarks(last_U, events.lengths, np.bincount(at_last, minlength=len(last_U)).astype(np.int64))
