"""Days, ids and fingerprints."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest

from encode.errors import ConfigError
from encode.schema import (
    Window,
    bucket_of,
    canonical_json,
    day_of,
    day_start,
    days_in_words,
    fingerprint,
    number_of,
    probability_in_digits,
    resolve_window,
)


def at(day, hour=0):
    return datetime(2024, 1, day, hour, tzinfo=UTC)


def test_explicit_days_win_over_everything():
    window = resolve_window("2024-01-03", "2024-01-05", "2024-02-01", [{"end": "2024-03-01"}], (at(10), at(11)))
    assert window == Window(date(2024, 1, 3), date(2024, 1, 5))


def test_one_explicit_day_means_that_day():
    assert resolve_window("2024-01-03") == Window(date(2024, 1, 3), date(2024, 1, 4))
    assert resolve_window(end="2024-01-04") == Window(date(2024, 1, 3), date(2024, 1, 4))


def test_then_the_partition_then_the_events_then_the_interval():
    events = [{"start": "2024-01-02", "end": "2024-01-03"}, {"start": "2024-01-05", "end": "2024-01-07"}]
    assert resolve_window(None, None, "2024-01-09", events) == Window(date(2024, 1, 9), date(2024, 1, 10))
    assert resolve_window(partition_key="2024-01-09..2024-01-12").end == date(2024, 1, 12)
    assert resolve_window(events=events, interval=(at(1), at(2))) == Window(date(2024, 1, 2), date(2024, 1, 7))
    assert resolve_window(interval=(at(1, 2), at(2, 2))) == Window(date(2024, 1, 1), date(2024, 1, 2))


@pytest.mark.parametrize("interval", [None, (None, None), (at(1), at(1))])
def test_without_days_it_fails_and_never_asks_the_clock(interval):
    with pytest.raises(ConfigError, match="no days given"):
        resolve_window(interval=interval)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ("2024-13-01", None, "start: found '2024-13-01', expected a day"),
        ("9999-12-31", None, "start: found '9999-12-31', expected a day after 0001-01-01 and before 9999-12-31"),
        (None, "0001-01-01", "end: found '0001-01-01', expected a day after"),
        ("2024-01-05", "2024-01-05", "start 2024-01-05 is not before end 2024-01-05"),
    ],
)
def test_what_is_not_a_window_is_refused_by_name(start, end, message):
    with pytest.raises(ConfigError, match=message):
        resolve_window(start, end)


def test_days_and_seconds_are_utc():
    assert day_start(date(1970, 1, 2)) == 86_400
    assert day_of(86_399) == date(1970, 1, 1)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_buckets_of_consecutive_users_are_even_and_stable():
    counts = np.bincount(bucket_of(np.arange(1, 80_001), 8), minlength=8)
    assert abs(counts - 10_000).max() < 400
    # Written into the layout of every snapshot: this may never change.
    assert bucket_of(np.array([1, 2, 3, 2**62]), 1000).tolist() == BUCKETS


BUCKETS = [465, 110, 53, 75]


def test_days_in_words_end_with_their_last_and_counts_agree_with_their_noun():
    assert Window(date(2024, 2, 28), date(2024, 3, 1)).in_words() == "2024-02-28 to 2024-02-29 (2 days)"
    assert Window(date(2024, 2, 29), date(2024, 3, 1)).in_words() == "2024-02-29"
    assert [number_of(count, "raw row") for count in (0, 1, 2_000)] == ["0 raw rows", "1 raw row", "2,000 raw rows"]


def test_days_in_a_row_are_told_by_the_first_and_the_last_and_of_many_rows_the_first_five():
    day = date(2024, 2, 28)
    assert days_in_words([]) == "none"
    assert days_in_words([day]) == "2024-02-28"
    three = [day + timedelta(offset) for offset in (0, 1, 2, 4)]
    assert days_in_words(three) == "2024-02-28 to 2024-03-01, 2024-03-03"
    many = [date(2024, 1, day) for day in (1, 3, 5, 7, 9, 11, 12, 14)]
    assert days_in_words(many) == "2024-01-01, 2024-01-03, 2024-01-05, 2024-01-07, 2024-01-09 and 3 days more"


def test_no_probability_is_told_as_certain():
    told = [probability_in_digits(value) for value in (1.0, 0.99991, 0.9999, 0.0521, 0.0001, 0.00004)]
    assert told == ["> 0.9999", "> 0.9999", "0.9999", "0.0521", "0.0001", "< 0.0001"]
