"""The process around the application: it listens, and on SIGTERM drains before it ends."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from encode.serving.engine import one_thread
from encode.serving.logs import log_config

_KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep idle connections, 60 s as a rule: the one that sends must be the one that closes."""


class _Draining(uvicorn.Server):
    """At the first SIGTERM it says that it is not ready; some time later, or at the second, it stops listening."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, delay_seconds: float) -> None:
        super().__init__(config)
        self._app, self._delay_seconds, self._stop_at = app, delay_seconds, float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM:
            super().handle_exit(sig, frame)
            return
        # Not handed on: uvicorn would end the process by the same signal again, whose status is not 0.
        self._stop_at = time.monotonic() + (0 if self._app.state.scorer.draining else self._delay_seconds)
        self._app.state.scorer.draining = True

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or time.monotonic() >= self._stop_at


def _freeze() -> None:
    """Take what is there at the start, and stays, from the garbage collector: to look through it takes 0.3 s."""
    gc.collect()
    gc.freeze()


def serve(app: FastAPI, host: str, port: int, drain_delay_seconds: float, drain_seconds: int) -> None:
    """Listen until SIGTERM or Ctrl-C.

    Args:
        app: made by `create_app`.
        host: address to listen on.
        port: to listen on.
        drain_delay_seconds: after SIGTERM, not ready but still taking requests, so that load balancers see it.
        drain_seconds: after that, given to requests at work; then they are cut off.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        ws="none",
        log_config=log_config(),
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
    )
    app.state.follower.before_first = _freeze
    server = _Draining(config, app, drain_delay_seconds)
    with one_thread():
        server.run()
    if app.state.work.count or app.state.loading:  # a thread cannot be stopped, and the interpreter would wait for it
        sys.stderr.flush()
        os._exit(0)
