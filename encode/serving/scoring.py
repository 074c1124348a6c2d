"""The one function behind all dialects: it scores with the bundle in use and tells what was assumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from fastapi import HTTPException, Request

from encode.serving.bundle import Behavior, Bundle, Scored
from encode.serving.follower import Follower
from encode.serving.messages import Fallbacks, ScoreRequest
from encode.serving.metrics import Metrics


class Scorer:
    """Answers with whatever bundle the follower holds."""

    def __init__(
        self, follower: Follower, metrics: Metrics, max_age_days: int | None, now: Callable[[], datetime]
    ) -> None:
        self.follower, self.metrics = follower, metrics
        self.draining = False
        """The process was told to end: requests are answered, but should be sent elsewhere."""
        self._max_age_days, self._now = max_age_days, now

    def bundle(self, request: Request) -> Bundle:
        """Return what serves, and note it for the log of the request.

        Raises:
            HTTPException: 503, nothing does yet.
        """
        bundle = self._bundle()
        _told(request)["bundle"] = bundle.id
        return bundle

    def ready(self) -> Bundle:
        """Return what serves, if requests should be sent here.

        Raises:
            HTTPException: 503, nothing serves yet, or the process was told to end.
        """
        if self.draining:
            raise HTTPException(503, "not ready: draining", {"Retry-After": "2"})
        return self._bundle()

    def is_ready(self) -> bool:
        """Tell whether requests should be sent here."""
        return self.follower.bundle is not None and not self.draining

    def stale(self, bundle: Bundle) -> bool:
        """Tell whether a bundle's snapshot is older than allowed."""
        return self._max_age_days is not None and (self._now().date() - bundle.pointer.as_of).days > self._max_age_days

    def score(self, request: Request, bundle: Bundle, asked: ScoreRequest) -> Scored:
        """Score the candidates for one user; the log of the request is told how many."""
        recent = [Behavior(one.item_id, one.category_id, one.timestamp) for one in asked.recent]
        began = time.perf_counter()
        scored = bundle.score(asked.user_id, asked.item_ids, asked.category_ids, recent)
        self.metrics.scored(time.perf_counter() - began, scored, self.stale(bundle))
        told = _told(request)
        told["candidates"] = told.get("candidates", 0) + len(asked.item_ids)
        return scored

    def fallbacks(self, bundle: Bundle, scored: Scored) -> Fallbacks:
        """Return what had to be assumed."""
        return Fallbacks(
            unknown_user=scored.unknown_user, unknown_items=scored.unknown_items, stale_snapshot=self.stale(bundle)
        )

    def _bundle(self) -> Bundle:
        bundle = self.follower.bundle
        if bundle is None:
            raise HTTPException(503, f"not ready: {self.follower.error or 'loading'}", {"Retry-After": "2"})
        return bundle


def _told(request: Request) -> dict[str, Any]:
    """What `encode.serving.observe` logs of a request."""
    told: dict[str, Any] = request.scope.setdefault("state", {})
    return told
