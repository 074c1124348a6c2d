"""The compiled pooling against torch's, which training uses, and against counting by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.interests.pooling import Behaviors, pool
from encode.model.relevance import pool_interests


def draw(seed, lengths, num_clusters, D=8, P=4, share_of_zero_keys=0.0, num_rows=40):
    """Behaviors of users with the given lengths, their labels, and the table of embeddings."""
    rng = np.random.default_rng(seed)
    key = rng.normal(size=(num_rows, P))
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    key[rng.random(num_rows) < share_of_zero_keys] = 0
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    index, timestamps = rng.integers(0, num_rows, offsets[-1]), rng.integers(1, 10**9, offsets[-1])
    labels = rng.integers(0, num_clusters, offsets[-1]).astype(np.uint8)
    embedding = rng.normal(size=(num_rows, D)).astype(np.float32)
    return labels, Behaviors(offsets, index, key[index].astype(np.float32), index * 2**40, timestamps), embedding


def by_torch(labels, behaviors, embedding, scale, by_relevance, num_clusters, dtype):
    """Centers, variances, values and sizes of the non-empty clusters, largest first, one user after the other."""
    num_users = len(behaviors.offsets) - 1
    user = np.repeat(np.arange(num_users), np.diff(behaviors.offsets))
    found = pool_interests(
        torch.from_numpy(embedding[behaviors.item_index]).to(dtype),
        torch.from_numpy(behaviors.key).to(dtype),
        torch.from_numpy(user * num_clusters + labels),
        num_users,
        num_clusters,
        torch.tensor(scale, dtype=dtype),
        by_relevance,
    )
    size = found.size.long()
    order = [(u, k) for u in range(num_users) for k in sorted(range(num_clusters), key=lambda k: -size[u, k])]
    rows = tuple(torch.tensor([(u, k) for u, k in order if size[u, k] > 0], dtype=torch.long).reshape(-1, 2).T)
    return tuple(part[rows].numpy() for part in (found.center, found.variance, found.value, size))


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 70), max_size=5),
    st.sampled_from([1, 3, 32, 255]),
    st.sampled_from([(1, 1), (7, 3), (8, 4), (64, 16)]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.1, 8.0, 300.0]),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_pooling_is_that_of_training(seed, lengths, num_clusters, dims, share_of_zero_keys, scale, by_relevance):
    """In doubles to 1e-6; in floats, where torch is the less exact, to 1e-5 at a scale that training sees."""
    labels, behaviors, embedding = draw(seed, lengths, num_clusters, *dims, share_of_zero_keys)
    found = pool(labels, behaviors, embedding, scale, by_relevance, num_clusters)
    dtype = torch.float64
    center, variance, value, size = by_torch(labels, behaviors, embedding, scale, by_relevance, num_clusters, dtype)
    np.testing.assert_allclose(found.center, center, atol=1e-6)
    np.testing.assert_allclose(found.variance, variance, atol=1e-6)
    np.testing.assert_allclose(found.value, value, atol=1e-6)
    np.testing.assert_array_equal(found.size, size)


@pytest.mark.parametrize("by_relevance", [True, False])
def test_pooling_in_floats_is_that_of_training(by_relevance):
    labels, behaviors, embedding = draw(0, [3000, 1, 500], 4)
    found = pool(labels, behaviors, embedding, 8.0, by_relevance, 4)
    center, _, value, _ = by_torch(labels, behaviors, embedding, 8.0, by_relevance, 4, torch.float32)
    np.testing.assert_allclose(found.center, center, atol=1e-5)
    np.testing.assert_allclose(found.value, value, atol=1e-5)


def test_no_scale_makes_all_weights_vanish():
    """Two almost opposite keys share a center that is far from both: there exp(rho - scale) is 0, even in doubles."""
    key = np.array([[1, 0], [-0.9539392, 0.3]], np.float32)
    behaviors = Behaviors(np.array([0, 2]), np.array([0, 1]), key, np.array([3, 4]), np.array([1, 2]))
    found = pool(np.zeros(2, np.uint8), behaviors, np.array([[1.0], [3.0]], np.float32), 1e4, True, 1)
    weight = np.exp(1e4 * (key.astype(float) @ found.center[0] - (key @ found.center[0]).max()))
    assert np.isfinite(found.value).all()
    np.testing.assert_allclose(found.value[0, 0], weight @ [1, 3] / weight.sum(), atol=1e-2)


def test_pooling_by_hand():
    """Labels 2, 5 and 7 of two users; equal sizes keep the order of the labels."""
    key = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 0]], np.float32)
    behaviors = Behaviors(
        np.array([0, 0, 4, 5]), np.array([1, 2, 3, 1, 0]), key, np.array([9, 8, 9, 7, 6]), np.array([4, 6, 5, 5, 2])
    )
    embedding = np.array([[0.0], [1.0], [2.0], [4.0]], np.float32)
    found = pool(np.array([5, 2, 5, 2, 7], np.uint8), behaviors, embedding, 1.0, False, 8)
    assert found.offsets.tolist() == [0, 0, 2, 3]
    assert found.center.tolist() == [[0, 1], [1, 0], [0, 0]]
    assert found.value.tolist() == [[1.5], [2.5], [0]]
    assert found.size.tolist() == [2, 2, 1]
    assert found.newest.tolist() == [6, 5, 2]
    assert found.top_offsets.tolist() == [0, 2, 3, 4]
    assert found.top_items.tolist() == [7, 8, 9, 6]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(-9, 9) | st.integers(1, 2**22)), max_size=80), max_size=4
    ),
    st.sampled_from([1, 2**40, 11400714819323198485 % 2**40]),
)
@settings(deadline=None, max_examples=100)
def test_top_items_are_those_of_a_counter(users, stride):
    events = [event for user in users for event in user]
    offsets = np.append(0, np.cumsum([len(user) for user in users])).astype(np.int64)
    nothing = np.zeros(len(events), np.int64)
    items = np.array([item * stride for _, item in events], np.int64)
    behaviors = Behaviors(offsets, nothing, np.zeros((len(events), 1), np.float32), items, nothing)
    labels = np.array([label for label, _ in events], np.uint8)
    found = pool(labels, behaviors, np.zeros((1, 1), np.float32), 1.0, True, 3)
    expected = []
    for user in users:
        counts = [Counter(item * stride for label, item in user if label == k) for k in range(3)]
        largest_first = sorted((one for one in counts if one), key=lambda one: -one.total())
        expected += [sorted(one, key=lambda item: (-one[item], item))[:5] for one in largest_first]
    assert [list(part) for part in np.split(found.top_items, found.top_offsets[1:-1])][: len(expected)] == expected


def test_a_long_history_loses_nothing_to_rounding():
    """100,000 behaviors in two clusters, summed in doubles; many more distinct items than fit beside each other."""
    labels, behaviors, embedding = draw(4, [100_000, 5], 2, num_rows=30_000)
    found = pool(labels, behaviors, embedding, 8.0, True, 2)
    center, variance, value, size = by_torch(labels, behaviors, embedding, 8.0, True, 2, torch.float64)
    np.testing.assert_allclose(found.center, center, atol=2e-7)
    np.testing.assert_allclose(found.variance, variance, atol=2e-7)
    np.testing.assert_allclose(found.value, value, atol=2e-7)
    for k in range(2):
        label = labels[0] if (labels[:100_000] == labels[0]).sum() == size[k] else 1 - labels[0]
        counts = Counter(behaviors.item_ids[:100_000][labels[:100_000] == label].tolist())
        top = found.top_items[found.top_offsets[k] : found.top_offsets[k + 1]].tolist()
        assert top == sorted(counts, key=lambda item: (-counts[item], item))[:5]
