"""A toy model's user states, folded into a store and read back."""

from __future__ import annotations

from collections import Counter

import numpy as np
from feature_store_reference import stored_histories

from elastic_rec.feature_store.states.files import StateFolder
from elastic_rec.feature_store.states.increments import Increments, LateEvents
from elastic_rec.feature_store.table.store import Store

PRIME = 2**31 - 1


EVENT = ["item", "action"]


def fold(state: tuple, events: list[tuple]) -> tuple:
    count, ordered, summed = state
    for event in events:
        value = hash(event) % PRIME
        count, ordered, summed = count + 1, (ordered * 31 + value) % PRIME, (summed + value) % PRIME
    return count, ordered, summed


def folder_of(store: Store, fingerprint: str = "a" * 32) -> StateFolder:
    return StateFolder(store, fingerprint=fingerprint, dtype="float32", state_bytes=24)


def fold_store(store: Store, late: str = "reencode", *, batch_size: int = 7, rescore: bool = False) -> Counter:
    """Brings the toy states of a store up to date. Returns counts."""
    folder, counts = folder_of(store), Counter()
    with folder.writing():
        for file in store.files:
            old = folder.open(file)
            increments = Increments(
                store,
                file,
                columns=EVENT,
                states=old,
                late_events=LateEvents(late),
                rescore=rescore,
                batch_size=batch_size,
            )
            writer = folder.writer(file)
            for span in increments:
                states = np.zeros((len(span), 3), np.int64)
                known = span.state_row_U >= 0
                if known.any():
                    states[known] = old.read(span.state_row_U[known]).view(np.int64)
                histories = span.histories
                assert span.active_U.sum() <= batch_size and len(histories.rows) == span.active_U.sum()
                events = list(zip(*(histories.columns[n].tolist() for n in EVENT), strict=True))
                for user, place in enumerate(np.flatnonzero(span.active_U)):
                    start, stop = histories.offsets[user : user + 2]
                    assert states[place, 0] == span.first_U[place], "the state holds what precedes the new events"
                    states[place] = fold(states[place].tolist(), events[start + span.first_U[place] : stop])
                writer.add(span.user_ids, span.watermarks, states.view(np.uint8))
            writer.commit()
            counts += increments.counts
    return counts


def states_of(store: Store) -> dict:
    found = {}
    for file in store.files:
        states = folder_of(store).open(file)
        rows = np.arange(len(states.user_ids))
        found |= zip(states.user_ids.to_pylist(), map(tuple, states.read(rows).view(np.int64).tolist()), strict=True)
    return found


def expected(store: Store) -> dict:
    raw = stored_histories(store, [])
    return {user: fold((0, 0, 0), [tuple(e[n] for n in EVENT) for e in events]) for user, events in raw.items()}
