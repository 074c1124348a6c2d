"""Masks over whole batches against a plain loop over rows."""

from __future__ import annotations

import math
import re
from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encode.config import SourceConfig
from encode.data import verdicts
from encode.data.integers import INEXACT, MISSING, NO_VALUE, NOT_INTEGER, OK, read_integers
from encode.data.readers import RAW_COLUMNS, RawBatch
from encode.data.verdicts import REASONS, duplicates, judge, read_timestamps, to_quarantine
from encode.schema import day_start

DAY = date(2024, 3, 5)
NOON = day_start(DAY) + 43_200
SOURCE = SourceConfig()


@pytest.mark.parametrize(
    ("column", "values", "problems"),
    [
        (pa.array([1, None, -3], pa.int8()), [1, 0, -3], [OK, MISSING, OK]),
        (pa.array([2**63 - 1, 2**63], pa.uint64()), [2**63 - 1, 0], [OK, INEXACT]),
        (pa.array([2**63 - 1, -(2**63)], pa.int64()), [2**63 - 1, -(2**63)], [OK, OK]),
        (pa.array([3.0, 3.5, math.nan, math.inf, None]), [3, 0, 0, 0, 0],
         [OK, NOT_INTEGER, MISSING, NOT_INTEGER, MISSING]),
        (pa.array([2.0**53 - 1, 2.0**53]), [2**53 - 1, 0], [OK, INEXACT]),
        (pa.array([2.0**24 - 1, 2.0**24], pa.float32()), [2**24 - 1, 0], [OK, INEXACT]),
        (pa.array([Decimal("12.00"), Decimal("12.50")]), [12, 0], [OK, NOT_INTEGER]),
        (pa.array(["9223372036854775807", "9223372036854775808"]), [2**63 - 1, 0], [OK, INEXACT]),
        (pa.array(["12", " 7 ", "007", "+5", "-5", "3.0", "3.5", "", "NaN", "1e3", "0x10", "٣"]),
         [12, 7, 7, 5, -5, 3, 0, 0, 0, 0, 0, 0], [OK] * 6 + [NOT_INTEGER, MISSING, MISSING] + [NOT_INTEGER] * 3),
        (pa.array([b"12", b"\xff"]), [12, 0], [OK, NOT_INTEGER]),
        (pa.array(["5", "x", "5"]).dictionary_encode(), [5, 0, 5], [OK, NOT_INTEGER, OK]),
        (pa.array([True, None]), [0, 0], [NOT_INTEGER, MISSING]),
        (pa.nulls(2), [0, 0], [MISSING, MISSING]),
        (pa.array([], pa.string()), [], []),
    ],
)  # fmt: skip
def test_integers_are_read_exactly_or_not_at_all(column, values, problems):
    found = read_integers(column)
    assert found.values.dtype == np.int64
    assert found.values.tolist() == values
    assert found.problem.tolist() == problems


@pytest.mark.parametrize(
    ("column", "unit", "seconds", "reasons"),
    [
        (pa.array([NOON]), "s", [NOON], [""]),
        (pa.array([NOON * 1000 + 999]), "ms", [NOON], [""]),
        (pa.array([NOON * 1000]), "s", None, ["timestamp_looks_like_ms"]),
        (pa.array([NOON * 10**6]), "s", None, ["timestamp_looks_like_us"]),
        (pa.array([NOON * 10**9]), "s", None, ["timestamp_looks_like_ns"]),
        (pa.array([NOON]), "ms", None, ["timestamp_looks_like_s"]),
        (pa.array([-5, 0]), "s", None, ["timestamp_out_of_range"] * 2),
        (pa.array([NOON], pa.timestamp("s")), "ns", [NOON], [""]),
        (pa.array([NOON * 10**9 + 1], pa.timestamp("ns", "Asia/Tokyo")), "s", [NOON], [""]),
        (pa.array([DAY]), "s", [day_start(DAY)], [""]),
        (pa.array(["1709640000", "", "x", "1709640000.5"]), "s", None,
         ["", "timestamp_missing", "timestamp_not_integer", "timestamp_not_integer"]),
    ],
)  # fmt: skip
def test_timestamps_know_their_unit(column, unit, seconds, reasons):
    found, codes = read_timestamps(column, SourceConfig(time_unit=unit))
    assert [REASONS[code] for code in codes] == reasons
    if seconds is not None:
        assert found.tolist() == seconds


def batch(*rows):
    columns = zip(*rows, strict=True)
    return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], names=list(RAW_COLUMNS))


def test_each_reason_by_hand():
    cases = {
        ("", "1", "1", "pv", NOON): "user_id_missing",
        ("a", "", "1", "pv", NOON): "user_id_not_integer",
        ("0", "1", "1", "pv", NOON): "user_id_not_positive",
        ("1", "-1", "1", "pv", NOON): "item_id_not_positive",
        ("1", "1.5", "1", "pv", NOON): "item_id_not_integer",
        ("1", "9" * 25, "1", "pv", NOON): "item_id_inexact",
        ("1", "1", "0", "pv", NOON): "",
        ("1", "1", None, "pv", NOON): "",
        ("1", "1", "-1", "pv", NOON): "category_id_negative",
        ("1", "1", "c", "pv", NOON): "category_id_not_integer",
        ("1", "1", "1", " ", NOON): "behavior_missing",
        ("1", "1", "1", "view", NOON): "behavior_unknown",
        ("1", "1", "1", " buy ", NOON): "",
        ("1", "1", "1", "pv", None): "timestamp_missing",
        ("1", "1", "1", "pv", day_start(DAY) - 1): "timestamp_outside_day",
        ("1", "1", "1", "pv", day_start(DAY)): "",
        ("1", "1", "1", "pv", day_start(DAY) + 86_399): "",
        ("1", "1", "1", "pv", day_start(DAY) + 86_400): "timestamp_outside_day",
        ("1", "1", "1", "pv", 5): "timestamp_outside_day",
        ("1", "1", "1", "pv", NOON * 1000): "timestamp_looks_like_ms",
    }
    raw = RawBatch("f", 1, batch(*cases))
    assert [REASONS[code] for code in judge(raw, DAY, SOURCE, ["pv", "buy"]).reason] == list(cases.values())


def test_any_behavior_that_is_not_empty_is_allowed_when_none_are_named():
    raw = RawBatch("f", 1, batch((1, 1, 1, "whatever", NOON), (1, 1, 1, "nan", NOON)))
    assert [REASONS[code] for code in judge(raw, DAY, SOURCE, None).reason] == ["", "behavior_missing"]


def test_quarantine_keeps_values_exactly_as_they_came():
    raw = RawBatch("f", 10, batch((1.0, 2**60, " x", "pv", "t"), (2.5, -7, None, None, "1")))
    reason = judge(raw, DAY, SOURCE, None).reason
    assert to_quarantine(raw, reason).to_pylist() == [
        {"file": "f", "row": 10, "reason": "category_id_not_integer", "user_id": "1", "item_id": str(2**60),
         "category_id": " x", "behavior": "pv", "timestamp": "t"},
        {"file": "f", "row": 11, "reason": "user_id_not_integer", "user_id": "2.5", "item_id": "-7",
         "category_id": None, "behavior": None, "timestamp": "1"},
    ]  # fmt: skip


# --- against a loop ----------------------------------------------------------------------------------------


def slow_integer(value):
    """(value, problem), one value at a time."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return 0, "missing"
    if isinstance(value, float):
        if not value.is_integer():
            return 0, "not_integer"
        return (int(value), None) if abs(value) < 2**53 else (0, "inexact")
    if isinstance(value, str):
        text = value.strip()
        if text in NO_VALUE:
            return 0, "missing"
        if not re.fullmatch(r"[+-]?[0-9]+(\.0*)?", text):
            return 0, "not_integer"
        value = int(text.split(".")[0])
    return (value, None) if abs(value) < 2**63 else (0, "inexact")


def slow_reason(user, item, category, behavior, timestamp, allowed):
    for name, value in (("user_id", user), ("item_id", item), ("category_id", category)):
        number, problem = slow_integer(value)
        if problem == "missing" and name == "category_id":
            continue
        if problem:
            return f"{name}_{problem}"
        if name == "category_id" and number < 0:
            return "category_id_negative"
        if name != "category_id" and number <= 0:
            return f"{name}_not_positive"
    if behavior is None or behavior.strip() in NO_VALUE:
        return "behavior_missing"
    if behavior.strip() not in allowed:
        return "behavior_unknown"
    number, problem = slow_integer(timestamp)
    if problem:
        return f"timestamp_{problem}"
    if day_start(DAY) <= number < day_start(DAY) + 86_400:
        return ""
    low, high = day_start(SOURCE.earliest), day_start(SOURCE.latest)
    if low <= number < high:
        return "timestamp_outside_day"
    for unit, factor in (("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        if low <= number // factor < high:
            return f"timestamp_looks_like_{unit}"
    return "timestamp_outside_day"


texts = st.sampled_from(
    ["1", "2", " 3", "4.0", "4.5", "", "nan", "-1", "0", "x", "007", "9" * 19, "9" * 18, "1.", None]
)
integers = st.one_of(st.none(), st.integers(-3, 5), st.sampled_from([2**63 - 1, 2**53 + 1, -(2**63) + 1]))
floats = st.one_of(st.none(), st.sampled_from([1.0, 2.5, math.nan, math.inf, 2.0**53, 2.0**60, -1.0, 0.0]))
times = st.one_of(
    st.none(), st.integers(day_start(DAY) - 2, day_start(DAY) + 2), st.sampled_from([NOON * 1000, NOON * 10**9, 5, -1])
)
names = st.sampled_from(["pv", "buy", " pv", "", None, "other", "null"])


def columns_of(values):
    return st.lists(values, min_size=20, max_size=20)


@given(
    *(st.one_of(columns_of(texts), columns_of(integers), columns_of(floats)) for _ in range(3)),
    columns_of(names),
    columns_of(times),
)
def test_masks_agree_with_a_loop(users, items, categories, behaviors, timestamps):
    columns = [users, items, categories, behaviors, timestamps]
    raw = RawBatch("f", 1, pa.RecordBatch.from_arrays([pa.array(c) for c in columns], names=list(RAW_COLUMNS)))
    found = judge(raw, DAY, SOURCE, ["pv", "buy"])
    expected = [slow_reason(*row, ["pv", "buy"]) for row in zip(*columns, strict=True)]
    assert [REASONS[code] for code in found.reason] == expected
    for i, reason in enumerate(expected):
        if not reason:
            row = (found.user_id[i], found.item_id[i], found.category_id[i], found.timestamp[i])
            assert row == tuple(slow_integer(column[i])[0] for column in (users, items, categories, timestamps))


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 2), st.sampled_from([0, 2**40, 2**63 - 1])), max_size=60))
def test_duplicates_agree_with_a_loop(rows):
    seen, expected = set(), []
    for row in rows:
        expected.append(row in seen)
        seen.add(row)
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    assert duplicates(list(columns)).tolist() == expected


def test_duplicates_do_not_rest_on_the_hash(monkeypatch):
    monkeypatch.setattr(verdicts, "_hash", lambda columns: np.zeros(len(columns[0]), np.uint64))
    columns = [np.array([1, 2, 1, 3, 2]), np.array([1, 1, 1, 1, 5])]
    assert duplicates(columns).tolist() == [False, False, True, False, False]
