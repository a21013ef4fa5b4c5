"""Impressions of the data sets: MovieLens as a ranking task, and planted ones for synthetic events.

MovieLens: ratings of one user in one second are one impression, its items the candidates; `liked` is 1 for a rating of
    4 or more, `loved` of 5, `passable` of 3 or more. Context: the user's gender, age group, occupation and zip region
    where the set has users; of items genres and release year. The events stay the histories: an impression sees the
    ratings before its second.
Synthetic (ours): an impression just before an event shows the item of that event among items drawn from global
    popularity. `click` is that item, `kindred` any item of its interest; on "tv" half of the clicks go missing, so the
    context has something to tell. What a model can know of the next item is in the history alone; a join that let the
    event itself through would rank perfectly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.datasets.files import EventFiles
from elastic_rec.feature_store.datasets.world import SyntheticConfig, World
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.sources import quote

GRADES = {"liked": 4, "loved": 5, "passable": 3}  # label -> the lowest rating that has it
DEVICES = np.array(["web", "phone", "tv"])
TV = 2
USER_COLUMNS = ["gender", "age", "occupation", "zip_region"]


@dataclass
class PlantedConfig(Options, prefix="planted."):
    """How many impressions synthetic users get, and how long their lists are."""

    per_user: int = option(8, "synthetic impressions of a user, spread over the history", at_least=1)
    num_candidates: int = option(10, "candidates of a synthetic impression", at_least=2)


def movielens_impressions(files: EventFiles, folder: Path) -> ImpressionConfig:
    """Writes impressions and attributes of items into `folder`; what to ingest them with."""
    # ml1m has age groups already, named by their first year.
    age = "age // 10 * 10" if files.name == "ml100k" else "age"
    users = (
        f"LEFT JOIN (SELECT user_id, gender, {age} AS age, occupation, substr(zip_code, 1, 3) AS zip_region "
        f"FROM {_parquet(files.users)}) USING (user_id)"
        if files.users
        else ""
    )
    context = USER_COLUMNS if files.users else []
    labels = ", ".join(
        f"list((CAST(rating AS DOUBLE) >= {lowest})::FLOAT ORDER BY file_row_number) AS {label}"
        for label, lowest in GRADES.items()
    )
    with duckdb.connect() as db:
        _copy(
            db,
            f"SELECT user_id, timestamp, list(item_id ORDER BY file_row_number) AS item_id, "
            f"{labels}{''.join(f', any_value({c}) AS {c}' for c in context)} "
            f"FROM {_parquet(files.events, numbered=True)} {users} "
            "GROUP BY user_id, timestamp ORDER BY min(file_row_number)",
            folder / "impressions.parquet",
        )
        genres = "string_split(nullif(genres, ''), '|') AS genres"
        _copy(
            db,
            f"SELECT item_id, {genres}, release_year FROM {_parquet(files.items)} ORDER BY item_id",
            folder / "items.parquet",
        )
    return ImpressionConfig(
        input=[str(folder / "impressions.parquet")],
        label_columns=list(GRADES),
        context_columns=context,
        item_input=str(folder / "items.parquet"),
        item_context_columns=["genres", "release_year"],
    )


def planted_impressions(
    files: EventFiles, config: SyntheticConfig, planted: PlantedConfig, folder: Path
) -> ImpressionConfig:
    """As movielens_impressions, from synthetic events (whole users in each row group)."""
    world = World.of(config)
    with pq.ParquetFile(files.events) as events:
        schema, writer = None, None
        for group in range(events.num_row_groups):
            table = events.read_row_group(group, columns=["user_id", "item_id", "timestamp"])
            block = _planted(table, world, planted, np.random.default_rng([config.seed, 2, group]))
            schema = schema or block.schema
            writer = writer or pq.ParquetWriter(folder / "impressions.parquet", schema)
            writer.write_table(block)
        writer.close()
    return ImpressionConfig(
        input=[str(folder / "impressions.parquet")], label_columns=["click", "kindred"], context_columns=["device"]
    )


def _planted(events: pa.Table, world: World, planted: PlantedConfig, rng: np.random.Generator) -> pa.Table:
    """N impressions of M candidates."""
    users, items, times = (events[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    starts = np.flatnonzero(np.diff(users, prepend=users[0] - 1))
    spare = np.diff(np.append(starts, len(users))) - 1  # events with another one before them
    K, M = planted.per_user, planted.num_candidates
    strata = (np.arange(K) + rng.random((len(starts), K))) / K
    place_UK = np.minimum((strata * spare[:, None]).astype(np.int64), np.maximum(spare - 1, 0)[:, None])
    at_N = np.unique((starts[:, None] + 1 + place_UK)[np.broadcast_to(spare[:, None] > 0, (len(starts), K))])
    N, C = len(at_N), len(world.item_ids_CS)
    rank_NM = np.searchsorted(np.cumsum(world.rank_probs_S)[:-1], rng.random((N, M)), side="right")
    item_NM = world.item_ids_CS[rng.integers(0, C, (N, M)), rank_NM]
    shown_N = rng.integers(0, M, N)
    item_NM[np.arange(N), shown_N] = items[at_N]
    device_N = rng.integers(0, len(DEVICES), N)
    click_NM = (item_NM == items[at_N][:, None]) & ~((device_N == TV) & (rng.random(N) < 0.5))[:, None]
    kindred_NM = world.interest_V1[item_NM] == world.interest_V1[items[at_N]][:, None]
    offsets = pa.array(np.arange(N + 1) * M, pa.int32())

    def lists(values_NM: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values_NM.ravel()))

    return pa.table(
        {
            "user_id": users[at_N],
            "timestamp": times[at_N],
            "item_id": lists(item_NM),
            "click": lists(click_NM.astype(np.float32)),
            "kindred": lists(kindred_NM.astype(np.float32)),
            "device": DEVICES[device_N],
        }
    )


def _parquet(path: Path, *, numbered: bool = False) -> str:
    return f"read_parquet({quote(str(path))}, file_row_number={str(numbered).lower()})"


def _copy(db: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    db.execute(f"COPY ({query}) TO {quote(str(path))} (FORMAT parquet)")
