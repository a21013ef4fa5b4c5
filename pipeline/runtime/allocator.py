"""Freed memory stays with the process. glibc maps large tensors from the kernel and gives them back when freed. Each
operation on long histories then faults all its pages in again: a third of the tower's time on a CPU."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST, NEVER = 2**31 - 1, -1  # mallopt takes an int: tensors from 2 GiB on are still mapped


def keep_freed_memory() -> str:
    """Call it before memory is used. Returns what is set, for a record. A user's own MALLOC_ settings stand."""
    own = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    if own or "LD_PRELOAD" in os.environ:
        return ", ".join(f"{name}={value}" for name, value in own.items()) or f"LD_PRELOAD={os.environ['LD_PRELOAD']}"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER)):
        return "the system's"  # musl, macOS
    return "glibc, freed memory kept"
