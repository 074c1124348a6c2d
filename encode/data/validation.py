"""Validation of days: what is new is validated, what is validated stays."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

from encode.config import Config
from encode.data.daily import DayReport, changes, report_of, validate_raw_day
from encode.data.partitions import published_days, quiet, waiting_days
from encode.data.profiles import Past
from encode.data.raw_days import find_raw_days
from encode.data.replay import replay_raw_day
from encode.errors import DataError, QualityError
from encode.outputs import Manifest, read_manifest
from encode.schema import Window, days_in_words, number_of
from encode.storage import Storage

MAX_REFUSED_DAYS = 3
"""After so many refused days the rest is not tried: the cause is most likely the same."""
_SAME = "neither the raw data nor the settings of these days changed since they were validated"
_STILL_BAD = "no row in quarantine is good by now"
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
    published = published_days(storage)
    done = read_manifest(storage, published[day][-1]) if day in published else None
    if done is not None:
        return report_of(storage, found[day], config, done)
    return validate_raw_day(storage, found[day], config, _past(storage, published))


def validate_window(
    storage: Storage, window: Window, config: Config, say: Callable[[str], None] = quiet
) -> dict[str, Any]:
    """Validate the days of `window` that have raw data, oldest first.

    A day that is refused does not keep the others from being published, unless it is the third.

    Returns:
        Counts of the window (`days`, `validated`, `unchanged`, `compared`: with earlier days, `rows`, `accepted`,
        `rejected`, `without_category`, `replayed`, `added`: rows published just now), `reasons` -> rows,
        `missing_days` without raw data, `warnings` as day: text, and `data_docs`: day -> address of its page.

    Raises:
        DataError: no day of the window has raw data, or one was validated before from other data.
        QualityError: names the days that were refused, and why.
    """
    return _run(storage, window, config, say, replay=False)


def replay_window(
    storage: Storage, window: Window, config: Config, say: Callable[[str], None] = quiet
) -> dict[str, Any]:
    """Judge anew what the days of `window` have in quarantine, where raw data or settings changed since.

    What is good by now is added to its day, what was published stays as it is, and a day that was refused is validated.
    A second time it is a no-op.

    Returns:
        As `validate_window`; `replayed` are the rows that were added to days that were published before, `waiting` the
        partitions of these days that the current histories do not hold.

    Raises:
        DataError: no day of the window has raw data, or rows that were published are no longer in them.
        QualityError: names the days that were refused, and why.
    """
    return _run(storage, window, config, say, replay=True)


def _run(
    storage: Storage, window: Window, config: Config, say: Callable[[str], None], *, replay: bool
) -> dict[str, Any]:
    raw_days = find_raw_days(storage, window.days())
    if not raw_days:
        raise DataError(
            f"{storage.uri}/raw: no raw data for any day of {window.in_words()}; land the log, or choose other days"
        )
    published = published_days(storage)
    past = _past(storage, published)
    done = _last(storage, {day: prefixes[-1] for day, prefixes in published.items() if day in raw_days})
    stale = [day for day, last in done.items() if replay and changes(raw_days[day], config, last)]
    to_do = [raw for day, raw in raw_days.items() if day not in done or day in stale]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        same = [day for day in done if day not in stale]
        reports = list(pool.map(lambda day: report_of(storage, raw_days[day], config, done[day]), same))
    say(f"{number_of(len(to_do), 'day')} to {'replay' if replay else 'validate'}, {len(same)} validated before")
    missing = [day for day in window.days() if day not in raw_days]
    if missing:
        say(f"no raw data for {number_of(len(missing), 'day')}: {days_in_words(missing)}")
    refused: list[str] = []
    progress = _Progress(len(to_do), say)
    for raw in to_do:
        try:
            if raw.day in done:
                report = replay_raw_day(storage, raw, config, past, published[raw.day], done[raw.day])
            else:
                report = validate_raw_day(storage, raw, config, past)
        except QualityError as error:
            refused.append(str(error))
            say(str(error))
            if len(refused) == MAX_REFUSED_DAYS:
                break
        else:
            reports.append(report)
            for line in report.warnings:
                say(f"{raw.day}: {line}")
        progress.step(raw.day)
    if refused:
        raise QualityError(
            f"{len(refused)} of {number_of(len(raw_days), 'day')} refused"
            + (", the rest was not tried" if len(refused) == MAX_REFUSED_DAYS else "")
            + ": "
            + " | ".join(refused)
        )
    if replay and not any(report.added for report in reports):
        say("nothing was replayed: " + (_STILL_BAD if to_do else _SAME))
    _say_docs(storage, reports, say)
    summary = _summary(storage, window, reports, missing)
    return summary | {"waiting": waiting_days(storage, window)} if replay else summary


def _past(storage: Storage, published: dict[date, list[str]]) -> Past:
    """Return the profiles of all published days; a quarantine is called as its behaviors are."""
    return Past(
        storage, {day: prefixes[-1].replace("behaviors/", "quarantine/", 1) for day, prefixes in published.items()}
    )


def _last(storage: Storage, prefixes: dict[date, str]) -> dict[date, Manifest]:
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        manifests = pool.map(lambda prefix: read_manifest(storage, prefix), prefixes.values())
        return {day: manifest for day, manifest in zip(prefixes, manifests, strict=True) if manifest is not None}


def _say_docs(storage: Storage, reports: list[DayReport], say: Callable[[str], None]) -> None:
    alone = [report.day for report in reports if not report.unchanged and not report.compared_with]
    if alone:
        days = " to ".join(dict.fromkeys(map(str, (alone[0], alone[-1]))))
        say(f"{number_of(len(alone), 'day')} not compared with earlier ones, for want of them: {days}")
    if len(reports) == 1:
        say(f"Data Docs: {_page(storage, reports[0])}; `encode docs {reports[0].day}` fetches and explains it")
    else:
        say(f"Data Docs: {storage.uri}/quarantine/dt=DAY/index.html; `encode docs DAY` fetches and explains one")


def _page(storage: Storage, report: DayReport) -> str:
    return f"{storage.uri}/{report.docs}/index.html"


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
            self._say(f"validated {self._done}/{number_of(self._total, 'day')}, last {day}, about {left:.0f} s left")


def _summary(storage: Storage, window: Window, reports: list[DayReport], missing: list[date]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report.reasons)
    ordered = sorted(reports, key=lambda report: report.day)
    return {
        "window": str(window),
        "days": len(reports),
        "validated": sum(not report.unchanged for report in reports),
        "unchanged": sum(report.unchanged for report in reports),
        "compared": sum(report.compared_with > 0 for report in reports),
        "rows": sum(report.rows for report in reports),
        "accepted": sum(report.accepted for report in reports),
        "rejected": sum(report.rejected for report in reports),
        "without_category": sum(report.without_category for report in reports),
        "replayed": sum(report.replayed for report in reports),
        "added": sum(report.added for report in reports),
        "reasons": dict(sorted(reasons.items())),
        "missing_days": [str(day) for day in missing],
        "warnings": [f"{report.day}: {line}" for report in ordered for line in report.warnings],
        "data_docs": {str(report.day): _page(storage, report) for report in ordered},
    }
