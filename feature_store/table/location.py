"""Where a store's files are: one type for the local disk, object stores and everything that fsspec knows.

    open_location("stores/mine")                local
    open_location("s3://bucket/stores/mine")    Arrow's own client: s3, gs, abfs(s), hdfs
    open_location("memory://stores/mine")       any other scheme: fsspec, wrapped for Arrow

A local rename is atomic; object stores have none, but a PUT is: a file is there whole or not at all once it is closed.
So the same rule holds everywhere: data first, under names that nobody reads yet, the manifest last.
Credentials and endpoints come from the environment (AWS_ENDPOINT_URL, ...), never from a URL (credentials.py).
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from elastic_rec.feature_store.utils.atomic_write import make_folder, sync, write_bytes
from elastic_rec.feature_store.utils.credentials import refuse_credentials
from elastic_rec.feature_store.utils.errors import DataError

_ARROW_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
_CHUNK = 1 << 20
WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Location:
    """A file or folder. `url` is what messages show; `path` is what `filesystem` takes. Local ones work where a path
    is wanted (os.fspath)."""

    url: str
    path: str = field(compare=False)
    filesystem: pafs.FileSystem = field(compare=False, repr=False)

    @property
    def is_local(self) -> bool:
        """Is it on the local disk?"""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path)

    @property
    def parent(self) -> Location:
        """The folder that it is in."""
        return Location(posixpath.dirname(self.url), posixpath.dirname(self.path), self.filesystem)

    def __truediv__(self, name: str) -> Location:
        return Location(posixpath.join(self.url, name), posixpath.join(self.path, name), self.filesystem)

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        if not self.is_local:
            raise DataError(f"{self.url}: not on the local disk")
        return self.path

    def resolve(self) -> Location:
        """The same place without links; object stores have none."""
        return open_location(os.path.realpath(self.path)) if self.is_local else self

    def is_file(self) -> bool:
        """Is a file there?"""
        return self._info().type == pafs.FileType.File

    def is_dir(self) -> bool:
        """On an object store: is there anything below it."""
        return self._info().type == pafs.FileType.Directory

    def size(self) -> int:
        """Bytes of this file."""
        return self._info().size

    def sizes(self, names: list[str]) -> list[int | None]:
        """Bytes of files below this folder, asked for at once; None where there is no such file."""
        return [info.size for info in self.filesystem.get_file_info([(self / name).path for name in names])]

    def modified(self) -> float:
        """Seconds since 1970."""
        info = self._info()
        if info.mtime_ns is None:  # Arrow's handler does not pass on what fsspec calls it
            return self.filesystem.handler.fs.modified(self.path).timestamp()
        return info.mtime_ns / 1e9

    def below(self, folder: Location) -> str:
        """The path from `folder` to here."""
        return self.path.removeprefix(folder.path.rstrip("/") + "/")

    def files(self, *, recursive: bool = True) -> list[Location]:
        """The files in a folder and below, sorted by path; none where there is nothing."""
        selector = pafs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found = [info.path for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
        base = self.path.rstrip("/") + "/"
        return [self / path.removeprefix(base) for path in sorted(found, key=lambda path: path.split("/"))]

    def open(self) -> pa.NativeFile:
        """For reading at any position."""
        return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """The whole content."""
        with self.open() as file:
            return file.read()

    def digest(self) -> str:
        """sha256 of the content, hexadecimal."""
        digest = hashlib.sha256()
        with self.open() as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def replace(self, content: bytes) -> None:
        """Whoever reads the file, now or after a crash, finds the old content or the new one whole."""
        if not self.is_local:
            # Arrow would pack it where the name ends in .gz or the like.
            with self.filesystem.open_output_stream(self.path, compression=None) as file:
                file.write(content)
            return
        write_bytes(Path(self.path), content)

    def receive(self, file: Path) -> None:
        """Moves a finished local file here; on the local disk by a rename, so within one disk. The file, its name and
        its folder last through a power cut. DataError where not all of it arrived elsewhere."""
        if self.is_local:
            target = Path(self.path)
            make_folder(target.parent)
            sync(file)
            file.rename(target)
            sync(target.parent)
            return
        pafs.copy_files(str(file), self.path, destination_filesystem=self.filesystem)
        if (arrived := self._info().size) != (sent := file.stat().st_size):
            raise DataError(f"{self.url}: {arrived} of {sent} bytes arrived; run again")
        file.unlink()

    def fetch(self, folder: Path) -> Path:
        """The file on the local disk: itself, or a copy in `folder` under its own name."""
        if self.is_local:
            return Path(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / self.name
        pafs.copy_files(self.path, str(copy), source_filesystem=self.filesystem)
        return copy

    def delete(self) -> None:
        """Removes the file. FileNotFoundError where there is none."""
        if self.is_local:
            os.unlink(self.path)
        else:
            self.filesystem.delete_file(self.path)

    def _info(self) -> pafs.FileInfo:
        return self.filesystem.get_file_info(self.path)


def open_location(url: str | os.PathLike | Location) -> Location:
    """A path or URL -> Location, whether or not anything is there. DataError for a scheme without a client, and for a
    URL with credentials in it."""
    if isinstance(url, Location):
        return url
    text = os.fspath(url)
    refuse_credentials(text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme == "file":
        path = str(Path(rest if separator else text))
        if ":" in path.split("/")[0]:
            path = f"./{path}"  # "log-12:00.csv" looks like a URL to Arrow
        return Location(path, path, pafs.LocalFileSystem())
    text = text.rstrip("/")
    try:
        if scheme in _ARROW_SCHEMES:
            filesystem, path = pafs.FileSystem.from_uri(_escaped(text))
        else:
            import fsspec

            client, path = fsspec.core.url_to_fs(text)
            filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(client))
    except (ValueError, ImportError, OSError) as error:
        raise DataError(f"{text}: no file system for it ({error}); check the scheme, or install its fsspec") from error
    return Location(text, path, filesystem)


def _escaped(url: str) -> str:
    """Names in an object store are given as they are; Arrow wants them as in a URL ("%C3%A4" for an umlaut)."""
    scheme, _, rest = url.partition("://")
    place, separator, options = rest.partition("?")
    bucket, slash, path = place.partition("/")
    return f"{scheme}://{bucket}{slash}{quote(path)}{separator}{options}"
