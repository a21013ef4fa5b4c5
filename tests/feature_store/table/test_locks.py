"""A disk that cannot lock is named; what is on it is not taken for somebody else's."""

import errno
import fcntl
import os

import pytest
from feature_store_reference import make_store, random_events

from elastic_rec.feature_store.table.versions import vacuum
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.locks import hold_folder
from elastic_rec.feature_store.utils.scratch import scratch_folder


def test_a_disk_without_locks(tmp_path, monkeypatch):
    store = make_store(tmp_path, random_events(20))

    def flock(*_: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # what NFS says of a folder

    monkeypatch.setattr(fcntl, "flock", flock)
    for begin in (
        scratch_folder(tmp_path).__enter__,
        hold_folder(tmp_path / "run", job="training", remedy="wait").__enter__,
        lambda: vacuum(str(store.path), retention_hours=24),
    ):
        with pytest.raises(DataError, match=f"^{tmp_path}/.* cannot be locked .*Bad file descriptor.*NFS"):
            begin()
