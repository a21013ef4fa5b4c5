"""User states on disk, beside the histories they summarise: how far each user's events are folded in, and the result.

    STORE/states/5a1c…-float32/bucket=0003.parquet      user_id | time | num_events | num_at_time | state

One folder per model (its fingerprint) and storage type, one file per bucket of the store, its users in the bucket's
order. A file is written aside and renamed. That rename says that the events are folded in: after a crash the same
events are folded into the states as they were. Its metadata name the data file it reflects, by sha256, and the input
files of that data. These tell apart the states of a store that was restored to an earlier version and went on
differently. They also hold a CRC-32 of each row group's content, and one of themselves, so that no damage is folded in.

A state is bytes, all of one length; this room does not know what is in them.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elastic_rec.feature_store.table.format import HistoryManifest
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.schema import USER
from elastic_rec.feature_store.table.store import BROKEN, Store, StoreFile, one_array, open_data_file, read_row_groups
from elastic_rec.feature_store.utils.atomic_write import aside_of, make_folder, remove_leftovers
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.locks import only_here
from elastic_rec.feature_store.utils.scratch import scratch_folder

VERSION = 2
ABOUT = b"elastic-rec-states"
CHECK = b"elastic-rec-states-crc32"
WATERMARK = ["time", "num_events", "num_at_time"]
STATE = "state"


class DamagedStates(DataError):
    """States that are not as they were written, or of another version: they are to be made from the histories again."""


@dataclass(frozen=True)
class Watermarks:
    """Up to where users are folded in, (U,) int64 each.

    time: of the newest event, in the store's unit. num_events: how many are folded in. num_at_time: how many of them at
    that very time, which tells a new event from a late one.
    """

    time: np.ndarray
    num_events: np.ndarray
    num_at_time: np.ndarray

    def take(self, rows: np.ndarray) -> Watermarks:
        """Rows in any order; -1 gives zeros: a user of whom nothing is folded in."""
        return Watermarks(*(np.append(values, 0)[rows] for values in astuple(self)))

    @staticmethod
    def concat(watermarks: list[Watermarks]) -> Watermarks:
        """Those of all parts, of which there is at least one."""
        return Watermarks(*map(np.concatenate, zip(*map(astuple, watermarks), strict=True)))


class StateFile:
    """The states of one bucket. Users and watermarks once read stay in memory, states are read when they are asked for.

    Raises DamagedStates where what is read is not what was written.
    """

    def __init__(self, path: Location) -> None:
        self.path, self.about = path, {}
        try:
            self._file = open_data_file(path)
            schema = self._file.schema_arrow
        except (*BROKEN, DataError) as error:
            raise DamagedStates(f"{path}: cannot be opened ({error})") from error
        metadata = self._file.metadata.metadata or {}
        text = metadata.get(ABOUT, b"{}")
        if metadata.get(CHECK) == _crc(text):
            self.about = json.loads(text)
        if self.about.get("version") != VERSION:
            raise DamagedStates(f"{path}: its metadata are damaged, or of another version than {VERSION}")
        if not schema.equals(_schema(schema.field(0).type, self.about["state_bytes"])):
            raise DamagedStates(f"{path}: its columns are not those of states")
        self._edges = np.cumsum([0, *self.about["group_users"]])
        self._decoded: tuple[int, np.ndarray] = -1, np.zeros((0, 0), np.uint8)

    @property
    def user_ids(self) -> pa.Array:
        """(U,) users with a state here, in the bucket's order."""
        return self._users[0]

    @property
    def watermarks(self) -> Watermarks:
        """Up to where these users are folded in."""
        return self._users[1]

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

    def verify(self) -> None:
        """Reads everything; raises DamagedStates."""
        _ = self._users
        for group in range(len(self.about["group_users"])):
            self._group(group)

    @cached_property
    def _users(self) -> tuple[pa.Array, Watermarks]:
        table = self._read(list(range(len(self.about["group_users"]))), [USER, *WATERMARK])
        ids, arrays = one_array(table[USER]), [table[name].to_numpy() for name in WATERMARK]
        for group, expected in enumerate(self.about["crc32_users"]):
            users = slice(self._edges[group], self._edges[group + 1])
            found = _crc_users(ids[users], Watermarks(*(values[users] for values in arrays)))
            self._check(f"users of row group {group}", found, expected)
        return ids, Watermarks(*arrays)

    def _group(self, group: int) -> np.ndarray:
        if self._decoded[0] != group:
            column = one_array(self._read([group], [STATE])[STATE])
            flat = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, self.about["state_bytes"])
            states = flat[column.offset : column.offset + len(column)]
            self._check(f"states of row group {group}", zlib.crc32(states), self.about["crc32_states"][group])
            self._decoded = group, states
        return self._decoded[1]

    def _read(self, groups: list[int], columns: list[str]) -> pa.Table:
        try:
            table = read_row_groups(self._file, groups, columns, self.path)
        except (DataError, IndexError) as error:
            raise DamagedStates(str(error)) from error
        expected = sum(self.about["group_users"][group] for group in groups)
        if len(table) != expected:
            raise DamagedStates(f"{self.path}: row groups {groups} have {len(table)} users, not {expected}")
        return table

    def _check(self, what: str, found: int, expected: int) -> None:
        if found != expected:
            raise DamagedStates(f"{self.path}: {what} are not as they were written (CRC-32 {found}, not {expected})")


class StateWriter:
    """Writes a bucket's states span by span; nothing is changed until commit()."""

    def __init__(self, path: Location, *, user_type: pa.DataType, about: dict) -> None:
        self.path, self._about = path, {**about, "group_users": [], "crc32_users": [], "crc32_states": []}
        self._scratch = ExitStack()
        folder = Path(path.parent) if path.is_local else self._scratch.enter_context(scratch_folder())
        self._aside = aside_of(folder / path.name)
        self._aside.unlink(missing_ok=True)  # another writer may have it open still
        self._schema = _schema(user_type, about["state_bytes"])
        self._writer = pq.ParquetWriter(
            self._aside,
            self._schema,
            compression="zstd",
            use_dictionary=[],
            write_statistics=[USER, *WATERMARK],
            write_page_checksum=True,
        )

    def add(self, user_ids: pa.Array, watermarks: Watermarks, states_US: np.ndarray) -> None:
        """The next users of the bucket, in its order; a row group of their own."""
        if not len(user_ids):
            return
        content = np.ascontiguousarray(states_US)
        states = pa.FixedSizeBinaryArray.from_buffers(
            self._schema.field(STATE).type, len(user_ids), [None, pa.py_buffer(content)]
        )
        columns = [user_ids, *map(pa.array, astuple(watermarks)), states]
        self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(user_ids))
        self._about["group_users"].append(len(user_ids))
        self._about["crc32_users"].append(_crc_users(user_ids, watermarks))
        self._about["crc32_states"].append(zlib.crc32(content))

    def commit(self) -> None:
        """Puts the file in its place, which says that its events are folded in."""
        text = json.dumps(self._about).encode()
        self._writer.add_key_value_metadata({ABOUT: text, CHECK: _crc(text)})
        self._writer.close()
        self.path.receive(self._aside)
        self._scratch.close()


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
        make_folder(Path(self.path))
        busy = "another job is folding events into these states; run again when it is done"
        with only_here(Path(self.path), busy=busy):
            remove_leftovers(Path(self.path))  # of a killed job
            yield

    def file_path(self, file: StoreFile) -> Location:
        """Where the states of a data file's users are."""
        return self.path / f"bucket={file.bucket:04d}.parquet"

    def open(self, file: StoreFile) -> StateFile | None:
        """The states of a bucket; None where there are none that the bucket's histories continue.

        DataError: states of another model. DamagedStates: they are to be made again.
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
        """Writes new states of a data file's users; they replace the old ones when it commits."""
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
        user_type = file.open().schema_arrow.field(USER).type
        return StateWriter(self.file_path(file), user_type=user_type, about=about)

    def _continues(self, about: dict, file: StoreFile) -> bool:
        """Whether what the states reflect has only been appended to since: its inputs are the first of today's."""
        inputs = _inputs(self.store.manifest)[: about["num_inputs"]]
        return about["data"] == file.sha256 or (bool(inputs) and about["inputs"] == _digest(inputs))


def _inputs(manifest: HistoryManifest) -> list[str]:
    """Digests of the input files, oldest first; none in a store from before appends, which can't be appended to."""
    return [entry.sha256 for entry in manifest.source.files if entry.sha256]


def _digest(inputs: list[str]) -> str:
    return hashlib.sha256(" ".join(inputs).encode()).hexdigest()


def _schema(user_type: pa.DataType, state_bytes: int) -> pa.Schema:
    types = {USER: user_type, **dict.fromkeys(WATERMARK, pa.int64()), STATE: pa.binary(state_bytes)}
    return pa.schema([pa.field(name, type, nullable=False) for name, type in types.items()])


def _crc(text: bytes) -> bytes:
    return str(zlib.crc32(text)).encode()


def _crc_users(user_ids: pa.Array, watermarks: Watermarks) -> int:
    """CRC-32 of users and their watermarks, whatever arrays they are slices of."""
    crc = zlib.crc32(user_ids.to_numpy() if pa.types.is_int64(user_ids.type) else _text_of(user_ids))
    for values in astuple(watermarks):
        crc = zlib.crc32(np.ascontiguousarray(values), crc)
    return crc


def _text_of(ids: pa.Array) -> bytes:
    """The strings' lengths, then the strings end to end."""
    _, offsets, text = ids.buffers()
    edges = np.frombuffer(offsets, np.int32)[ids.offset : ids.offset + len(ids) + 1]
    return np.diff(edges).tobytes() + (text[edges[0] : edges[-1]].to_pybytes() if text is not None else b"")
