"""The one function behind all dialects: it scores with the bundle in use and tells what was assumed."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError

from encode.serving.bundle import Asked, Bundle, Scored
from encode.serving.follower import Follower
from encode.serving.limits import Work
from encode.serving.messages import Fallbacks
from encode.serving.metrics import Metrics
from encode.serving.rollout import ROLE_HEADER, Role, Rollout
from encode.serving.shadow import Shadow

_RETRY = {"Retry-After": "2"}


class Scorer:
    """Answers with whatever bundle the follower holds."""

    def __init__(
        self,
        follower: Follower,
        rollout: Rollout,
        metrics: Metrics,
        work: Work,
        max_age_days: int | None,
        now: Callable[[], datetime],
        threads: int | None = None,
    ) -> None:
        """Prepare; threads start when they are needed.

        Args:
            follower: holds what scores.
            rollout: who scores for whom.
            metrics: told of each request.
            work: how many requests have a place now.
            max_age_days: a snapshot older than this is stale; None never.
            now: the clock behind that.
            threads: that compute beside the event loop; by default one for each processor but the event loop's.
        """
        self.follower, self.metrics = follower, metrics
        self._work = work
        self._pool = ThreadPoolExecutor(threads or max(1, num_processors() - 1), "scoring")
        self.shadow = Shadow(follower, rollout.shadow_share, metrics)
        self._rollout = rollout
        self.draining = False
        """The process was told to end: requests are answered, but should be sent elsewhere."""
        self._max_age_days, self._now = max_age_days, now

    def bundle(self, request: Request, user_id: int | None = None) -> Bundle:
        """Return what is to answer, and note it for the log of the request.

        Args:
            request: may ask for the champion or the challenger by a header.
            user_id: decides otherwise; None leaves it to the champion.

        Raises:
            HTTPException: 503, it is not loaded.
            RequestValidationError: the header asks for something else.
        """
        bundle = self._chosen(request.headers.get(ROLE_HEADER), user_id)
        _told(request)["bundle"] = bundle.id
        return bundle

    def ready(self) -> Bundle:
        """Return what serves, if requests should be sent here.

        Raises:
            HTTPException: 503, nothing serves yet, or the process was told to end.
        """
        if self.draining:
            raise HTTPException(503, "not ready: draining", _RETRY)
        if self.follower.bundle is None:  # why may name stores and registries: not for those without a key
            raise HTTPException(503, "not ready: no bundle yet; /v1/release tells why", _RETRY)
        return self.follower.bundle

    def is_ready(self) -> bool:
        """Tell whether requests should be sent here."""
        return self.follower.bundle is not None and not self.draining

    def stale(self, bundle: Bundle) -> bool:
        """Tell whether a bundle's snapshot is older than allowed."""
        return self._max_age_days is not None and (self._now().date() - bundle.pointer.as_of).days > self._max_age_days

    def score(self, request: Request, bundle: Bundle, asked: Asked) -> Scored:
        """Score the candidates for one user; the log of the request is told how many.

        Raises:
            HTTPException: 421, the user is of a shard that this process does not hold.
        """
        check_shard(bundle, asked.user_id)
        return self._noted(request, bundle, asked, *self.follower.score(bundle, asked))

    async def score_soon(self, request: Request, bundle: Bundle, asked: Asked) -> Scored:
        """Do the same from the event loop: there, if no other request waits, else on a thread beside it.

        A change of threads there and back takes longer than it is worth to the only request; of several, one is read
        and answered while another is computed.
        """
        if self._work.count <= 1:
            return self.score(request, bundle, asked)
        check_shard(bundle, asked.user_id)
        return self._noted(request, bundle, asked, *await self.follower.score_aside(bundle, asked, self._pool))

    def close(self) -> None:
        """Let go of the threads once what they compute is computed."""
        self._pool.shutdown(wait=False)

    def _noted(self, request: Request, bundle: Bundle, asked: Asked, scored: Scored, seconds: float) -> Scored:
        self.follower.recorder.record(asked)
        champion = bundle is not self.follower.challenger
        if champion:
            self.shadow.offer(asked, scored)
        self.metrics.scored("champion" if champion else "challenger", seconds, scored, self.stale(bundle))
        told = _told(request)
        told["candidates"] = told.get("candidates", 0) + len(asked.item_ids)
        return scored

    def fallbacks(self, bundle: Bundle, scored: Scored) -> Fallbacks:
        """Return what had to be assumed."""
        return Fallbacks(
            unknown_user=scored.unknown_user, unknown_items=scored.unknown_items, stale_snapshot=self.stale(bundle)
        )

    def _chosen(self, role: str | None, user_id: int | None) -> Bundle:
        followed: tuple[str, ...] = get_args(Role) if self._rollout.challenger else ("champion",)
        if role is not None and role not in followed:
            message = f"expected {' or '.join(followed)}"
            raise RequestValidationError([{"type": "value_error", "loc": ("header", ROLE_HEADER), "msg": message}])
        challenger = self.follower.challenger
        if role == "challenger" and challenger is None:
            raise HTTPException(503, f"not ready: no challenger; {self.follower.error or 'it is not loaded'}", _RETRY)
        wanted = role or ("champion" if user_id is None else self._rollout.role_of(user_id))
        return challenger if wanted == "challenger" and challenger is not None else self._bundle()

    def _bundle(self) -> Bundle:
        bundle = self.follower.bundle
        if bundle is None:
            raise HTTPException(503, f"not ready: {self.follower.error or 'loading'}", _RETRY)
        return bundle


def num_processors(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many processors this process may keep busy: those it may run on, or the quota of its container."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = map(int, cpu_max.read_text().split())
    except (OSError, ValueError):  # no quota: "max 100000"
        return allowed
    return max(1, min(allowed, round(quota / period)))


def check_shard(bundle: Bundle, user_id: int) -> None:
    """Refuse a user whom another replica holds: as an unknown one, the user would get wrong probabilities.

    Raises:
        HTTPException: 421; it names the shard.
    """
    snapshot = bundle.snapshot
    if (wanted := snapshot.shard_of(user_id)) != snapshot.shard:
        raise HTTPException(421, f"user {user_id}: of shard {wanted}, this process holds {snapshot.shard}")


def _told(request: Request) -> dict[str, Any]:
    """What `encode.serving.observe` logs of a request."""
    told: dict[str, Any] = request.scope.setdefault("state", {})
    return told
