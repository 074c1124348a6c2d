"""The least that a refresh must do: read the same Parquet, sort it by user and time, and write it back.

Done by tools made for it, each with the settings that were fastest here, and without the checksums and the fsync that
a refresh does. Memory is theirs to take; where DuckDB's limit is lower, it spills more and takes longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

_COLUMNS = "user_id", "item_id", "category_id", "timestamp"
"""What a refresh reads and writes: not the name of the behavior."""
_DUCKDB_MEMORY_SHARE = 0.7


def duckdb(files: Sequence[str], target: Path) -> Callable[[], object]:
    """Return the sort with DuckDB, ready to be called."""
    import duckdb
    import psutil

    limit = int(psutil.virtual_memory().total * _DUCKDB_MEMORY_SHARE / 2**20)
    settings = {
        "threads": len(os.sched_getaffinity(0)),
        "memory_limit": f"{limit}MiB",
        "temp_directory": str(target.parent / "duckdb"),
    }
    connection = duckdb.connect(config=settings)
    rows = f"SELECT {', '.join(_COLUMNS)} FROM read_parquet(?, hive_partitioning=false) ORDER BY user_id, timestamp"
    statement = f"COPY ({rows}) TO '{target}' (FORMAT parquet, COMPRESSION lz4)"
    return lambda: connection.execute(statement, [list(files)])


def polars(files: Sequence[str], target: Path) -> Callable[[], object]:
    """Return the sort with the streaming engine of Polars, ready to be called."""
    os.environ["POLARS_MAX_THREADS"] = str(len(os.sched_getaffinity(0)))
    import polars

    rows = polars.scan_parquet(list(files), hive_partitioning=False).select(_COLUMNS)
    rows = rows.sort("user_id", "timestamp")
    return lambda: rows.sink_parquet(target, compression="snappy", engine="streaming")


def tools() -> dict[str, Callable[[Sequence[str], Path], Callable[[], object]]]:
    """Return those of the two that are installed, by name."""
    return {tool.__name__: tool for tool in (duckdb, polars) if find_spec(tool.__name__)}
