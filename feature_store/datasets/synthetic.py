"""Synthetic events with planted interests: what a user does next is decided by hidden interests that drift, or by
one event a known number of events back. The best hit rate any model can reach is known (bayes.py) and stored beside.

World: V items in C interests of S = V/C; inside an interest the item of rank r (0..S-1) has probability ~ (r+1)^-zipf.
    Global popularity is the mean of the C interests.
Drift (lag = 0): a user's hidden state is (major, minor), two different interests. Before every event, with probability
    `drift`, the minor becomes major and a new minor is drawn. The event then comes from global popularity with
    probability `noise`, else from the major interest with probability `major_weight`, else from the minor one.
Lag (lag > 0): a history is `num_segments` times
        pin   filler x (lag - 1)   answer
    with actions "pin", "view", "answer". A pin is an item of a fresh, uniformly drawn interest c*; fillers are drifting
    events as above that say nothing of c*; the answer is an item of c* with probability 1 - noise, else from global
    popularity. So just one event decides an answer, `lag` events before it. Train and judge where action is "answer".

Ours, not the paper's. Legend: B users of a chunk, L their longest history, V, C, S as above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.datasets.bayes import bayes_hit_rate, write_bayes
from elastic_rec.feature_store.datasets.files import EventFiles, commit_folder, open_folder
from elastic_rec.feature_store.datasets.world import BLOCK_EVENTS, SyntheticConfig, World

__all__ = ["SyntheticConfig", "bayes_hit_rate", "generate"]

ACTIONS = pa.array(["view", "pin", "answer"])
VIEW, PIN, ANSWER = range(3)
FIRST_DAY_S = 1_500_000_000  # 2017-07-14
YEAR_S = 365 * 24 * 3600


def generate(config: SyntheticConfig, out_dir: str | Path) -> EventFiles:
    """Writes events, items and bayes.json into the folder `out_dir`, unless this very set is there already.

    events: user_id (1..), item_id (1..V), timestamp (int64 s, strictly rising per user), and with lag > 0 action; user
        after user, each in time order. Memory does not grow with the number of users or with the lag.
    items: item_id, interest, rank (the hidden truth: for judging, not for training).
    Raises DataError if out_dir holds something else or cannot be written.
    """
    out_dir, key = Path(out_dir).absolute(), {"synthetic": asdict(config), "block_events": BLOCK_EVENTS}
    if (there := open_folder(out_dir, key=key)) is not None:
        return there
    world, num_events = World.of(config), 0
    columns = [("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())]
    columns += [("action", pa.dictionary(pa.int8(), pa.string()))] if config.lag else []
    with commit_folder(out_dir, name="synthetic", key=key) as (aside, figures):
        # store_schema=False: read back as plain strings; to DuckDB and others "action" is a string either way.
        options = {"compression": "zstd", "store_schema": False, "use_dictionary": ["user_id", "item_id", "action"]}
        with pq.ParquetWriter(aside / "events.parquet", pa.schema(columns), **options) as writer:
            for block in event_blocks(config, world):
                table = pa.table(block, schema=pa.schema(columns))
                writer.write_table(table, row_group_size=table.num_rows)
                num_events += table.num_rows
        C, S = world.item_ids_CS.shape
        truth = {
            "item_id": world.item_ids_CS.ravel(),
            "interest": np.repeat(np.arange(C), S),
            "rank": np.tile(np.arange(S), C),
        }
        pq.write_table(pa.table(truth).sort_by("item_id"), aside / "items.parquet")
        write_bayes(config, aside / "events.parquet", aside / "bayes.json")
        figures |= {"source": f"made by elastic-rec, seed {config.seed}", "num_events": num_events}
    return open_folder(out_dir, key=key)


def event_blocks(config: SyntheticConfig, world: World) -> Iterator[dict]:
    """Columns of consecutive events. With lag=0 a block holds whole users (bayes.py relies on it); a lagged history
    longer than a block comes in several, its hidden state carried from one to the next."""
    for first in range(0, config.num_users, config.users_per_chunk):
        B = min(config.users_per_chunk, config.num_users - first)
        rng = np.random.default_rng([config.seed, 1, first])
        C, L = config.num_interests, config.history_length_max
        lengths_B = np.full(B, L) if config.lag else rng.integers(config.events_per_user_min, L + 1, B)
        pinned_BG = rng.integers(0, C, (B, config.num_segments))
        major_B = rng.integers(0, C, B)
        minor_B = (major_B + rng.integers(1, C, B)) % C
        now_B = FIRST_DAY_S + rng.integers(0, YEAR_S, B)
        for start in range(0, L, BLOCK_EVENTS):
            position_L = np.arange(start, min(L, start + BLOCK_EVENTS))
            interest_BL, major_B, minor_B = drifting_interests(config, rng, major_B, minor_B, len(position_L))
            action_L = np.zeros(len(position_L), np.int8)
            if config.lag:
                segment_L, offset_L = np.divmod(position_L, config.lag + 1)
                action_L[offset_L == 0], action_L[offset_L == config.lag] = PIN, ANSWER
                decided_BL = pinned_BG[:, segment_L]
                stray_BL = rng.random(decided_BL.shape) < config.noise
                decided_BL = np.where(stray_BL & (action_L == ANSWER), rng.integers(0, C, decided_BL.shape), decided_BL)
                interest_BL = np.where(action_L == VIEW, interest_BL, decided_BL)
            rank_BL = np.searchsorted(np.cumsum(world.rank_probs_S)[:-1], rng.random(interest_BL.shape), side="right")
            time_BL = now_B[:, None] + np.cumsum(gaps_s(config, rng, interest_BL.shape), axis=1)
            now_B = time_BL[:, -1]
            real_BL = position_L < lengths_B[:, None]
            users_BL = np.broadcast_to(np.arange(first + 1, first + 1 + B)[:, None], real_BL.shape)
            block = {"user_id": users_BL, "item_id": world.item_ids_CS[interest_BL, rank_BL], "timestamp": time_BL}
            block = {name: values_BL[real_BL] for name, values_BL in block.items()}
            if config.lag:
                actions = pa.array(np.broadcast_to(action_L, real_BL.shape).ravel())
                block["action"] = pa.DictionaryArray.from_arrays(actions, ACTIONS)
            yield block


def drifting_interests(
    config: SyntheticConfig, rng: np.random.Generator, major_B: np.ndarray, minor_B: np.ndarray, L: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The interest of each of L further events, and the state (major, minor) after them.

    No loop over time: the interests a user passes through form one sequence m_0 m_1 m_2 ... in which neighbours differ,
    and after d drifts the state is (m_d, m_d+1); so the state is a gather by the running count of drifts.
    """
    B, C = len(major_B), config.num_interests
    drifts_BL = np.cumsum(rng.random((B, L)) < config.drift, axis=1)
    D = int(drifts_BL[:, -1].max())
    steps = np.concatenate([minor_B[:, None] - major_B[:, None], rng.integers(1, C, (B, D))], axis=1)
    passed_BD = np.concatenate([major_B[:, None], (major_B[:, None] + np.cumsum(steps, axis=1)) % C], axis=1)
    draw_BL = rng.random((B, L))  # one number decides noise, major or minor
    minor_BL = draw_BL >= config.noise + (1 - config.noise) * config.major_weight
    interest_BL = np.take_along_axis(passed_BD, drifts_BL + minor_BL, axis=1)
    # Global popularity is the mean of the interests: an interest drawn uniformly, then an item of it.
    interest_BL = np.where(draw_BL < config.noise, rng.integers(0, C, (B, L)), interest_BL)
    last_B1 = drifts_BL[:, -1:]
    state = [np.take_along_axis(passed_BD, last_B1 + i, axis=1)[:, 0] for i in (0, 1)]
    return interest_BL, *state


def gaps_s(config: SyntheticConfig, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Whole seconds >= 1 between events: log-normal (heavy-tailed, as people's are), median six hours, or as much less
    as keeps the longest history near two years."""
    sigma = 1.5
    median_s = min(6 * 3600.0, 2 * YEAR_S / config.history_length_max / np.exp(sigma**2 / 2))
    return 1 + np.floor(median_s * np.exp(sigma * rng.standard_normal(shape, dtype=np.float32))).astype(np.int64)
