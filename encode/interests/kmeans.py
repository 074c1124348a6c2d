"""Spherical k-means over ragged batches of histories.

    U users   N behaviors of all users   S start centers of all users   P projected_dim   K num_clusters

Each user's history is clustered alone, so nothing depends on who else is in the batch, on its order, or on the
number of threads. The kernels are compiled by Numba at their first call and release the GIL: seeding.py finds where to
begin, lloyd.py improves it, in vectors of lanes.py.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from encode.compiled import compiled, read_only
from encode.config import ClusteringConfig
from encode.errors import DataError
from encode.interests.lloyd import Doubles, Floats, Ints, Labels, lloyd, longest_key
from encode.interests.seeding import start

_BLOCKS = 16
"""Blocks of users a thread, at least: so that none has long to wait for the others at the end."""


class Starts(NamedTuple):
    """Centers that some users' clustering begins from: their last ones."""

    centers: Floats
    """Only their direction counts, [S, P]."""
    offsets: Ints
    """Start of each user's centers, then the end of the last, [U + 1]; a user may have none."""


def cluster(
    keys: Floats,
    offsets: Ints,
    seeds: Ints,
    config: ClusteringConfig,
    starts: Starts | None = None,
    num_threads: int | None = None,
) -> Labels:
    """Return the cluster of each behavior within its user's history, [N], 0 to K - 1.

    Begins from a user's start centers, if there are any, and from greedy k-means++ with a stream that `seeds[u]`
    starts. An emptied cluster takes the behavior farthest from its center. A history with fewer distinct keys than K
    uses one cluster a distinct key. Labels are those of a last assignment to the final centers; ties go to the lower
    cluster, and zero vectors, which tie with every center, to cluster 0.

    Args:
        keys: unit vectors h, [N, P], or zero vectors.
        offsets: start of each user's behaviors, then the end of the last, [U + 1].
        seeds: one a user, [U]; use the user id, so that a user's clusters do not depend on the batch.
        config: K, iterations at most, and a seed that is mixed into `seeds`.
        starts: centers to begin from. Of more than K the first K are used; fewer are filled up by k-means++.
        num_threads: None is one for each core.

    Raises:
        DataError: a key or a start center is not finite, or lengths do not fit together.
    """
    keys, offsets, given, given_offsets = checked(keys, offsets, seeds, starts)
    streams = mixed(seeds, config)
    labels = np.empty(len(keys), np.uint8)

    def work(users: Ints) -> bool:
        K, iterations = config.num_clusters, config.num_iterations
        return bool(_cluster_users(keys, offsets, users, streams, given, given_offsets, K, iterations, labels))

    num_threads = num_threads or len(os.sched_getaffinity(0))
    blocks = _blocks(np.diff(offsets), num_threads)
    if num_threads == 1 or len(blocks) == 1:
        finite = [work(users) for users in blocks]
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            finite = list(pool.map(work, blocks))
    if not all(finite):
        refuse_not_finite(keys)
    return labels


def checked(keys: Floats, offsets: Ints, seeds: Ints, starts: Starts | None) -> tuple[Floats, Ints, Floats, Ints]:
    """Return keys, offsets, start centers and their offsets as the kernels take them, which check no bounds.

    Raises:
        DataError: their lengths do not fit together, or a start center is not finite.
    """
    if starts is None:
        starts = Starts(np.empty((0, keys.shape[1]), np.float32), np.zeros(len(offsets), np.int64))
    found = len(keys), len(seeds) + 1, len(starts.offsets), len(starts.centers), starts.centers.shape[1]
    expected = int(offsets[-1]), len(offsets), len(offsets), int(starts.offsets[-1]), keys.shape[1]
    if found != expected:
        what = "keys, seeds + 1, starts.offsets, starts.centers, their dimensions"
        raise DataError(f"k-means: {what}: found {found}, expected {expected} by offsets and keys")
    if not np.isfinite(starts.centers).all():
        raise DataError("k-means: a start center is not finite; is the last snapshot damaged?")
    lengths = np.linalg.norm(starts.centers.astype(np.float64), axis=1, keepdims=True)
    directions = starts.centers / np.where(lengths > 0, lengths, 1)
    keys, given = (read_only(vectors.astype(np.float32, copy=False)) for vectors in (keys, directions))
    offsets, given_offsets = (read_only(array.astype(np.int64, copy=False)) for array in (offsets, starts.offsets))
    return keys, offsets, given, given_offsets


def mixed(seeds: Ints, config: ClusteringConfig) -> npt.NDArray[np.uint64]:
    """Return where each user's random numbers begin."""
    return seeds.astype(np.uint64) ^ np.uint64(config.seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)


def refuse_not_finite(keys: Floats) -> None:
    """Name the first key that is not finite, or whose square is not, if there is one."""
    with np.errstate(over="ignore"):
        rows = np.flatnonzero(~np.isfinite((keys * keys).sum(1)))
    if rows.size:
        raise DataError(
            f"k-means: key of behavior {rows[0]} is not finite; expected unit vectors: is the space damaged?"
        )


def _blocks(lengths: Ints, num_threads: int) -> list[Ints]:
    """Users in blocks of equal work, longest histories first."""
    order = np.argsort(-lengths, kind="stable")
    done = np.cumsum(lengths[order])
    total = int(done[-1]) if len(done) else 0
    edges = np.searchsorted(done, np.linspace(0, total, _BLOCKS * num_threads + 1)[1:-1])
    return [block for block in np.split(order, np.unique(edges)) if len(block)]


@compiled
def _cluster_users(
    keys: Floats,
    offsets: Ints,
    users: Ints,
    streams: npt.NDArray[np.uint64],
    given: Floats,
    given_offsets: Ints,
    num_clusters: int,
    num_iterations: int,
    labels: Labels,
) -> bool:
    """Label the behaviors of some users; tell whether all their keys are finite, and stop at one that is not."""
    centers = np.empty((num_clusters, keys.shape[1]), np.float32)
    for user in users:
        x, own = keys[offsets[user] : offsets[user + 1]].copy(), labels[offsets[user] : offsets[user + 1]]
        longest = longest_key(x)
        if longest == np.inf:
            return False
        K = start(x, longest, streams[user], given[given_offsets[user] : given_offsets[user + 1]], centers)
        lloyd(x, longest, centers[:K], num_iterations, own)
    return True


def inertia(keys: Floats, offsets: Ints, labels: Labels, num_clusters: int) -> Doubles:
    """Return sum_i ||h_i - c||^2 of each user, [U], with c the normalized mean of the behavior's cluster."""
    total = np.zeros(len(offsets) - 1)
    _sum_inertia(read_only(keys), read_only(offsets), read_only(labels), np.zeros((num_clusters, keys.shape[1])), total)
    return total


@compiled
def _sum_inertia(keys: Floats, offsets: Ints, labels: Labels, centers: Doubles, total: Doubles) -> None:
    K, P = centers.shape
    for user in range(len(total)):
        centers[:] = 0.0
        for i in range(offsets[user], offsets[user + 1]):
            for d in range(P):
                centers[labels[i], d] += keys[i, d]
        for k in range(K):
            norm = np.sqrt((centers[k] ** 2).sum())
            if norm > 0.0:
                centers[k] /= norm
        for i in range(offsets[user], offsets[user + 1]):
            for d in range(P):
                total[user] += (keys[i, d] - centers[labels[i], d]) ** 2
