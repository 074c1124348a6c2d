"""A raw log into daily partitions, as it came: `raw/dt=YYYY-MM-DD/part-NNNNN.landed.parquet`.

Nothing is judged here but the day. Rows without a plausible time have none: they go to
`quarantine/dt=unknown/<fingerprint>/`. Memory holds a bounded number of rows, what exceeds it waits on local disk in
compressed files. Nothing is written to the store before the whole log is read and no day of it is in conflict.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from encode.config import SourceConfig
from encode.data.parquet import parquet_bytes
from encode.data.partitions import days_of, quiet
from encode.data.readers import RawBatch
from encode.data.sources import open_log
from encode.data.verdicts import REASONS, count_reasons, read_timestamps, to_quarantine
from encode.errors import DataError, EncodeError
from encode.outputs import MANIFEST, Manifest, read_manifest, recipe, write_output
from encode.schema import SECONDS_PER_DAY, day_of, digest, number_of
from encode.storage import Storage

LANDED_SUFFIX = ".landed.parquet"
"""Marks our files, so that those of a landing that was killed are not taken for files of the owner of the log."""
UNKNOWN_DAY = "unknown"
MAX_BUFFERED_ROWS = 4_000_000
_MALFORMED = REASONS.index("malformed_row")
_NUM_THREADS = 8
_ROWS_BETWEEN_LINES = 1_000_000


@dataclass(frozen=True)
class LandingReport:
    """What a landing did, or had done before."""

    fingerprint: str
    days: tuple[date, ...]
    rows: int
    landed: int
    quarantined: int
    reasons: dict[str, int]
    """Rows without a day, by reason."""
    items: int
    """Rows of the items table, 0 where the log has none."""
    unchanged: bool
    """The same log was landed before; nothing was read or written."""

    def summary(self) -> dict[str, Any]:
        """Return the report as strings and numbers."""
        return {
            "fingerprint": self.fingerprint,
            "first_day": str(self.days[0]),
            "last_day": str(self.days[-1]),
            "days": len(self.days),
            "rows": self.rows,
            "landed": self.landed,
            "quarantined": self.quarantined,
            "reasons": self.reasons,
            "items": self.items,
            "unchanged": self.unchanged,
        }


def land(
    storage: Storage, source: SourceConfig, cache: Path | None = None, say: Callable[[str], None] = quiet
) -> LandingReport:
    """Land the log that `source` names; a second time it is a no-op.

    Args:
        storage: where the partitions go.
        source: the log; `time_unit`, `earliest` and `latest` say which times give a day.
        cache: folder for downloads of `complete-journey`.
        say: gets a line of progress now and then.

    Raises:
        DataError: the log cannot be read or has no rows, or a day of it is there already with another content.
    """
    log = open_log(source, cache)
    settings = landing_settings(source)
    fingerprint = recipe("raw", settings, log.inputs)
    prefix = f"raw/_landings/{fingerprint}"
    done = read_manifest(storage, prefix)
    if done is not None and _is_whole(storage, done):
        landed, count = int(done.counts["landed"]), len(done.details["days"])
        say(f"raw log landed before: {number_of(landed, 'row')}, {number_of(count, 'day')}")
        return _report(done, unchanged=True)
    with tempfile.TemporaryDirectory(prefix="encode-landing-") as spill:
        days = _DayBuffers(Path(spill))
        reasons = _sort_into_days(log.batches(), source, days, say)
        _refuse_dayless(source, days, reasons)
        days.flush()
        _refuse_conflicts(storage, days)
        say(f"writing {number_of(len(days.parts) - (UNKNOWN_DAY in days.parts), 'day')}")
        identity: dict[str, Any] = {"fingerprint": fingerprint, "config": settings, "inputs": log.inputs}
        _write_days(storage, days, identity)
    items = log.items()
    if items is not None:
        _write_items(storage, items, identity)
    quarantined = sum(reasons.values())
    counts = {
        "rows": days.rows,
        "landed": sum(rows for day, rows in days.counts.items() if day != UNKNOWN_DAY),
        "quarantined": days.counts.get(UNKNOWN_DAY, 0),
        "items": items.num_rows if items is not None else 0,
    }
    if counts["rows"] != counts["landed"] + counts["quarantined"] or counts["quarantined"] != quarantined:
        raise EncodeError(f"landing: counts do not reconcile: {counts}, reasons {reasons}; this is a defect")
    if quarantined:
        say(f"{number_of(quarantined, 'row')} without a day in quarantine/dt={UNKNOWN_DAY}/{fingerprint}: {reasons}")
    details = {"days": sorted(day for day in days.counts if day != UNKNOWN_DAY), "reasons": reasons}
    manifest = write_output(storage, prefix, {}, kind="landing", counts=counts, details=details, **identity)
    return _report(manifest, unchanged=False)


def _refuse_dayless(source: SourceConfig, days: _DayBuffers, reasons: dict[str, int]) -> None:
    """Raise if no row at all has a day: then a setting is wrong, not some rows."""
    name = source.path or source.reader
    if days.rows == 0:
        raise DataError(f"raw log {name}: no rows, expected at least one")
    if days.counts.get(UNKNOWN_DAY) == days.rows:
        raise DataError(
            f"raw log {name}: none of its {days.rows:,} rows has a time from {source.earliest} to {source.latest} "
            f"({', '.join(f'{reason} {count:,}' for reason, count in reasons.items())}); set source.time_unit "
            f"(now {source.time_unit}), source.columns or source.reader"
        )


def landing_settings(source: SourceConfig) -> dict[str, Any]:
    """Return the settings that decide what a log's raw partitions hold; where it lies is not one of them."""
    left_out = {"path"} if source.reader == "generated" else {"path", "generator"}
    return source.model_dump(mode="json", exclude=left_out)


class _DayBuffers:
    """Rows by day, in the order they came; the fullest days go to disk when too many rows are held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, list[pa.RecordBatch]] = {}
        self._num_held = 0
        self.rows = 0
        self.counts: dict[str, int] = {}
        self.parts: dict[str, list[Path]] = {}

    def add(self, day: str, batch: pa.RecordBatch) -> None:
        self._held.setdefault(day, []).append(batch)
        self._num_held += batch.num_rows
        self.rows += batch.num_rows
        self.counts[day] = self.counts.get(day, 0) + batch.num_rows
        if self._num_held > MAX_BUFFERED_ROWS:
            by_size = sorted(self._held, key=lambda d: (-sum(b.num_rows for b in self._held[d]), d))
            for fullest in by_size[: (len(by_size) + 1) // 2]:
                self._spill(fullest)

    def flush(self) -> None:
        """Write what is held; days in order."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._spill, sorted(self._held)))

    def _spill(self, day: str) -> None:
        batches = self._held.pop(day)
        self._num_held -= sum(batch.num_rows for batch in batches)
        paths = self.parts.setdefault(day, [])
        for same_schema in _runs(batches):
            path = self._folder / f"{day}-{len(paths):05d}"
            path.write_bytes(parquet_bytes(pa.Table.from_batches(same_schema).combine_chunks()))
            paths.append(path)


def _runs(batches: list[pa.RecordBatch]) -> list[list[pa.RecordBatch]]:
    """Group consecutive batches of equal schema: files of one log may differ in their types."""
    runs: list[list[pa.RecordBatch]] = []
    for batch in batches:
        if runs and runs[-1][0].schema.equals(batch.schema):
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return runs


def _sort_into_days(
    batches: Any, source: SourceConfig, days: _DayBuffers, say: Callable[[str], None]
) -> dict[str, int]:
    """Give each row to its day, or to the unknown day with a reason; return the reasons' counts."""
    reasons: Counter[str] = Counter()
    next_line = _ROWS_BETWEEN_LINES
    for raw in batches:
        seconds, reason = read_timestamps(raw.batch.column("timestamp"), source)
        if raw.malformed is not None:
            reason[raw.malformed] = _MALFORMED
        if reason.any():
            for batch in to_quarantine(raw, reason).to_batches():
                days.add(UNKNOWN_DAY, batch)
            reasons.update(count_reasons(reason))
        if not reason.all():
            _add_rows(raw, seconds, np.flatnonzero(reason == 0), days)
        if days.rows >= next_line:
            next_line += _ROWS_BETWEEN_LINES
            say(f"read {days.rows:,} rows, {number_of(len(days.counts), 'day')}")
    return dict(sorted(reasons.items()))


def _add_rows(raw: RawBatch, seconds: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], days: _DayBuffers) -> None:
    number = seconds[rows] // SECONDS_PER_DAY
    order = np.argsort(number, kind="stable")
    number = number[order]
    batch = raw.batch.take(pa.array(rows[order]))
    starts = np.flatnonzero(np.diff(number, prepend=-1 << 40)).tolist()
    for start, end in zip(starts, [*starts[1:], len(number)], strict=True):
        day = str(day_of(int(number[start]) * SECONDS_PER_DAY))
        days.add(day, batch.slice(start, end - start))


# --- the store ---------------------------------------------------------------------------------------------


def _names(paths: list[Path]) -> list[str]:
    return [f"part-{i:05d}{LANDED_SUFFIX}" for i in range(len(paths))]


def _refuse_conflicts(storage: Storage, days: _DayBuffers) -> None:
    """Raise if a day of the log is in the store with another content."""
    there = days_of(storage.list("raw/dt="))

    def problem(day: date) -> str | None:
        manifest = read_manifest(storage, f"raw/dt={day}")
        if manifest is None:
            foreign = [key for key in there[day] if not key.endswith(LANDED_SUFFIX)]
            return f"raw/dt={day} holds {number_of(len(foreign), 'file')} not landed from here" if foreign else None
        paths = days.parts[str(day)]
        ours = {name: digest(path.read_bytes()) for name, path in zip(_names(paths), paths, strict=True)}
        if {part.name: part.sha256 for part in manifest.parts} == ours:
            return None
        rows = manifest.counts.get("rows", 0)
        return (
            f"raw/dt={day} holds {number_of(int(rows), 'row')} of another log, this one has {days.counts[str(day)]:,}"
        )

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        problems = [p for p in pool.map(problem, [day for day in there if str(day) in days.parts]) if p]
    if problems:
        raise DataError(
            f"{storage.uri}: {number_of(len(problems), 'day')} there already with another content, nothing was "
            f"written: {'; '.join(problems[:3])}{'; ...' if problems[3:] else ''}. Use another store for another log, "
            "or remove these days first"
        )


def _write_days(storage: Storage, days: _DayBuffers, identity: dict[str, Any]) -> None:
    def write(day: str) -> None:
        paths = days.parts[day]
        known = day != UNKNOWN_DAY
        prefix = f"raw/dt={day}" if known else f"quarantine/dt={day}/{identity['fingerprint']}"
        names = _names(paths) if known else [f"part-{i:05d}.parquet" for i in range(len(paths))]
        write_output(
            storage,
            prefix,
            {name: path.read_bytes() for name, path in zip(names, paths, strict=True)},
            kind="raw" if known else "quarantine",
            counts={"rows": days.counts[day]},
            **identity,
        )

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(write, sorted(days.parts)))


def _write_items(storage: Storage, items: pa.Table, identity: dict[str, Any]) -> None:
    data = parquet_bytes(items)
    existing = read_manifest(storage, "items")
    if existing is not None and existing.parts[0].sha256 != digest(data):
        raise DataError(
            f"{storage.uri}/items: holds the items of another log; use another store, or remove items/ first"
        )
    write_output(storage, "items", {"items.parquet": data}, kind="items", counts={"rows": items.num_rows}, **identity)


def _is_whole(storage: Storage, done: Manifest) -> bool:
    """Tell whether all days of an earlier landing are still there."""
    keys = set(storage.list("raw/dt="))
    return all(f"raw/dt={day}/{MANIFEST}" in keys for day in done.details["days"])


def _report(manifest: Manifest, *, unchanged: bool) -> LandingReport:
    counts = {name: int(count) for name, count in manifest.counts.items()}
    days = tuple(date.fromisoformat(day) for day in manifest.details["days"])
    return LandingReport(
        fingerprint=manifest.fingerprint,
        days=days,
        reasons=dict(manifest.details["reasons"]),
        unchanged=unchanged,
        **counts,
    )
