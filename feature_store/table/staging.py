"""A store that appears whole or not at all.

On the local disk it is built beside its place and moved there by one rename. Object stores have no rename: there it is
built in a local scratch folder ($TMPDIR), files go up, and the manifest, last, is the commit.

Files have their digests in their names in both cases. So a reader of the store that was there before reads its own
files, or finds them gone and fails: it never reads those of the new store.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from elastic_rec.feature_store.table.format import HistoryManifest
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.manifest import MANIFEST, commit, filed_versions
from elastic_rec.feature_store.table.own_files import WORK, foreign_paths
from elastic_rec.feature_store.utils.atomic_write import make_folder, sync
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.locks import lock_folder, only_here
from elastic_rec.feature_store.utils.scratch import remove_marked, scratch_folder, sweep


def stage(out: str, *, overwrite: bool) -> LocalStaging | RemoteStaging:
    """The place to build the store that is to be at `out`. DataError where something is there that must not be
    replaced."""
    place = open_location(out)
    return LocalStaging(Path(place), overwrite=overwrite) if place.is_local else RemoteStaging(place, overwrite)


class LocalStaging:
    """Context manager over `<out>.tmp-<pid>`. Leaving it without commit() removes the folder.

    root: what will be the store. work: scratch space inside it, gone before the rename. target: where an engine that
    writes from several machines puts finished data files.
    The staging folder is locked (flock) while its process lives, so that a later ingest can tell litter from work.
    Its folder WORK marks it as ours, until it is in place.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out = Path(os.path.realpath(out))  # a link to a store stays a link
        self.root = self.out.with_name(f"{self.out.name}.tmp-{os.getpid()}")
        self.work = self.root / WORK / "scratch"
        self.target = open_location(self.root)
        self._overwrite = overwrite
        self._lock: int | None = None

    def __enter__(self) -> LocalStaging:
        clear_litter(self.out)
        self._check_free()
        make_folder(self.out.parent)
        try:
            self.work.mkdir(parents=True)
        except FileExistsError as error:
            raise DataError(f"{self.root}: in use by another ingest of this process, or not ours") from error
        self._lock = lock_folder(self.root)
        if self._lock is None:
            raise DataError(f"{self.out}: another ingest to it began at the same moment; run again")
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._lock is not None:
            remove_marked(self.root, WORK)  # gone already after a commit
            os.close(self._lock)

    def commit(self, manifest: HistoryManifest) -> None:
        """Writes the manifest and moves the folder to `out`. With overwrite the old store steps aside first and is
        deleted last. A kill between leaves it whole as `<out>.old-<pid>`, and the next ingest puts it back."""
        shutil.rmtree(self.work)
        commit(manifest, work=self.root, root=self.target)
        self._check_free()
        if self.out.exists() and any(self.out.iterdir()):
            self._replace()
        else:
            self._put_in_place()
        shutil.rmtree(self.out / WORK, ignore_errors=True)

    def _put_in_place(self) -> None:
        try:
            self.root.rename(self.out)
        except OSError as error:
            raise DataError(f"{self.out}: cannot be put in place ({error}); another ingest to the same out?") from error
        sync(self.out.parent)

    def _replace(self) -> None:
        old = self.out.with_name(f"{self.out.name}.old-{os.getpid()}")
        # Held to the end: an append that begins now must not write into a folder on its way out.
        with only_here(self.out, busy="an append or vacuum is at work in it; wait for it and run again"):
            (self.out / WORK).mkdir(exist_ok=True)  # marks the folder: it may be deleted
            self.out.rename(old)
            try:
                self._put_in_place()
            except DataError:
                old.rename(self.out)
                raise
            remove_marked(old, WORK)

    def _check_free(self) -> None:
        if self.out.is_file():
            raise DataError(f"{self.out}: is a file; choose another out")
        _check_replaceable(open_location(self.out), self._overwrite)


class RemoteStaging:
    """The same, for a store that is not on the local disk. One ingest to an `out` at a time: nothing locks it."""

    def __init__(self, out: Location, overwrite: bool) -> None:
        self.out = self.target = out
        self._overwrite = overwrite
        self._scratch = ExitStack()

    def __enter__(self) -> RemoteStaging:
        _check_replaceable(self.out, self._overwrite)
        self.root = self._scratch.enter_context(scratch_folder())
        self.work = self.root / WORK
        self.work.mkdir()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._scratch.close()

    def commit(self, manifest: HistoryManifest) -> None:
        """Uploads what `manifest` names, then the manifest itself; then deletes what the new store does not name."""
        shutil.rmtree(self.work)
        _check_replaceable(self.out, self._overwrite)
        manifest = commit(manifest, work=self.root, root=self.out)
        named = {MANIFEST, *(entry.path for entry in manifest.named_files())}
        for file in self.out.files():  # of a killed ingest, or of the store that this one replaces
            if file.below(self.out) not in named:
                file.delete()


def clear_litter(out: Path) -> None:
    """Removes what killed ingests to `out` left beside it. An old store that had stepped aside goes back to its place
    where the new one had not got there."""
    olds = () if out.exists() else list(out.parent.glob("*"))
    for old in olds:
        if old.name.startswith(f"{out.name}.old-") and (old / WORK).is_dir() and not old.is_symlink():
            lock = lock_folder(old)
            if lock is not None:
                old.rename(out)
                sync(out.parent)
                shutil.rmtree(out / WORK, ignore_errors=True)
                os.close(lock)
                break
    for kind in ("tmp", "old"):
        sweep(out.parent, f"{out.name}.{kind}-", mark=WORK)


def _check_replaceable(out: Location, overwrite: bool) -> None:
    """DataError where `out` holds anything but a store that may be overwritten."""
    is_store = (out / MANIFEST).is_file() or bool(filed_versions(out))
    foreign = foreign_paths(out)
    # An upload that was killed leaves data files without a manifest; a local ingest leaves nothing in `out`.
    others = foreign if is_store or not out.is_local else [file.below(out) for file in out.files()] + foreign
    shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    if others and not is_store:
        raise DataError(f"{out}: exists and is not a history store ({shown}); choose another out or remove it")
    if is_store and not overwrite:
        raise DataError(f"{out}: a store is there already; choose another out or set overwrite=true")
    if others:
        raise DataError(f"{out}: holds files or links that no store wrote ({shown}); move them away, then run again")
