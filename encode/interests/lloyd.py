"""Lloyd's algorithm for one user, compiled: the same labels as the plain one for less work.

    n behaviors of the user   P projected_dim   K centers   tile: 16 keys in columns, [P * 16], one a lane

A key's margin is by how much its center's similarity beats the second best. When centers move, it shrinks by no more
than the moves of its own center and of the farthest moved other one (Hamerly, SDM 2010). Only keys that may have lost
their margin are compared again, sixteen at a time, and a cluster's sum changes only by the keys that come and go.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from encode.compiled import compiled
from encode.interests.lanes import LANES, add, columns, every, fma, load, splat, store, subtract, where_greater

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.uint8]

_NONE = 255
"""The label of a key that no center has yet."""
AT_ITS_CENTER = 1.0 - 1e-6
"""A key as similar to its center as this gains nothing from a center of its own."""
SHORTEST_SUM = 1e-9
"""A sum of keys shorter than this is rounding: it has no direction."""


class _Clusters(NamedTuple):
    centers: Floats
    """[K, P], flat, and zeros up to a multiple of four centers."""
    bias: Floats
    """Added to each similarity: zero, and minus infinity where there is no center."""
    sums: Doubles
    """Of the keys of each cluster, [K, P]; float64, so that what is added and taken away again leaves nothing."""
    sizes: Ints
    """Keys of each cluster, [K]."""
    stale: npt.NDArray[np.bool_]
    """Clusters whose sum is not that of their center any more."""
    loss: Floats
    """How much a margin may have shrunk since the last assignment, by label, [256]."""


@compiled
def lloyd(x: Floats, longest: float, centers: Floats, num_iterations: int, labels: Labels) -> None:
    """Move `centers` and set `labels`, both in place, until no label changes or for a number of iterations.

    Args:
        x: finite keys, [n, P].
        longest: length of the longest key, or more.
        centers: [K, P], K of 1 to 255.
        num_iterations: updates of the centers; the last is followed by an assignment.
        labels: [n]; what is there is ignored.
    """
    n, P = x.shape
    K = len(centers)
    if n == 0:
        return
    padded = -(-K // 4) * 4
    flat, bias = np.zeros(padded * P, np.float32), np.full(padded, -np.inf, np.float32)
    for k in range(K):
        bias[k] = 0.0
        for d in range(P):
            flat[k * P + d] = centers[k, d]
    loss = np.zeros(256, np.float32)
    state = _Clusters(flat, bias, np.zeros((K, P)), np.zeros(K, np.int64), np.zeros(K, np.bool_), loss)
    labels[:] = _NONE
    margin, rows = np.zeros(n, np.float32), np.empty(n + LANES, np.int64)
    # Twice what two sums of P rounded products may be off, so that no label depends on what was skipped.
    slack = np.float32(longest * (P + 16) * 2.0**-22)
    for iteration in range(num_iterations + 1):
        changed = _assign(x, labels, margin, rows, slack, state)
        if not changed or iteration == num_iterations:
            break
        _relocate(x, labels, margin, state)
        _update(state, longest)
    for k in range(K):
        for d in range(P):
            centers[k, d] = flat[k * P + d]


@compiled
def longest_key(x: Floats) -> float:
    """Return the length of the longest key; infinity if any is not finite, 0 if there is none."""
    n, P = x.shape
    rows, tile, squares = in_order(n), np.empty(P * LANES, np.float32), np.empty(LANES, np.float32)
    most, poison = every(0.0), every(0.0)
    for i in range(0, n, LANES):
        transpose(x.reshape(-1), P, rows, i, tile)
        square = every(0.0)
        for d in range(P):
            square = fma(load(tile, d * LANES), load(tile, d * LANES), square)
        most = where_greater(square, most, square, most)
        poison = fma(square, every(0.0), poison)  # is 0 and stays 0, or is no number and stays that
    store(squares, 0, add(most, poison))
    largest = 0.0
    for lane in range(LANES):
        if not np.isfinite(squares[lane]):
            return np.inf
        largest = max(largest, np.float64(squares[lane]))
    return float(np.sqrt(largest))


@compiled
def in_order(n: int) -> Ints:
    """Return rows 0 to n - 1, and the last one again up to a whole tile."""
    rows = np.empty(-(-n // LANES) * LANES, np.int64)
    for i in range(len(rows)):
        rows[i] = min(i, n - 1)
    return rows


@compiled
def transpose(flat: Floats, P: int, rows: Ints, first: int, tile: Floats) -> None:
    """Fill a tile with 16 rows, `rows[first]` and on, of a matrix given flat."""
    whole = P // 4 * 4
    for d in range(0, whole, 4):
        x0, x1, x2, x3 = columns(flat, P, rows, first, d)
        store(tile, d * LANES, x0)
        store(tile, (d + 1) * LANES, x1)
        store(tile, (d + 2) * LANES, x2)
        store(tile, (d + 3) * LANES, x3)
    for d in range(whole, P):
        for lane in range(LANES):
            tile[d * LANES + lane] = flat[rows[first + lane] * P + d]


@compiled
def _assign(x: Floats, labels: Labels, margin: Floats, rows: Ints, slack: float, state: _Clusters) -> bool:
    """E step: the most similar center of each key that may have another one; tell whether any label changed."""
    n, P = x.shape
    count = 0
    for i in range(n):
        margin[i] -= state.loss[labels[i]]
        rows[count] = i
        count += margin[i] <= slack
    for j in range(count, count + LANES):  # the last tile is filled up with its last key
        rows[j] = rows[max(count - 1, 0)]
    changed = False
    tile, best = np.empty(P * LANES, np.float32), np.empty(LANES, np.int32)
    lead = np.empty(LANES, np.float32)
    for j in range(0, count, LANES):
        transpose(x.reshape(-1), P, rows, j, tile)
        _nearest(tile, state.centers, state.bias, lead, best)
        for lane in range(min(LANES, count - j)):
            i, old, new = rows[j + lane], labels[rows[j + lane]], best[lane]
            margin[i] = lead[lane]
            if old == new:
                continue
            changed = True
            labels[i] = new
            state.stale[new] = True
            state.sizes[new] += 1
            for d in range(P):
                state.sums[new, d] += x[i, d]
            if old != _NONE:
                state.stale[old] = True
                state.sizes[old] -= 1
                for d in range(P):
                    state.sums[old, d] -= x[i, d]
    return changed


@compiled
def _nearest(tile: Floats, centers: Floats, bias: Floats, lead: Floats, best: npt.NDArray[np.int32]) -> None:
    """The most similar center of each of 16 keys, the first of equals, and by how much it leads the second."""
    P = len(tile) // LANES
    most, second, label = every(-np.inf), every(-np.inf), every(0)
    for k in range(0, len(bias), 4):
        # Four centers at once, for a sum waits for each of its additions.
        s0, s1, s2, s3 = splat(bias, k), splat(bias, k + 1), splat(bias, k + 2), splat(bias, k + 3)
        c0, c1, c2, c3 = k * P, (k + 1) * P, (k + 2) * P, (k + 3) * P
        for d in range(P):
            x = load(tile, d * LANES)
            s0, s1 = fma(x, splat(centers, c0 + d), s0), fma(x, splat(centers, c1 + d), s1)
            s2, s3 = fma(x, splat(centers, c2 + d), s2), fma(x, splat(centers, c3 + d), s3)
        most, second, label = _ranked(s0, k, most, second, label)
        most, second, label = _ranked(s1, k + 1, most, second, label)
        most, second, label = _ranked(s2, k + 2, most, second, label)
        most, second, label = _ranked(s3, k + 3, most, second, label)
    store(lead, 0, subtract(most, second))
    store(best, 0, label)


@compiled
def _ranked(similarity: Any, k: int, most: Any, second: Any, label: Any) -> Any:
    label = where_greater(similarity, most, every(k), label)
    lesser = where_greater(similarity, most, most, similarity)
    second = where_greater(lesser, second, lesser, second)
    return where_greater(similarity, most, similarity, most), second, label


@compiled
def _relocate(x: Floats, labels: Labels, margin: Floats, state: _Clusters) -> None:
    """Give each empty cluster the key least similar to its center, of those that leave no cluster empty."""
    n, P = x.shape
    if state.sizes.min() > 0:
        return
    similarity = np.full(n, np.float32(2.0))  # a zero vector is never taken: it has no direction to offer
    for i in range(n):
        dot, square = 0.0, 0.0
        for d in range(P):
            dot += np.float64(x[i, d]) * state.centers[labels[i] * P + d]
            square += x[i, d] ** 2
        if square > 0.0:
            similarity[i] = dot
    for k in range(len(state.sizes)):
        if state.sizes[k] > 0:
            continue
        farthest, least = -1, np.float32(AT_ITS_CENTER)
        for i in range(n):
            if similarity[i] < least and state.sizes[labels[i]] > 1:
                farthest, least = i, similarity[i]
        if farthest < 0:
            return
        old = labels[farthest]
        labels[farthest] = k
        margin[farthest] = 0.0
        state.stale[old] = state.stale[k] = True
        state.sizes[old] -= 1
        state.sizes[k] = 1
        for d in range(P):
            state.sums[old, d] -= x[farthest, d]
            state.sums[k, d] = x[farthest, d]


@compiled
def _update(state: _Clusters, longest: float) -> None:
    """M step: normalized means, and what margins may have lost; a cluster without a direction keeps its center."""
    K, P = state.sums.shape
    farthest, next_farthest = np.float32(0.0), np.float32(0.0)
    for k in range(K):
        state.loss[k] = 0.0
        norm = 0.0
        for d in range(P):
            norm += state.sums[k, d] ** 2
        norm = np.sqrt(norm)
        if state.stale[k] and state.sizes[k] > 0 and norm > SHORTEST_SUM:
            moved = 0.0
            for d in range(P):
                new = np.float32(state.sums[k, d] / norm)
                moved += (np.float64(new) - state.centers[k * P + d]) ** 2
                state.centers[k * P + d] = new
            state.loss[k] = np.sqrt(moved) * longest * 1.00001  # never rounded down
        state.stale[k] = False
        if state.loss[k] > farthest:
            farthest, next_farthest = state.loss[k], farthest
        elif state.loss[k] > next_farthest:
            next_farthest = state.loss[k]
    for k in range(K):
        state.loss[k] += next_farthest if state.loss[k] == farthest else farthest
        state.loss[k] += longest * 2.0**-22  # and what taking it from a margin may round
