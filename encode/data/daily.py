"""One raw day into validated behaviors and quarantine, whole or not at all.

`raw/dt=D/...` gives `behaviors/dt=D/part-*.parquet` and `quarantine/dt=D/` with the rejected rows, the result of
Great Expectations (`result.json`) and its page (`index.html`). Quarantine is complete before behaviors is, so that a
published day always has its page. A day that is refused publishes no behaviors; its rejected rows, result and page
are kept under `quarantine/dt=D/refused-<fingerprint>/`, out of the way of a later try with other data or settings.

Behaviors and their manifest follow from the raw data and the settings alone. The manifest of the quarantine also says
what the day was compared with, so it depends on which days were validated before; nothing is made from it.
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
from encode.data.judging import COLUMNS, Judged, judge_rows
from encode.data.landing import landing_settings
from encode.data.parquet import parquet_bytes
from encode.data.profiles import Past, Profile, profile_of
from encode.data.raw_days import RawDay
from encode.data.trends import compare
from encode.data.verdicts import Verdict
from encode.errors import DataError, EncodeError, QualityError
from encode.outputs import Manifest, read_manifest, recipe, write_output
from encode.schema import BEHAVIORS, QUARANTINE, fingerprint, number_of
from encode.storage import Storage

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
    docs: str
    """Where its Data Docs are: the prefix of its quarantine."""
    warnings: tuple[str, ...] = ()
    """Failed expectations that do not refuse the day, and hints about files that mix time units."""
    compared_with: int = 0
    """Earlier days that it was compared with; 0 where there were too few."""
    replayed: int = 0
    """Rows that became part of the day by a replay just now."""
    added: int = 0
    """Rows that were published just now, by a replay or not."""
    unchanged: bool = False
    """The day was validated before, from the same data with the same settings."""


@dataclass(frozen=True)
class Addition:
    """What a replay adds to a day that is published."""

    suffix: str
    """Of both outputs, after `dt=D`."""
    prefix: str
    """The output before it."""
    digest: str
    """Of that one's manifest."""


def validate_raw_day(storage: Storage, raw: RawDay, config: Config, past: Past) -> DayReport:
    """Validate a day that has no behaviors yet.

    Raises:
        DataError: a file is not readable.
        QualityError: the day is refused. Its quarantine is written, its behaviors are not.
    """
    return publish(storage, raw, judge_rows(storage, raw, config), config, past)


def publish(
    storage: Storage, raw: RawDay, judged: Judged, config: Config, past: Past, addition: Addition | None = None
) -> DayReport:
    """Judge a day as a whole, write its quarantine, and publish those rows that are judged now and accepted.

    A day whose quarantine is complete and whose behaviors are not was killed in between. It keeps its verdict, which
    might be another one beside the days that are there by now.

    Raises:
        QualityError: the day is refused.
    """
    identity = identity_of(raw, config)
    suffix = ""
    if addition:
        suffix = addition.suffix
        identity["inputs"] |= {addition.prefix: addition.digest}
    quarantine, profile = f"quarantine/dt={raw.day}{suffix}", profile_of(judged.every())
    verdict = read_manifest(storage, quarantine)
    if verdict is None or verdict.fingerprint != identity["fingerprint"]:
        verdict = _judge(storage, quarantine, raw.day, judged, profile, config, past, identity)
    details = {"quarantine": quarantine} | ({"adds_to": addition.prefix} if addition else {})
    made = _write_behaviors(storage, f"behaviors/dt={raw.day}{suffix}", judged, profile, details, identity)
    past.add(raw.day, quarantine, profile)
    return _report(raw.day, made, verdict)


def _judge(
    storage: Storage,
    quarantine: str,
    day: date,
    judged: Judged,
    profile: Profile,
    config: Config,
    past: Past,
    identity: dict[str, Any],
) -> Manifest:
    """Let Great Expectations judge a day, and write what it says beside the rejected rows."""
    trends = config.validation.trends
    earlier = past.before(day, trends.days)
    measures = compare(day, profile, earlier, trends)
    hints = [*judged.hints, *_unit_hints(profile, config)]
    judgment = judge_day(day, judged.every(), config.validation, measures, len(earlier), hints)
    _reconcile(day, profile, judged, judgment)
    refusal = _refusal(profile, judgment, config)
    details = {
        "reasons": profile.reasons,
        "warnings": [*judgment.warnings, *judged.hints, *judgment.drift],
        "notes": list(judgment.notes),
        "refusal": refusal,
        "profile": profile.to_json(),
        "measures": [{**vars(one), "named": list(one.named)} for one in measures],
        "compared_with": {str(one): fingerprint(known.to_json()) for one, known in earlier.items() if measures},
    }
    if refusal is None:
        return _write_quarantine(storage, quarantine, judged, judgment, details, identity)
    refused = f"quarantine/dt={day}/refused-{recipe('refused', identity['config'], identity['inputs'])[:12]}"
    if read_manifest(storage, refused) is None:  # beside other days its result may differ, the refusal does not
        _write_quarantine(storage, refused, judged, judgment, details, identity)
    raise QualityError(
        f"day {day} refused, no behaviors published: {refusal}. Rejected rows, result.json and index.html are in "
        f"{storage.uri}/{refused}; land corrected data, or change validation or source in the settings"
    )


def report_of(storage: Storage, raw: RawDay, config: Config, done: Manifest) -> DayReport:
    """Return the report of a day that was validated before; `done` is the last output that added to it.

    Raises:
        DataError: it was validated from other data or with other settings than now.
    """
    # With equal data and settings only the version of this package differs: what was validated stays valid.
    if changed := changes(raw, config, done):
        raise DataError(
            f"{storage.uri}/behaviors/dt={raw.day}: validated before, but {', '.join(changed)} changed since; outputs "
            f"are immutable: `encode replay --start {raw.day}` adds what is good by now and keeps what was published; "
            f"to validate it all anew remove behaviors/dt={raw.day} and quarantine/dt={raw.day}, then run again"
        )
    return _report(raw.day, done, read_manifest(storage, done.details["quarantine"]), unchanged=True)


def changes(raw: RawDay, config: Config, done: Manifest) -> list[str]:
    """Return what differs from when a day was validated: its raw data, settings by name."""
    identity = identity_of(raw, config)
    if done.fingerprint == identity["fingerprint"]:
        return []
    changed = [] if done.inputs.items() >= identity["inputs"].items() else ["the raw data"]
    old, new = _flat(done.config), _flat(identity["config"])
    return changed + sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def identity_of(raw: RawDay, config: Config) -> dict[str, Any]:
    """Return what a day is validated from and with, and the fingerprint of both.

    What it is compared with is not in it: another day before it, or another width of what is usual, changes what is
    said about a day and not what is in it, and must not make it stale.
    """
    settings = {
        "source": {k: v for k, v in landing_settings(config.source).items() if k != "generator"},
        "validation": config.validation.model_dump(mode="json", exclude={"trends"}),
    }
    inputs = {f"raw/dt={raw.day}": fingerprint(raw.digests)}
    return {"fingerprint": recipe("behaviors", settings, inputs), "config": settings, "inputs": inputs}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def _report(day: date, made: Manifest, judged: Manifest | None, *, unchanged: bool = False) -> DayReport:
    counts, details = made.counts, judged.details if judged else {}
    raw_rows, rejected = int(counts["raw_rows"]), int(counts["rejected"])
    return DayReport(
        day,
        rows=raw_rows,
        accepted=raw_rows - rejected,
        rejected=rejected,
        without_category=int(counts["without_category"]),
        reasons=dict(made.details["reasons"]),
        docs=made.details["quarantine"],
        warnings=tuple(details.get("warnings", ())),
        compared_with=len(details.get("compared_with", ())),
        replayed=0 if unchanged or not made.details.get("adds_to") else int(counts["rows"]),
        added=0 if unchanged else int(counts["rows"]),
        unchanged=unchanged,
    )


def _reconcile(day: date, profile: Profile, judged: Judged, judgment: Judgment) -> None:
    """See that the masks, the rows for quarantine and Great Expectations count alike."""
    rejected = profile.raw_rows - profile.rows
    if judgment.rejected != rejected:
        raise EncodeError(
            f"validation of {day}: Great Expectations counted {judgment.rejected} rejected rows, the masks {rejected}; "
            "nothing was written, this is a defect"
        )
    if judged.quarantined.num_rows != rejected:
        raise EncodeError(
            f"validation of {day}: {judged.quarantined.num_rows} rows for quarantine, counted {rejected}; nothing was "
            "written, this is a defect"
        )


def _too_many_rejected(profile: Profile, config: Config) -> bool:
    rows, rejected = profile.raw_rows, profile.raw_rows - profile.rows
    return rows > 0 and rejected / rows > config.validation.max_rejected_share


def _unit_hints(profile: Profile, config: Config) -> list[str]:
    """Return what may be wrong where so many rows are rejected that the day is refused."""
    if not _too_many_rejected(profile, config):
        return []
    looks = "timestamp_looks_like_"
    units = [reason.removeprefix(looks) for reason in profile.reasons if reason.startswith(looks)]
    return [f"times look like {unit}, source.time_unit is {config.source.time_unit}" for unit in units[:1]]


def _refusal(profile: Profile, judgment: Judgment, config: Config) -> str | None:
    """Return why the day is refused, or None."""
    problems = []
    limit = config.validation.max_rejected_share
    rows, rejected = profile.raw_rows, profile.raw_rows - profile.rows
    if _too_many_rejected(profile, config):
        by_count = sorted(profile.reasons.items(), key=lambda r: -r[1])
        named = ", ".join(f"{reason} {count:,}" for reason, count in by_count)
        problems.append(
            f"{rejected:,} of {number_of(rows, 'row')} rejected ({rejected / rows:.2%}; {named}), "
            f"expected at most {limit:.2%}"
        )
        problems += _unit_hints(profile, config)
    problems += [line for line in judgment.failed if not problems or "(reason)" not in line]
    return "; ".join(problems) or None


# --- outputs -----------------------------------------------------------------------------------------------


def _write_quarantine(
    storage: Storage,
    prefix: str,
    judged: Judged,
    judgment: Judgment,
    details: dict[str, Any],
    identity: dict[str, Any],
) -> Manifest:
    rows = judged.quarantined.num_rows
    return write_output(
        storage,
        prefix,
        {
            "part-00000.parquet": parquet_bytes(judged.quarantined),
            "result.json": judgment.result,
            "index.html": judgment.page,
        },
        kind="quarantine",
        rows={"part-00000.parquet": rows},
        columns=_columns(QUARANTINE),
        counts={"rows": rows, "raw_rows": details["profile"]["raw_rows"]},
        details=details,
        **identity,
    )


def _write_behaviors(
    storage: Storage,
    prefix: str,
    judged: Judged,
    profile: Profile,
    details: dict[str, Any],
    identity: dict[str, Any],
) -> Manifest:
    table = _behaviors(judged.verdicts)
    published = len(judged.published.reason) if judged.published else 0
    if table.num_rows + published + judged.quarantined.num_rows != profile.raw_rows:
        raise EncodeError(
            f"{prefix}: {table.num_rows} behaviors, {published} published before and {judged.quarantined.num_rows} "
            f"rejected rows do not add up to {profile.raw_rows} raw rows; not published, this is a defect"
        )
    starts = range(0, max(table.num_rows, 1), _ROWS_PER_PART)
    parts = {f"part-{number:05d}.parquet": table.slice(start, _ROWS_PER_PART) for number, start in enumerate(starts)}
    return write_output(
        storage,
        prefix,
        {name: parquet_bytes(part) for name, part in parts.items()},
        kind="behaviors",
        rows={name: part.num_rows for name, part in parts.items()},
        columns=_columns(BEHAVIORS),
        counts={
            "rows": table.num_rows,
            "raw_rows": profile.raw_rows,
            "rejected": profile.raw_rows - profile.rows,
            "without_category": profile.without_category,
            "users": profile.users,
        },
        details={"reasons": profile.reasons} | details,
        **identity,
    )


def _behaviors(verdicts: Sequence[Verdict]) -> pa.Table:
    """Return the accepted rows in the order of the source; the dictionary of behaviors is sorted."""
    accepted = [v.reason == 0 for v in verdicts]
    columns = [
        pa.array(np.concatenate([getattr(v, name)[keep] for v, keep in zip(verdicts, accepted, strict=True)]))
        for name in COLUMNS
    ]
    names = pa.chunked_array(
        [v.behavior.filter(pa.array(keep)) for v, keep in zip(verdicts, accepted, strict=True)], pa.string()
    ).combine_chunks()
    dictionary = pc.unique(names).sort()
    columns.insert(3, pa.DictionaryArray.from_arrays(pc.index_in(names, dictionary), dictionary))
    return pa.Table.from_arrays(columns, schema=BEHAVIORS)


def _columns(schema: pa.Schema) -> dict[str, str]:
    return {column.name: str(column.type) for column in schema}
