"""Files that are checked before they are believed: JSON and text that carry their own sha256, and sha256s of others.

    {                                     step: 420
     "step": 420,                         # sha256: 5f0a...     of the lines before
     "sha256": "5f0a..."
    }

In JSON it is the digest of the file's bytes without its line.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from elastic_rec.feature_store.utils.atomic_write import to_json, write_text
from elastic_rec.feature_store.utils.errors import DataError

_KEY = ',\n "sha256": "'
_LINE = "# sha256: "


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """`value`, not empty and without a key "sha256", as `path`: whole or not at all."""
    body = to_json(value, indent=1)
    write_text(path, f'{body[:-2]}{_KEY}{_digest(body)}"\n}}\n')


def read_checked(path: Path) -> dict[str, Any]:
    """The value. Raises DataError where the file is not as it was written, FileNotFoundError where there is none."""
    text = path.read_bytes().decode(errors="replace")
    body, _, tail = text.rpartition(_KEY)
    body += "\n}"
    if tail != f'{_digest(body)}"\n}}\n':
        raise DataError(f"{path} is damaged: its content does not fit its sha256")
    return json.loads(body)


def write_signed(path: Path, text: str) -> None:
    """`text`, whose last line is ended and whose comments begin with #, as `path`: whole or not at all."""
    write_text(path, f"{text}{_LINE}{_digest(text)}\n")


def read_signed(path: Path) -> str:
    """The text. Raises DataError where it is not as it was written and has its last line still."""
    text = path.read_bytes().decode(errors="replace")
    body, line, digest = text.rpartition(_LINE)
    if text.rstrip("\n").rpartition("\n")[2].startswith("#") and not (line and digest == _digest(body) + "\n"):
        raise DataError(
            f"{path} is damaged or edited, not as its sha256 says: restore it; to keep an edit, remove the last line"
        )
    return text


def describe_file(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file, as markers and manifests keep it."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def fault_in(folder: Path, files: dict[str, dict[str, Any]]) -> str:
    """What is wrong with the first of `files` that is not as it was written; empty where nothing is."""
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{path} is damaged: {path.stat().st_size} bytes, was written with {wanted['bytes']}"
        if describe_file(path)["sha256"] != wanted["sha256"]:
            return f"{path} is damaged: its content does not fit its sha256"
    return ""


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
