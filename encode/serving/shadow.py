"""Shadow scoring: the challenger scores what the champion has answered, and nobody waits for it."""

from __future__ import annotations

import logging
import queue
import random
import threading
from contextlib import suppress

import numpy as np

from encode.serving.bundle import Asked, Scored
from encode.serving.follower import Follower
from encode.serving.metrics import Metrics

_WAITING = 32
_LOG = logging.getLogger("uvicorn.error")


class Shadow:
    """A thread with a short queue; what does not fit into it is not scored a second time, and counted."""

    def __init__(self, follower: Follower, share: float, metrics: Metrics) -> None:
        """Prepare; `start` begins.

        Args:
            follower: holds the challenger.
            share: of the requests.
            metrics: told how far the two are apart.
        """
        self._follower, self._share, self._metrics = follower, share, metrics
        self._waiting: queue.Queue[tuple[Asked, Scored] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)

    def start(self) -> None:
        """Begin to score."""
        self._thread.start()

    def stop(self) -> None:
        """End after the request at work."""
        with suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)

    def offer(self, asked: Asked, answered: Scored) -> None:
        """Take a share of what was asked; never waits."""
        if not self._share or self._follower.challenger is None or random.random() >= self._share:
            return
        try:
            self._waiting.put_nowait((asked, answered))
        except queue.Full:
            self._metrics.shadowed("dropped")

    def _work(self) -> None:
        while (one := self._waiting.get()) is not None:
            challenger = self._follower.challenger
            if challenger is None:
                continue
            asked, answered = one
            try:
                scored, _ = self._follower.score(challenger, asked)
            except Exception as error:  # whatever it is, it must not end the comparison
                self._metrics.shadowed("failed")
                _LOG.warning("shadow: %s", type(error).__name__)
                continue
            apart = np.abs(scored.probabilities - answered.probabilities)
            self._metrics.shadowed("scored", float(apart.mean()))
