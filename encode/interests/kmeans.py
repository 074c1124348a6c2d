"""Spherical k-means over ragged batches of histories.

    U users   N behaviors of all users   P projected_dim   K num_clusters

Each user's history is clustered alone, so nothing depends on who else is in the batch, on its order, or on the
number of threads. The kernel is compiled by Numba at its first call and releases the GIL.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from encode.config import ClusteringConfig
from encode.errors import DataError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_NUM_THREADS = len(os.sched_getaffinity(0))


def cluster(keys: Floats, offsets: Ints, seeds: Ints, config: ClusteringConfig) -> npt.NDArray[np.uint8]:
    """Return the cluster of each behavior within its user's history, [N], 0 to K - 1.

    Seeding is k-means++ from a stream that `seeds[u]` starts. An emptied cluster takes the behavior farthest from
    its center. A history with fewer distinct keys than K uses one cluster a distinct key. Labels are those of a
    last assignment to the final centers; ties go to the lower cluster.

    Args:
        keys: unit vectors h, [N, P]; zero vectors are allowed and are equally far from everything.
        offsets: start of each user's behaviors, then the end of the last, [U + 1].
        seeds: one a user, [U]; use the user id, so that a user's clusters do not depend on the batch.
        config: K, iterations at most, and a seed that is mixed into `seeds`.

    Raises:
        DataError: a key is not finite.
    """
    if not np.isfinite(keys).all():
        row = int(np.flatnonzero(~np.isfinite(keys).all(1))[0])
        raise DataError(f"k-means: key of behavior {row} is not finite; expected unit vectors: is the space damaged?")
    labels = np.zeros(len(keys), np.uint8)
    streams = seeds.astype(np.uint64) ^ np.uint64(config.seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    num_users = len(offsets) - 1
    keys = np.ascontiguousarray(keys)
    # A few blocks of equal work a thread, so that one long history does not hold up the rest.
    num_threads = _NUM_THREADS if num_users > 1 else 1
    edges = np.searchsorted(offsets[1:], np.linspace(0, offsets[-1], 4 * num_threads + 1)[1:-1])
    bounds = np.unique(np.concatenate([[0], edges, [num_users]]))

    def work(block: tuple[int, int]) -> None:
        _cluster_users(keys, offsets, streams, block[0], block[1], config.num_clusters, config.num_iterations, labels)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)))
    return labels


def _compiled(function: Any) -> Any:
    """Compile to a cached kernel without the GIL; cached beside the source, or in the user's cache if read-only."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


@_compiled
def _next_random(state: np.uint64) -> tuple[np.uint64, float]:
    """Splitmix64: the next state and a number in [0, 1)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    x = state
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return state, np.float64(x >> np.uint64(11)) / 9007199254740992.0


@_compiled
def _cluster_users(
    keys: Floats,
    offsets: Ints,
    streams: npt.NDArray[np.uint64],
    first: int,
    last: int,
    num_clusters: int,
    num_iterations: int,
    labels: npt.NDArray[np.uint8],
) -> None:
    P = keys.shape[1]
    centers = np.empty((num_clusters, P), np.float32)
    sums = np.empty((num_clusters, P), np.float64)
    sizes = np.empty(num_clusters, np.int64)
    for user in range(first, last):
        begin, end = offsets[user], offsets[user + 1]
        if begin == end:
            continue
        x, own = keys[begin:end], labels[begin:end]
        similarity = np.empty(end - begin, np.float32)
        K = _seed(x, streams[user], centers)
        _assign(x, centers, K, own, similarity)
        for _ in range(num_iterations):
            _update(x, own, similarity, centers, sums, sizes, K)
            if not _assign(x, centers, K, own, similarity):
                break


@_compiled
def _seed(x: Floats, state: np.uint64, centers: Floats) -> int:
    """k-means++: fill `centers` and return how many distinct ones there are (K at most)."""
    n, P = x.shape
    state, u = _next_random(state)
    chosen = min(int(u * n), n - 1)
    distance = np.full(n, np.inf)
    for k in range(centers.shape[0]):
        total = 0.0
        for d in range(P):
            centers[k, d] = x[chosen, d]
        for i in range(n):
            # Differences, not 2 - 2 cos: equal keys must be at exactly 0.
            square = 0.0
            for d in range(P):
                square += (x[i, d] - centers[k, d]) ** 2
            distance[i] = min(distance[i], square)
            total += distance[i]
        if total == 0.0:
            return k + 1
        state, u = _next_random(state)
        left = u * total
        chosen = -1
        for i in range(n):
            if distance[i] > 0.0:
                chosen = i
                left -= distance[i]
                if left < 0.0:
                    break
    return int(centers.shape[0])


@_compiled
def _assign(x: Floats, centers: Floats, K: int, labels: npt.NDArray[np.uint8], similarity: Floats) -> bool:
    """E step: the most similar center of each key; tell whether any label changed."""
    changed = False
    # Innermost over centers, which lie side by side: that loop vectorizes, a sum over dimensions would not.
    columns = np.ascontiguousarray(centers[:K].T)
    dots = np.empty(K, np.float32)
    for i in range(x.shape[0]):
        dots[:] = np.float32(0.0)
        for d in range(x.shape[1]):
            value = x[i, d]
            for k in range(K):
                dots[k] += value * columns[d, k]
        best = 0
        for k in range(1, K):
            if dots[k] > dots[best]:
                best = k
        similarity[i] = dots[best]
        if labels[i] != best:
            labels[i] = best
            changed = True
    return changed


@_compiled
def _update(
    x: Floats,
    labels: npt.NDArray[np.uint8],
    similarity: Floats,
    centers: Floats,
    sums: npt.NDArray[np.float64],
    sizes: Ints,
    K: int,
) -> None:
    """M step: normalized means; an empty cluster is given the key that is least similar to its center."""
    n, P = x.shape
    sums[:K] = 0.0
    sizes[:K] = 0
    for i in range(n):
        sizes[labels[i]] += 1
        for d in range(P):
            sums[labels[i], d] += x[i, d]
    for k in range(K):
        if sizes[k] > 0:
            continue
        farthest = -1
        for i in range(n):
            if sizes[labels[i]] > 1 and (farthest < 0 or similarity[i] < similarity[farthest]):
                farthest = i
        if farthest < 0:
            continue
        sizes[labels[farthest]] -= 1
        for d in range(P):
            sums[labels[farthest], d] -= x[farthest, d]
            sums[k, d] = x[farthest, d]
        labels[farthest] = k
        sizes[k] = 1
    for k in range(K):
        norm = 0.0
        for d in range(P):
            norm += sums[k, d] ** 2
        norm = np.sqrt(norm)
        if norm > 0.0:
            for d in range(P):
                centers[k, d] = sums[k, d] / norm
