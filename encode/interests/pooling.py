"""Clusters into interests for a whole batch of users, in compiled loops that release the GIL.

    U users   N behaviors of all users   V indices of the vocabulary   D embedding_dim   P projected_dim
    K num_clusters   S non-empty clusters of all users   T top items of all interests   n behaviors of one user

Training pools with `relevance.pool_interests`, which is differentiable; this is the same formula for offline use, at
the speed of memory. Each user is summed alone and in the order of the behaviors, in doubles, so the bytes of an
interest depend on nothing but its own user.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from encode.compiled import compiled, read_only
from encode.interests.lanes import prefetch
from encode.interests.top_items import NUM_TOP_ITEMS, Counter, counter_of, top_items

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.uint8]
Ints32 = npt.NDArray[np.int32]
_AHEAD, _FLOATS_A_LINE = 12, 16
"""Embeddings are fetched this many behaviors early, a cache line of 64 bytes at a time."""
_SMALLEST_NORM = 1e-12
"""As in torch's `normalize`: keys that sum to zero give a center of zero."""


class Behaviors(NamedTuple):
    """The behaviors of U users, one user after the other, each user's oldest first."""

    offsets: Ints
    """Start of each user's behaviors, then the end of the last, [U + 1]."""
    item_index: Ints
    """Index of each item in the vocabulary, [N]."""
    key: Floats
    """h_i, unit vectors, [N, P]."""
    item_ids: Ints
    """[N]"""
    timestamps: Ints
    """[N]"""


class Pooled(NamedTuple):
    """The interests of U users, one user after the other, each user's largest first."""

    offsets: Ints32
    """Start of each user's interests, then the end of the last, [U + 1]."""
    center: Floats
    """c_k, means of keys, [S, P]."""
    variance: Floats
    """lambda_k, of the keys, by coordinate, [S, P]."""
    value: Floats
    """z_k, [S, D]."""
    size: Ints
    """n_k, at least 1, [S]."""
    newest: Ints
    """Latest timestamp, [S]."""
    top_offsets: Ints32
    """Start of each interest's top items, then the end of the last, [S + 1]."""
    top_items: Ints
    """The most frequent items of each interest, at most 5, the smaller id first among equals, [T]."""


class _Scratch(NamedTuple):
    """Room for one user at a time, made once for the batch."""

    slot: Labels
    """Interest of each behavior, 0 for the largest, [n]."""
    weight: Doubles
    """[n]"""
    center: Doubles
    """[K, P]"""
    square: Doubles
    """Sums of the squares of the keys, [K, P]."""
    value: Doubles
    """[K, D]"""
    highest: Doubles
    """Largest relevance in each cluster, [K]."""
    mass: Doubles
    """Sum of the weights of each cluster, [K]."""
    end: Ints
    """Where each interest ends in `grouped`, [K]."""
    grouped: Ints
    """Items, interest by interest, [n]."""
    counter: Counter
    """Of items."""


def pool(
    labels: Labels, behaviors: Behaviors, embedding: Floats, scale: float, by_relevance: bool, num_clusters: int
) -> Pooled:
    """Pool each user's non-empty clusters into interests, largest first, the lower label first among equals.

    c_k is the mean of the keys, z_k that of the embeddings or sum_i w_i e_i with w_i = softmax over the cluster of
    rho(c_k / |c_k|, h_i): `relevance.pool_interests` to rounding, on one thread (arXiv 2508.13567, offline stage). We
    differ from it in that the largest relevance of the cluster is subtracted before exp, so that no scale makes all
    weights vanish.

    Args:
        labels: cluster of each behavior within its user's history, 0 to K - 1, [N].
        behaviors: of all users; a user without behaviors gets no interests.
        embedding: e of each index, [V, D].
        scale: of the relevance.
        by_relevance: False pools by the mean.
        num_clusters: K.
    """
    behaviors = Behaviors(*(read_only(array) for array in behaviors))
    labels, embedding = read_only(labels), read_only(embedding)
    offsets = np.zeros(len(behaviors.offsets), np.int32)
    _count(labels, behaviors.offsets, np.zeros(num_clusters, bool), offsets)
    S, (_, P), D = int(offsets[-1]), behaviors.key.shape, embedding.shape[1]
    pooled = Pooled(
        offsets,
        np.empty((S, P), np.float32),
        np.empty((S, P), np.float32),
        np.empty((S, D), np.float32),
        np.empty(S, np.int64),
        np.empty(S, np.int64),
        np.zeros(S + 1, np.int32),
        np.empty(min(NUM_TOP_ITEMS * S, len(labels)), np.int64),
    )
    longest = int(np.diff(behaviors.offsets).max(initial=0))
    scratch = _scratch(longest, num_clusters, P, D)
    num_top = _pool_users(labels, behaviors, embedding, scale, by_relevance, pooled, scratch)
    return pooled._replace(top_items=pooled.top_items[:num_top])


def _scratch(longest: int, K: int, P: int, D: int) -> _Scratch:
    return _Scratch(
        np.empty(longest, np.uint8),
        np.empty(longest),
        np.empty((K, P)),
        np.empty((K, P)),
        np.empty((K, D)),
        np.empty(K),
        np.empty(K),
        np.empty(K, np.int64),
        np.empty(longest, np.int64),
        counter_of(longest),
    )


@compiled
def _count(labels: Labels, offsets: Ints, met: npt.NDArray[np.bool_], found: Ints32) -> None:
    """Fill in where each user's interests will start, so that all are written to their final place."""
    for user in range(len(offsets) - 1):
        met[:] = False
        for i in range(offsets[user], offsets[user + 1]):
            met[labels[i]] = True
        found[user + 1] = found[user] + met.sum()


@compiled
def _pool_users(
    labels: Labels,
    behaviors: Behaviors,
    embedding: Floats,
    scale: float,
    by_relevance: bool,
    out: Pooled,
    scratch: _Scratch,
) -> int:
    """Fill `out` user by user, while the user's behaviors are in cache; return T."""
    num_top = 0
    for user in range(len(behaviors.offsets) - 1):
        begin, end = behaviors.offsets[user], behaviors.offsets[user + 1]
        if begin == end:
            continue
        first, last = out.offsets[user], out.offsets[user + 1]
        slot, size = scratch.slot[: end - begin], out.size[first:last]
        _rank(labels[begin:end], len(scratch.end), slot, size)
        key = behaviors.key[begin:end]
        _weigh(slot, size, key, scale, by_relevance, out.center[first:last], out.variance[first:last], scratch)
        _average(slot, behaviors.item_index[begin:end], embedding, out.value[first:last], scratch)
        _latest(slot, behaviors.timestamps[begin:end], out.newest[first:last])
        _group(slot, size, behaviors.item_ids[begin:end], scratch.grouped, scratch.end)
        start = 0
        for k in range(last - first):
            num_top += top_items(scratch.grouped[start : scratch.end[k]], scratch.counter, out.top_items[num_top:])
            out.top_offsets[first + k + 1] = num_top
            start = scratch.end[k]
    return num_top


@compiled
def _rank(labels: Labels, num_clusters: int, slot: Labels, size: Ints) -> None:
    """Sort the non-empty clusters into slots, largest first, then by label; fill in each behavior's and each size."""
    counts = np.zeros(num_clusters, np.int64)
    for label in labels:
        counts[label] += 1
    order, num_slots = np.empty(num_clusters, np.int64), 0
    for label in range(num_clusters):
        if counts[label] > 0:
            place = num_slots
            while place > 0 and counts[order[place - 1]] < counts[label]:
                order[place] = order[place - 1]
                place -= 1
            order[place] = label
            num_slots += 1
    slot_of = np.empty(num_clusters, np.uint8)
    for place in range(num_slots):
        slot_of[order[place]] = place
        size[place] = counts[order[place]]
    for i in range(len(labels)):
        slot[i] = slot_of[labels[i]]


@compiled
def _weigh(
    slot: Labels,
    size: Ints,
    key: Floats,
    scale: float,
    by_relevance: bool,
    center: Floats,
    variance: Floats,
    scratch: _Scratch,
) -> None:
    """Fill in centers and variances, and the weight of each behavior before it is divided by its cluster's mass."""
    P, unit, weight, highest, squares = key.shape[1], scratch.center, scratch.weight, scratch.highest, scratch.square
    unit[: len(center)] = 0.0
    squares[: len(center)] = 0.0
    for i in range(len(slot)):
        k = slot[i]  # read here, as the inner loop does not vectorize around it
        for d in range(P):
            unit[k, d] += key[i, d]
            squares[k, d] += np.float64(key[i, d]) ** 2
    for k in range(len(center)):
        square = 0.0
        for d in range(P):
            mean = unit[k, d] / size[k]
            center[k, d] = mean
            variance[k, d] = max(squares[k, d] / size[k] - mean**2, 0.0)
            square += unit[k, d] ** 2
        norm = max(math.sqrt(square), _SMALLEST_NORM)
        for d in range(P):
            unit[k, d] /= norm
    if not by_relevance:
        weight[: len(slot)] = 1.0
        return
    highest[: len(center)] = -np.inf
    for i in range(len(slot)):
        k, cosine = slot[i], 0.0
        for d in range(P):
            cosine += unit[k, d] * key[i, d]
        weight[i] = scale * cosine
        highest[k] = max(highest[k], weight[i])
    for i in range(len(slot)):
        weight[i] = math.exp(weight[i] - highest[slot[i]])


@compiled
def _average(slot: Labels, index: Ints, embedding: Floats, value: Floats, scratch: _Scratch) -> None:
    """Fill in the weighted means of the embeddings."""
    D, total, mass = embedding.shape[1], scratch.value, scratch.mass
    total[: len(value)] = 0.0
    mass[: len(value)] = 0.0
    for i in range(len(slot)):
        if i + _AHEAD < len(slot):
            for d in range(0, D, _FLOATS_A_LINE):
                prefetch(embedding, index[i + _AHEAD], d)
        k, row, weight = slot[i], index[i], scratch.weight[i]
        mass[k] += weight
        for d in range(D):
            total[k, d] += weight * embedding[row, d]
    for k in range(len(value)):
        for d in range(D):
            value[k, d] = total[k, d] / mass[k]


@compiled
def _latest(slot: Labels, timestamps: Ints, newest: Ints) -> None:
    newest[:] = np.iinfo(np.int64).min
    for i in range(len(slot)):
        newest[slot[i]] = max(newest[slot[i]], timestamps[i])


@compiled
def _group(slot: Labels, size: Ints, item_ids: Ints, grouped: Ints, end: Ints) -> None:
    """Counting sort of a user's items by interest; fill in where each interest ends."""
    start = 0
    for k in range(len(size)):
        end[k] = start
        start += size[k]
    for i in range(len(slot)):
        grouped[end[slot[i]]] = item_ids[i]
        end[slot[i]] += 1
