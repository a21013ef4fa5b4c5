"""Work done before its consumer asks for it, in background threads, in order and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(work: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """work(item) for each item, in order. While one result is in use, the next `workers` are made or kept ready by as
    many threads; 0: no threads, each is made when it is asked for. Errors surface where their result would.

    Threads and not processes: decoding, decompression and numpy's gathers let go of Python's lock.
    """
    if workers == 0:
        yield from map(work, items)
        return
    pending: deque = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="elastic-rec-read")
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also where the consumer stops early
        pool.shutdown(wait=True, cancel_futures=True)
