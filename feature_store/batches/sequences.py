"""The one jagged type: events of several users, laid end to end in flat arrays.

    user         4           7     9
    events       a  b  c           d  e         rows       4 7 9            B = 3 users
    T axis       0  1  2           3  4         offsets    0 3 3 5          T = 5 events
                                                owners     0 0 0 2 2
                                                places     0 1 2 0 1

Row groups are decoded into it; readers, windows and states cut and join it; batches are made of it. Times stay in the
store's unit until then. torch is imported where it is first needed: an ingest does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from elastic_rec.feature_store.utils.jagged import offsets_of, span_indices


@dataclass(frozen=True, eq=False)
class Sequences:
    """Histories of B users with T events in all, often without a copy of the Arrow buffers they come from.

    rows: (B,) int64, the user's row number in the store; -1: padding, or a user whom the store does not know.
    offsets: (B+1,) int64, user b has the events offsets[b] to offsets[b + 1] - 1: [0, 3, 3, 5] in the drawing above.
    times: (T,) int64 in the store's unit, rising within a user.
    columns: name -> (T,) int64 vocabulary indices ("item" always among them).
    units_per_second: of times: 1000 where they are milliseconds.
    num_global_rows: users in the global batch that these are one rank's share of, padding not counted.
    """

    rows: np.ndarray
    offsets: np.ndarray
    times: np.ndarray
    columns: dict[str, np.ndarray]
    units_per_second: int = 1
    num_global_rows: int = 0

    @staticmethod
    def padding(columns: list[str], units_per_second: int = 1) -> Sequences:
        """One user without events, row -1, offsets [0, 0]: what a rank without users brings to a batch."""
        row, offsets, empty = np.full(1, -1, np.int64), np.zeros(2, np.int64), np.zeros(0, np.int64)
        return Sequences(row, offsets, empty, dict.fromkeys(columns, empty), units_per_second)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64, events of each user: [3, 0, 2]."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """(T,) int64, the user in 0..B-1 of each event: [0, 0, 0, 2, 2]."""
        return np.repeat(np.arange(len(self.rows)), self.lengths)

    @property
    def places(self) -> np.ndarray:
        """(T,) int64, number of the event within its user's: [0, 1, 2, 0, 1]."""
        return np.arange(len(self.times)) - np.repeat(self.offsets[:-1], self.lengths)

    @cached_property
    def times_s(self) -> np.ndarray:
        """(T,) int64 times in whole seconds."""
        return self.times if self.units_per_second == 1 else self.times // self.units_per_second

    def take(self, users: np.ndarray) -> Sequences:
        """The users with these numbers (0..B-1), in that order, as often as named; [2, 0] gives offsets [0, 2, 5]."""
        starts, rows = self.offsets[users], self.rows[users]
        lengths = self.offsets[users + 1] - starts
        offsets = offsets_of(lengths)
        if 8 * offsets[-1] < len(self.times):  # few: the others are not touched
            return self.pick(span_indices(starts, lengths), rows=rows, offsets=offsets)
        import torch

        import elastic_rec.feature_store.batches.torchrec_types  # noqa: F401 - registers torch.ops.fbgemm

        order, lengths_B1 = torch.from_numpy(users.astype(np.int32)), torch.from_numpy(self.lengths).unsqueeze(1)

        def permuted(values: np.ndarray) -> np.ndarray:  # whole users at a time: half the time of gathering events
            source = torch.from_numpy(np.require(values, requirements="W"))  # torch warns of Arrow's read-only memory
            return torch.ops.fbgemm.permute_2D_sparse_data(order, lengths_B1, source, None, offsets[-1])[1].numpy()

        columns = {name: permuted(values) for name, values in self.columns.items()}
        return self._with(rows, offsets, permuted(self.times), columns)

    def slice(self, begin: int, end: int) -> Sequences:
        """Users begin to end - 1, without a copy of their events; (1, 3) gives offsets [0, 0, 2]."""
        offsets = self.offsets[begin : end + 1]
        return self.pick(slice(offsets[0], offsets[-1]), rows=self.rows[begin:end], offsets=offsets - offsets[0])

    def spans(self, starts: np.ndarray, ends: np.ndarray) -> Sequences:
        """(B,) starts and ends: of each user only the events [start, end) of the T axis.

        starts [1, 3, 3], ends [3, 3, 4] in the drawing above keep b c and d: offsets [0, 2, 2, 3].
        """
        return self.pick(span_indices(starts, ends - starts), rows=self.rows, offsets=offsets_of(ends - starts))

    def pick(self, events: Any, *, rows: np.ndarray, offsets: np.ndarray) -> Sequences:
        """The events of an index into the T axis (a slice, a mask, or numbers), under these rows and offsets."""
        columns = {name: values[events] for name, values in self.columns.items()}
        return self._with(rows, offsets, self.times[events], columns)

    @staticmethod
    def concat(parts: list[Sequences]) -> Sequences:
        """The users of all parts, of which there is at least one; without a copy where there is no other."""
        if len(parts) == 1:
            return parts[0]
        return parts[0]._with(
            np.concatenate([part.rows for part in parts]),
            offsets_of(np.concatenate([part.lengths for part in parts])),
            np.concatenate([part.times for part in parts]),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        )

    def _with(self, *arrays: Any) -> Sequences:
        return Sequences(*arrays, self.units_per_second, self.num_global_rows)  # a third of the time of replace()
