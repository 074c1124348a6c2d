"""One raw day into validated behaviors and quarantine, whole or not at all.

`raw/dt=D/...` gives `behaviors/dt=D/part-*.parquet` and `quarantine/dt=D/` with the rejected rows, the result of
Great Expectations (`result.json`) and its page (`index.html`). Quarantine is complete before behaviors is, so that a
published day always has its page. A day that is refused publishes no behaviors; its rejected rows, result and page
are kept under `quarantine/dt=D/refused-<fingerprint>/`, out of the way of a later try with other data or settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from encode.config import Config
from encode.data.expectations import Judgment, judge_day
from encode.data.landing import landing_settings
from encode.data.parquet import parquet_bytes
from encode.data.raw_days import RawDay, read_raw_day
from encode.data.readers import RAW_COLUMNS, RawBatch
from encode.data.verdicts import REASONS, Verdict, count_reasons, duplicates, judge, to_quarantine
from encode.errors import DataError, EncodeError, QualityError
from encode.outputs import Manifest, read_manifest, recipe, write_output
from encode.schema import BEHAVIORS, QUARANTINE, fingerprint
from encode.storage import Storage

_DUPLICATE = REASONS.index("duplicate")
_ROWS_PER_PART = 1 << 22
"""A file of behaviors is read as a whole, by several at a time."""


@dataclass(frozen=True)
class DayReport:
    """What validation found in one day."""

    day: date
    rows: int
    accepted: int
    rejected: int
    without_category: int
    """Accepted rows whose category is 0."""
    reasons: dict[str, int]
    warnings: tuple[str, ...] = ()
    """Failed expectations that do not refuse the day, and hints about files that mix time units."""
    unchanged: bool = False
    """The day was validated before, from the same data with the same settings."""


@dataclass(frozen=True)
class _Judged:
    """All rows of a day with their verdicts, batch by batch."""

    batches: list[RawBatch]
    verdicts: list[Verdict]

    def reasons(self) -> dict[str, int]:
        return count_reasons(np.concatenate([v.reason for v in self.verdicts]))


def validate_raw_day(storage: Storage, raw: RawDay, config: Config) -> DayReport:
    """Validate one day; a no-op if it was validated before from the same data with the same settings.

    Raises:
        DataError: a file is not readable, or the day was validated before from other data or with other settings.
        QualityError: the day is refused. Its quarantine is written, its behaviors are not.
    """
    if done := read_manifest(storage, f"behaviors/dt={raw.day}"):
        return report_of(storage, raw, config, done)
    judged = _judge_rows(raw, storage, config)
    judgment = judge_day(raw.day, judged.verdicts, config.validation)
    report = _report(raw.day, judged, judgment)
    refusal = _refusal(report, judgment, config)
    if judgment.rejected != report.rejected:
        raise EncodeError(
            f"validation of {raw.day}: Great Expectations counted {judgment.rejected} rejected rows, the masks "
            f"{report.rejected}; nothing was written, this is a defect"
        )
    identity = _identity(raw, config)
    mark = identity["fingerprint"][:12]
    quarantine = f"quarantine/dt={raw.day}" + (f"/refused-{mark}" if refusal else "")
    _write_quarantine(storage, quarantine, judged, judgment, report, identity)
    if refusal:
        raise QualityError(
            f"day {raw.day} refused, no behaviors published: {refusal}. Rejected rows, result.json and index.html are "
            f"in {storage.uri}/{quarantine}; land corrected data, or change validation or source in the settings"
        )
    _write_behaviors(storage, judged, report, identity, quarantine)
    return report


def report_of(storage: Storage, raw: RawDay, config: Config, done: Manifest) -> DayReport:
    """Return the report of a day that was validated before.

    Raises:
        DataError: it was validated from other data or with other settings than now.
    """
    identity = _identity(raw, config)
    if done.fingerprint != identity["fingerprint"]:
        changed = [] if done.inputs == identity["inputs"] else ["the raw data"]
        old, new = _flat(done.config), _flat(identity["config"])
        changed += sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        # With equal data and settings only the version of this package differs: what was validated stays valid.
        if changed:
            raise DataError(
                f"{storage.uri}/behaviors/dt={raw.day}: validated before, but {', '.join(changed)} changed since; "
                f"outputs are immutable: remove behaviors/dt={raw.day} and quarantine/dt={raw.day}, then run again"
            )
    counts = {key: int(count) for key, count in done.counts.items()}
    return DayReport(
        raw.day,
        counts["raw_rows"],
        counts["rows"],
        counts["rejected"],
        counts["without_category"],
        dict(done.details["reasons"]),
        tuple(done.details["warnings"]),
        unchanged=True,
    )


def _identity(raw: RawDay, config: Config) -> dict[str, Any]:
    settings = {
        "source": {k: v for k, v in landing_settings(config.source).items() if k != "generator"},
        "validation": config.validation.model_dump(mode="json"),
    }
    inputs = {f"raw/dt={raw.day}": fingerprint(raw.digests)}
    return {"fingerprint": recipe("behaviors", settings, inputs), "config": settings, "inputs": inputs}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


# --- rows --------------------------------------------------------------------------------------------------


def _judge_rows(raw: RawDay, storage: Storage, config: Config) -> _Judged:
    empty = pa.RecordBatch.from_arrays([pa.nulls(0)] * len(RAW_COLUMNS), names=list(RAW_COLUMNS))
    batches = list(read_raw_day(storage, raw, config.source)) or [RawBatch("", 1, empty)]
    verdicts = [judge(batch, raw.day, config.source, config.validation.behaviors) for batch in batches]
    if config.validation.reject_duplicates:
        _mark_duplicates(verdicts)
    return _Judged(batches, verdicts)


def _mark_duplicates(verdicts: Sequence[Verdict]) -> None:
    accepted = [np.flatnonzero(v.reason == 0) for v in verdicts]
    columns = [
        np.concatenate([getattr(v, name)[rows] for v, rows in zip(verdicts, accepted, strict=True)])
        for name in ("user_id", "item_id", "category_id", "timestamp")
    ]
    names = pa.chunked_array([v.behavior for v in verdicts], pa.string()).combine_chunks().dictionary_encode()
    codes = names.indices.fill_null(-1).to_numpy().astype(np.int64)
    columns.append(codes[np.concatenate([v.reason for v in verdicts]) == 0])
    found = duplicates(columns)
    ends = np.cumsum([len(rows) for rows in accepted])[:-1]
    for verdict, rows, repeated in zip(verdicts, accepted, np.split(found, ends), strict=True):
        verdict.reason[rows[repeated]] = _DUPLICATE


def _report(day: date, judged: _Judged, judgment: Judgment) -> DayReport:
    rows = sum(len(v.reason) for v in judged.verdicts)
    rejected = sum(int((v.reason != 0).sum()) for v in judged.verdicts)
    without = sum(int(((v.reason == 0) & (v.category_id == 0)).sum()) for v in judged.verdicts)
    hints = tuple(_mixed_units(judged))
    return DayReport(day, rows, rows - rejected, rejected, without, judged.reasons(), judgment.warnings + hints)


def _mixed_units(judged: _Judged) -> list[str]:
    """Return a line for each file in which some times are right and others look like another unit."""
    by_file: dict[str, np.ndarray[Any, Any]] = {}
    for raw, verdict in zip(judged.batches, judged.verdicts, strict=True):
        counts = np.bincount(verdict.reason, minlength=len(REASONS))
        by_file[raw.file] = by_file.get(raw.file, 0) + counts
    lines = []
    for file, counts in by_file.items():
        odd = {r: int(n) for r, n in zip(REASONS, counts, strict=True) if n and r.startswith("timestamp_looks_like_")}
        if odd and counts[0]:
            lines.append(f"{file}: mixed time units: {counts[0]} rows fit, others do not: {odd}")
    return lines


def _refusal(report: DayReport, judgment: Judgment, config: Config) -> str | None:
    """Return why the day is refused, or None."""
    problems = []
    limit = config.validation.max_rejected_share
    if report.rows and report.rejected / report.rows > limit:
        named = ", ".join(f"{reason} {count}" for reason, count in sorted(report.reasons.items(), key=lambda r: -r[1]))
        problems.append(
            f"{report.rejected:,} of {report.rows:,} rows rejected ({report.rejected / report.rows:.2%}; {named}), "
            f"expected at most {limit:.2%}"
        )
        hints = [reason for reason in report.reasons if reason.startswith("timestamp_looks_like_")]
        if hints:
            unit = hints[0].removeprefix("timestamp_looks_like_")
            problems.append(f"times look like {unit}, source.time_unit is {config.source.time_unit}")
    problems += [line for line in judgment.failed if not problems or "(reason)" not in line]
    return "; ".join(problems) or None


# --- outputs -----------------------------------------------------------------------------------------------


def _details(report: DayReport) -> dict[str, Any]:
    return {"reasons": report.reasons, "warnings": list(report.warnings)}


def _write_quarantine(
    storage: Storage,
    prefix: str,
    judged: _Judged,
    judgment: Judgment,
    report: DayReport,
    identity: dict[str, Any],
) -> None:
    pairs = zip(judged.batches, judged.verdicts, strict=True)
    tables = [to_quarantine(raw, verdict.reason) for raw, verdict in pairs if verdict.reason.any()]
    table = pa.concat_tables([QUARANTINE.empty_table(), *tables])
    if table.num_rows != report.rejected:
        raise EncodeError(f"validation of {report.day}: {table.num_rows} rows in quarantine, counted {report.rejected}")
    write_output(
        storage,
        prefix,
        {"part-00000.parquet": parquet_bytes(table), "result.json": judgment.result, "index.html": judgment.page},
        kind="quarantine",
        rows={"part-00000.parquet": table.num_rows},
        columns=_columns(QUARANTINE),
        counts={"rows": table.num_rows, "raw_rows": report.rows},
        details=_details(report),
        **identity,
    )


def _write_behaviors(
    storage: Storage, judged: _Judged, report: DayReport, identity: dict[str, Any], quarantine: str
) -> None:
    table = _behaviors(judged.verdicts)
    if table.num_rows + report.rejected != report.rows:
        raise EncodeError(
            f"validation of {report.day}: {table.num_rows} behaviors and {report.rejected} rejected rows do not add up "
            f"to {report.rows} raw rows; behaviors were not published, this is a defect"
        )
    starts = range(0, max(table.num_rows, 1), _ROWS_PER_PART)
    parts = {f"part-{number:05d}.parquet": table.slice(start, _ROWS_PER_PART) for number, start in enumerate(starts)}
    write_output(
        storage,
        f"behaviors/dt={report.day}",
        {name: parquet_bytes(part) for name, part in parts.items()},
        kind="behaviors",
        rows={name: part.num_rows for name, part in parts.items()},
        columns=_columns(BEHAVIORS),
        counts={
            "rows": table.num_rows,
            "raw_rows": report.rows,
            "rejected": report.rejected,
            "without_category": report.without_category,
            "users": len(pc.unique(table["user_id"])),
        },
        details=_details(report) | {"quarantine": quarantine},
        **identity,
    )


def _behaviors(verdicts: Sequence[Verdict]) -> pa.Table:
    """Return the accepted rows in the order of the source; the dictionary of behaviors is sorted."""
    accepted = [v.reason == 0 for v in verdicts]
    columns = [
        pa.array(np.concatenate([getattr(v, name)[keep] for v, keep in zip(verdicts, accepted, strict=True)]))
        for name in ("user_id", "item_id", "category_id", "timestamp")
    ]
    names = pa.chunked_array(
        [v.behavior.filter(pa.array(keep)) for v, keep in zip(verdicts, accepted, strict=True)], pa.string()
    ).combine_chunks()
    dictionary = pc.unique(names).sort()
    columns.insert(3, pa.DictionaryArray.from_arrays(pc.index_in(names, dictionary), dictionary))
    return pa.Table.from_arrays(columns, schema=BEHAVIORS)


def _columns(schema: pa.Schema) -> dict[str, str]:
    return {column.name: str(column.type) for column in schema}
