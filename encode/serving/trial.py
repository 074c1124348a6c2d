"""The trial of a bundle before it serves: recorded and drawn requests must give probabilities, and in time.

It is the warm-up, too: what is allocated, mapped and paged in at first use is so before anybody waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from encode.errors import ArtifactError
from encode.serving.bundle import Behavior, Bundle, Scored

_DRAWN_USERS, _DRAWN_CANDIDATES = 8, 1_000
_ROUNDS = 5
"""Times that every request is timed."""
NEVER_SLOW_MS = 5.0
"""A median below this is good enough, whatever served before."""
TIMES_SLOWER = 3.0
"""Than what served before, at most."""


@dataclass(frozen=True)
class Asked:
    """What a user's candidates were scored by."""

    user_id: int
    item_ids: Sequence[int]
    category_ids: Sequence[int] | None = None
    recent: Sequence[Behavior] = ()


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
        beside: what serves now, timed in turn with it, so that a busy machine slows both.

    Raises:
        ArtifactError: a probability is not a number, or it takes too long: longer than `max_ms`, or more than three
            times as long as what serves now (and more than 5 ms).
    """
    drawn = list(_drawn(bundle))
    for asked in (*recorded, *drawn):
        _score(bundle, asked)
    ours: list[list[float]] = [[] for _ in drawn]
    theirs: list[list[float]] = [[] for _ in drawn]
    for _ in range(_ROUNDS):
        for place, asked in enumerate(drawn):
            ours[place].append(_score(bundle, asked))
            theirs[place] += _score_beside(beside, asked)
    median, before = _typical(ours), _typical(theirs)
    where = f"bundle {bundle.id}: {len(drawn[0].item_ids):,} candidates take {median:.1f} ms"
    if median > max_ms:
        raise ArtifactError(f"{where}, expected at most {max_ms:g}")
    if beside and median > max(NEVER_SLOW_MS, TIMES_SLOWER * before):
        raise ArtifactError(f"{where}, bundle {beside.id} {before:.1f} ms")


def median_ms(bundle: Bundle) -> float:
    """Return the milliseconds of a drawn request, 1,000 candidates of one user: the median, timed as in a trial.

    Raises:
        ArtifactError: a probability is not a number.
    """
    drawn = list(_drawn(bundle))
    for asked in drawn:
        _score(bundle, asked)
    return _typical([[_score(bundle, asked) for _ in range(_ROUNDS)] for asked in drawn])


def _typical(times: Sequence[Sequence[float]]) -> float:
    """Return the median over requests of the shortest time of each; NaN where there is none.

    The shortest, for on a busy machine the others waited for a processor.
    """
    shortest = [min(rounds) for rounds in times if rounds]
    return float(np.median(shortest)) if shortest else float("nan")


def timed(bundle: Bundle, asked: Asked) -> tuple[Scored, float]:
    """Score, and return also the seconds it takes."""
    began = time.perf_counter()
    scored = bundle.score(asked.user_id, asked.item_ids, asked.category_ids, asked.recent)
    return scored, time.perf_counter() - began


def _score(bundle: Bundle, asked: Asked) -> float:
    """Return the milliseconds it takes."""
    return 1e3 * timed(bundle, asked)[1]


def _score_beside(bundle: Bundle | None, asked: Asked) -> list[float]:
    """Return the milliseconds; none where the bundle in use cannot score this, which says nothing of the other."""
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
        yield Asked(int(user), drawn.tolist())
