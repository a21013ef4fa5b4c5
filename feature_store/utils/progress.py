"""A progress bar on a terminal, nothing elsewhere; and the most memory this process has held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from tqdm import tqdm


def progress(what: str, *, total: int, unit: str) -> tqdm:
    """Has update(n) and close()."""
    # disable=None: tqdm asks whether stderr is a terminal.
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, disable=None, leave=False)


def peak_memory_bytes() -> int:
    """Resident memory of this process at its highest, libraries included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the process that started this one held
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
