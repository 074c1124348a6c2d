"""The trial of a bundle before it serves: recorded and drawn requests must give probabilities, and in time.

It is the warm-up, too: what is allocated, mapped and paged in at first use is so before anybody waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from encode.errors import ArtifactError
from encode.serving.bundle import Asked, Bundle, Scored

_DRAWN_USERS, _DRAWN_CANDIDATES = 8, 1_000
_ROUNDS = 5
"""Times that every request is timed."""
NEVER_SLOW_MS = 5.0
"""A median below this is good enough, whatever served before."""
TIMES_SLOWER = 3.0
"""Than what served before, at most."""


class Recorder:
    """The latest requests, in memory only; threads may record and read at once."""

    def __init__(self, count: int = 64) -> None:
        self._latest: deque[Asked] = deque(maxlen=count)

    def record(self, asked: Asked) -> None:
        """Keep a request, and forget the oldest."""
        self._latest.append(asked)

    def latest(self) -> list[Asked]:
        """Return what is kept."""
        return list(self._latest)


def try_bundle(bundle: Bundle, recorded: Sequence[Asked], max_ms: float, beside: Bundle | None = None) -> None:
    """Ask a bundle what was asked lately, and what is drawn from its own users and items.

    Args:
        bundle: has passed its digests and its mirror test.
        recorded: requests that were answered by another one.
        max_ms: the longest that a drawn request, 1,000 candidates of one user, may take: the median, each at its best.
        beside: what serves now, which it is held against by the processor's time, for what it waits for the others at
            work in this process says nothing of it.

    Raises:
        ArtifactError: a probability is not a number, or it takes too long: longer than `max_ms`, or more than three
            times the processor's time of what serves now (and more than 5 ms).
    """
    drawn = list(_drawn(bundle))
    for asked in (*recorded, *drawn):
        _score(bundle, asked)
    ours: list[list[_Cost]] = [[] for _ in drawn]
    theirs: list[list[_Cost]] = [[] for _ in drawn]
    for _ in range(_ROUNDS):
        for place, asked in enumerate(drawn):
            ours[place].append(_score(bundle, asked))
            theirs[place] += _score_beside(beside, asked)
    (taken, median), (_, before) = _typical(ours), _typical(theirs)
    where = f"bundle {bundle.id}: {len(drawn[0].item_ids):,} candidates take"
    if taken > max_ms:
        raise ArtifactError(f"{where} {taken:.1f} ms, expected at most {max_ms:g}")
    if beside and median > max(NEVER_SLOW_MS, TIMES_SLOWER * before):
        raise ArtifactError(f"{where} {median:.1f} ms of the processor, bundle {beside.id} {before:.1f} ms")


def median_ms(bundle: Bundle) -> float:
    """Return the milliseconds of a drawn request, 1,000 candidates of one user: the median, timed as in a trial.

    Raises:
        ArtifactError: a probability is not a number.
    """
    drawn = list(_drawn(bundle))
    for asked in drawn:
        _score(bundle, asked)
    return _typical([[_score(bundle, asked) for _ in range(_ROUNDS)] for asked in drawn]).taken


class _Cost(NamedTuple):
    """Milliseconds of a request."""

    taken: float
    worked: float
    """Of the processor."""


def _typical(costs: Sequence[Sequence[_Cost]]) -> _Cost:
    """Return the medians over requests of the shortest of each; NaN where there is none.

    The shortest, for on a busy machine the others waited for a processor, or found its caches full of something else.
    """
    shortest = [np.min(rounds, axis=0) for rounds in costs if rounds]
    return _Cost(*map(float, np.median(shortest, axis=0))) if shortest else _Cost(float("nan"), float("nan"))


def timed(bundle: Bundle, asked: Asked) -> tuple[Scored, float]:
    """Score, and return also the seconds it takes."""
    began = time.perf_counter()
    scored = bundle.score(asked)
    return scored, time.perf_counter() - began


async def timed_aside(bundle: Bundle, asked: Asked, pool: Executor) -> tuple[Scored, float]:
    """Do the same from the event loop, and compute on a thread of a pool; to wait for a thread takes no seconds."""
    began = time.perf_counter()
    found = bundle.look_up(asked)
    looked_up = time.perf_counter() - began

    def compute() -> tuple[npt.NDArray[np.float32], float]:
        began_here = time.perf_counter()
        return bundle.compute(found), time.perf_counter() - began_here

    probability, computed = await asyncio.get_running_loop().run_in_executor(pool, compute)
    began = time.perf_counter()
    scored = bundle.told(asked, found, probability)
    return scored, looked_up + computed + time.perf_counter() - began


def _score(bundle: Bundle, asked: Asked) -> _Cost:
    began = time.thread_time()
    _, seconds = timed(bundle, asked)
    return _Cost(1e3 * seconds, 1e3 * (time.thread_time() - began))


def _score_beside(bundle: Bundle | None, asked: Asked) -> list[_Cost]:
    """Return the cost; none where the bundle in use cannot score this, which says nothing of the other."""
    try:
        return [_score(bundle, asked)] if bundle else []
    except Exception:
        return []


def _drawn(bundle: Bundle) -> Iterator[Asked]:
    """Draw candidates for some users of the snapshot, and for one that it does not know."""
    random, items = np.random.default_rng(0), bundle.space.vocabulary.item_ids
    some = islice((int(user) for users in bundle.snapshot.user_ids() for user in users[:1]), _DRAWN_USERS - 1)
    for user in (*some, np.iinfo(np.int64).max):
        drawn = random.choice(items, _DRAWN_CANDIDATES) if len(items) else np.ones(_DRAWN_CANDIDATES, np.int64)
        yield Asked(int(user), drawn)
