"""Distances of distributions, by hand and by their properties."""

from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encode.monitoring.stability import chance, counts_of, edges_of, psi

HISTOGRAMS = st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any)


def test_psi_by_hand():
    # shares 3.5/9, 5.5/9 of (3, 5) and 1.5/5, 3.5/5 of (1, 3), each bin with half a value more
    p, q = (3.5 / 9, 5.5 / 9), (1.5 / 5, 3.5 / 5)
    expected = (q[0] - p[0]) * log(q[0] / p[0]) + (q[1] - p[1]) * log(q[1] / p[1])
    assert psi(np.array([3, 5]), np.array([1, 3])) == pytest.approx(expected)
    assert psi(np.array([10, 10]), np.array([400, 400])) == pytest.approx(0, abs=1e-12)


@given(HISTOGRAMS, st.data())
def test_psi_is_a_symmetric_distance(first, data):
    second = data.draw(st.lists(st.integers(0, 1000), min_size=len(first), max_size=len(first)).filter(any))
    one, other = np.array(first), np.array(second)
    assert psi(one, other) == pytest.approx(psi(other, one))
    assert 0 <= psi(one, other) < float("inf")
    assert psi(one, one) == 0


def test_psi_refuses_other_bins_and_knows_nothing_of_nothing():
    with pytest.raises(ValueError, match="psi: 2 bins and 3"):
        psi(np.array([1, 2]), np.array([1, 2, 3]))
    assert np.isnan(psi(np.array([0, 0]), np.array([1, 2])))
    assert np.isnan(chance(2, 0, 5))


def test_two_samples_of_one_distribution_are_as_far_apart_as_chance_says():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        before, now = rng.normal(size=500), rng.normal(size=800)
        edges = edges_of(before)
        found.append(psi(counts_of(before, edges), counts_of(now, edges)))
    assert np.mean(found) == pytest.approx(chance(10, 500, 800), rel=0.15)


def test_bins_are_of_about_equal_size():
    values = np.random.default_rng(1).permutation(1000)
    counts = counts_of(values, edges_of(values))
    assert counts.sum() == 1000
    assert counts.tolist() == [pytest.approx(100, abs=1)] * 10


def test_equal_values_are_never_cut_apart():
    values = np.array([8] * 90 + [3] * 10)
    edges = edges_of(values)
    assert edges.tolist() == [8]
    assert counts_of(values, edges).tolist() == [10, 90]
    assert edges_of(np.array([5, 5, 5])).tolist() == []
    assert edges_of(np.zeros(0)).tolist() == []


def test_a_value_on_an_edge_is_in_the_bin_that_begins_there():
    assert counts_of(np.array([0.5, 1.0, 1.5, 2.0]), np.array([1.0, 2.0])).tolist() == [1, 2, 1]
