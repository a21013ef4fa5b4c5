"""How a verb ends when it cannot go on: one line on stderr that says what happened and what to do, and an exit code.

    0 done    1 a wrong config key (Hydra's message), or a fault of the program (a traceback)
    2 what the user gave or the machine lacks    3 no source of a public data set answers
    4 another rank was lost, or hangs    75 interrupted by a signal

HYDRA_FULL_ERROR=1 shows the traceback of any of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import duckdb
import pyarrow as pa
import yaml

from elastic_rec.feature_store.datasets import DatasetUnavailable
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.runtime import interrupts
from elastic_rec.pipeline.runtime.errors import CheckpointError, ConfigError, NonFiniteError

USER_ERRORS = (DataError, ConfigError, CheckpointError, NonFiniteError)
EXIT_USER = 2
EXIT_UNAVAILABLE = 3
EXIT_LOST_RANK = 4

AGAIN = "run it again (train: with run.resume=true)"
# errno -> what to do. What happened is the system's own text.
REMEDIES = {
    errno.ENOSPC: f"free space on that disk or write elsewhere, then {AGAIN}",
    errno.EDQUOT: f"free some of your quota or write elsewhere, then {AGAIN}",
    errno.EFBIG: f"raise the limit on file sizes (ulimit -f) or write elsewhere, then {AGAIN}",
    errno.EROFS: "that disk is mounted read-only: mount it writable, or write elsewhere",
    errno.EACCES: "give this user the right to it (chmod, chown), or name another path",
    errno.EPERM: "give this user the right to it (chmod, chown, chattr), or name another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or use fewer threads, data.ingest.num_buckets or ranks",
    errno.ENFILE: "the machine has no file descriptors left: end other processes, or raise fs.file-max",
    errno.ENOENT: "check the path; if it was there a moment ago, look for who removes it",
    errno.ENOTDIR: "a part of the path is a file where a folder is needed: name another path",
    errno.EISDIR: "a folder is where a file is needed: name a file",
    errno.EEXIST: "something is in the way: remove it, or name another path",
    errno.ENOTEMPTY: "something is in the way: remove it, or name another path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "links go in a circle: name another path",
    errno.EXDEV: "the path and its temporary files must be on one disk",
    errno.ESTALE: f"the network disk has lost the file: mount it again, then {AGAIN}",
    errno.EIO: "the disk cannot be read or written: look at the kernel's log (dmesg), copy the data to another disk",
    errno.ENOTCONN: f"the network disk is not connected: mount it again, then {AGAIN}",
    errno.ETXTBSY: "another process runs or writes that file: wait for it, or name another path",
    errno.EBUSY: "another process uses it: wait for it, or name another path",
    errno.EPIPE: "whoever read the output has ended: run it again without the pipe for the last lines",
    errno.ENOLCK: "that disk cannot lock files: use a disk that can",
    errno.EOPNOTSUPP: "that disk cannot do it: use another disk",
    errno.ECONNREFUSED: "nothing listens there: check the address (AWS_ENDPOINT_URL, spark_master) and the network",
    errno.ETIMEDOUT: "no answer came: check the address, the network and the mounts",
    errno.EHOSTUNREACH: "check the address and the network",
    errno.ENETUNREACH: "check the address and the network",
    errno.EADDRINUSE: "another job uses that port: give torchrun another --master-port or --rdzv-endpoint",
    errno.EAGAIN: "the machine starts no more processes or threads: raise the limit (ulimit -u), or use fewer threads",
}
# Whatever met one of these, and whatever it took it for, they are the cause.
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)
NO_MEMORY = (
    "out of memory{detail}; take a machine with more, or lower data.ingest.memory_limit and threads (ingest), "
    "optim.global_batch_size and data.max_history (train), batch_size, window and part_rows (evaluate, score)"
)
# Longest first: "Too many open files in system" holds "Too many open files".
_TEXTS = {os.strerror(number): number for number in sorted(REMEDIES, key=lambda n: -len(os.strerror(n)))}
_PATH = re.compile(r"""["'](/[^"']+|[\w.+-]+://[^"']+)["']""")
_MEMORY = re.compile(r"can't allocate memory|out of memory|std::bad_alloc|Cannot allocate memory|malloc of size", re.I)
# What torch says in place of the system's error that its writer met.
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos|failed writing file")


class Ending(NamedTuple):
    """A process's exit code, and its last line on stderr."""

    code: int
    line: str


def ending_of(error: BaseException) -> Ending | None:
    """None: a fault of the program, whose traceback is wanted."""
    if isinstance(error, DatasetUnavailable):
        return Ending(EXIT_UNAVAILABLE, f"error: {error}")
    if isinstance(error, USER_ERRORS):
        is_exhausted = any(_errno(cause, str(cause)) in _EXHAUSTED for cause in _causes(error))
        return Ending(EXIT_USER, f"error: {(is_exhausted and explain(error)) or error}")
    if isinstance(error, interrupts.Interrupted):
        return Ending(interrupts.EXIT_INTERRUPTED, str(error))
    if (name := interrupts.requested()) or isinstance(error, KeyboardInterrupt):
        # Libraries turn what our handler raised into errors of their own; PySpark puts its handler in place of ours.
        line = f"interrupted by {name or 'SIGINT'}; what is committed stays: run the same command again"
        return Ending(interrupts.EXIT_INTERRUPTED, line)
    line = explain(error)
    return line and Ending(EXIT_USER, f"error: {line}")


def explain(error: BaseException) -> str | None:
    """What the machine or a file lacks, and what to do, in one line; None where that is not what went wrong."""
    for each in (causes := list(_causes(error))):
        text = " ".join(str(each).split())
        if isinstance(each, MemoryError | pa.ArrowMemoryError | duckdb.OutOfMemoryException) or (
            isinstance(each, RuntimeError | OSError) and _MEMORY.search(text)
        ):
            return NO_MEMORY.format(detail=f" ({text[:200]})" if text else "")
        if isinstance(each, yaml.YAMLError):
            return f"not readable as YAML: {text}; mend that file, or make it again"
        if (number := _errno(each, text)) is not None:
            return _of_system(each, number, text, places=[n for one in causes for n in getattr(one, "__notes__", ())])
        if isinstance(each, OSError | duckdb.IOException):
            return f"{text or type(each).__name__}: check the path, the disk and the network, then run it again"
    return None


def end(ending: Ending, *, rank: int | None = None, size: int = 1) -> None:
    """Print the line and end the process, without Python's clean-up: peers may be inside a collective."""
    line = ending.line
    if rank is not None and size > 1:
        line = re.sub(r"^error\b", f"error [rank {rank}]", line)
    if os.environ.get("HYDRA_FULL_ERROR") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(line, file=sys.stderr, flush=True)
    tell_launcher(line)
    quit_now(ending.code)


def quit_now(code: int) -> None:
    """End without a word. What was printed before is not lost, unless stdout is (a full disk, a closed pipe)."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def tell_launcher(line: str) -> None:
    """Let torchrun's last block name the cause: it reads it from this file."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(path, "w") as file:  # the line itself is on stderr
        json.dump({"message": message}, file)


def in_thread(failed: threading.ExceptHookArgs) -> None:
    """What threading.excepthook is to do: TensorBoard writes in a thread."""
    line = failed.exc_value and explain(failed.exc_value)
    if line is None:
        threading.__excepthook__(failed)
    else:
        print(f"warning, in a thread: {line}", file=sys.stderr, flush=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it says it came from, and what a collective checkpoint met on each rank."""
    seen: list[BaseException] = []
    todo = [error]
    while todo:
        each = todo.pop(0)
        if each is None or any(each is one for one in seen):
            continue
        seen.append(each)
        yield each
        todo += [cause for cause, *_ in getattr(each, "failures", {}).values()]  # torch's CheckpointException
        todo += getattr(each, "exceptions", ())  # ExceptionGroup
        todo.append(each.__cause__)
        if _TORCH_WRITER.search(str(each)):
            todo.append(each.__context__)


def _errno(error: BaseException, text: str) -> int | None:
    """The system's error number, from the exception or from the text that libraries made of it."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return error.errno
    if isinstance(error, OSError | duckdb.Error | pa.ArrowException | RuntimeError):
        return next((number for words, number in _TEXTS.items() if words in text), None)
    return None


def _of_system(error: BaseException, number: int, text: str, *, places: list[str]) -> str:
    """places: notes of the code that was writing (atomic_write.at_place), for errors that name no path."""
    path = getattr(error, "filename", None)
    if path is None and (found := _PATH.search(text)):
        path = found[1]
    if path is None and places:
        path = places[0]
    if (other := getattr(error, "filename2", None)) is not None:
        path = f"{path} -> {other}"
    what = os.strerror(number)
    if number == errno.EMFILE:
        what = f"{what}, this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    where = f"{os.fsdecode(path) if isinstance(path, bytes) else path}: " if path is not None else ""
    return f"{where}{what}: {REMEDIES[number]}" if where else f"{what} ({text[:200]}): {REMEDIES[number]}"
