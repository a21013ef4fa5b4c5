"""A trained run in Python: users and histories in, items or scores out. No dataset, no Hydra, no process group.

    run = elastic_rec.load("runs/demo/run")
    state = run.observe(None, items=[50, 181, 50], times=[887431973, 887432020, 887432054])
    run.recommend(state, k=3)                                  # [(258, 3.1), (100, 2.9), (294, 2.7)]
    state = run.observe(state, items=[258], times=[887439000])  # goes on from where the user stood

Ids are raw ids, as they were ingested. Times are seconds since 1970, or datetimes. Every call takes one user (flat
lists) or several (a list of lists, one per user), and answers in kind. How to serve from it:
docs/how-to/serve-from-python.md.

Legend: B users, T their events end to end, V items, C candidates, D width, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from elastic_rec.feature_store.batches.impression_batch import Impressions
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.windows import HistoryWindows
from elastic_rec.feature_store.reading.python_lists import (
    IdIndex,
    Lists,
    histories_after,
    newest_events,
    no_events,
    seconds_of,
)
from elastic_rec.feature_store.table.times import iso_time
from elastic_rec.feature_store.table.vocabulary import FIRST, UNKNOWN
from elastic_rec.feature_store.utils.arrow import flat_bags
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import Bags, offsets_of
from elastic_rec.models.ranking.model import RankingModel
from elastic_rec.models.towers.base import TowerOutput
from elastic_rec.models.towers.config import Time
from elastic_rec.models.towers.elastic.state import StateError, UserState
from elastic_rec.pipeline.runtime.finite import require_finite
from elastic_rec.pipeline.tasks.next_item.sharded_topk import NOTHING, from_sort_key, sort_key
from elastic_rec.pipeline.tasks.ranking.data import RankingBatch
from elastic_rec.pipeline.tasks.scoring import ALL
from elastic_rec.pipeline.training.run_folder import load_whole_model

Ids = Sequence[Any] | np.ndarray
Users = Ids | Sequence[Ids]  # one user's flat list, or a list per user
NOT_CAUSAL = "this run's tower is not causal, it has no state to go on from: give all events to observe(None, ...)"


@dataclass(frozen=True)
class UserStates:
    """What a run keeps of B users: the same number of bytes for any history. Make it with `Run.observe`.

    newest_s_B: (B,) int64, seconds since 1970 of each user's newest event, -1 without one.
    num_unknown_B: (B,) how many ids of the last `observe` the run does not know; it reads them as one unknown id.
    is_one_user: made from one user's flat lists, and answered with flat lists.
    state, output: of a causal tower; output is what the tower said last (None: it is asked again).
    histories: of the other towers: the newest data.max_history events.
    """

    newest_s_B: np.ndarray
    num_unknown_B: np.ndarray
    is_one_user: bool
    state: UserState | None = None
    output: TowerOutput | None = None
    histories: Sequences | None = None

    def __len__(self) -> int:
        return len(self.newest_s_B)

    @property
    def users(self) -> tuple[bool, int]:
        """(is_one_user, B), which the lists of every later call must fit."""
        return self.is_one_user, len(self)

    def to_bytes(self) -> bytes | list[bytes]:
        """The state of one user, or a list of them; `Run.state_from_bytes` reads it.

        Raises ValueError for towers that are not causal.
        """
        if self.state is None:
            raise ValueError(NOT_CAUSAL)
        rows = [row.tobytes() for row in self.state.to_bytes()]
        return rows[0] if self.is_one_user else rows


class Run:
    """A trained run, loaded with `load`. Not for several threads at once; each process may load it.

    columns: the event columns it reads, "item" first. labels: of a ranking run; empty for the next item.
    step: of the checkpoint. task: its settings (`task.config`) and store (`task.store`). model: the torch module.
    """

    def __init__(self, task: Any, model: Any, *, step: int) -> None:
        self.task, self.model, self.step = task, model, step
        self.columns: list[str] = task.columns
        self.is_ranking = isinstance(model, RankingModel)
        self.labels: list[str] = task.table.labels if self.is_ranking else []
        self._device = task.world.device
        self._has_states = getattr(model.tower, "has_states", False)
        self._index = {name: IdIndex(task.vocabulary(name), size) for name, size in task.rows.items()}

    @torch.inference_mode()  # an eighth faster than no_grad
    def observe(
        self,
        states: UserStates | None,
        *,
        items: Users,
        times: Users,
        columns: Mapping[str, Users] | None = None,
    ) -> UserStates:
        """The states after more events; None begins with users of whom nothing is known.

        items, times, columns: as many of each per user, oldest first; columns: the run's other event columns by name.
        A causal run reads all events. Other runs read the newest data.max_history, and cannot go on from a state.
        Raises ValueError for events out of order or older than the state, and for columns that are not the run's;
        DataError for ids of another type than the store's.
        """
        if states is not None and not self._has_states:
            raise ValueError(NOT_CAUSAL)
        given, wanted = columns or {}, self.columns[1:]
        if sorted(given) != sorted(wanted):
            raise ValueError(f"columns={sorted(given)}, but the run reads {wanted} beside the item: give these")
        events = Lists.of(items, "items", like=None if states is None else states.users)
        lengths_B, num_users = events.lengths_B, len(events.lengths_B)
        rows = {"item": self._index["item"].encode(events.flat, where="items")}
        for name in wanted:
            rows[name] = self._index[name].encode(_parallel(given[name], name, events), where=name)
        newest_B = np.full(num_users, -1) if states is None else states.newest_s_B
        times_s = seconds_of(_parallel(times, "times", events), "times")
        histories = histories_after(newest_B, lengths_B, rows, times_s)
        unknown_T = sum((ids == UNKNOWN).astype(np.int64) for ids in rows.values())
        about = {
            "newest_s_B": _last(histories),
            "num_unknown_B": np.diff(offsets_of(unknown_T)[events.offsets_B1]),
            "is_one_user": events.is_one_user,
        }
        if not self._has_states:
            most = self.task.config.data.max_history + (not self.is_ranking)  # one more, for the gap after it
            return UserStates(**about, histories=newest_events(histories, most))
        state = self.model.tower.init_state(num_users) if states is None else states.state
        output, state = self.model.fold(self._batch(histories, (newest_B >= 0).astype(np.int64)), state)
        return UserStates(**about, state=state, output=output)

    @torch.inference_mode()
    def recommend(
        self,
        states: UserStates,
        *,
        k: int = 10,
        exclude: Users = (),
        allow: Ids | None = None,
        at: Any = None,
    ) -> list[tuple[Any, float]] | list[list[tuple[Any, float]]]:
        """The k best items of each user with their scores, best first; fewer where fewer are left.

        exclude: items to leave out, per user. allow: a list of items to choose from, for all users; ids that the run
        does not know are passed over in both. at: the moment that is asked for, one or a moment per user; for runs
        with model.time=query, and only for them.
        Raises ValueError for a ranking run, and for an `at` that is missing, not wanted, or before a user's newest
        event; NonFiniteError for a query or score that is no number.
        """
        if self.is_ranking:
            raise ValueError("a ranking run scores candidates: use rank(states, candidates, context)")
        if k < 1:
            raise ValueError(f"k={k}: set at least 1")
        query_BD = self._query(states, at)
        require_finite(query_BD, "the query", row_name="user {} of the call".format)
        table_VD = self.model.embeddings.embeddings["item"].weight
        ids_V, rows_VD = torch.arange(FIRST, len(table_VD), device=self._device), table_VD[FIRST:]
        if allow is not None:
            rows = np.unique(self._index["item"].encode(allow, where="allow"))
            ids_V = torch.from_numpy(rows[rows >= FIRST]).to(self._device)
            rows_VD = table_VD.index_select(0, ids_V)
        scores_BV = query_BD @ rows_VD.T
        if scores_BV.numel():
            require_finite(scores_BV, "a score", row_name="user {} of the call".format)
        key_BV = sort_key(scores_BV, ids_V)
        key_BV[self._places(states, exclude, ids_V)] = NOTHING
        found = self._decoded(key_BV.topk(min(k, len(ids_V)), dim=1).values)
        return found[0] if states.is_one_user else found

    @torch.inference_mode()
    def rank(
        self,
        states: UserStates,
        candidates: Users,
        context: Mapping[str, Any] | None = None,
        *,
        at: Any = None,
    ) -> dict[str, np.ndarray] | list[dict[str, np.ndarray]]:
        """A probability per candidate for each label: {label: (C,) float32} for each user, in the candidates' order.

        context: the impressions' context columns by name, a value or a list of values per user; a column that is left
        out counts as empty. at: the moment of the impression, one or a moment per user; None: unknown.
        Raises ValueError for a run that does not rank, and for an `at` before a user's newest event; NonFiniteError for
        a logit that is no number.
        """
        if not self.is_ranking:
            raise ValueError("this run predicts the next item: use recommend(states, k=...)")
        shown = Lists.of(candidates, "candidates", like=states.users)
        batch = self._impressions(states, shown, context or {})
        batch.query_gap_s = torch.from_numpy(self._gaps(states, at))
        output = self._output(states) if states.histories is None else None
        logits_CL = self.model.score(batch.to(self._device), output)
        require_finite(logits_CL, "a logit", row_name="candidate {} of the call".format)
        scores_CL, edges = torch.sigmoid(logits_CL).cpu().numpy(), shown.offsets_B1
        found = [dict(zip(self.labels, scores_CL[start:stop].T, strict=True)) for start, stop in pairwise(edges)]
        return found[0] if states.is_one_user else found

    def state_from_bytes(self, data: bytes | Sequence[bytes]) -> UserStates:
        """What `UserStates.to_bytes` gave, of one user or of several.

        Raises StateError for states of another model or version, and for damaged ones; ValueError where the run's
        tower is not causal.
        """
        if not self._has_states:
            raise ValueError(NOT_CAUSAL)
        rows = [np.frombuffer(row, np.uint8) for row in ([data] if isinstance(data, bytes) else data)]
        if len(sizes := {len(row) for row in rows}) != 1:
            raise StateError(f"states of {sorted(sizes)} bytes in one call: give one or more, of one model")
        state = UserState.from_bytes(np.stack(rows), self.model.tower)
        newest_B = torch.where(state.count_B > 0, state.newest_s_B, -1).cpu().numpy()
        return UserStates(newest_B, np.zeros(len(rows), np.int64), isinstance(data, bytes), state=state)

    def _batch(self, histories: Sequences, first_B: np.ndarray) -> PrefixBatch:
        """All events but each user's first_B first ones, as one batch."""
        split, rest = self.task.config.data.split, {"seed": 0, "epoch": 0, "world_size": 1}
        about = {"size": ALL, "max_history": ALL, "stage": "score", "split": split, **rest}
        return HistoryWindows(histories, first_B=first_B, **about).batch(0, 1).to(self._device)

    def _output(self, states: UserStates) -> TowerOutput:
        """What the causal tower says of the users now."""
        if states.output is not None:
            return states.output
        nothing = self._batch(no_events(len(states), self.columns), np.zeros(len(states), np.int64))
        return self.model.fold(nothing, states.state)[0]

    def _query(self, states: UserStates, at: Any) -> torch.Tensor:
        time = self.task.config.model.time
        if (at is not None) is not (time is Time.query):
            problem = "its scores depend on when they are asked for: give at=" if at is None else "leave `at` out"
            raise ValueError(f"at={at}, but the run was trained with model.time={time.value}: {problem}")
        gap_B = torch.from_numpy(self._gaps(states, at)).to(self._device)
        if states.histories is None:
            return self.model.ask(self._output(states), gap_B)
        lengths_B = np.diff(states.histories.offsets)
        batch = self._batch(states.histories, np.maximum(lengths_B - self.task.config.data.max_history, 0))
        return self.model.query(replace(batch, query_gap_s=gap_B))

    def _gaps(self, states: UserStates, at: Any) -> np.ndarray:
        """(B,) seconds from each user's newest event to the moment `at`; -1: unknown."""
        if at is None:
            return np.full(len(states), -1)
        asked = seconds_of(at if isinstance(at, list | tuple | np.ndarray) else [at], "at")
        if len(asked) not in (1, len(states)):
            raise ValueError(f"at: {len(asked)} moments for {len(states)} users: give one, or one per user")
        asked_B, newest_B = np.broadcast_to(asked, len(states)), states.newest_s_B
        for user in np.flatnonzero(asked_B < newest_B)[:1]:
            raise ValueError(
                f"at={iso_time(int(asked_B[user]))} is before the newest event of user {user} of the call, "
                f"{iso_time(int(newest_B[user]))}: give a later one"
            )
        return np.where(newest_B >= 0, asked_B - newest_B, -1)

    def _places(self, states: UserStates, exclude: Users, ids_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(user, place in ids_V) of each excluded item that is there."""
        if not len(exclude) or not len(ids_V):
            nowhere = torch.zeros(0, dtype=torch.int64, device=self._device)
            return nowhere, nowhere
        left_out = Lists.of(exclude, "exclude", like=states.users)
        items, ids = self._index["item"].encode(left_out.flat, where="exclude"), ids_V.cpu().numpy()
        place = np.searchsorted(ids, items).clip(max=len(ids) - 1)
        is_there, owner = ids[place] == items, np.repeat(np.arange(len(states)), left_out.lengths_B)
        return torch.from_numpy(owner[is_there]).to(self._device), torch.from_numpy(place[is_there]).to(self._device)

    def _decoded(self, key_Bk: torch.Tensor) -> list[list[tuple[Any, float]]]:
        ids_Bk, score_Bk = (found.cpu().numpy() for found in from_sort_key(key_Bk))
        filled = ids_Bk >= 0
        items = self.task.vocabulary("item").decode(ids_Bk[filled]).to_pylist()
        pairs = list(zip(items, score_Bk[filled].tolist(), strict=True))
        return [pairs[start:stop] for start, stop in pairwise(offsets_of(filled.sum(1)))]

    def _impressions(self, states: UserStates, shown: Lists, context: Mapping[str, Any]) -> RankingBatch:
        """An impression for each user. A causal tower's users come without events: their output is given beside."""
        table, num_users = self.task.table, len(states)
        if unknown := sorted(set(context) - set(table.context)):
            raise ValueError(f"context={unknown}, but the run's impressions have {table.context}: leave these out")
        histories = states.histories or no_events(num_users, self.columns)
        users, none = np.arange(num_users), np.zeros(num_users, np.int64)
        candidates = self._index["item"].encode(shown.flat, where="candidates")
        impressions = Impressions(
            histories=histories,
            group=users,
            starts=histories.offsets[:-1],
            ends=histories.offsets[1:],
            times=none,
            rows=users,
            owners=users,
            owner_candidates=none,
            candidates=Bags(shown.offsets_B1, candidates),
            labels=np.full((len(candidates), len(self.labels)), np.nan, np.float32),
            context={name: self._context(name, context.get(name), states) for name in table.context},
            item_context={name: bags.take(candidates) for name, bags in table.item_bags.items()},
        )
        return RankingBatch.of(self.task.mask_impressions(impressions))

    def _context(self, name: str, values: Any, states: UserStates) -> Bags:
        if values is None:
            return Bags(np.zeros(len(states) + 1, np.int64), np.zeros(0, np.int64))
        of_each = [values] if states.is_one_user else values
        if len(of_each) != len(states):
            raise ValueError(f"context {name}: {len(of_each)} values for {len(states)} users: give one per user")
        lengths, flat = flat_bags(pa.chunked_array([pa.array(of_each)]))
        return Bags(offsets_of(lengths), self._index[name].encode(flat, where=f"context {name}"))


def load(run: str | Path, *, checkpoint: str = "best", store: str = "", device: str = "cpu") -> Run:
    """A run folder -> a Run. checkpoint: "best", "last" or a step number. device: of torch.

    store: where the run's history store is now, if it was moved; only its vocabularies are read. The digests of the
    checkpoint's files and of the vocabularies are checked.
    Raises CheckpointError for a folder that is no run or is damaged, DataError for a store that is not there, and
    ConfigError for one whose ids are not the run's.
    """
    try:
        task, model, step = load_whole_model(run, checkpoint=checkpoint, device=torch.device(device), store=store)
    except DataError as error:
        raise DataError(f"{error}. If the run's store was moved: load({str(run)!r}, store=FOLDER)") from error
    return Run(task, model, step=step)


def _parallel(values: Users, what: str, events: Lists) -> Ids:
    """Values end to end, as many for each user as there are events."""
    found = Lists.of(values, what, like=events.users)
    for user in np.flatnonzero(found.lengths_B != events.lengths_B)[:1]:
        raise ValueError(
            f"{what}: {found.lengths_B[user]} values for the {events.lengths_B[user]} items of user {user} of the call"
        )
    return found.flat


def _last(histories: Sequences) -> np.ndarray:
    """(B,) time of each user's last event, -1 without one."""
    newest_B, has_B = np.full(len(histories.rows), -1), np.diff(histories.offsets) > 0
    newest_B[has_B] = histories.times_s[histories.offsets[1:][has_B] - 1]
    return newest_B
