"""Trained model -> metrics: of the next item over the whole catalogue, beside popularity and last-item baselines; or,
for a run with task=ranking, AUC and its kin over the impressions of the test period.

torchrun --nproc-per-node 2 pipeline/evaluate.py run=runs/ml100k
"""

from pathlib import Path

import elastic_rec.models  # noqa: F401 (before TorchRec: it asks whether the stack belongs together)
from elastic_rec.feature_store.atomic_write import write_json
from elastic_rec.pipeline.baselines import fit_baselines
from elastic_rec.pipeline.errors import ConfigError
from elastic_rec.pipeline.evaluation import evaluate
from elastic_rec.pipeline.launch import verb
from elastic_rec.pipeline.ranking_task import RankingTask
from elastic_rec.pipeline.run_folder import load_model
from elastic_rec.pipeline.schema import EvaluateConfig
from elastic_rec.pipeline.world import World


@verb("evaluate", EvaluateConfig, distributed=True)
def main(config: EvaluateConfig, world: World) -> dict:
    task, model, step = load_model(config.run, checkpoint=config.checkpoint, world=world, parallel=config.parallel)
    settings = {"stage": config.stage, "length_edges": config.length_edges, "batch_size": config.batch_size}
    if isinstance(task, RankingTask):
        figures = task.evaluate(model, **settings, max_history=config.max_history)
    elif config.max_history:
        raise ConfigError(f"max_history={config.max_history}: only for runs with task=ranking; leave it out")
    else:
        baselines = fit_baselines(task, batch_size=config.batch_size, exclude_seen=True)
        figures = evaluate(
            task, model, k=config.k, baselines=baselines, min_item_count=config.min_item_count, **settings
        )
    figures = {"run": config.run, "stage": config.stage, "step": step, "ranks": world.size, **figures}
    if world.is_main:
        parts = ["metrics", config.stage * (config.stage != "test"), str(config.max_history or "")]
        name = "_".join(part for part in parts if part)
        write_json(Path(config.run) / f"{name}.json", figures)
    return figures


if __name__ == "__main__":
    main()
