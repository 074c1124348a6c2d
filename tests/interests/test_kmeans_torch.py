"""k-means in PyTorch against the compiled kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.config import ClusteringConfig
from encode.errors import DataError
from encode.interests import kmeans, kmeans_torch
from encode.interests.kmeans import Starts

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def unit(vectors) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def random_users(rng, num_users, longest, dim, spread):
    """Keys around a few directions a user, some of them equal, some zero; some users without any."""
    lengths = rng.integers(0, longest, num_users)
    offsets = np.append(0, np.cumsum(lengths))
    directions = rng.normal(size=(6, dim))
    keys = unit(directions[rng.integers(6, size=offsets[-1])] + spread * rng.normal(size=(offsets[-1], dim)))
    keys[rng.random(len(keys)) < 0.1] = 0
    copied = rng.random(len(keys)) < 0.2
    if len(keys):
        keys[copied] = keys[rng.integers(len(keys), size=copied.sum())]
    return keys, offsets, rng.integers(2**62, size=num_users)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("longest", [40, 1500])
def test_labels_are_equal_on_separated_data(longest, device, monkeypatch):
    monkeypatch.setattr(kmeans_torch, "_BATCH", 4000)
    keys, offsets, seeds = random_users(np.random.default_rng(0), 30, longest, 8, 0.05)
    config = ClusteringConfig(num_clusters=6)
    expected = kmeans.cluster(keys, offsets, seeds, config)
    np.testing.assert_array_equal(kmeans_torch.cluster(keys, offsets, seeds, config, device=device), expected)


@pytest.mark.parametrize("device", DEVICES)
@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 6), st.integers(1, 9), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_labels_are_equal_on_small_histories(device, seed, longest, dim, num_clusters, most_given):
    """Any spread, with duplicates, zero vectors, empty histories, starts that are too few, too many or useless."""
    rng = np.random.default_rng(seed)
    keys, offsets, seeds = random_users(rng, 5, longest, dim, rng.random() * 2)
    counts = rng.integers(0, most_given + 1, 5)
    starts = Starts(unit(rng.normal(size=(counts.sum(), dim))), np.append(0, np.cumsum(counts)))
    config = ClusteringConfig(num_clusters=num_clusters, num_iterations=4)
    expected = kmeans.cluster(keys, offsets, seeds, config, starts)
    found = kmeans_torch.cluster(keys, offsets, seeds, config, starts, device)
    np.testing.assert_array_equal(kmeans_torch.cluster(keys, offsets, seeds, config, starts, device), found)
    if (found != expected).any():  # a near tie, decided by the last bit of a sum
        ours, theirs = (kmeans.inertia(keys, offsets, labels, num_clusters) for labels in (expected, found))
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_no_behaviors_at_all():
    none = np.zeros((0, 4), np.float32)
    assert kmeans_torch.cluster(none, np.array([0, 0]), np.array([1]), ClusteringConfig()).shape == (0,)


def test_a_key_that_is_no_number_is_refused_by_its_row():
    keys = np.full((3, 2), np.sqrt(0.5), np.float32)
    keys[1, 0] = np.nan
    with pytest.raises(DataError, match="key of behavior 1 is not finite"):
        kmeans_torch.cluster(keys, np.array([0, 3]), np.array([1]), ClusteringConfig())
