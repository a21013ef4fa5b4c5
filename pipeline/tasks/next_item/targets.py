"""What is predicted: how many targets a store has in each stage, which of them the user has met before, and the policy
for items already seen that follows.

    user     a b c a d | a        target a, 2 events back: repeat_recent
             a ... 64 others | a   farther back than RECENT: repeat_far
             a b c d | e          new
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from elastic_rec.feature_store.batches.examples import targets_at
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import SplitConfig, SplitKind, split_bounds
from elastic_rec.feature_store.table.vocabulary import UNKNOWN
from elastic_rec.feature_store.utils.jagged import span_indices
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.next_item.data import NextItemData

KINDS = ("repeat_recent", "repeat_far", "new")
RECENT = 64  # newest events before a target
FEW_REPEATS = 0.05  # share of training targets below which auto leaves out seen items
COUNTED = 4  # users with fewer events than this are counted one by one


class HeldOut(NamedTuple):
    """(B,) each: events before the target, its item (PAD: no target), index into KINDS, and whether it is ranked.

    A user without a target is not ranked, nor is a target that the run does not know.
    """

    before: np.ndarray
    item: np.ndarray
    kind: np.ndarray
    ranked: np.ndarray

    @property
    def num_unknown(self) -> int:
        """Targets that the run has no row for."""
        return int((self.item == UNKNOWN).sum())


def held_out_targets(histories: Sequences, split: SplitConfig, stage: str) -> HeldOut:
    """stage: valid or test. histories: the run's ids, newer ones as UNKNOWN (task.mask_new_ids)."""
    place_B = getattr(split_bounds(split, histories), stage)
    before_B = place_B.clip(min=0)
    item_B, _ = targets_at(histories, np.where(place_B >= 0, histories.offsets[:-1] + place_B, -1))
    return HeldOut(before_B, item_B, target_kinds(histories, before_B, item_B), item_B > UNKNOWN)


def target_kinds(histories: Sequences, before_B: np.ndarray, target_B: np.ndarray) -> np.ndarray:
    """(B,) index into KINDS of each user's target, given the user's first before_B events."""
    begins = histories.offsets[:-1]
    owner = np.repeat(np.arange(len(before_B)), before_B)
    events = span_indices(begins, before_B)
    same = histories.columns["item"][events] == target_B[owner]
    newest_B = np.full(len(before_B), -1)
    np.maximum.at(newest_B, owner[same], events[same] - begins[owner[same]])
    kinds_B = np.where(before_B - newest_B <= RECENT, KINDS.index("repeat_recent"), KINDS.index("repeat_far"))
    return np.where(newest_B < 0, KINDS.index("new"), kinds_B)


def is_repeat(histories: Sequences) -> np.ndarray:
    """(T,) whether the event's item occurs earlier in its user's history."""
    items = histories.columns["item"]
    owner = np.repeat(np.arange(len(histories.rows)), np.diff(histories.offsets))
    key = owner * (items.max(initial=0) + 1) + items
    order = np.argsort(key, kind="stable")
    repeat = np.zeros(len(items), bool)
    repeat[order[1:]] = key[order[1:]] == key[order[:-1]]
    return repeat


@dataclass
class Survey:
    """Counts over a whole store. users_by_events: users with 0, 1, ... events, the last entry with COUNTED or more."""

    train: int
    repeats: int
    valid: int
    test: int
    users_by_events: list[int]
    first_s: int
    last_s: int

    @property
    def repeat_share(self) -> float:
        """Share of the training targets that the user has met before."""
        return self.repeats / max(self.train, 1)


def survey(task: NextItemData) -> Survey:
    """One pass over the store, each rank its share. Collective."""
    counts, by_events = np.zeros(4, np.int64), np.zeros(COUNTED + 1, np.int64)
    times = [np.array([np.iinfo(np.int64).max, np.iinfo(np.int64).max])]  # first, -last
    for histories in task.histories(batch_size=256 * task.world.size):
        bounds, begins = split_bounds(task.config.data.split, histories), histories.offsets[:-1]
        lengths_B = np.diff(histories.offsets)
        trained = span_indices(begins + 1, np.maximum(bounds.train_end - 1, 0))
        known = histories.columns["item"] > UNKNOWN
        counts += [
            known[trained].sum(),
            (known & is_repeat(histories))[trained].sum(),
            *(known[(begins + place)[place >= 0]].sum() for place in (bounds.valid, bounds.test)),
        ]
        by_events += np.bincount(np.minimum(lengths_B[histories.rows >= 0], COUNTED), minlength=COUNTED + 1)
        if len(histories.times_s):
            times.append(np.array([histories.times_s.min(), -histories.times_s.max()]))
    sums = torch.from_numpy(np.concatenate([counts, by_events])).to(task.world.device)
    first_last = torch.from_numpy(np.min(times, axis=0)).to(task.world.device)
    dist.all_reduce(sums)
    dist.all_reduce(first_last, op=dist.ReduceOp.MIN)
    return Survey(*sums[:4].tolist(), sums[4:].tolist(), int(first_last[0]), -int(first_last[1]))


def require_targets(task: NextItemData, found: Survey, stages: list[str]) -> None:
    """Raises ConfigError where a stage has no target, with what the store has instead."""
    for stage in stages:
        if getattr(found, stage) == 0:
            raise ConfigError(f"no user of {task.store.path} has a {_NAMES[stage]} target: {_why(task, found)}")


_NAMES = {"train": "training", "valid": "validation", "test": "test"}


def _why(task: NextItemData, found: Survey) -> str:
    names = [*(str(number) for number in range(COUNTED)), f"{COUNTED} or more"]
    users = ", ".join(f"{users} with {name}" for name, users in zip(names, found.users_by_events, strict=True) if users)
    split = task.config.data.split
    if split.kind is SplitKind.leave_one_out:
        need = "data.split.kind=leave_one_out trains on users with 4 events or more, validates with 3, tests with 2"
    else:
        first, last = (np.datetime64(moment, "s") for moment in (found.first_s, found.last_s))
        need = (
            f"data.split.valid_time={split.valid_time}, test_time={split.test_time}, and events are from {first} to "
            f"{last} (UTC); a training target needs two events before valid_time, another target one event before it"
        )
    return f"its users by events are {users}; {need}"


def resolve_seen(task: NextItemData, asked: Seen, found: Survey | None = None) -> Seen:
    """keep or exclude; what `auto` comes to is said aloud. found: of this store, where there is one. Collective."""
    if asked is not Seen.auto:
        return asked
    share = (found or survey(task)).repeat_share
    choice = Seen.exclude if share < FEW_REPEATS else Seen.keep
    what = "left out of" if choice is Seen.exclude else "kept in"
    task.world.log(
        f"seen=auto: {share:.1%} of the training targets repeat an item of their user, so items already seen are "
        f"{what} lists and figures (seen={choice.value}); {FEW_REPEATS:.0%} is the bound, data.seen=keep or exclude "
        "overrides it"
    )
    return choice
