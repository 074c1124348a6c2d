"""A day beside those before it: what is usual stays silent, what is not is said by name."""

from __future__ import annotations

from datetime import date, timedelta
from functools import cache

import numpy as np
import pyarrow as pa
import pytest

from encode.config import TrendsConfig
from encode.data.profiles import NUM_CATEGORIES, NUM_SAMPLED, Profile, profile_of
from encode.data.trends import compare, psi
from encode.data.verdicts import REASONS, Verdict
from encode.schema import day_start

MONDAY = date(2024, 1, 1)
SETTINGS = TrendsConfig()


def rows_of(day, *, seed=0, users=300, first_user=1):
    """Rows of user, item, category, behavior and second of the day: busy weekends, evenings, 40 categories."""
    rng = np.random.default_rng([day.toordinal(), seed])
    count = int(rng.normal(2000, 60) * (1.5 if day.weekday() >= 5 else 1))
    hour = np.clip(rng.normal(17, 2.5, count), 0, 23.9)
    return {
        "user_id": rng.integers(first_user, first_user + users, count),
        "item_id": rng.integers(1, 500, count),
        "category_id": 1 + np.minimum(rng.geometric(0.07, count), 40),
        "behavior": rng.choice(["buy", "cart", "pv"], count, p=[0.05, 0.15, 0.8]),
        "second": (hour * 3600).astype(np.int64),
    }


def profile(day, rows, reasons=()):
    """The profile of accepted rows, and of one more row for each reason."""
    count, more = len(rows["user_id"]), len(reasons)
    ids = (np.append(rows[name], np.zeros(more, np.int64)) for name in ("user_id", "item_id", "category_id"))
    codes = np.append(np.zeros(count), [REASONS.index(reason) for reason in reasons]).astype(np.int8)
    behavior = pa.array([*rows["behavior"].tolist(), *[None] * more], pa.string())
    seconds = np.append(rows["second"], np.zeros(more, np.int64)) + day_start(day)
    return profile_of([Verdict(*ids, behavior, seconds, codes)])


@cache
def usual(day):
    return profile(day, rows_of(day))


def past(end, count=28):
    return {day: usual(day) for day in (end - timedelta(days=back) for back in range(count, 0, -1))}


def unusual(day, today, before=None, settings=SETTINGS, severity="warning"):
    measures = compare(day, today, past(day) if before is None else before, settings)
    outside = [
        one
        for one in measures
        if (one.low is not None and one.value < one.low) or (one.high is not None and one.value > one.high)
    ]
    return {one.name: one for one in outside if one.severity == severity}


def test_a_profile_counts_by_hand():
    rows = {
        "user_id": np.array([7, 7, 7, 2]),
        "item_id": np.array([1, 2, 2, 3]),
        "category_id": np.array([5, 5, 0, 4]),
        "behavior": np.array(["pv", "pv", "buy", "pv"]),
        "second": np.array([0, 10, 3600, 86_399]),
    }
    found = profile(MONDAY, rows, ["user_id_missing", "user_id_missing", "duplicate"])
    assert (found.raw_rows, found.rows, found.users, found.items) == (7, 4, 2, 3)
    assert (found.largest_user, found.without_category) == (3, 1)
    assert found.reasons == {"duplicate": 1, "user_id_missing": 2}
    assert found.behaviors == {"pv": 3, "buy": 1}
    assert {hour: users for hour, users in enumerate(found.hours.tolist()) if users} == {0: 1, 1: 1, 23: 1}
    assert dict(zip(found.categories.tolist(), found.category_rows.tolist(), strict=True)) == {5: 2, 0: 1, 4: 1}


def test_what_is_kept_of_a_profile_is_small_and_says_the_same():
    day = MONDAY + timedelta(days=40)
    kept = {one: Profile.from_json(p.to_json()) for one, p in past(day).items()}
    today = profile(day, rows_of(day))
    assert compare(day, today, kept, SETTINGS) == compare(day, today, past(day), SETTINGS)
    many = np.arange(1, 5001)
    wide = profile(
        day,
        {**dict.fromkeys(("user_id", "item_id", "category_id"), many), "second": many % 86_400}
        | {"behavior": np.array(["pv"] * 5000)},
    )
    assert len(wide.to_json()["categories"]) == NUM_CATEGORIES
    assert len(wide.sampled_users) == len(wide.sampled_items) == NUM_SAMPLED


def test_usual_days_of_every_weekday_stay_silent():
    for offset in range(28, 42):
        day = MONDAY + timedelta(days=offset)
        assert unusual(day, profile(day, rows_of(day, seed=1))) == {}


def test_too_few_days_are_no_comparison():
    day = MONDAY + timedelta(days=30)
    today = profile(day, rows_of(day))
    assert compare(day, today, past(day, 6), SETTINGS) == []
    assert compare(day, today, past(day, 7), SETTINGS) != []
    nothing = profile(day, {name: values[:0] for name, values in rows_of(day).items()})
    assert compare(day, nothing, past(day), SETTINGS) == []


def change(name, rows):
    kept = slice(None)
    rows = dict(rows)
    if name == "cut in half":
        kept = rows["user_id"] % 2 == 0
    elif name == "morning only":
        kept = rows["second"] < np.median(rows["second"])
    elif name == "hours shifted":
        rows["second"] = (rows["second"] + 3 * 3600) % 86_400
    elif name == "a category vanished":
        kept = rows["category_id"] != 5
    elif name == "a behavior vanished":
        kept = rows["behavior"] != "buy"
    elif name == "other user ids":
        rows["user_id"] = rows["user_id"] + 10**12
    elif name == "categories lost":
        rows["category_id"] = np.where(rows["user_id"] % 10 == 0, 0, rows["category_id"])
    return {name: values[kept] for name, values in rows.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cut in half", {"rows", "users"}),
        ("morning only", {"rows", "PSI of hours"}),
        ("hours shifted", {"PSI of hours"}),
        ("a category vanished", {"vanished categories"}),
        ("a behavior vanished", {"vanished behaviors", "share of rows of buy"}),
        ("other user ids", {"share of users not seen before"}),
        ("categories lost", {"share of rows without a category", "PSI of categories"}),
    ],
)
def test_what_went_wrong_is_said_by_name(name, expected):
    for offset in (33, 35):  # a Saturday and a Monday
        day = MONDAY + timedelta(days=offset)
        found = unusual(day, profile(day, change(name, rows_of(day))))
        assert expected <= set(found), found
        if name == "a category vanished":
            assert found["vanished categories"].named == ("5",)


def test_a_new_reason_for_rejecting_rows_is_said():
    day = MONDAY + timedelta(days=35)
    rows = rows_of(day)
    few, many = (profile(day, rows, ["user_id_missing"] * count) for count in (3, 30))
    assert unusual(day, few) == {}
    assert set(unusual(day, many)) == {"share of rejected rows", "share of rejected rows: user_id_missing"}


def test_an_odd_day_in_the_past_does_not_hide_the_next_one():
    day = MONDAY + timedelta(days=35)
    before = past(day)
    odd = day - timedelta(days=7)
    before[odd] = profile(odd, change("cut in half", rows_of(odd)))
    today = profile(day, change("cut in half", rows_of(day)))
    assert {"rows", "users"} <= set(unusual(day, today, before))
    assert unusual(day, profile(day, rows_of(day)), before) == {}


def test_the_share_of_new_users_is_estimated_from_those_that_are_kept():
    day = MONDAY + timedelta(days=35)
    days = [day - timedelta(days=back) for back in range(1, 15)]
    before = {one: profile(one, rows_of(one, users=1500)) for one in days}
    for shift, expected in ((0, 0.0), (600, 0.4), (1500, 1.0)):
        measures = compare(day, profile(day, rows_of(day, users=1500, first_user=1 + shift)), before, SETTINGS)
        (found,) = [one.value for one in measures if one.name == "share of users not seen before"]
        assert found == pytest.approx(expected, abs=0.15)


def test_one_user_with_a_third_of_all_rows_is_noted_and_not_a_warning():
    day = MONDAY + timedelta(days=35)
    rows = rows_of(day)
    rows["user_id"][::3] = 1
    assert "share of rows of the largest user" in unusual(day, profile(day, rows), severity="info")


def test_psi_by_hand():
    # Shares with half a row added: 1/4 and 3/4 against 3/4 and 1/4.
    assert psi(np.array([0.5, 2.5]), np.array([2.5, 0.5])) == pytest.approx(np.log(3))
    assert psi(np.array([[3.0, 1.0], [1.0, 3.0]]), np.array([[3.0, 1.0], [3.0, 1.0]]))[0] == 0


def test_how_wide_a_band_is_can_be_set():
    day = MONDAY + timedelta(days=35)
    today = profile(day, change("cut in half", rows_of(day)))
    for changed in ({"width": 1000.0}, {"min_change": 2.0}):
        found = unusual(day, today, settings=SETTINGS.model_copy(update=changed))
        assert "rows" not in found
        assert "rows" in unusual(day, today)
