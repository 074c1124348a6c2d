"""Rows a second through the Spark engine, and what Spark's shuffle writes.

    python -m benchmarks.spark --master 'local-cluster[2,1,2048]' --rows 10000000 --buckets 16 --max-user-id 1000000

Sources are generated on the executors; work only counts. Local clusters keep their logs below SPARK_HOME.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from encode.config import Places
from encode.engines import Rows
from encode.engines.spark import SparkEngine

ROWS_PER_SOURCE = 500_000


def read(max_user_id: int, day: int) -> Iterator[Rows]:
    """Rows of one day, oldest first: users up to an id, Zipf's items in a thousand categories."""
    draw = np.random.default_rng(day)
    rows = np.empty((ROWS_PER_SOURCE, 4), np.int64)
    rows[:, 0] = draw.integers(1, max_user_id, len(rows), endpoint=True)
    rows[:, 1] = (draw.pareto(0.3, len(rows)) % 1_000_000).astype(np.int64) + 1
    rows[:, 2] = rows[:, 1] % 1000 + 1
    rows[:, 3] = 1_700_000_000 + day * 86_400 + np.sort(draw.integers(0, 86_400, len(rows)))
    yield rows


def count(bucket: int, rows: Rows) -> dict[str, int]:
    """Count the rows, and say which process did."""
    return {"bucket": bucket, "rows": len(rows), "pid": os.getpid()}


def shuffle_bytes(log: Path) -> list[int]:
    """Return the bytes that each stage wrote for the shuffle, from Spark's log of events."""
    written: dict[int, int] = {}
    for path in sorted(log.rglob("events_*")):
        for event in map(json.loads, path.read_text().splitlines()):
            if event["Event"] == "SparkListenerTaskEnd":
                bytes_ = event["Task Metrics"]["Shuffle Write Metrics"]["Shuffle Bytes Written"]
                written[event["Stage ID"]] = written.get(event["Stage ID"], 0) + bytes_
    return [total for _, total in sorted(written.items()) if total]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--master", default="local-cluster[2,1,2048]")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--buckets", type=int, default=16)
    parser.add_argument("--max-user-id", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="events-") as log:
        measure(options, Path(log))


def measure(options: argparse.Namespace, log: Path) -> None:
    """Shuffle a few times, with Spark's events logged in a folder."""
    days, rows_of = range(max(1, options.rows // ROWS_PER_SOURCE)), partial(read, options.max_user_id)
    logged = f"--conf spark.eventLog.enabled=true --conf spark.eventLog.compress=false --conf spark.eventLog.dir={log}"
    os.environ["PYSPARK_SUBMIT_ARGS"] = f"{logged} pyspark-shell"
    started = time.perf_counter()
    for day in days:
        next(rows_of(day))
    print(f"making the rows, one process: {time.perf_counter() - started:.1f} s")
    engine = SparkEngine(Places(store="-", spark_master=options.master))
    started = time.perf_counter()
    list(engine.map([0], lambda bucket: {}))
    print(f"session and first task: {time.perf_counter() - started:.1f} s")
    for _ in range(options.repeat):
        started = time.perf_counter()
        results = list(engine.shuffle(days, rows_of, range(options.buckets), options.buckets, count))
        took = time.perf_counter() - started
        rows, pids = sum(result["rows"] for result in results), {result["pid"] for result in results}
        print(
            f"{rows:,} rows, {len(days)} sources, {options.buckets} buckets, {len(pids)} processes: {took:.2f} s, ",
            end="",
        )
        print(f"{rows / took / 1e6:.2f} M rows/s", flush=True)
    engine.close()
    print("shuffled, bytes a row:", *(f"{total / (len(days) * ROWS_PER_SOURCE):.1f}" for total in shuffle_bytes(log)))


if __name__ == "__main__":
    main()
