"""Trained model -> metrics: of the next item over the whole catalogue, beside counting baselines; or,
for a run with task=ranking, AUC and its kin over the impressions of the test period.

torchrun --nproc-per-node 2 pipeline/evaluate.py run=runs/ml100k
python pipeline/evaluate.py run=runs/mine store=stores/mine version=31
"""

from copy import copy
from pathlib import Path
from typing import Any

import elastic_rec.models  # noqa: F401 (before TorchRec: it asks whether the stack belongs together)
from elastic_rec.feature_store.utils.atomic_write import write_json
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.runtime.launch import verb
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.registry import refuse_keys_of_others
from elastic_rec.pipeline.training.run_folder import load_model, read_config


@verb("evaluate", EvaluateConfig, distributed=True)
def main(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """The verb."""
    return run_evaluation(config, world)


def run_evaluation(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """Measures a run, and writes the figures into its folder. Collective. Returns them."""
    run = read_config(config.run)
    refuse_keys_of_others(run, config)
    trained_on = copy(run.data)
    if config.store:  # a run's version says nothing about another store
        run.data.store, run.data.version = config.store, config.version
    elif config.version is not None:
        run.data.version = config.version
    task, model, step = load_model(
        config.run,
        checkpoint=config.checkpoint,
        world=world,
        parallel=config.parallel,
        config=run,
        check=lambda task: task.require_evaluable(config, trained_on=trained_on),
    )
    figures = {
        "run": config.run,
        "stage": config.stage,
        "step": step,
        "ranks": world.size,
        "store": str(task.store.path),
        "version": task.store.version,
        **task.evaluate(model, config),
    }
    if world.is_main:
        write_json(Path(config.run) / f"{_name(config)}.json", figures)
    return figures


def _name(config: EvaluateConfig) -> str:
    """Of the file with the figures: metrics, and what differs from a plain call."""
    version = "" if config.version is None else f"g{config.version}"
    stage = config.stage * (config.stage != "test")
    parts = [stage, config.max_history, config.store.rstrip("/").rpartition("/")[2], version, config.seen]
    return "_".join(["metrics", *(str(part) for part in parts if part)])


if __name__ == "__main__":
    main()
