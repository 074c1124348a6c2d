"""Spherical k-means against plain loops and scikit-learn, and its edges."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.caching import CacheImpl
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from encode.compiled import compiled
from encode.config import ClusteringConfig
from encode.errors import DataError
from encode.interests import kmeans, lloyd, seeding
from encode.interests.kmeans import Starts, cluster


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def one(keys, seed=0, starts=None, **settings) -> np.ndarray:
    """Cluster a single history."""
    keys = np.asarray(keys, np.float32)
    if starts is not None:
        starts = Starts(np.asarray(starts, np.float32), np.array([0, len(starts)]))
    return cluster(keys, np.array([0, len(keys)]), np.array([seed]), ClusteringConfig(**settings), starts)


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
    return float(kmeans.inertia(keys, np.array([0, len(keys)]), labels, 255)[0])


def plain_lloyd(keys, centers, num_iterations) -> np.ndarray:
    """Spherical Lloyd from given centers: assign, then renormalized means, and a last assignment."""
    for _ in range(num_iterations):
        labels = (keys @ centers.T).argmax(1)
        centers = means(keys, labels, len(centers))
    return (keys @ centers.T).argmax(1)


def seeded(keys, num_clusters, seed) -> np.ndarray:
    """The centers that the library starts from."""
    centers = np.zeros((num_clusters, keys.shape[1]), np.float32)
    assert seeding.start(keys, 1.0, np.uint64(seed), np.zeros((0, keys.shape[1]), np.float32), centers) == num_clusters
    return centers.astype(np.float64)


def squares(keys, centers) -> np.ndarray:
    """Squared distances of unit vectors to the closest center, as the seeding rounds them: nothing is nearly zero."""
    closest = np.where((keys != 0).any(1), 4.0, 0.0)
    for center in centers.astype(np.float64):
        closest = np.minimum(closest, 2 - 2 * (keys @ center))
    return np.where(closest > 1e-6, closest, 0)


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
    expected = plain_lloyd(keys, seeded(keys, 5, seed), 4)
    assert np.unique(expected).size == 5  # none was emptied on the way, so both are defined alike
    np.testing.assert_array_equal(one(keys, seed, num_clusters=5, num_iterations=4), expected)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(2, 21), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_nothing_that_is_skipped_would_change_a_label(seed, length, dim, num_clusters):
    """Against plain Lloyd from the same centers: any width, any number of centers, also a tile that is not full."""
    rng = np.random.default_rng(seed)
    keys = unit(rng.normal(size=(length, dim)))
    starts = unit(rng.normal(size=(num_clusters, dim)))
    for num_iterations in (1, 2, 3, 8):
        expected = plain_lloyd(keys, starts, num_iterations)
        if len(np.unique(plain_lloyd(keys, starts, num_iterations - 1))) < num_clusters:
            break  # from here on an empty cluster is filled
        found = one(keys, starts=starts, num_clusters=num_clusters, num_iterations=num_iterations)
        np.testing.assert_array_equal(found, expected)


def test_bounds_hold_for_keys_of_any_length():
    rng = np.random.default_rng(0)
    keys = 20 * rng.random((400, 1)) * unit(rng.normal(size=(400, 6)))
    starts = unit(rng.normal(size=(7, 6)))
    found = one(keys, starts=starts, num_clusters=7, num_iterations=9)
    np.testing.assert_array_equal(found, plain_lloyd(keys.astype(np.float32), starts, 9))


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 20), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_seeding_is_greedy_k_means_plus_plus(seed, length, distinct, num_given):
    """Each center is the best of eight that are drawn by squared distance; equals may go either way."""
    rng = np.random.default_rng(seed)
    keys = unit(rng.normal(size=(distinct, 3)))[rng.integers(distinct, size=length)]
    centers = np.full((8, 3), 9, np.float32)
    centers[:num_given] = unit(rng.normal(size=(num_given, 3)))
    found = seeding._seed(keys, np.uint64(seed), centers, num_given)
    assert found == min(8, num_given + len(np.unique(keys, axis=0)))
    lane_by_lane = np.argsort(np.arange(length) % 16, kind="stable")
    state = np.uint64(seed)
    for k in range(found):
        cumulated = np.cumsum(squares(keys, centers[:k])[lane_by_lane])
        drawn = []
        for _ in range(8):
            state, u = seeding.next_random(np.uint64(state))
            drawn.append(keys[lane_by_lane[np.searchsorted(cumulated, u * cumulated[-1], side="right")]])
        if k >= num_given:
            assert (centers[k] == drawn).all(1).any()
            left = [squares(keys, np.vstack([centers[:k], candidate])).sum() for candidate in drawn]
            assert squares(keys, centers[: k + 1]).sum() <= min(left) + 1e-4


def test_a_sample_that_misses_a_key_is_not_trusted():
    """Three rare directions among 5,000 equal keys: each gets its own cluster although no sample holds them all."""
    keys = np.repeat(unit([[1, 0, 0]]), 5000, axis=0)
    keys[[17, 2500, 4999]] = unit([[0, 1, 0], [0, 0, 1], [0, -1, 0]])
    labels = one(keys, num_clusters=4)
    assert len(set(labels[[0, 17, 2500, 4999]])) == 4
    assert (labels == labels[0]).sum() == 4997
    np.testing.assert_array_equal(np.unique(seeded(keys, 4, 0), axis=0), np.unique(keys, axis=0))


def test_keys_too_close_for_seeding_to_tell_get_clusters_of_their_own_if_there_is_room():
    """The squared distance between the first two is 8e-7, of which a similarity of float32 knows one digit."""
    keys = np.repeat(unit([[1, 0], [np.cos(9e-4), np.sin(9e-4)], [0, 1]]), 3, axis=0)
    assert len(set(one(keys, num_clusters=3)[::3])) == 3


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
    before, after = (keys @ centers.T).argmax(1), plain_lloyd(keys, centers, 1)
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


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_the_number_of_threads_does_not_matter(batch, num_threads):
    keys, offsets, seeds, labels = batch
    found = cluster(keys, offsets, seeds, ClusteringConfig(num_clusters=7), num_threads=num_threads)
    np.testing.assert_array_equal(found, labels)


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
    for bad in (np.nan, np.inf, 1e30):
        keys[3, 1] = bad
        with pytest.raises(DataError, match="key of behavior 3 is not finite; expected unit vectors"):
            one(keys)


def test_ties_go_to_the_lower_cluster():
    """Also a zero vector's, which ties with every center."""
    keys = np.array([[1, 0], [0, 0], [0, -1]], np.float32)
    assert one(keys, starts=unit([[0, 1], [1, 0], [1, 0], [0, -1]]), num_clusters=4).tolist() == [1, 0, 3]


def test_an_emptied_cluster_takes_the_key_farthest_from_its_center():
    """Cluster 1 of 3 wins no key; the key at 90 degrees is the least similar to its center, the lone one stays."""
    keys = unit([[1, 0], [1, 0.1], [0, 1], [-1, -0.9]])
    assert one(keys, starts=[[1, 0], [0, 0], keys[3]], num_clusters=3).tolist() == [0, 0, 1, 2]


def test_several_emptied_clusters_take_different_keys():
    keys = unit([[1, 0], [1, 0.2], [1, 0.5], [0, 1]])
    assert one(keys, starts=[[1, 0], [0, 0], [0, 0]], num_clusters=3).tolist() == [0, 0, 2, 1]


def test_histories_in_which_clusters_empty_end_with_all_of_them_used():
    """Of random small histories many empty a cluster in plain Lloyd; ours fills it, to a lower inertia on the whole."""
    gained = []
    for seed in range(200):
        keys = unit(np.random.default_rng(seed).normal(size=(14, 2)))
        centers = unit(np.random.default_rng(seed + 1000).normal(size=(6, 2)))
        plain = plain_lloyd(keys, centers, 30)
        if len(np.unique(plain)) == 6:
            continue
        labels = one(keys, starts=centers, num_clusters=6, num_iterations=30)
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


# --- starts ------------------------------------------------------------------------------------------------


def test_more_start_centers_than_clusters_are_cut():
    keys = unit(np.random.default_rng(0).normal(size=(90, 5)))
    starts = unit(np.random.default_rng(1).normal(size=(9, 5)))
    found = one(keys, starts=starts, num_clusters=4, num_iterations=3)
    np.testing.assert_array_equal(found, plain_lloyd(keys, starts[:4], 3))


def test_too_few_start_centers_are_filled_up():
    """Two of six directions are given, and keep their numbers; the others are found."""
    keys, truth = planted(np.random.default_rng(0), 6, 50, 0.03)
    given = means(keys, truth, 6)[[4, 2]]
    labels = one(keys, starts=given, num_clusters=6)
    assert adjusted_rand_score(truth, labels) == 1
    assert set(labels[truth == 4]) == {0}
    assert set(labels[truth == 2]) == {1}


def test_each_user_has_its_own_starts_or_none(batch):
    keys, offsets, seeds, labels = batch
    counts = np.where(np.arange(len(seeds)) % 3 == 0, 0, np.arange(len(seeds)) % 12)
    bounds = np.append(0, np.cumsum(counts))
    centers = unit(np.random.default_rng(0).normal(size=(bounds[-1], 8)))
    found = cluster(keys, offsets, seeds, ClusteringConfig(num_clusters=7), Starts(centers, bounds))
    for user in range(len(seeds)):
        rows, own = slice(offsets[user], offsets[user + 1]), slice(bounds[user], bounds[user + 1])
        expected = one(keys[rows], seeds[user], centers[own], num_clusters=7) if counts[user] else labels[rows]
        np.testing.assert_array_equal(found[rows], expected)


def test_where_clustering_has_converged_it_stays():
    keys, _ = planted(np.random.default_rng(3), 8, 100, 0.6)
    labels = one(keys, num_clusters=8, num_iterations=200)
    again = one(keys, starts=means(keys, labels, 8), num_clusters=8)
    np.testing.assert_array_equal(again, labels)


def test_a_cluster_that_lost_its_keys_for_good_keeps_its_center():
    """Both keys go to the center of the other cluster, which one of them is; then there is none to give back."""
    keys = np.repeat(unit([[1, 0], [0, 1]]), 5, axis=0)
    starts = unit([[1, 0.2], [0.2, 1], [1, -1]])
    for num_iterations in (1, 2, 9):
        labels = one(keys, starts=starts, num_clusters=3, num_iterations=num_iterations)
        assert labels.tolist() == [0] * 5 + [1] * 5


def test_starts_that_do_not_fit_are_refused():
    keys, offsets, seeds, config = unit(np.ones((4, 3))), np.array([0, 4]), np.array([1]), ClusteringConfig()
    for centers, bounds in (
        (np.ones((2, 3)), [0, 2, 2]),
        (np.ones((2, 3)), [0, 1]),
        (np.ones((2, 4)), [0, 2]),
    ):
        with pytest.raises(DataError, match=r"found .*, expected .* by offsets and keys"):
            cluster(keys, offsets, seeds, config, Starts(centers.astype(np.float32), np.array(bounds)))
    with pytest.raises(DataError, match=r"found \(4, 3, .*, expected \(4, 2, "):
        cluster(keys, offsets, np.array([1, 2]), config)
    with pytest.raises(DataError, match="a start center is not finite"):
        one(keys, starts=[[1, 0, np.nan]])


# --- inertia -----------------------------------------------------------------------------------------------


def test_inertia_by_hand():
    """Cluster 0 of user 0 is (1, 0) and (0, 1), 2 - sqrt 2 each from the middle; the other users have none."""
    keys = unit([[1, 0], [0, 1], [-1, 0], [0, -1]])
    found = kmeans.inertia(keys, np.array([0, 3, 3, 4]), np.array([0, 0, 2, 1], np.uint8), 3)
    np.testing.assert_allclose(found, [2 * (2 - np.sqrt(2)), 0, 0], atol=1e-6)


# --- vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3, 4, 7, 16, 18])
def test_a_tile_is_sixteen_rows_in_columns(dim):
    x = np.random.default_rng(dim).normal(size=(40, dim)).astype(np.float32)
    rows, tile = np.random.default_rng(0).integers(40, size=19), np.zeros(16 * dim, np.float32)
    lloyd.transpose(x.reshape(-1), dim, rows, 3, tile)
    np.testing.assert_array_equal(tile.reshape(dim, 16), x[rows[3:]].T)


# --- cache -------------------------------------------------------------------------------------------------


OF_LLOYD = """
from encode.compiled import compiled
from encode.interests.lloyd import in_order
@compiled
def called(n):
    return in_order(n)[-1]
"""
OF_LANES = """
import numpy as np
from encode.compiled import compiled
from encode.interests.lanes import LANES, add, every, store
@compiled
def called(n):
    out = np.empty(LANES, np.float32)
    store(out, 0, add(every(n * 1.0), every(n * 1.0)))
    return int(out[0])
"""


@pytest.mark.parametrize(
    ("file", "caller", "old", "new", "results"),
    [
        ("lloyd.py", OF_LLOYD, "min(i, n - 1)", "min(i, n - 1) + 40", ["2", "42"]),
        ("lanes.py", OF_LANES, "builder.fadd(*args)", "builder.fsub(*args)", ["6", "0"]),
    ],
)
def test_a_kernel_is_compiled_again_when_what_it_calls_has_changed(tmp_path, file, caller, old, new, results):
    """Edit the file of a function that a kernel in another file calls: a second process must not run the old code."""
    package = tmp_path / "encode"
    shutil.copytree(Path(kmeans.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "caller.py").write_text(caller)
    source, found = package / "interests" / file, []
    text = source.read_text()
    for edited in (text, text.replace(old, new)):
        source.write_text(edited)
        command = [sys.executable, "-c", "from encode import caller; print(caller.__file__, caller.called(3))"]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert told.startswith(str(package))
        found.append(told.split()[-1])
    assert found == results


def test_where_no_cache_can_be_written_kernels_are_compiled_without_one(monkeypatch):
    """As in a container whose file system is read-only throughout."""
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert compiled(lambda n: n + 1)(2) == 3


def test_keys_that_cannot_be_written_need_no_other_kernel(batch):
    keys, offsets, seeds, labels = batch
    known = len(kmeans._cluster_users.signatures)
    keys, offsets = keys.copy(), offsets.copy()
    keys.flags.writeable = offsets.flags.writeable = False
    np.testing.assert_array_equal(cluster(keys, offsets, seeds, ClusteringConfig(num_clusters=7)), labels)
    assert len(kmeans._cluster_users.signatures) == known == 1
