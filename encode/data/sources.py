"""A raw log, wherever it comes from: what identifies its content, its rows, and the names of its items."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from encode.config import SourceConfig
from encode.data.complete_journey import DIGESTS, default_cache, find_tables, read_complete_journey, read_items
from encode.data.generate import generate
from encode.data.readers import RawBatch, path_of, raw_files, read_raw
from encode.errors import DataError


@dataclass(frozen=True)
class RawLog:
    """A log that can be read; nothing heavy happens before `batches` or `items` is called."""

    inputs: dict[str, str]
    """Digest of each file, by its name in the log; empty for a generated log, which its settings identify."""
    batches: Callable[[], Iterator[RawBatch]]
    items: Callable[[], pa.Table | None]
    """Names of the items as `schema.ITEMS`, where the log has them."""


def open_log(source: SourceConfig, cache: Path | None = None) -> RawLog:
    """Find the log that `source` names.

    Args:
        source: which reader, and where the log lies.
        cache: folder for downloads of `complete-journey`; None takes `default_cache()`.

    Raises:
        DataError, ConfigError: there is no such log, or no path is set.
    """
    if source.reader == "generated":
        return RawLog({}, partial(generate, source.generator), lambda: None)
    if source.reader == "complete-journey":
        folder = cache or default_cache()
        return RawLog(
            dict(DIGESTS),
            lambda: read_complete_journey(find_tables(source.path, folder)),
            lambda: read_items(find_tables(source.path, folder)),
        )
    path = path_of(source)
    root = path if path.is_dir() else path.parent
    inputs = {str(file.relative_to(root)): _digest(file) for file in raw_files(source, path)}
    return RawLog(inputs, lambda: read_raw(source, path), lambda: None)


def require_log(source: SourceConfig) -> None:
    """See that there is a log at all, before anything is made for it. Nothing of it is read, nothing fetched.

    Raises:
        DataError, ConfigError: there is no such log, or no path is set.
    """
    if source.reader == "complete-journey" and source.path and not source.path.exists():
        raise DataError(f"{source.path}: no such file or folder; set source.path to the wheel, or leave it out")
    if source.reader not in ("complete-journey", "generated"):
        raw_files(source, path_of(source))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
