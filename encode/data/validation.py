"""Validation of days: what is new is validated, what is validated stays."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

from encode.config import Config
from encode.data.daily import DayReport, report_of, validate_raw_day
from encode.data.partitions import days_of, quiet
from encode.data.raw_days import find_raw_days
from encode.errors import DataError, QualityError
from encode.outputs import MANIFEST, Manifest, read_manifest
from encode.schema import Window
from encode.storage import Storage

MAX_REFUSED_DAYS = 3
"""After so many refused days the rest is not tried: the cause is most likely the same."""
_NUM_THREADS = 8
_SECONDS_BETWEEN_LINES = 5.0


def validate_day(storage: Storage, day: date, config: Config) -> DayReport:
    """Validate one day; a no-op if it was validated before from the same data with the same settings.

    Raises:
        DataError: there are no raw data for the day, a file is not readable, or the day was validated before from
            other data or with other settings.
        QualityError: the day is refused. Its quarantine is written, its behaviors are not.
    """
    found = find_raw_days(storage, [day])
    if day not in found:
        raise DataError(f"{storage.uri}/raw/dt={day}: no raw data for this day; land the log first")
    return validate_raw_day(storage, found[day], config)


def validate_window(
    storage: Storage, window: Window, config: Config, say: Callable[[str], None] = quiet
) -> dict[str, Any]:
    """Validate the days of `window` that have raw data.

    A day that is refused does not keep the others from being published, unless it is the third.

    Returns:
        Counts of the window (`days`, `validated`, `unchanged`, `rows`, `accepted`, `rejected`, `without_category`),
        `reasons` -> rows, `missing_days` without raw data, and `warnings` as day: text.

    Raises:
        DataError: no day of the window has raw data, or one was validated before from other data.
        QualityError: names the days that were refused, and why.
    """
    raw_days = find_raw_days(storage, window.days())
    if not raw_days:
        raise DataError(f"{storage.uri}/raw: no raw data for any day of {window}; land the log, or choose other days")
    done = _validated(storage, raw_days)
    reports = [report_of(storage, raw_days[day], config, manifest) for day, manifest in done.items()]
    to_do = [raw for day, raw in raw_days.items() if day not in done]
    say(f"{len(to_do)} days to validate, {len(done)} validated before")
    refused: list[str] = []
    progress = _Progress(len(to_do), say)
    for raw in to_do:
        try:
            reports.append(validate_raw_day(storage, raw, config))
        except QualityError as error:
            refused.append(str(error))
            say(str(error))
            if len(refused) == MAX_REFUSED_DAYS:
                break
        progress.step(raw.day)
    if refused:
        raise QualityError(
            f"{len(refused)} of {len(raw_days)} days refused"
            + (", the rest was not tried" if len(refused) == MAX_REFUSED_DAYS else "")
            + ": "
            + " | ".join(refused)
        )
    return _summary(window, reports, [day for day in window.days() if day not in raw_days])


def _validated(storage: Storage, days: Iterable[date]) -> dict[date, Manifest]:
    there = days_of(key for key in storage.list("behaviors/dt=") if key.endswith("/" + MANIFEST))
    both = [day for day in days if day in there]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        manifests = pool.map(lambda day: read_manifest(storage, f"behaviors/dt={day}"), both)
        return {day: manifest for day, manifest in zip(both, manifests, strict=True) if manifest is not None}


class _Progress:
    """A line every few seconds: how many days are done, and how long the rest will take."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say, self._done = total, say, 0
        self._start = self._last = time.monotonic()

    def step(self, day: date) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._say(f"validated {self._done}/{self._total} days, last {day}, about {left:.0f} s left")


def _summary(window: Window, reports: list[DayReport], missing: list[date]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report.reasons)
    ordered = sorted(reports, key=lambda report: report.day)
    return {
        "window": str(window),
        "days": len(reports),
        "validated": sum(not report.unchanged for report in reports),
        "unchanged": sum(report.unchanged for report in reports),
        "rows": sum(report.rows for report in reports),
        "accepted": sum(report.accepted for report in reports),
        "rejected": sum(report.rejected for report in reports),
        "without_category": sum(report.without_category for report in reports),
        "reasons": dict(sorted(reasons.items())),
        "missing_days": [str(day) for day in missing],
        "warnings": [f"{report.day}: {line}" for report in ordered for line in report.warnings],
    }
