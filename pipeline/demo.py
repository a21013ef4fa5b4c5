"""The whole pipeline on real data: ingest, train, evaluate, score, plot. `make demo` runs it.

python pipeline/demo.py
python pipeline/demo.py data=synthetic ranks=1 "train=[optim.epochs=2]"
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from elastic_rec.feature_store.datasets import DatasetUnavailable
from elastic_rec.pipeline.config.demo import DemoConfig
from elastic_rec.pipeline.reports.plots import plot_run
from elastic_rec.pipeline.runtime.endings import EXIT_UNAVAILABLE
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb

PIPELINE = Path(__file__).parent


@verb("demo", DemoConfig)
def main(config: DemoConfig) -> dict:
    """Runs the verbs one after another; returns metrics, paths, and the seconds of each verb."""
    out = Path(config.out)
    _empty(out)
    seconds: dict[str, float] = {}

    def stage(name: str, *overrides: str, ranks: int = 1) -> dict:
        start = time.perf_counter()
        figures = _run(name, overrides, ranks=ranks)
        seconds[name] = round(time.perf_counter() - start, 1)
        return figures

    store, run, scores = out / "store", out / "run", out / "scores"
    data = config.data
    try:
        stage("ingest", f"data={data}", f"data.store={store}")
    except DatasetUnavailable as error:
        print(f"\n{'!' * 100}\n{error}\nTHE DEMO GOES ON WITH SYNTHETIC DATA INSTEAD.\n{'!' * 100}\n", file=sys.stderr)
        data = "synthetic"
        stage("ingest", f"data={data}", f"data.store={store}")
    stage("train", f"experiment={data}", f"data.store={store}", f"run.dir={run}", *config.train, ranks=config.ranks)
    metrics = stage("evaluate", f"run={run}", ranks=config.ranks)
    stage("score", f"run={run}", f"out={scores}", ranks=config.ranks)
    counting = metrics["baselines"]
    plot = plot_run(run, out / "training.png", popularity=counting["popularity"]["hr@10"])
    best = max(counting, key=lambda name: counting[name]["ndcg@10"])
    return {
        "data": data,
        "hr@10": metrics["hr@10"],
        "ndcg@10": metrics["ndcg@10"],
        "popularity": {name: counting["popularity"][name] for name in ("hr@10", "ndcg@10")},
        "best_baseline": {"name": best, **{name: counting[best][name] for name in ("hr@10", "ndcg@10")}},
        "store": str(store),
        "run": str(run),
        "scores": str(scores),
        "plot": str(plot),
        "seconds": seconds,
    }


def _run(name: str, overrides: tuple[str, ...], *, ranks: int) -> dict:
    """Run one verb as a user would; its progress goes to the terminal, its last line comes back."""
    python = [sys.executable]
    if ranks > 1:
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*python, str(PIPELINE / f"{name}.py"), *overrides]
    print("\n$ " + " ".join(command), file=sys.stderr, flush=True)
    threads = max(1, (os.cpu_count() or 1) // ranks)  # torchrun's own default is 1, with a long warning
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as done:
        try:
            output, _ = done.communicate()
        except BaseException:
            done.terminate()  # not kill: torchrun ends its ranks
            raise
    if done.returncode == EXIT_UNAVAILABLE:
        raise DatasetUnavailable("none of the sources of this data set can be reached (see above)")
    if done.returncode != 0:
        raise ConfigError(f"{name} failed with exit code {done.returncode}; its message is above")
    return json.loads(output.strip().splitlines()[-1])


def _empty(out: Path) -> None:
    """Empties the folder, unless it is not an earlier demo's."""
    marker = out / ".demo"
    if out.exists():
        if not marker.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and not an earlier demo's: give another out=DIR")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    marker.touch()


if __name__ == "__main__":
    main()
