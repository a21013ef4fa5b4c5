"""Where reading stands: enough to go on with the same order, on any number of ranks and workers."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_rec.feature_store.table.manifest import check_digest, read_manifest
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError


@dataclass(frozen=True)
class Cursor:
    """A place in an epoch. rows: users of its global order that all ranks have consumed (of impressions: groups).

    manifest_hash: of the store's version, and so of every byte of it.
    """

    seed: int
    epoch: int
    rows: int
    manifest_hash: str

    def check(self, store: Store, *, rank: int = 0, world_size: int = 1) -> None:
        """DataError where the store is not, byte for byte, the one the cursor was taken on: it names the file.

        Each rank reads its share of the files; all of them together read every byte once.
        """
        if store.manifest.hash != self.manifest_hash:
            raise DataError(
                f"{store.path}: the cursor was taken on the manifest {self.manifest_hash[:12]}, this one is "
                f"{store.manifest.hash[:12]} (version {store.version}): open the version it was taken on"
            )
        # Again, although the store is open: a file may have gone or been cut since.
        manifest = read_manifest(store.path, store.version)
        for entry in manifest.files[rank::world_size]:
            check_digest(store.path / entry.path, entry.sha256)
