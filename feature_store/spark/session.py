"""Finding or starting Spark."""

from __future__ import annotations

import os
import sys

from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from elastic_rec.feature_store.errors import DataError


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
        return builder.getOrCreate(), True
    except PySparkException as error:
        raise DataError(
            f"Spark did not start ({error}); it needs Java 17 or newer (JAVA_HOME), and a master that answers "
            "(spark_master, or spark-submit --master)"
        ) from error
