"""Power cuts, emulated: what a disk may hold after one, at each moment of a job.

A disk keeps a file's content from the fsync of the file on, and the names in a folder from the fsync of the folder on.
Of the rest it may keep any part. Two extremes are built after each sync, rename and deletion:

    strict   nothing that was not synced: no new name, no new content
    eager    every rename and deletion at once, but no content that was not synced: such files have 0 bytes
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

Image = dict[str, bytes | None]  # content by path below the root; None: a folder


@dataclass
class Moment:
    """What the disk may hold, and what had been acknowledged by then."""

    image: Image
    acknowledged: frozenset[str]


class PowerCut:
    """Context manager: watches the files below `root`, which are on the disk when it begins."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.acknowledged: set[str] = set()
        self._moments: dict[tuple, Moment] = {}
        self._held: dict[int, int] = {}  # an open descriptor per inode, so that no inode is used twice
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> PowerCut:
        for folder, _, files in os.walk(self.root):
            self._sync_folder(folder)
            for name in files:
                path = os.path.join(folder, name)
                self._content[os.stat(path).st_ino] = Path(path).read_bytes()
        for name in ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir"):
            self._patch.setattr(os, name, self._watched(getattr(os, name)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._patch.undo()
        for descriptor in self._held.values():
            os.close(descriptor)

    def acknowledge(self, what: str) -> None:
        """From now on the job's user may rely on it."""
        self.acknowledged.add(what)
        self._look()

    def moments(self) -> list[Moment]:
        """The distinct ones, each with all that was acknowledged at some time when the disk could be so."""
        return list(self._moments.values())

    def restore(self, image: Image) -> None:
        """Makes the root what the image says."""
        shutil.rmtree(self.root)
        self.root.mkdir()
        for name, content in sorted(image.items()):
            if content is None:
                (self.root / name).mkdir()
            else:
                (self.root / name).write_bytes(content)

    def _watched(self, call):
        def watched(*args, **kwargs):
            self._look()
            done = call(*args, **kwargs)
            if call.__name__ == "fsync":
                self._synced(args[0])
            self._look()
            return done

        return watched

    def _synced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._sync_folder(f"/proc/self/fd/{descriptor}")
        else:
            self._content[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _sync_folder(self, folder: str) -> None:
        self._names[os.stat(folder).st_ino] = {entry.name: entry.inode() for entry in os.scandir(folder)}

    def _look(self) -> None:
        eager: Image = {}
        for folder, folders, files in os.walk(self.root):
            for name in [*folders, *files]:
                path = os.path.join(folder, name)
                inode = os.stat(path).st_ino
                if inode not in self._held:
                    self._held[inode] = os.open(path, os.O_RDONLY)
                below = os.path.relpath(path, self.root)
                eager[below] = None if name in folders else self._content.get(inode, b"")
        strict: Image = {}
        self._durable(os.stat(self.root).st_ino, "", strict)
        for image in (strict, eager):
            key = tuple(sorted(image.items(), key=lambda item: item[0]))
            self._moments[key] = Moment(image, frozenset(self.acknowledged))

    def _durable(self, folder: int, below: str, image: Image) -> None:
        for name, inode in self._names.get(folder, {}).items():
            is_folder = inode in self._names or (
                inode in self._held and stat.S_ISDIR(os.fstat(self._held[inode]).st_mode)
            )
            image[below + name] = None if is_folder else self._content.get(inode, b"")
            if is_folder:
                self._durable(inode, f"{below}{name}/", image)
