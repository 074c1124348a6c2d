"""Where a user's clustering begins: greedy k-means++ on a sample of the history, compiled.

    n behaviors of the user   P projected_dim   K num_clusters   tile: 16 keys in columns, [P * 16], one a lane

k-means++ (Arthur & Vassilvitskii, SODA 2007) draws each center with probability proportional to the squared distance
from the centers before it. The greedy one draws several and keeps what leaves the least total (as scikit-learn does).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from encode.compiled import compiled, mix
from encode.interests.lanes import LANES, add, every, fma, load, splat, store, where_greater
from encode.interests.lloyd import Doubles, Floats, Ints, in_order, lloyd, longest_key, transpose

_TRIALS = 8
"""Candidates of each center; a multiple of four. scikit-learn has 5 for K = 32."""
_SAMPLE = 16
"""Behaviors a center in the sample, at least."""
_SHARE = 16
"""The sample is at least one in so many behaviors."""
_ROUNDS = 3
"""Iterations on the sample before those on the history: they cost little and save some there."""
_SAME = 1e-6
"""Squared distances up to this are taken as zero: two similarities of float32 cannot tell."""


@compiled
def start(x: Floats, longest: float, stream: np.uint64, given: Floats, centers: Floats) -> int:
    """Fill `centers`, [K, P], with the first of `given` and then with seeds; return how many there are.

    `longest` is the length of the longest key. Centers are fewer than K if the history has fewer distinct keys.
    """
    n, P = x.shape
    K, num_given = len(centers), min(len(given), len(centers))
    for k in range(num_given):
        for d in range(P):
            centers[k, d] = given[k, d]
    if num_given == K or n == 0:
        return num_given
    num_sample = max(_SAMPLE * K, n // _SHARE)
    if num_sample < n:
        sample = np.empty((num_sample, P), np.float32)
        state = stream
        for j in range(num_sample):  # one from each of equal stretches of the history
            state, u = next_random(state)
            row = min(int((j + u) * n / num_sample), n - 1)
            for d in range(P):
                sample[j, d] = x[row, d]
        if _seed(sample, state, centers, num_given) == K:
            if num_given == 0:
                lloyd(sample, longest, centers, np.int64(_ROUNDS), np.empty(num_sample, np.uint8))
            return K
    return int(_add_distinct(x, centers, _seed(x, stream, centers, num_given)))


@compiled
def start_users(
    keys: Floats,
    offsets: Ints,
    users: Ints,
    streams: npt.NDArray[np.uint64],
    given: Floats,
    given_offsets: Ints,
    centers: Floats,
    counts: Ints,
) -> None:
    """Fill centers[j] and counts[j] for users[j]."""
    for j in range(len(users)):
        user = users[j]
        own = given[given_offsets[user] : given_offsets[user + 1]]
        x = keys[offsets[user] : offsets[user + 1]].copy()
        counts[j] = start(x, longest_key(x), streams[user], own, centers[j])


@compiled
def next_random(state: np.uint64) -> tuple[np.uint64, float]:
    """Splitmix64: the next state and a number in [0, 1)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    return state, np.float64(mix(state) >> np.uint64(11)) / 9007199254740992.0


@compiled
def _seed(x: Floats, state: np.uint64, centers: Floats, num_given: int) -> int:
    """Fill `centers` behind those given; return at how many nothing is left that is farther than rounding."""
    n, P = x.shape
    size = -(-n // LANES) * LANES
    tiles, closest = _tiles(x)
    tried = np.empty(_TRIALS * size, np.float32)
    candidates = np.empty(_TRIALS * P, np.float32)
    totals, passed = np.zeros(_TRIALS * LANES, np.float32), np.zeros(LANES)
    _keep(closest, 0, closest, passed)
    for k in range(len(centers)):
        for trial in range(_TRIALS):
            state, u = next_random(state)
            row = _draw(closest, passed, u)
            for d in range(P):
                candidates[trial * P + d] = -2.0 * (centers[k, d] if k < num_given else x[row, d])
        for trial in range(0, _TRIALS, 4):
            _try(tiles, candidates, trial, closest, tried, totals)
        best, least = 0, np.inf
        for trial in range(_TRIALS):
            total = 0.0
            for lane in range(LANES):
                total += totals[trial * LANES + lane]
            if total < least:
                best, least = trial, total
        for d in range(P):
            centers[k, d] = -0.5 * candidates[best * P + d]
        _keep(tried, best * size, closest, passed)
        if passed[-1] == 0.0 and k + 1 >= num_given:
            return k + 1
    return len(centers)


@compiled
def _tiles(x: Floats) -> tuple[Floats, Floats]:
    """The keys in tiles, and the squared distance of each from no center: 4, or 0 for a zero vector or padding."""
    n, P = x.shape
    rows = in_order(n)
    tiles, closest = np.empty(len(rows) * P, np.float32), np.empty(len(rows), np.float32)
    for i in range(0, len(rows), LANES):
        tile = tiles[i * P : (i + LANES) * P]
        transpose(x.reshape(-1), P, rows, i, tile)
        square = every(0.0)
        for d in range(P):
            square = fma(load(tile, d * LANES), load(tile, d * LANES), square)
        store(closest, i, where_greater(square, every(0.0), every(4.0), every(0.0)))
    for i in range(n, len(rows)):
        closest[i] = 0.0
    return tiles, closest


@compiled
def _keep(tried: Floats, first: int, closest: Floats, passed: Doubles) -> None:
    """Take over tried[first] and on as `closest`, and set `passed` to its sums over tiles, added up lane by lane."""
    sums, total = np.empty(LANES, np.float32), every(0.0)
    for i in range(0, len(closest), LANES):
        square = load(tried, first + i)
        square = where_greater(square, every(_SAME), square, every(0.0))
        store(closest, i, square)
        total = add(total, square)
    store(sums, 0, total)
    so_far = 0.0
    for lane in range(LANES):
        so_far += sums[lane]
        passed[lane] = so_far


@compiled
def _draw(closest: Floats, passed: Doubles, u: float) -> int:
    """Return the row where the sum of `closest`, lane after lane, passes a share u of the whole.

    Counts what the sum has not passed rather than stop there: no step of a loop then hangs on a guess.
    """
    left, lane = u * passed[-1], 0
    for other in range(LANES):
        lane += passed[other] <= left
    if lane == LANES:  # by rounding: then it is the last that is not zero, of the lanes and of the rows
        lane = 0
        for other in range(1, LANES):
            lane = other if passed[other] > passed[other - 1] else lane
    so_far, row = passed[lane - 1] if lane > 0 else 0.0, lane
    for i in range(lane, len(closest), LANES):
        so_far += closest[i]
        row += LANES * (so_far <= left)
    if row >= len(closest):
        row = lane
        for i in range(lane, len(closest), LANES):
            row = i if closest[i] > 0.0 else row
    return row


@compiled
def _try(tiles: Floats, candidates: Floats, trial: int, closest: Floats, tried: Floats, totals: Floats) -> None:
    """What `closest` would be with each of four candidates from `trial` on, and its sums over tiles.

    ||a - b||^2 = 2 - 2 a b of unit vectors; candidates come times -2.
    """
    n = len(closest)
    P = len(tiles) // n
    t0, t1, t2, t3 = every(0.0), every(0.0), every(0.0), every(0.0)
    c0, c1, c2, c3 = trial * P, (trial + 1) * P, (trial + 2) * P, (trial + 3) * P
    for i in range(0, n, LANES):
        s0, s1, s2, s3 = every(2.0), every(2.0), every(2.0), every(2.0)
        for d in range(P):
            x = load(tiles, i * P + d * LANES)
            s0, s1 = fma(x, splat(candidates, c0 + d), s0), fma(x, splat(candidates, c1 + d), s1)
            s2, s3 = fma(x, splat(candidates, c2 + d), s2), fma(x, splat(candidates, c3 + d), s3)
        near = load(closest, i)
        s0, s1, s2, s3 = _lesser(s0, near), _lesser(s1, near), _lesser(s2, near), _lesser(s3, near)
        store(tried, trial * n + i, s0)
        store(tried, (trial + 1) * n + i, s1)
        store(tried, (trial + 2) * n + i, s2)
        store(tried, (trial + 3) * n + i, s3)
        t0, t1, t2, t3 = add(t0, s0), add(t1, s1), add(t2, s2), add(t3, s3)
    store(totals, trial * LANES, t0)
    store(totals, (trial + 1) * LANES, t1)
    store(totals, (trial + 2) * LANES, t2)
    store(totals, (trial + 3) * LANES, t3)


@compiled
def _lesser(a: Any, b: Any) -> Any:
    return where_greater(b, a, a, b)


@compiled
def _add_distinct(x: Floats, centers: Floats, found: int) -> int:
    """Add keys that are no center yet, zero vectors aside, to the `found` centers; return how many there are."""
    n, P = x.shape
    for i in range(n):
        known = True
        for d in range(P):
            known = known and x[i, d] == 0.0
        for k in range(found):
            same = True
            for d in range(P):
                same = same and x[i, d] == centers[k, d]
            known = known or same
        if not known and found < len(centers):
            for d in range(P):
                centers[found, d] = x[i, d]
            found += 1
    return found
