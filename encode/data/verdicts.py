"""Which rows keep the contract, and why the others do not: masks over whole batches, no loop over rows.

A row gets the first reason that applies, in the order user, item, category, behavior, timestamp, duplicate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encode.config import SourceConfig
from encode.data.integers import INEXACT, MISSING, NO_VALUE, NOT_INTEGER, OK, as_text, read_integers
from encode.data.readers import RAW_COLUMNS, RawBatch
from encode.schema import QUARANTINE, SECONDS_PER_DAY, day_start

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int8]

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}

REASONS = (
    "",
    "malformed_row",
    *(f"user_id_{what}" for what in ("missing", "not_integer", "inexact", "not_positive")),
    *(f"item_id_{what}" for what in ("missing", "not_integer", "inexact", "not_positive")),
    *(f"category_id_{what}" for what in ("not_integer", "inexact", "negative")),
    "behavior_missing",
    "behavior_unknown",
    *(f"timestamp_{what}" for what in ("missing", "not_integer", "inexact", "outside_day", "out_of_range")),
    *(f"timestamp_looks_like_{unit}" for unit in UNITS),
    "duplicate",
)
"""Reason codes are places in this tuple; 0 is no reason: the row is accepted.

`inexact`: a whole number that int64, or the float that carried it, cannot tell from its neighbors.
`timestamp_looks_like_ms`: not plausible in the configured unit, but so in milliseconds.
"""
_CODE = {reason: code for code, reason in enumerate(REASONS)}
_PROBLEMS = {MISSING: "missing", NOT_INTEGER: "not_integer", INEXACT: "inexact"}


@dataclass(frozen=True)
class Verdict:
    """The five columns of N rows in contract types, and a reason code for each; 0 or null where unreadable."""

    user_id: Ints
    item_id: Ints
    category_id: Ints
    behavior: pa.StringArray
    timestamp: Ints
    reason: Codes


def judge(raw: RawBatch, day: date, source: SourceConfig, allowed: Sequence[str] | None) -> Verdict:
    """Judge each row by itself; `duplicates` needs the whole day.

    Args:
        raw: the rows as they came.
        day: the UTC day that all of them must fall on.
        source: the unit of integer timestamps, and which times are plausible.
        allowed: behavior names; None allows any that is not empty.
    """
    reason = np.zeros(raw.batch.num_rows, np.int8)
    if raw.malformed is not None:
        reason[raw.malformed] = _CODE["malformed_row"]
    users, items = (_read_ids(raw.batch, name, reason) for name in ("user_id", "item_id"))
    categories = _read_ids(raw.batch, "category_id", reason)
    behaviors = _read_behaviors(raw.batch, allowed, reason)
    timestamps, problem = read_timestamps(raw.batch.column("timestamp"), source)
    first = day_start(day)
    outside = (timestamps < first) | (timestamps >= first + SECONDS_PER_DAY)
    problem = np.where((problem == OK) & outside, _CODE["timestamp_outside_day"], problem)
    problem[problem == _CODE["timestamp_out_of_range"]] = _CODE["timestamp_outside_day"]
    _mark(reason, problem.astype(np.int8))
    return Verdict(users, items, categories, behaviors, timestamps, reason)


def read_timestamps(column: pa.Array, source: SourceConfig) -> tuple[Ints, Codes]:
    """Return UTC seconds, and the reason code where there are none or they are not plausible.

    Arrow timestamps and dates know their unit; integers are read in `source.time_unit`. Parts of a second are cut off.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    unit: str = source.time_unit
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        column = column.cast(pa.timestamp("s")) if pa.types.is_date(kind) else column
        unit = column.type.unit
        column = column.cast(pa.int64())
    values, problem = read_integers(column)
    low, high = day_start(source.earliest), day_start(source.latest)
    code = np.zeros(len(values), np.int8)
    for kind_of_problem, what in _PROBLEMS.items():
        code[problem == kind_of_problem] = _CODE[f"timestamp_{what}"]
    seconds = values // UNITS[unit]
    implausible = (problem == OK) & ((seconds < low) | (seconds >= high))
    code[implausible] = _CODE["timestamp_out_of_range"]
    for other, factor in UNITS.items():
        scaled = values // factor
        hit = (code == _CODE["timestamp_out_of_range"]) & (scaled >= low) & (scaled < high)
        code[hit] = _CODE[f"timestamp_looks_like_{other}"]
    return seconds, code


def duplicates(columns: Sequence[Ints]) -> Bools:
    """Tell which rows equal an earlier row in all columns.

    Rows are compared by a 64-bit hash first, so that only those with an equal hash are sorted by all columns.
    """
    found = np.zeros(len(columns[0]), bool)
    key = _hash(columns)
    order = np.argsort(key, kind="stable")
    same = key[order[1:]] == key[order[:-1]]
    if not same.any():
        return found
    suspects = np.sort(order[np.append(same, False) | np.insert(same, 0, False)])
    values = [column[suspects] for column in columns]
    ranked = np.lexsort(values)
    equal = np.logical_and.reduce([v[ranked[1:]] == v[ranked[:-1]] for v in values])
    found[suspects[ranked[1:][equal]]] = True
    return found


def _hash(columns: Sequence[Ints]) -> npt.NDArray[np.uint64]:
    key = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def to_quarantine(raw: RawBatch, reason: Codes) -> pa.Table:
    """Return the rows that have a reason, as `schema.QUARANTINE`, with their values as text exactly as they came."""
    rows = np.flatnonzero(reason)
    kept = raw.batch.take(pa.array(rows))
    arrays = [
        pa.repeat(pa.scalar(raw.file), len(rows)),
        pa.array(rows + raw.first_row, pa.int64()),
        pa.array(REASONS).take(pa.array(reason[rows])),
        *(as_text(kept.column(name)) for name in RAW_COLUMNS),
    ]
    return pa.Table.from_arrays(arrays, schema=QUARANTINE)


def count_reasons(reason: Codes) -> dict[str, int]:
    """Return how often each reason occurs, by name."""
    counts = np.bincount(reason, minlength=len(REASONS))
    return {name: int(count) for name, count in sorted(zip(REASONS, counts, strict=True)) if name and count}


def _read_ids(batch: pa.RecordBatch, name: str, reason: Codes) -> Ints:
    """Read one id column and mark its problems; category 0, or none at all, means "no category"."""
    values, problem = read_integers(batch.column(name))
    code = np.zeros(len(values), np.int8)
    optional = name == "category_id"
    for kind, what in _PROBLEMS.items():
        if not (optional and kind == MISSING):
            code[problem == kind] = _CODE[f"{name}_{what}"]
    if optional:
        code[values < 0] = _CODE["category_id_negative"]
    else:
        code[(problem == OK) & (values <= 0)] = _CODE[f"{name}_not_positive"]
    _mark(reason, code)
    return values


def _read_behaviors(batch: pa.RecordBatch, allowed: Sequence[str] | None, reason: Codes) -> pa.StringArray:
    names = pc.utf8_trim_whitespace(as_text(batch.column("behavior")))
    names = pc.if_else(pc.is_in(names, pa.array(NO_VALUE)), None, names)
    code = np.where(names.is_null().to_numpy(zero_copy_only=False), _CODE["behavior_missing"], 0).astype(np.int8)
    if allowed is not None:
        known = pc.is_in(names, pa.array(allowed, pa.string())).to_numpy(zero_copy_only=False)
        code[(code == 0) & ~known] = _CODE["behavior_unknown"]
    _mark(reason, code)
    return names


def _mark(reason: Codes, code: Codes) -> None:
    """Give `code` to the rows that have no reason yet."""
    free = reason == 0
    reason[free] = code[free]
