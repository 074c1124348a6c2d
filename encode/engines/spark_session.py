"""The Spark session of a process: what must be there before it starts, its settings, and its end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from encode.errors import ConfigError

_SETTINGS = {
    "spark.app.name": "encode",
    "spark.ui.showConsoleProgress": "false",
    # A task has one core, and so has what it calls.
    "spark.executorEnv.MKL_NUM_THREADS": "1",
    "spark.executorEnv.NUMBA_NUM_THREADS": "1",
    "spark.executorEnv.OMP_NUM_THREADS": "1",
    "spark.executorEnv.OPENBLAS_NUM_THREADS": "1",
}
_LOCAL_SETTINGS = {
    # Spark would listen on all interfaces, with a UI that anyone may open.
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
}
_SET_BY_PYSPARK = {"spark.app.name": "pyspark-shell", "spark.ui.showConsoleProgress": "true"}
"""What is there although nobody chose it."""


def require_pyspark() -> None:
    """Raise ConfigError unless pyspark can be imported."""
    # It warns of pandas 3, at its import and at each query; no pandas frame is made here, Arrow alone passes.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
    try:
        import pyspark.sql  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"`refresh.engine` is spark, but pyspark cannot be imported: {error}; pip install 'encode-interests[spark]'"
        ) from None


def require_java() -> None:
    """Raise ConfigError unless the Java that Spark would start is 17 or newer."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else "java"
    where = f"JAVA_HOME={home}" if home else "PATH"
    remedy = (
        "Spark needs Java 17 or newer: install it (Debian: openjdk-17-jre-headless), or set JAVA_HOME to where it is"
    )
    if shutil.which(java) is None:
        raise ConfigError(f"no java found by {where}; {remedy}")
    told = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', told)  # Java 8 calls itself 1.8
    if version is None or int(version[1]) < 17:
        found = f"Java {version[1]}" if version else f"{told.strip()[:200]!r}"
        raise ConfigError(f"found {found} by {where}; {remedy}")


def running() -> Any:
    """Return the session that this process has, whoever started it, or None."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    return SparkSession.builder.getOrCreate() if SparkContext._active_spark_context else None


def start(master: str) -> Any:
    """Start a session; what spark-defaults.conf, PYSPARK_SUBMIT_ARGS and the environment say wins over our settings."""
    from pyspark import SparkConf, SparkContext
    from pyspark.sql import SparkSession

    local = master.startswith("local")
    if local:
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    if not any(os.environ.get(name) for name in ("SPARK_CONF_DIR", "SPARK_HOME", "SPARK_SUBMIT_OPTS")):
        os.environ["SPARK_SUBMIT_OPTS"] = f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties')}"
    # Only with the JVM started is it known what those files say; the builder's settings would override them unseen.
    SparkContext._ensure_initialized()
    theirs = SparkConf()
    python = theirs.get("spark.pyspark.python", sys.executable if local else "python3")
    os.environ.setdefault("PYSPARK_PYTHON", python)  # pyspark reads the variable only
    builder = SparkSession.builder.master(master)
    for key, value in (_SETTINGS | (_LOCAL_SETTINGS if local else {})).items():
        if theirs.get(key, None) in (None, _SET_BY_PYSPARK.get(key)):
            builder = builder.config(key, value)
    return builder.getOrCreate()


def stop(session: Any) -> None:
    """Stop a session that `start` gave, and the Java process of its driver."""
    from pyspark import SparkContext

    session.stop()
    gateway = SparkContext._gateway
    SparkContext._gateway = SparkContext._jvm = None  # or the next session would call a process that has ended
    gateway.shutdown()
    if process := getattr(gateway, "proc", None):  # none under spark-submit
        process.stdin.close()
        process.wait()
