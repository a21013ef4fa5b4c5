"""Batch scoring: one Parquet part per store file, each committed by a rename, the manifest last.

    OUT/job.json              what is being scored, with what; a rerun with other settings is refused
    OUT/part-00003.parquet    user_id, item_ids list, scores list; best first
    OUT/manifest.json         parts and rows; written when all parts are there

Ranks walk through the parts in lockstep (part p goes to rank p modulo ranks), because the item table is sharded and
every top-k needs all ranks; a rank that has run out of users takes part with an empty batch. A part's content does
not depend on the number of ranks. A restart skips the parts that are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn

from elastic_rec.feature_store.batch import Histories, PrefixBatch
from elastic_rec.pipeline.errors import ConfigError
from elastic_rec.pipeline.evaluation import open_catalogue, seen_pairs
from elastic_rec.pipeline.files import write_json
from elastic_rec.pipeline.schema import ScoreConfig
from elastic_rec.pipeline.task import NextItemTask


def score_store(task: NextItemTask, model: nn.Module, *, step: int, config: ScoreConfig) -> dict:
    """Score every user of task.store into config.out. Collective. Returns figures."""
    out, world = Path(config.out), task.world
    start = time.perf_counter()
    _open_job(out, task, step=step, config=config)
    todo = [i for i in range(len(task.store.files)) if not _part(out, i).exists()]
    skipped = len(task.store.files) - len(todo)
    world.say(f"{len(todo)} parts to score, {skipped} done before")
    catalogue = open_catalogue(model, world)
    for first in range(0, len(todo), world.size):
        mine = todo[first + world.rank] if first + world.rank < len(todo) else None
        tables = []
        for histories, batch in _lockstep(task, mine, config.batch_size):
            with torch.no_grad():
                query_RD = model.query(batch.to(world.device))
                seen = seen_pairs(histories, task, "score") if config.exclude_seen else None
                ids_Rk, score_Rk = catalogue.top_k(query_RD, config.k, seen)
            tables.append(_to_arrow(task, histories, ids_Rk.cpu(), score_Rk.cpu()))
        if mine is not None:
            _commit(_part(out, mine), pa.concat_tables(tables))
    dist.barrier()
    rows = [pq.read_metadata(_part(out, i)).num_rows for i in range(len(task.store.files))]
    if world.is_main:
        parts = [{"path": _part(out, i).name, "users": n} for i, n in enumerate(rows)]
        write_json(out / "manifest.json", {"parts": parts, "users": sum(rows), "k": config.k})
    seconds = time.perf_counter() - start
    scored = sum(rows[i] for i in todo)
    return {
        "out": str(out),
        "users": sum(rows),
        "parts": len(rows),
        "skipped_parts": skipped,
        "seconds": round(seconds, 2),
        "users_per_s": round(scored / seconds, 1),
    }


def _lockstep(task: NextItemTask, file_index: int | None, batch_size: int) -> Iterator[tuple[Histories, PrefixBatch]]:
    """This rank's batches, then padding batches until every rank has run out."""
    batches = task.file_batches(file_index, batch_size=batch_size) if file_index is not None else iter(())
    while True:
        item = next(batches, None)
        someone = torch.tensor(int(item is not None), device=task.world.device)
        dist.all_reduce(someone, op=dist.ReduceOp.MAX)
        if not someone:
            return
        yield item if item is not None else task.padding_batch()


def _to_arrow(task: NextItemTask, histories: Histories, ids_Rk: torch.Tensor, score_Rk: torch.Tensor) -> pa.Table:
    real = histories.rows >= 0
    ids_Rk, score_Rk = ids_Rk[torch.from_numpy(real)], score_Rk[torch.from_numpy(real)]
    filled = ids_Rk >= 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), filled.sum(1).cumsum(0)]).to(torch.int32).numpy()
    item_ids = task.store.vocabulary("item").decode(ids_Rk[filled].numpy())
    return pa.table(
        {
            "user_id": task.store.user_ids(histories.rows[real]),
            "item_ids": pa.ListArray.from_arrays(pa.array(offsets), item_ids),
            "scores": pa.ListArray.from_arrays(pa.array(offsets), pa.array(score_Rk[filled].numpy())),
        }
    )


def _open_job(out: Path, task: NextItemTask, *, step: int, config: ScoreConfig) -> None:
    """Write job.json, or check that a restart does the same job."""
    job = {
        "run": str(Path(config.run).resolve()),
        "step": step,
        "store": task.store.manifest["hash"],
        "k": config.k,
        "exclude_seen": config.exclude_seen,
    }
    known = out / "job.json"
    if known.exists():
        was = json.loads(known.read_text())
        changed = [key for key in job if was.get(key) != job[key]]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"{out} holds scores made with {key}={was.get(key)!r}, asked for now: {job[key]!r}; "
                "give another out=DIR, or remove that folder"
            )
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no scores (no job.json): give another out=DIR")
    dist.barrier()  # nobody writes before everybody has looked
    if task.world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_json(known, job)
    dist.barrier()


def _part(out: Path, index: int) -> Path:
    return out / f"part-{index:05d}.parquet"


def _commit(path: Path, table: pa.Table) -> None:
    aside = path.with_suffix(".tmp")
    pq.write_table(table, aside, compression="zstd")
    aside.rename(path)
