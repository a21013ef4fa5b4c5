"""User states on disk, beside the histories they summarise: how far each user's events are folded in, and the result.

    STORE/states/5a1c…-float32/bucket=0003.parquet      user_id | time | num_events | num_at_time | state

One folder per model (its fingerprint) and storage type, one file per bucket of the store, its users in the bucket's
order. A file is written aside and renamed: that rename says that the events are folded in, so what is folded twice
after a crash is folded into the states as they were. Its metadata say which data file it reflects, by sha256, and which
input files that data came from: states of a store that was rolled back and went on differently are told apart.

A state is bytes, all of one length; this room does not know what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elastic_rec.feature_store.atomic_write import sync
from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.filesystem import Location
from elastic_rec.feature_store.schema import USER
from elastic_rec.feature_store.staging import lock_folder
from elastic_rec.feature_store.store import Store, StoreFile, one_array, open_data_file, read_row_groups

VERSION = 1
ABOUT = b"elastic-rec-states"
CLOCK = ["time", "num_events", "num_at_time"]
STATE = "state"


@dataclass(frozen=True)
class Clocks:
    """Up to where users are folded in, (U,) int64 each: time of the newest event, in the store's unit; how many events
    are folded in; how many of them at that very time, which tells an event that came later from one that came late."""

    time: np.ndarray
    num_events: np.ndarray
    num_at_time: np.ndarray

    def take(self, rows: np.ndarray) -> Clocks:
        """Rows in any order; -1 gives the clock of a user of whom nothing is folded in: all zeros."""
        return Clocks(*(np.append(values, 0)[rows] for values in astuple(self)))

    @staticmethod
    def concat(clocks: list[Clocks]) -> Clocks:
        return Clocks(*map(np.concatenate, zip(*map(astuple, clocks), strict=True)))


class StateFile:
    """The states of one bucket: users and clocks once read stay in memory, states are read as they are asked for."""

    def __init__(self, path: Location) -> None:
        self.path, self._file = path, open_data_file(path)
        metadata = self._file.schema_arrow.metadata or {}
        self.about: dict = json.loads(metadata.get(ABOUT, b"{}"))
        if self.about.get("version") != VERSION:
            raise DataError(
                f"{path}: states of version {self.about.get('version')}, this code reads version {VERSION}; "
                f"remove {path.parent}, and the users are encoded again"
            )
        groups = range(self._file.metadata.num_row_groups)
        self._edges = np.cumsum([0, *(self._file.metadata.row_group(g).num_rows for g in groups)])
        self._decoded: tuple[int, np.ndarray] = -1, np.zeros((0, 0), np.uint8)

    @cached_property
    def user_ids(self) -> pa.Array:
        return one_array(self._read([USER])[USER])

    @cached_property
    def clocks(self) -> Clocks:
        table = self._read(CLOCK)
        return Clocks(*(table[name].to_numpy() for name in CLOCK))

    def find(self, user_ids: pa.Array) -> np.ndarray:
        """(U,) row of each user here, -1 for one without a state."""
        return np.asarray(pc.fill_null(pc.index_in(user_ids, value_set=self.user_ids), -1)).astype(np.int64)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(U,) rows -> (U, S) uint8. One row group is decoded at a time: ask for rows that lie together."""
        states = np.zeros((len(rows), self.about["state_bytes"]), np.uint8)
        group_U = np.searchsorted(self._edges, rows, side="right") - 1
        for group in np.unique(group_U).tolist():
            here = group_U == group
            states[here] = self._group(group)[rows[here] - self._edges[group]]
        return states

    def _group(self, group: int) -> np.ndarray:
        if self._decoded[0] != group:
            column = one_array(read_row_groups(self._file, [group], [STATE], self.path)[STATE])
            flat = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, self.about["state_bytes"])
            self._decoded = group, flat[column.offset : column.offset + len(column)]
        return self._decoded[1]

    def _read(self, columns: list[str]) -> pa.Table:
        return read_row_groups(self._file, list(range(self._file.metadata.num_row_groups)), columns, self.path)


class StateWriter:
    """Writes a bucket's states span by span; nothing is changed until commit()."""

    def __init__(self, path: Location, *, user_type: pa.DataType, about: dict) -> None:
        self.path = path
        folder = Path(path.parent) if path.is_local else Path(tempfile.mkdtemp())
        self._aside = folder / path.name.replace(".parquet", ".tmp")
        fields = [pa.field(USER, user_type, nullable=False)]
        fields += [pa.field(name, pa.int64(), nullable=False) for name in CLOCK]
        fields += [pa.field(STATE, pa.binary(about["state_bytes"]), nullable=False)]
        self._schema = pa.schema(fields, metadata={ABOUT: json.dumps(about)})
        self._writer = pq.ParquetWriter(
            self._aside,
            self._schema,
            compression="zstd",
            use_dictionary=[],
            write_statistics=[USER, *CLOCK],
            write_page_checksum=True,
        )

    def add(self, user_ids: pa.Array, clocks: Clocks, states_US: np.ndarray) -> None:
        """The next users of the bucket, in its order; a row group of their own."""
        if not len(user_ids):
            return
        buffer = pa.py_buffer(np.ascontiguousarray(states_US))
        states = pa.FixedSizeBinaryArray.from_buffers(self._schema.field(STATE).type, len(user_ids), [None, buffer])
        columns = [user_ids, *map(pa.array, astuple(clocks)), states]
        self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(user_ids))

    def commit(self) -> None:
        self._writer.close()
        sync(self._aside)
        self.path.receive(self._aside)


class StateFolder:
    """The states that one model keeps of one store. dtype: name of the storage type, kept apart from others."""

    def __init__(self, store: Store, *, fingerprint: str, dtype: str, state_bytes: int) -> None:
        self.store, self.fingerprint, self.dtype, self.state_bytes = store, fingerprint, dtype, state_bytes
        self.path = store.path / "states" / f"{fingerprint[:16]}-{dtype}"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Takes the folder, made if need be, for one job; the lock ends with the process, too. An object store has no
        locks: there it is up to whoever starts jobs."""
        if not self.path.is_local:
            yield
            return
        Path(self.path).mkdir(parents=True, exist_ok=True)
        lock = lock_folder(Path(self.path))
        if lock is None:
            raise DataError(f"{self.path}: another job is folding events into these states; run again when it is done")
        try:
            yield
        finally:
            os.close(lock)

    def file_path(self, file: StoreFile) -> Location:
        return self.path / f"bucket={file.bucket:04d}.parquet"

    def open(self, file: StoreFile) -> StateFile | None:
        """The states of a bucket; None where there are none that the bucket's histories continue.

        DataError: states of another model.
        """
        path = self.file_path(file)
        if not path.is_file():
            return None
        states = StateFile(path)
        for key in ("fingerprint", "dtype", "state_bytes"):
            was, now = states.about[key], getattr(self, key)
            if was != now:
                raise DataError(
                    f"{path}: states of another model ({key} {str(was)[:16]}, this model's is {str(now)[:16]}); they "
                    f"can't be continued: remove {self.path}, and the users are encoded again"
                )
        return states if self._continues(states.about, file) else None

    def writer(self, file: StoreFile) -> StateWriter:
        inputs = _inputs(self.store.manifest)
        about = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "state_bytes": self.state_bytes,
            "data": file.sha256,
            "path": file.path.below(self.store.path),
            "num_inputs": len(inputs),
            "inputs": _digest(inputs),
        }
        user_type = open_data_file(file.path).schema_arrow.field(USER).type
        return StateWriter(self.file_path(file), user_type=user_type, about=about)

    def _continues(self, about: dict, file: StoreFile) -> bool:
        """Whether what the states reflect has only been appended to since: its inputs are the first of today's."""
        inputs = _inputs(self.store.manifest)[: about["num_inputs"]]
        return about["data"] == file.sha256 or (bool(inputs) and about["inputs"] == _digest(inputs))


def _inputs(manifest: dict) -> list[str]:
    """Digests of the input files, oldest first; none in a store from before appends, which can't be appended to."""
    return [entry["sha256"] for entry in manifest["source"]["files"] if "sha256" in entry]


def _digest(inputs: list[str]) -> str:
    return hashlib.sha256(" ".join(inputs).encode()).hexdigest()
