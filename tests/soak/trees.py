"""Folders of files: their digests, cheap copies, and one flipped bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

Tree = dict[str, str]


def tree(folder: Path, pattern: str = "**/*") -> Tree:
    """Path below `folder` -> sha256, of all files that match."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def sizes(folder: Path) -> list[int]:
    """Bytes of each file."""
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


def fresh(folder: Path, pristine: Path | None = None, *, linked: bool = False) -> None:
    """Make `folder` a copy of `pristine`, or empty. linked: by hard links, for jobs that replace files by renames."""
    clear(folder)
    if pristine is not None:
        copy = os.link if linked else shutil.copy2
        shutil.copytree(pristine, folder, dirs_exist_ok=True, copy_function=copy)


def clear(folder: Path) -> None:
    """Empty `folder`, which may be a mount point."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip(path: Path, draw: random.Random) -> str:
    """Flip one bit of a file, in a copy of its own. Returns which."""
    content = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    path.unlink()
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)}"


def figures(run: Path) -> dict[str, Any]:
    """Loss of each step, and each validation, of a run's metrics.jsonl. The use of the memory's slots is left out: it
    is counted since the run began or was resumed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [line for line in lines if line["kind"] == "valid"]
    losses = {f"loss {line['step']}": line["loss"] for line in lines if line["kind"] == "train"}
    return losses | {f"valid {v['step']}": {key: v[key] for key in v if not key.startswith("memory_")} for v in valid}


def weights(run: Path) -> Tree:
    """Digests of the newest checkpoint's tensors, model and optimizer."""
    newest = max((run / "checkpoints").glob("step-*[0-9]"))
    return {f"{newest.name}/{name}": digest for name, digest in tree(newest, "*.distcp").items()}
