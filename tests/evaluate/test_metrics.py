"""Metrics by hand, against scikit-learn, and where they are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from encode.evaluate.metrics import auc, calibration, curves, gauc, logloss, summary


def arrays(labels, scores):
    return np.array(labels, np.int8), np.array(scores, np.float32)


# Scores of few values, so that there are ties in and between the classes.
rows = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 1), st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.9])),
    min_size=1,
    max_size=60,
)


def test_auc_by_hand():
    """Positives 0.8 and 0.4, negatives 0.6, 0.4, 0.1. Pairs won: 3 of 3, and 1 + a half of 3: 4.5 / 6."""
    assert auc(*arrays([1, 0, 1, 0, 0], [0.8, 0.6, 0.4, 0.4, 0.1])) == pytest.approx(0.75)
    assert auc(*arrays([0, 1], [0.2, 0.3])) == 1
    assert auc(*arrays([0, 1], [0.3, 0.2])) == 0
    assert auc(*arrays([0, 1, 1], [0.5, 0.5, 0.5])) == 0.5


def test_auc_of_one_class_is_not_a_number():
    for labels, scores in (([], []), ([1], [0.5]), ([0, 0], [0.1, 0.2])):
        assert math.isnan(auc(*arrays(labels, scores)))


def test_gauc_by_hand():
    """User 7: 1 of 2 pairs won, 3 impressions. User 2: 1 of 1, 2 impressions. User 5 has one class: left out.

    (0.5 * 3 + 1 * 2) / 5 = 0.7. Between users nothing is compared.
    """
    users = np.array([7, 2, 5, 7, 5, 2, 7])
    labels, scores = arrays([1, 1, 1, 0, 1, 0, 0], [0.5, 0.02, 0.3, 0.7, 0.4, 0.01, 0.1])
    assert gauc(users, labels, scores) == pytest.approx(0.7)


def test_gauc_where_no_group_has_both_classes():
    labels, scores = arrays([1, 0], [0.3, 0.4])
    assert math.isnan(gauc(np.array([1, 2]), labels, scores))
    assert math.isnan(gauc(np.zeros(0, np.int64), labels[:0], scores[:0]))


@given(rows)
def test_auc_is_that_of_scikit_learn(given_rows):
    _, labels, scores = zip(*given_rows, strict=True)
    labels, scores = arrays(labels, scores)
    if 0 < labels.sum() < len(labels):
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    else:
        assert math.isnan(auc(labels, scores))


@given(rows)
def test_gauc_is_the_loop_over_groups(given_rows):
    groups, labels, scores = zip(*given_rows, strict=True)
    groups, (labels, scores) = np.array(groups) * 1000 - 2000, arrays(labels, scores)
    values, weights = [], []
    for group in set(groups.tolist()):
        mine = groups == group
        if 0 < labels[mine].sum() < mine.sum():
            values.append(roc_auc_score(labels[mine], scores[mine]))
            weights.append(mine.sum())
    found = gauc(groups, labels, scores)
    assert math.isnan(found) if not values else found == pytest.approx(np.average(values, weights=weights), abs=1e-12)


@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_impressions_does_not_matter(given_rows, random):
    shuffled = random.sample(given_rows, len(given_rows))
    for metric in (auc, logloss, calibration):
        found = [metric(*arrays(*list(zip(*order, strict=True))[1:])) for order in (given_rows, shuffled)]
        assert found[0] == pytest.approx(found[1], nan_ok=True)


def test_logloss_by_hand():
    """-(ln 0.8 + ln 0.5) / 2."""
    labels, scores = arrays([1, 0], [0.8, 0.5])
    assert logloss(labels, scores) == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.001, 0.999)), min_size=1, max_size=50))
def test_logloss_is_that_of_scikit_learn(given_rows):
    labels, probabilities = np.array([r[0] for r in given_rows]), np.array([r[1] for r in given_rows])
    assert logloss(labels, probabilities) == pytest.approx(log_loss(labels, probabilities, labels=[0, 1]), rel=1e-9)


def test_logloss_stays_finite_where_the_model_is_sure_and_wrong():
    labels, scores = arrays([1, 0], [0, 1])
    assert logloss(labels, scores) == pytest.approx(-math.log(1e-7), rel=1e-6)
    labels, scores = arrays([0, 1], [0, 1])
    assert logloss(labels, scores) == pytest.approx(1e-7, rel=1e-3)


def test_calibration_by_hand():
    """Promised 0.2 + 0.4 + 0.6 + 0.8 = 2 clicks; there was 1."""
    assert calibration(*arrays([0, 0, 1, 0], [0.2, 0.4, 0.6, 0.8])) == pytest.approx(2)
    assert math.isnan(calibration(*arrays([0, 0], [0.2, 0.4])))


def test_calibration_of_many_small_probabilities_does_not_drift():
    """A sum in float32 would lose the third digit."""
    labels = np.zeros(2_000_000, np.int8)
    labels[:2000] = 1
    assert calibration(labels, np.full(len(labels), 1e-3, np.float32)) == pytest.approx(1, abs=1e-6)


def test_summary_splits_off_first_times():
    users = np.array([1, 1, 1, 1])
    labels, scores = arrays([1, 0, 1, 0], [0.9, 0.5, 0.1, 0.3])
    found = summary(users, labels, scores, np.array([False, True, True, True]))
    assert found["auc"] == found["gauc"] == pytest.approx(0.5)
    assert found["auc_first_time"] == found["gauc_first_time"] == 0
    assert (found["impressions"], found["positives"]) == (4, 2)


def test_curves_by_hand():
    labels, scores = arrays([0, 1, 0, 1], [0.4, 0.9, 0.2, 0.7])
    found = curves(labels, scores, np.array([10, 2, 1, 30]), num_bins=2)
    low, high = found["reliability"]
    assert (low["predicted"], low["observed"], low["impressions"]) == pytest.approx((0.3, 0, 2))
    assert (high["predicted"], high["observed"], high["impressions"]) == pytest.approx((0.8, 1, 2))
    assert found["auc_by_history_length"] == [
        {"up_to": 2, "auc": 1, "impressions": 2},
        {"up_to": 30, "auc": 1, "impressions": 2},
    ]
    assert len(curves(labels[:1], scores[:1], np.array([3]))["reliability"]) == 1
    assert curves(labels[:1], scores[:1], np.array([3]))["auc_by_history_length"] == []
