"""Candidates of users whose impressions come in several batches and on several ranks, held until users are complete."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from elastic_rec.pipeline.runtime.world import World

LOOK_AT = 1 << 16  # candidates: users are looked through when so many are new, and as many as are held


class OpenUsers:
    """Every user's candidates come to one rank, which holds them until it has as many as the user has in the stage.

    The reader walks through few users at a time, so that few are open. Legend: C candidates, F numbers of each.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # (C, 2) int64: user, their number; (C, F) float32
        self._held = 0

    def add(self, user_C: np.ndarray, num_C: np.ndarray, about_CF: np.ndarray) -> None:
        """user_C: any number of a user, not below 0. num_C: candidates of the user over all calls and ranks.
        about_CF: float32. Collective."""
        who_C2 = np.stack([user_C, num_C], axis=1)
        if self.world.size > 1:
            order = np.argsort(user_C % self.world.size, kind="stable")
            counts = np.bincount(user_C % self.world.size, minlength=self.world.size)
            who_C2, about_CF = exchange([who_C2[order], about_CF[order]], counts, self.world)
        self._parts.append((who_C2, about_CF))

    def take_complete(self, *, is_last: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(user_C, about_CF) of this rank's users who are complete, at last of all; not each time it is asked for."""
        num_new = sum(len(who) for who, _ in self._parts) - self._held
        if not is_last and num_new < max(LOOK_AT, self._held):
            who_C2, about_CF = self._parts[0]
            return who_C2[:0, 0], about_CF[:0]
        who_C2, about_CF = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        _, place_C, count_U = np.unique(who_C2[:, 0], return_inverse=True, return_counts=True)
        complete_C = count_U[place_C] == who_C2[:, 1]
        if is_last and not complete_C.all():
            raise RuntimeError(f"user {who_C2[~complete_C, 0][0]} has other candidates than the reader counted")
        self._parts = [(who_C2[~complete_C], about_CF[~complete_C])]
        self._held = len(self._parts[0][0])
        return who_C2[complete_C, 0], about_CF[complete_C]


def exchange(tables: list[np.ndarray], counts: np.ndarray, world: World) -> list[np.ndarray]:
    """Rows to ranks: the first counts[0] of each table to rank 0, the next counts[1] to rank 1, ... Returns the rows
    that came to this rank, in order of the senders. Collective."""
    sent = torch.from_numpy(counts).to(world.device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    received, found = received.tolist(), []
    for table in tables:
        rows = torch.from_numpy(table).to(world.device)
        come = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(come, rows, received, counts.tolist())
        found.append(come.cpu().numpy())
    return found
