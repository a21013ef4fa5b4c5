"""The global order of an epoch, and which rank reads which row groups of it.

Units (users, or impression groups) lie in row groups. Row groups of all files are permuted and dealt into blocks.
Within a block, unit j of a group of n, in an order drawn for that group, stands at the fraction (j + u) / n, u random:

    group A, 4 units   a0   a1   a2   a3        block    b0 a0 a1 c0 b1 a2 a3 c1
    group B, 2 units   b0        b1
    group C, 2 units        c0        c1

so the block is shuffled, and every part of it holds about the same share of each of its groups. A rank therefore owns
whole row groups and decodes no others. It still has about its share of every batch; of the events too, since row groups
are cut by events. The order is a function of (counts, seed, epoch); only the ownership depends on the ranks.

A block with fewer groups than ranks is decoded by all of them, and each takes a stride of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from elastic_rec.feature_store.utils.counter_hash import counter_hash, counter_uniform
from elastic_rec.feature_store.utils.jagged import offsets_of

ROW_GROUPS_PER_BLOCK = 16
_GROUPS, _PLACES, _UNITS, _CLASSES = 1, 5, 2, 7  # tell the uses of counter_hash apart


class Order(NamedTuple):
    """What the order of an epoch is drawn from. shuffle False: it is that of the store."""

    seed: int
    epoch: int
    shuffle: bool

    def of_units(self, keys: np.ndarray) -> np.ndarray:
        """(N,) the order of a row group's units, drawn by a key of each (its row number): numbers 0..N-1."""
        if not self.shuffle:
            return np.arange(len(keys))
        return np.argsort(counter_hash(_UNITS, self.seed, self.epoch, keys), kind="stable")


class Share(NamedTuple):
    """What one rank takes of one row group: its units `picks` (numbers in the group's drawn order), which stand at
    `positions` (ascending) of the epoch. Group B of the drawing: picks [0, 1], positions [0, 4]."""

    group: int
    picks: np.ndarray
    positions: np.ndarray


class Block(NamedTuple):
    """Units [start, stop) of the epoch, and this rank's shares of it. Groups without units are in no block.

    members: all its row groups. places: of their units, group after group in drawn order, the place within the block;
    in the drawing [1, 2, 5, 6, 0, 4, 3, 7].
    """

    start: int
    stop: int
    shares: list[Share]
    members: list[int]
    places: np.ndarray


def epoch_blocks(
    num_units_G: np.ndarray,
    costs_G: np.ndarray,
    *,
    order: Order,
    rank: int,
    world_size: int,
    row_groups_per_block: int = ROW_GROUPS_PER_BLOCK,
    classes_of: Callable[[int], np.ndarray] | None = None,
) -> Iterator[Block]:
    """The blocks of an epoch, in order, with this rank's shares of them.

    num_units_G: units of each row group of the store. costs_G: what reading one costs (events), to balance ranks.
    classes_of(group): a class (int) of each of its units, in drawn order. Units of one class then stand together in a
    block, the classes in an order drawn for the block.
    """
    groups = np.flatnonzero(num_units_G)
    if order.shuffle:
        groups = groups[np.argsort(counter_hash(_GROUPS, order.seed, order.epoch, groups), kind="stable")]
    start = 0
    for members in np.array_split(groups, max(1, len(groups) // row_groups_per_block)):
        counts = num_units_G[members]
        classes = [classes_of(group) for group in members.tolist()] if classes_of and len(members) else None
        places = _places(members, counts, classes, order)
        stop = start + int(counts.sum())
        edges = offsets_of(counts)
        owner = _owners(costs_G[members], world_size)
        shares = []
        for number, group in enumerate(members.tolist()):
            positions = start + places[edges[number] : edges[number + 1]]
            if owner is None:
                picks = np.flatnonzero(positions % world_size == rank)
            elif owner[number] == rank:
                picks = np.arange(len(positions))
            else:
                continue
            picks = picks[np.argsort(positions[picks], kind="stable")]
            shares.append(Share(group, picks, positions[picks]))
        yield Block(start, stop, shares, members.tolist(), places)
        start = stop


def _places(members: np.ndarray, counts: np.ndarray, classes: list[np.ndarray] | None, order: Order) -> np.ndarray:
    """Place within the block of every unit, group after group; without classes rising within a group."""
    group_N = np.repeat(members, counts)
    j_N = np.arange(len(group_N)) - np.repeat(offsets_of(counts)[:-1], counts)
    seed, epoch, shuffle = order
    u_N = counter_uniform(_PLACES, seed, epoch, group_N, j_N) if shuffle else 0.5
    fraction_N = (j_N + u_N) / np.repeat(counts, counts)
    if classes is None:
        sorted_N = np.argsort(fraction_N, kind="stable")
    else:
        class_N = np.concatenate(classes)
        keys = counter_hash(_CLASSES, seed, epoch, int(members[0]), class_N) if shuffle else class_N
        sorted_N = np.lexsort((fraction_N, keys))
    places = np.empty(len(sorted_N), np.int64)
    places[sorted_N] = np.arange(len(sorted_N))
    return places


def _owners(costs: np.ndarray, world_size: int) -> np.ndarray | None:
    """Rank that reads each group, dearest first to the rank with the least so far; None: all ranks read all groups."""
    if len(costs) < world_size:
        return None
    owner, load = np.empty(len(costs), np.int64), np.zeros(world_size)
    for number in np.argsort(-costs, kind="stable"):
        owner[number] = np.argmin(load)
        load[owner[number]] += costs[number] + 1e-9  # groups without cost go round, too
    return owner
