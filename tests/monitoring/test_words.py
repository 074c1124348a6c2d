"""What is measured, told to people."""

import pytest

from encode.monitoring.words import lines, numbers

SHIFT = {"psi": 0.3, "chance": 0.01, "before": 150.25, "now": 12_345.0}
TEST = "2024-02-23 to 2024-02-29 (7 days)"


def shown(**measured):
    told = {"as_of": "2024-03-03", "freshness": {}, "problems": [], **measured}
    return list(lines(told))


def drift(**measured):
    sample = {"users": 200, "buckets": 1, "of_buckets": 4}
    return {"snapshot": "20240301-b", "users": 800, "sample": sample, "before": None, **measured}


def skew(scored):
    rest = {"unknown_items": 0.0125, "users_without_history": 0.5, "auc": 0.75, "impressions": 34_030.0}
    return {"trained": TEST, "scored": scored, **SHIFT, **rest}


def test_a_stage_is_told_by_its_last_day_and_its_age():
    stages = {"raw": {"ends": "2024-03-01", "age_days": 2}, "model": {"ends": "2024-03-05", "ahead_days": 2}}
    assert shown(freshness=stages | {"histories": {"ends": None}})[:6] == [
        "as of the start of 2024-03-03",
        "",
        "what each stage holds:",
        "  raw        days up to 2024-02-29, 2 days old",
        "  model      days up to 2024-03-04, 2 days ahead of that",
        "  histories  nothing yet",
    ]


def test_a_first_snapshot_has_none_to_be_compared_with():
    text = "\n".join(shown(drift=drift()))
    assert "drift: snapshot 20240301-b of 800 users, and none before it to compare with" in text
    assert "None" not in text
    assert "PSI" not in text


def test_what_moved_since_the_snapshot_before_is_a_table():
    measures = {"behaviors a user": SHIFT, "score": SHIFT | {"psi": 0.0}}
    found = shown(drift=drift(before="20240229-a", sampled_users_kept=0.99, measures=measures))
    assert "against the one before it, 20240229-a" in found[4]
    assert [line.split() for line in found[-3:]] == [
        ["before", "now", "PSI", "by", "chance", "moved"],
        ["behaviors", "a", "user", "150.2", "12,345", "0.3000", "0.0100", "much"],
        ["score", "150.2", "12,345", "0.0000", "0.0100", "none"],
    ]


@pytest.mark.parametrize("measured", [{}, {"psi": 0.3}, {"chance": 0.01}])
def test_what_has_no_psi_or_no_chance_is_not_measured(measured):
    shifted = {"score": {"before": 150.25, **measured}}
    found = shown(drift=drift(before="20240229-a", sampled_users_kept=0.0, measures=shifted))
    assert found[-1].split() == ["score", "150.2", "-", "-", "-", "not", "measured"]


EARLY = "trained on or tuned by, so that scores are too good:"
TESTED = "test days themselves, which show no skew:"
NONE_NEWER = "to measure skew: validate newer days first"


@pytest.mark.parametrize(
    ("scored", "told"),
    [
        (TEST, [f"{TESTED} {TEST}", NONE_NEWER]),
        ("2024-02-29", [f"{TESTED} 2024-02-29", NONE_NEWER]),
        (
            "2024-01-31 to 2024-02-29 (30 days)",
            [f"{EARLY} 2024-01-31 to 2024-02-22 (23 days)", f"{TESTED} {TEST}", NONE_NEWER],
        ),
        (
            "2024-02-22 to 2024-02-23 (2 days)",
            [f"{EARLY} 2024-02-22", f"{TESTED} 2024-02-23", NONE_NEWER],
        ),
        ("2024-02-01 to 2024-02-10 (10 days)", [f"{EARLY} 2024-02-01 to 2024-02-10 (10 days)", NONE_NEWER]),
        ("2024-02-22", [f"{EARLY} 2024-02-22", NONE_NEWER]),
        (
            "2024-02-28 to 2024-03-05 (7 days)",
            [f"{TESTED} 2024-02-28 to 2024-02-29 (2 days)", "to measure skew: --score-days 5"],
        ),
        (
            "2024-02-20 to 2024-03-01 (11 days)",
            [f"{EARLY} 2024-02-20 to 2024-02-22 (3 days)", f"{TESTED} {TEST}", "to measure skew: --score-days 1"],
        ),
        ("2024-03-01 to 2024-03-02 (2 days)", []),
    ],
)
def test_scored_days_that_the_model_knows_are_named_with_what_to_do(scored, told):
    found = shown(skew=skew(scored))
    assert found[4:6] == [
        f"skew: behaviors of {scored}",
        f"  scored like, and held against, the model's own test days, {TEST}",
    ]
    after = 6 + len(told)
    assert found[6:after] == [f"  {line}" for line in told]
    assert found[after].split() == ["test", "now", "PSI", "by", "chance", "moved"]
    assert "  unknown items 1.25%, users without a history 50.00%" in found
    assert found[-1] == "  of the 34,030 impressions scored: AUC 0.7500"


def test_problems_come_last():
    assert shown(problems=["drift: no snapshot yet"])[-2:] == ["problems:", "  drift: no snapshot yet"]


def test_numbers_that_belong_together_share_a_line():
    told = {"whole": {"impressions": 2000, "logloss": 0.25}, "bundles": {"b94": {"positives": 3, "skew": "unknown"}}}
    assert list(numbers(told)) == [
        "  whole: impressions 2,000, logloss 0.25",
        "  bundles",
        "    b94: positives 3, skew unknown",
    ]
