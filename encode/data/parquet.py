"""Parquet as bytes: equal tables give equal files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 1 << 20


def parquet_bytes(table: pa.Table) -> bytes:
    """Return `table` as one zstd-compressed Parquet file with fixed settings and no dates in it."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return bytes(sink.getvalue())


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Return the table in `data`; dictionary columns come back as they were written."""
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(columns=columns, use_threads=False)
