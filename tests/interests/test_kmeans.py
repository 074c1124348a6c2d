"""Spherical k-means against plain loops and scikit-learn, and its edges."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from encode.config import ClusteringConfig
from encode.errors import DataError
from encode.interests import kmeans
from encode.interests.kmeans import cluster


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def one(keys, seed=0, **settings) -> np.ndarray:
    """Cluster a single history."""
    keys = np.asarray(keys, np.float32)
    return cluster(keys, np.array([0, len(keys)]), np.array([seed]), ClusteringConfig(**settings))


def planted(rng, num_clusters, size, spread, dim=8):
    """Well separated directions: corners of a cross, so that no two are closer than 90 degrees."""
    corners = np.concatenate([np.eye(dim), -np.eye(dim)])[rng.permutation(2 * dim)[:num_clusters]]
    truth = rng.permutation(np.repeat(np.arange(num_clusters), size))
    return unit(corners[truth] + spread * rng.normal(size=(len(truth), dim))), truth


def means(keys, labels, num_clusters) -> np.ndarray:
    sums = np.stack([keys[labels == k].sum(0, dtype=np.float64) for k in range(num_clusters)])
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.where(norms > 0, norms, 1)


def inertia(keys, labels) -> float:
    used = np.unique(labels)
    centers = means(keys, np.searchsorted(used, labels), len(used))
    return float(((keys - centers[np.searchsorted(used, labels)]) ** 2).sum())


def lloyd(keys, centers, num_iterations) -> np.ndarray:
    """Spherical Lloyd from given centers: assign, then renormalized means, and a last assignment."""
    for _ in range(num_iterations):
        labels = (keys @ centers.T).argmax(1)
        centers = means(keys, labels, len(centers))
    return (keys @ centers.T).argmax(1)


def seeded(keys, num_clusters, seed) -> np.ndarray:
    """The centers that k-means++ of the library starts from."""
    centers = np.zeros((num_clusters, keys.shape[1]), np.float32)
    assert kmeans._seed(keys, np.uint64(seed), centers) == num_clusters
    return centers.astype(np.float64)


def slow_seed(keys, num_clusters, seed) -> list[int]:
    """Rows that k-means++ chooses, drawn with the library's random numbers: each new one by squared distance."""
    state, u = kmeans._next_random(np.uint64(seed))
    chosen = [int(u * len(keys))]
    while len(chosen) < num_clusters:
        distance = ((keys[:, None].astype(float) - keys[chosen]) ** 2).sum(2).min(1)
        if distance.sum() == 0:
            break
        state, u = kmeans._next_random(np.uint64(state))
        chosen.append(int(np.searchsorted(np.cumsum(distance), u * distance.sum(), side="right")))
    return chosen


# --- quality -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed):
    keys, truth = planted(np.random.default_rng(seed), 6, 50, 0.05)
    labels = one(keys, seed, num_clusters=6)
    assert adjusted_rand_score(truth, labels) == 1 or inertia(keys, labels) > inertia(keys, truth)
    found = [one(keys, stream, num_clusters=6) for stream in range(20)]
    assert np.mean([adjusted_rand_score(truth, labels) == 1 for labels in found]) > 0.5


@pytest.mark.parametrize("seed", range(8))
def test_it_is_lloyds_algorithm_from_the_same_seeds(seed):
    keys, _ = planted(np.random.default_rng(seed), 5, 60, 0.4)
    expected = lloyd(keys, seeded(keys, 5, seed), 4)
    assert np.unique(expected).size == 5  # none was emptied on the way, so both are defined alike
    np.testing.assert_array_equal(one(keys, seed, num_clusters=5, num_iterations=4), expected)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_seeding_is_k_means_plus_plus(seed, length, distinct):
    """With duplicates among the keys: it ends with one seed a distinct key where there are fewer than K."""
    rng = np.random.default_rng(seed)
    keys = unit(rng.normal(size=(distinct, 3)))[rng.integers(distinct, size=length)]
    centers = np.full((8, 3), 9, np.float32)
    chosen = slow_seed(keys, 8, seed)
    assert kmeans._seed(keys, np.uint64(seed), centers) == len(chosen) == min(8, len(np.unique(keys, axis=0)))
    np.testing.assert_array_equal(centers[: len(chosen)], keys[chosen])


@pytest.mark.parametrize("seed", range(3))
def test_it_is_as_good_as_scikit_learn(seed):
    """The best of ten seedings each. Squared distances of unit vectors to unit centers; theirs are renormalized."""
    keys, _ = planted(np.random.default_rng(seed), 8, 40, 0.35)
    ours = min(inertia(keys, one(keys, stream, num_clusters=8, num_iterations=50)) for stream in range(10))
    theirs = inertia(keys, KMeans(8, n_init=10, random_state=0).fit_predict(keys))
    assert ours <= theirs * 1.01


def test_iterations_improve_on_the_seeding():
    keys, _ = planted(np.random.default_rng(0), 8, 100, 0.6)
    after = [inertia(keys, one(keys, 3, num_clusters=8, num_iterations=n)) for n in (1, 5, 30)]
    assert after[0] > after[1] >= after[2]


@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_labels_are_those_of_the_final_assignment(seed, length, num_clusters):
    """At convergence every key is with the center that it is most similar to."""
    keys = unit(np.random.default_rng(seed).normal(size=(length, 3)))
    labels = one(keys, seed, num_clusters=num_clusters, num_iterations=100)
    assert labels.max() < num_clusters
    used = np.unique(labels)
    similarity = keys @ means(keys, np.searchsorted(used, labels), len(used)).T
    own = similarity[np.arange(length), np.searchsorted(used, labels)]
    assert (own >= similarity.max(1) - 1e-5).all()


def test_labels_follow_the_last_centers_also_when_stopped_early():
    """One iteration: seeds, assignment, means, and an assignment to those means rather than to the seeds."""
    keys, _ = planted(np.random.default_rng(1), 5, 60, 0.8)
    centers = seeded(keys, 5, 1)
    before, after = (keys @ centers.T).argmax(1), lloyd(keys, centers, 1)
    assert (before != after).any()
    np.testing.assert_array_equal(one(keys, 1, num_clusters=5, num_iterations=1), after)


# --- independence ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """40 histories of 0 to 200 behaviors: keys, offsets, seeds, labels."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 200, 40)
    lengths[[3, 4, 39]] = 0
    offsets = np.append(0, np.cumsum(lengths))
    keys = unit(rng.normal(size=(offsets[-1], 8)))
    seeds = rng.integers(1, 2**62, 40)
    return keys, offsets, seeds, cluster(keys, offsets, seeds, ClusteringConfig(num_clusters=7))


def test_the_same_call_gives_the_same_labels(batch):
    keys, offsets, seeds, labels = batch
    np.testing.assert_array_equal(cluster(keys, offsets, seeds, ClusteringConfig(num_clusters=7)), labels)


def test_who_else_is_in_the_batch_does_not_matter(batch):
    keys, offsets, seeds, labels = batch
    for user in range(len(seeds)):
        rows = slice(offsets[user], offsets[user + 1])
        np.testing.assert_array_equal(one(keys[rows], seeds[user], num_clusters=7), labels[rows])


def test_the_order_of_users_does_not_matter(batch):
    keys, offsets, seeds, labels = batch
    order = np.random.default_rng(1).permutation(len(seeds))
    rows = np.concatenate([np.arange(offsets[u], offsets[u + 1]) for u in order])
    shuffled = np.append(0, np.cumsum(np.diff(offsets)[order]))
    found = cluster(keys[rows], shuffled, seeds[order], ClusteringConfig(num_clusters=7))
    np.testing.assert_array_equal(found, labels[rows])


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_the_number_of_threads_does_not_matter(batch, threads, monkeypatch):
    keys, offsets, seeds, labels = batch
    monkeypatch.setattr(kmeans, "_NUM_THREADS", threads)
    np.testing.assert_array_equal(cluster(keys, offsets, seeds, ClusteringConfig(num_clusters=7)), labels)


def test_seed_and_stream_do_matter(batch):
    keys, offsets, seeds, labels = batch
    for config, streams in (
        (ClusteringConfig(num_clusters=7, seed=1), seeds),
        (ClusteringConfig(num_clusters=7), seeds + 1),
    ):
        assert (cluster(keys, offsets, streams, config) != labels).any()


def test_the_layout_in_memory_does_not_matter(batch):
    keys, offsets, seeds, labels = batch
    for same in (np.asfortranarray(keys), np.repeat(keys, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(cluster(same, offsets, seeds, ClusteringConfig(num_clusters=7)), labels)


# --- edges -------------------------------------------------------------------------------------------------


def test_no_users_and_no_behaviors():
    none = np.zeros((0, 4), np.float32)
    assert cluster(none, np.array([0]), np.zeros(0, np.int64), ClusteringConfig()).shape == (0,)
    assert cluster(none, np.array([0, 0, 0]), np.array([1, 2]), ClusteringConfig()).shape == (0,)


def test_one_behavior():
    assert one(unit([[1, 2]])).tolist() == [0]


def test_more_clusters_than_distinct_keys_uses_one_a_key():
    keys = unit([[1, 0], [0, 1], [1, 1]])[[0, 1, 2, 1, 0, 2, 2]]
    labels = one(keys, num_clusters=200)
    assert len(set(labels[:3])) == 3
    np.testing.assert_array_equal(labels, labels[[0, 1, 2, 1, 0, 2, 2]])
    assert labels.max() == 2


def test_keys_that_differ_in_the_last_bit_are_distinct():
    """So they get clusters of their own if there is room, and never a cluster beyond those."""
    keys = np.repeat(unit([[1, 2, 3]]), 6, axis=0)
    keys[3:, 0] = np.nextafter(keys[0, 0], np.float32(1))
    assert one(keys, num_clusters=4).max() <= 1


def test_all_equal_is_one_cluster():
    assert set(one(np.repeat(unit([[3, 4]]), 500, axis=0), num_clusters=8)) == {0}


def test_zero_vectors_are_clustered_with_the_rest():
    assert set(one(np.zeros((5, 3)), num_clusters=4)) == {0}
    keys = np.concatenate([np.zeros((3, 2), np.float32), unit([[1, 0], [0, 1]])])
    labels = one(keys, num_clusters=2)
    assert len(set(labels[:3])) == 1
    assert labels.max() <= 1


def test_a_key_that_is_no_number_is_refused_by_its_row():
    keys = unit(np.ones((5, 3)))
    for bad in (np.nan, np.inf):
        keys[3, 1] = bad
        with pytest.raises(DataError, match="key of behavior 3 is not finite; expected unit vectors"):
            one(keys)


def test_ties_go_to_the_lower_cluster():
    labels, similarity = np.full(3, 9, np.uint8), np.zeros(3, np.float32)
    centers = unit([[0, 1], [1, 0], [1, 0], [0, -1]])
    keys = np.array([[1, 0], [0, 0], [0, -1]], np.float32)
    assert kmeans._assign(keys, centers, 4, labels, similarity)
    assert labels.tolist() == [1, 0, 3]
    assert similarity.tolist() == [1, 0, 1]
    assert not kmeans._assign(keys, centers, 4, labels, similarity)


def test_an_emptied_cluster_takes_the_key_farthest_from_its_center():
    """Cluster 1 of 3 is empty; the key at 90 degrees is the least similar to its center, the lone one stays."""
    keys = unit([[1, 0], [1, 0.1], [0, 1], [-1, -0.9]])
    labels, similarity = np.array([0, 0, 0, 2], np.uint8), np.array([1.0, 0.99, 0.1, -0.5], np.float32)
    centers = np.full((3, 2), 7, np.float32)
    sums, sizes = np.zeros((3, 2)), np.zeros(3, np.int64)
    kmeans._update(keys, labels, similarity, centers, sums, sizes, 3)
    assert labels.tolist() == [0, 0, 1, 2]
    assert sizes.tolist() == [2, 1, 1]
    np.testing.assert_allclose(centers, [unit(keys[:2].sum(0)), keys[2], keys[3]], atol=1e-6)


def test_several_emptied_clusters_take_different_keys():
    keys = unit([[1, 0], [1, 0.2], [1, 0.5], [0, 1]])
    labels, similarity = np.zeros(4, np.uint8), np.array([1.0, 0.9, 0.8, 0.0], np.float32)
    kmeans._update(keys, labels, similarity, np.zeros((3, 2), np.float32), np.zeros((3, 2)), np.zeros(3, np.int64), 3)
    assert labels.tolist() == [0, 0, 2, 1]


def test_histories_in_which_clusters_empty_end_with_all_of_them_used():
    """Of random small histories many empty a cluster in plain Lloyd; ours fills it, to a lower inertia on the whole."""
    gained = []
    for seed in range(200):
        keys = unit(np.random.default_rng(seed).normal(size=(14, 2)))
        centers = unit(np.random.default_rng(seed + 1000).normal(size=(6, 2))).astype(np.float64)
        plain = lloyd(keys, centers, 30)
        if len(np.unique(plain)) == 6:
            continue
        labels, similarity = np.zeros(14, np.uint8), np.zeros(14, np.float32)
        own = centers.astype(np.float32)
        kmeans._assign(keys, own, 6, labels, similarity)
        for _ in range(30):
            kmeans._update(keys, labels, similarity, own, np.zeros((6, 2)), np.zeros(6, np.int64), 6)
            kmeans._assign(keys, own, 6, labels, similarity)
        assert len(np.unique(labels)) == 6
        gained.append(inertia(keys, plain) - inertia(keys, labels))
    assert len(gained) > 20
    assert np.mean(gained) > 0.1


def test_a_long_history_takes_seconds_at_most():
    keys, _ = planted(np.random.default_rng(0), 16, 6250, 0.3)
    one(keys[:10])  # compiled or loaded
    started = time.perf_counter()
    labels = one(keys, num_clusters=32)
    assert time.perf_counter() - started < 5
    assert len(labels) == 100_000
    assert len(np.unique(labels)) == 32
