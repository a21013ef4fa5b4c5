"""The whole pipeline on real data: ingest, train, evaluate, score, plot. `make demo` runs it.

python pipeline/demo.py
python pipeline/demo.py data=synthetic ranks=1 "train=[optim.epochs=2]"
"""

import shutil
import sys
import time
from pathlib import Path

from elastic_rec.feature_store.datasets import DatasetUnavailable
from elastic_rec.pipeline.config.demo import DemoConfig
from elastic_rec.pipeline.reports.plots import plot_run
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb
from elastic_rec.pipeline.runtime.subprocess_verb import run_verb


@verb("demo", DemoConfig)
def main(config: DemoConfig) -> dict:
    """Runs the verbs one after another; returns metrics, paths, and the seconds of each verb."""
    out = Path(config.out)
    _empty(out)
    seconds: dict[str, float] = {}

    def stage(name: str, *overrides: str, ranks: int = 1) -> dict:
        start = time.perf_counter()
        figures = run_verb(name, *overrides, ranks=ranks)
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


def _empty(out: Path) -> None:
    """Starts from nothing, but never removes a folder that is not an earlier demo's."""
    marker = out / ".demo"
    if out.exists():
        if not marker.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and not an earlier demo's: give another out=DIR")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    marker.touch()


if __name__ == "__main__":
    main()
