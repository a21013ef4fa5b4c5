"""Trained model -> metrics: of the next item over the whole catalogue, beside counting baselines; or,
for a run with task=ranking, AUC and its kin over the impressions of the test period.

torchrun --nproc-per-node 2 pipeline/evaluate.py run=runs/ml100k
python pipeline/evaluate.py run=runs/mine store=stores/mine version=31
"""

from pathlib import Path

import elastic_rec.models  # noqa: F401 (before TorchRec: it asks whether the stack belongs together)
from elastic_rec.feature_store.batches.splits import SplitKind
from elastic_rec.feature_store.utils.atomic_write import write_json
from elastic_rec.models.retrieval.model import RetrievalModel
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.config.verbs import EvaluateConfig, Task
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.next_item.baselines import fit_baselines
from elastic_rec.pipeline.tasks.next_item.evaluation import below_baseline, evaluate, measure_baselines
from elastic_rec.pipeline.tasks.next_item.targets import Survey, require_targets, resolve_seen, survey
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask
from elastic_rec.pipeline.tasks.ranking.task import RankingTask
from elastic_rec.pipeline.tasks.registry import AnyTask
from elastic_rec.pipeline.training.run_folder import load_model, read_config
from elastic_rec.pipeline.training.validation import warn_below, warn_of_misses

KEY_OF = {"seen": Task.next_item, "min_item_count": Task.next_item, "max_history": Task.ranking}


@verb("evaluate", EvaluateConfig, distributed=True)
def main(config: EvaluateConfig, world: World) -> dict:
    return run_evaluation(config, world)


def run_evaluation(config: EvaluateConfig, world: World) -> dict:
    run = read_config(config.run)
    for key, owner in KEY_OF.items():
        if run.task is not owner and getattr(config, key):
            raise ConfigError(f"{key}={getattr(config, key)}: only for runs with task={owner}; leave it out")
    trained_on = run.data.store, run.data.version
    if config.store:  # a run's version says nothing about another store
        run.data.store, run.data.version = config.store, config.version
    elif config.version is not None:
        run.data.version = config.version
    surveys: list[Survey] = []

    def look(task: AnyTask) -> None:
        if isinstance(task, NextItemTask):
            _refuse_trained_targets(task, *trained_on)
            surveys.append(survey(task))
            require_targets(task, surveys[0], [config.stage])

    task, model, step = load_model(
        config.run, checkpoint=config.checkpoint, world=world, parallel=config.parallel, config=run, check=look
    )
    about = {"run": config.run, "stage": config.stage, "step": step, "ranks": world.size}
    about |= {"store": str(task.store.path), "version": task.store.version}
    settings = {"stage": config.stage, "length_edges": config.length_edges, "batch_size": config.batch_size}
    if isinstance(task, RankingTask):
        figures = task.evaluate(model, **settings, max_history=config.max_history)
    else:
        seen = resolve_seen(task, config.seen or run.data.seen, surveys[0])
        figures = _next_item(task, model, config, **settings, k=config.k, seen=seen)
    figures = about | figures
    if world.is_main:
        write_json(Path(config.run) / f"{_name(config)}.json", figures)
    return figures


def _refuse_trained_targets(task: NextItemTask, store: str, version: int) -> None:
    """Leave-one-out: the last events of an earlier version of what a run was trained on were training events."""
    now, kind = task.store.version, task.config.data.split.kind
    if kind is SplitKind.leave_one_out and str(task.store.path.resolve()) == store and now < version:
        raise ConfigError(
            f"version {now} of {store} is earlier than the run's, {version}: with data.split.kind=leave_one_out "
            f"its targets are among the events the run was trained on; set version={version} or later"
        )


def _next_item(task: NextItemTask, model: RetrievalModel, config: EvaluateConfig, **settings) -> dict:
    figures = evaluate(task, model, min_item_count=config.min_item_count, **settings)
    warn_of_misses(task, figures)
    exclude = settings["seen"] is Seen.exclude
    baselines = fit_baselines(task, batch_size=config.batch_size, exclude_seen=exclude)
    found = measure_baselines(task, baselines, **settings)
    below = below_baseline(figures[task.metric], found, task.metric)
    if below:
        warn_below(task, figures[task.metric], below, found[below])
    return {**figures, "baselines": found, "below_baseline": below}


def _name(config: EvaluateConfig) -> str:
    """Of the file with the figures: metrics, and what differs from a plain call."""
    version = "" if config.version is None else f"g{config.version}"
    stage = config.stage * (config.stage != "test")
    parts = [stage, config.max_history, config.store.rstrip("/").rpartition("/")[2], version, config.seen]
    return "_".join(["metrics", *(str(part) for part in parts if part)])


if __name__ == "__main__":
    main()
