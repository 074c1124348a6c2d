"""Parquet files of users' own, read whole and judged at the door."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from encode.errors import DataError
from encode.schema import BEHAVIORS, day_start, parse_day

_RULES = {
    "user_id": (1, None, "ids above 0: number users from 1 on"),
    "item_id": (1, None, "ids above 0: number items from 1 on"),
    "category_id": (0, None, "0 (none) or ids above it"),
    "label": (0, 1, "0 (not clicked) or 1 (clicked)"),
    "timestamp": (0, day_start(parse_day("2100-01-01", "latest")), "UTC seconds; divide milliseconds by 1000"),
}
"""Lowest and highest value of each column, and what is expected of it."""
LABELLED = ("user_id", "item_id", "category_id", "label", "timestamp")
BEHAVIORS_FILE, IMPRESSIONS_FILE = "behaviors.parquet", "impressions.parquet"


def behaviors_file(path: Path) -> Path:
    """Return the file of behaviors that a path means: itself, or the one in the folder."""
    return path / BEHAVIORS_FILE if path.is_dir() else path


def read_behaviors(file: Path) -> pa.Table:
    """Return rows of `schema.BEHAVIORS`, in the order of the file.

    Raises:
        DataError: no such file, not Parquet, a column is missing or of another type, or a value is out of range.
    """
    table = _read(file, {field.name: field.type for field in BEHAVIORS})
    return pa.Table.from_arrays([table[name] for name in BEHAVIORS.names], schema=BEHAVIORS)


def read_labelled(file: Path) -> pa.Table:
    """Return the columns `LABELLED` of impressions or ratings as int64, in the order of the file.

    Raises:
        DataError: as for `read_behaviors`.
    """
    return _read(file, dict.fromkeys(LABELLED, pa.int64()))


def _read(file: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected Parquet with the columns {', '.join(columns)}")
    try:
        with pq.ParquetFile(str(file)) as opened:
            have = opened.schema_arrow.names
            missing = [name for name in columns if name not in have]
            if missing:
                raise DataError(
                    f"{file}: no column {', '.join(missing)}; found {', '.join(have[:20])}; expected "
                    f"{', '.join(columns)}: rename or add columns"
                )
            table = opened.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file}: not a readable Parquet file ({detail}); export or copy it again") from None
    if table.num_rows == 0:
        raise DataError(f"{file}: found no rows, expected some; export it again")
    cast = [_cast(file, table[name].combine_chunks(), name, kind) for name, kind in columns.items()]
    return pa.table(dict(zip(columns, cast, strict=True)))


def _cast(file: Path, column: pa.Array, name: str, kind: pa.DataType) -> pa.Array:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"{file}, column {name}: found {column.null_count:,} nulls, the first in row {row + 1}; fill it"
        )
    if name == "behavior":
        return _as_dictionary(file, column, kind)
    if not pa.types.is_integer(column.type):
        raise DataError(f"{file}, column {name}: found {column.type}, expected integers: {_RULES[name][2]}")
    if pa.types.is_uint64(column.type):
        column = pc.cast(column, kind, safe=False)  # above 2^63 it turns negative, which is refused below
    values = pc.cast(column, kind)
    lowest, highest, expected = _RULES[name]
    numbers = values.to_numpy()
    bad = numbers < lowest if highest is None else (numbers < lowest) | (numbers > highest)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{file}, column {name}, row {row + 1}: found {numbers[row]}, expected {expected}")
    return values


def _as_dictionary(file: Path, column: pa.Array, kind: pa.DataType) -> pa.Array:
    plain = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain)):
        raise DataError(f"{file}, column behavior: found {column.type}, expected text such as click or buy")
    return pc.cast(column, pa.string()).dictionary_encode().cast(kind)
