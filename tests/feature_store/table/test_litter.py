"""A killed ingest leaves nothing that a later one does not clear away, wherever the removal of the old store ended."""

import os

from feature_store_reference import make_store, random_events, write_events

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.table.store import Store

REMOVALS = ("unlink", "rmdir", "remove")


class Killed(BaseException):
    pass


def test_an_old_store_half_removed_is_cleared_away(tmp_path, monkeypatch):
    source = write_events(tmp_path / "new.parquet", random_events(60, seed=1))
    ended = []
    for allowed in range(100):
        place = tmp_path / str(allowed)
        store = make_store(place, random_events(60))
        config = IngestConfig(input=[source], out=str(store.path), overwrite=True, num_buckets=2, threads=1)
        with monkeypatch.context() as patch:
            dying = Dying(allowed)
            for name in REMOVALS:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                ingest(config)
                ended.append(True)
            except Killed:
                ended.append(False)
        ingest(config)
        assert sorted(path.name for path in place.iterdir()) == ["events.parquet", "store"], allowed
        Store.open(store.path).verify()
        if ended[-1]:
            break
    assert ended.count(False) > 8 and ended[-1]


class Dying:
    """Lets `allowed` removals below the old store through; the next ones raise Killed."""

    def __init__(self, allowed: int) -> None:
        self.left = allowed

    def __call__(self, real):
        def removal(path, *args, dir_fd: int | None = None, **kwargs):
            where = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            if ".old-" in f"{where}/{path}":
                self.left -= 1
                if self.left < 0:
                    raise Killed
            return real(path, *args, dir_fd=dir_fd, **kwargs)

        return removal
