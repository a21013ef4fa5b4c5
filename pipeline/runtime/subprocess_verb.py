"""A verb in a process of its own, or in several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from elastic_rec.feature_store.datasets import DatasetUnavailable
from elastic_rec.pipeline.runtime.endings import EXIT_UNAVAILABLE
from elastic_rec.pipeline.runtime.errors import ConfigError

PIPELINE = Path(__file__).parents[1]


def run_verb(name: str, *overrides: str, ranks: int = 1) -> dict[str, Any]:
    """Runs pipeline/{name}.py as a user would. Its progress goes to the terminal; returns the figures of its last line.

    Raises DatasetUnavailable where no source of a data set answers, ConfigError where the verb fails otherwise.
    """
    python = [sys.executable]
    if ranks > 1:
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*python, str(PIPELINE / f"{name}.py"), *overrides]
    print("\n$ " + " ".join(command), file=sys.stderr, flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // ranks))  # torchrun's own default is 1, and it says so at length
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as done:
        try:
            output, _ = done.communicate()
        except BaseException:
            done.terminate()  # not kill: torchrun ends its ranks
            raise
    if done.returncode == EXIT_UNAVAILABLE:
        raise DatasetUnavailable("none of the sources of this data set can be reached (see above)")
    if done.returncode != 0:
        raise ConfigError(f"{name} failed with exit code {done.returncode}; its message stands above")
    return json.loads(output.strip().splitlines()[-1])
