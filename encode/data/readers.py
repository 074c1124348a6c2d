"""Readers of raw logs: Parquet, Taobao UserBehavior, RecBole `.inter` and MovieLens ratings.

Each yields Arrow record batches with the columns of `RAW_COLUMNS` as they came: native types from Parquet, text from
text formats. Judging the values is the work of `encode.data.verdicts`; here only files that are not what they are
said to be are refused. Memory holds one batch (Parquet: one row group), whatever the size of the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from encode.config import SourceConfig
from encode.data.text_formats import header_of, read_lines, split_lines, without_header
from encode.errors import ConfigError, DataError

RAW_COLUMNS = ("user_id", "item_id", "category_id", "behavior", "timestamp")
OPTIONAL_COLUMNS = ("category_id", "behavior")
ROWS_PER_BATCH = 1 << 17

_PATTERNS = {
    "parquet": ("*.parquet", "*.pq"),
    "taobao": ("*.csv",),
    "recbole": ("*.inter",),
    "movielens": ("ratings*.dat", "ratings*.csv"),
}
_MOVIELENS_NAMES = {"user_id": "userId", "item_id": "movieId"}


class RawBatch(NamedTuple):
    """Consecutive rows of one file."""

    file: str
    first_row: int
    """Rows of Parquet and lines of text both count from 1, a header line included."""
    batch: pa.RecordBatch
    malformed: npt.NDArray[np.bool_] | None = None
    """Rows that did not split into the format's fields: the whole line is their user_id, the rest is null."""


def raw_files(source: SourceConfig, path: Path) -> list[Path]:
    """Return the files of a log: `path` itself, or all files below it of the reader's format, sorted by path.

    Files and folders whose name begins with `.` or `_` are bookkeeping and left out.

    Raises:
        DataError: there is no such file or folder, or no file of the format in it.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; set source.path to the log")
    patterns = _PATTERNS[source.reader]
    found = {file for pattern in patterns for file in path.rglob(pattern) if file.is_file()}
    files = sorted(f for f in found if not any(part[0] in "._" for part in f.relative_to(path).parts))
    if not files:
        have = sorted({f.suffix or f.name for f in path.rglob("*") if f.is_file()})
        raise DataError(
            f"{path}: no {' or '.join(patterns)} below it (found {', '.join(have[:5]) or 'nothing'}); "
            f"set source.path or source.reader (now {source.reader})"
        )
    return files


def read_raw(source: SourceConfig, path: Path) -> Iterator[RawBatch]:
    """Yield the rows of the log at `path`, a file or a folder, in the order of its files.

    Raises:
        DataError: a file is missing, empty, damaged, of another format or without a column; names the file, what
            was found, what was expected and the remedy.
    """
    root = path if path.is_dir() else path.parent
    for file in raw_files(source, path):
        with pa.OSFile(str(file)) as opened:
            yield from _read(source, str(file.relative_to(root)), str(file), opened)


def read_object(source: SourceConfig, name: str, data: bytes) -> Iterator[RawBatch]:
    """Yield the rows of one file that is already in memory; `name` says which, in messages and in quarantine."""
    yield from _read(source, name, name, pa.BufferReader(data))


def _read(source: SourceConfig, label: str, name: str, file: pa.NativeFile) -> Iterator[RawBatch]:
    if file.size() == 0:
        raise DataError(f"{name}: empty file, expected rows; remove it or export it again")
    if source.reader == "taobao":
        yield from _read_text(source, label, name, file, ",", RAW_COLUMNS)
    elif source.reader == "recbole":
        yield from _read_text(source, label, name, file, "\t", None)
    elif source.reader == "movielens":
        dat = b"::" in file.read(256)
        file.seek(0)
        fields = ("user_id", "item_id", "rating", "timestamp")
        yield from _read_text(source, label, name, file, "::" if dat else ",", fields if dat else None)
    else:
        yield from _read_parquet(source, label, name, file)


# --- Parquet -----------------------------------------------------------------------------------------------


def _read_parquet(source: SourceConfig, label: str, name: str, file: pa.NativeFile) -> Iterator[RawBatch]:
    # `file` must be Arrow's own: prefetching threads that call into a Python file object abort the interpreter
    # when they outlive it ("terminate called without an active exception").
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            found = _find_columns(name, schema.names, source.columns, {})
            for column in found.values():
                _check_type(name, schema.field(column))
            row = 1
            for batch in parquet.iter_batches(ROWS_PER_BATCH, columns=sorted(found.values())):
                columns = {key: batch.column(column) for key, column in found.items()}
                yield RawBatch(label, row, _complete(columns, batch.num_rows, source))
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: not a readable Parquet file ({detail}); it may be truncated: export or copy it again, "
            "or set source.reader if it has another format"
        ) from None


def _check_type(name: str, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_nested(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        raise DataError(
            f"{name}: column {field.name!r} is {field.type}, expected integers, floats, text or timestamps; "
            "set source.columns to the right column"
        )


# --- text --------------------------------------------------------------------------------------------------


def _read_text(
    source: SourceConfig, label: str, name: str, file: pa.NativeFile, separator: str, fields: tuple[str, ...] | None
) -> Iterator[RawBatch]:
    places: dict[str, int] | None = None
    if fields is not None:
        places = {key: fields.index(key) for key in RAW_COLUMNS if key in fields}
    for lines in read_lines(file, name):
        if places is None:
            header = [field.strip() for field in header_of(lines, separator)]
            names = [field.partition(":")[0] for field in header] if source.reader == "recbole" else header
            defaults = _MOVIELENS_NAMES if source.reader == "movielens" else {}
            found = _find_columns(name, names, source.columns, defaults)
            places, fields, lines = {k: names.index(v) for k, v in found.items()}, tuple(names), without_header(lines)
        if len(lines.text) == 0:
            continue
        columns, malformed = split_lines(lines, separator, len(fields or ()))
        if lines.first_row == 1 and malformed.all():
            raise DataError(
                f"{name}: not the {source.reader} format: found {lines.text[0].as_py()[:80]!r}, expected "
                f"{len(fields or ())} fields joined by {separator!r}; set source.reader"
            )
        kept = {key: columns[place] for key, place in places.items()}
        if malformed.any():
            kept["user_id"] = pc.if_else(pa.array(malformed), lines.text, kept["user_id"])
        yield RawBatch(label, lines.first_row, _complete(kept, len(lines.text), source), malformed)


# --- both --------------------------------------------------------------------------------------------------


def _find_columns(name: str, have: list[str], given: dict[Any, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """Return contract name -> column of the file, for those that it has."""
    found = {}
    for key in RAW_COLUMNS:
        column = given.get(key, defaults.get(key, key))
        if have.count(column) == 1:
            found[key] = column
        elif have.count(column) > 1:
            raise DataError(f"{name}: column {column!r} occurs {have.count(column)} times, expected once")
        elif key in given or key not in OPTIONAL_COLUMNS:
            raise DataError(
                f"{name}: no column {column!r} for {key}; found {', '.join(have[:20]) or 'none'}; "
                f"set source.columns: {{{key}: <name in the file>}}"
            )
    return found


def _complete(columns: Mapping[str, pa.Array], num_rows: int, source: SourceConfig) -> pa.RecordBatch:
    """Add the columns that the log does not have: no category (0), and one behavior for all rows."""
    defaults = {
        "category_id": pa.scalar(0, pa.int64()),
        "behavior": pa.scalar(source.default_behavior, pa.string()),
    }
    arrays = [columns[key] if key in columns else pa.repeat(defaults[key], num_rows) for key in RAW_COLUMNS]
    return pa.RecordBatch.from_arrays(arrays, names=list(RAW_COLUMNS))


def path_of(source: SourceConfig) -> Path:
    """Return where the log lies.

    Raises:
        ConfigError: the setting is missing.
    """
    if source.path is None:
        raise ConfigError(f"source.path is not set; the reader {source.reader} expects a file or a folder")
    return source.path
