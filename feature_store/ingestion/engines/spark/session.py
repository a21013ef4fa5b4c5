"""Finding or starting Spark."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from elastic_rec.feature_store.utils.errors import DataError


def open_session(master: str | None) -> tuple[SparkSession, bool]:
    """The session that runs in this process, or a new one; was it started here, and is to be stopped?"""
    if (running := SparkSession.getActiveSession()) is not None:
        return running, False
    builder = SparkSession.builder.appName("elastic-rec ingest")
    builder = builder.config("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    if master is not None:
        builder = builder.master(master)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # not under spark-submit, which chooses the executors' Python
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    try:
        with _signals_held():
            return builder.getOrCreate(), True
    except PySparkException as error:
        raise DataError(
            f"Spark did not start ({error}); it needs Java 17 or newer (JAVA_HOME), and a master that answers "
            "(spark_master, or spark-submit --master)"
        ) from error


@contextmanager
def _signals_held() -> Iterator[None]:
    """A signal inside takes effect after the block: PySpark would leave a JVM running that is not up yet.

    It also undoes PySpark's own handler of Ctrl-C, so that both signals end a job alike.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    come: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: come.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in come[:1]:
            if callable(handler := before[number]):
                handler(number, None)
            else:
                os.kill(os.getpid(), number)
