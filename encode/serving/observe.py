"""What is told of every request: its metrics, its line in the log, its place in a trace."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from encode.serving.logs import log_request
from encode.serving.metrics import Metrics
from encode.serving.problems import problem
from encode.serving.trace import continue_trace

_CLIENT_LEFT = 499
"""Not sent to anybody: what nginx logs, too, when the client went away before its answer."""


class Observed:
    """ASGI middleware around all others. A fault of this program is logged and answered here.

    While the process drains, answers close their connection: a client that keeps it would lose its next request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, is_draining: Callable[[], bool]) -> None:
        self._app, self._metrics, self._is_draining = app, metrics, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        trace = continue_trace(Headers(scope=scope).getlist("traceparent"))
        status, fault = _CLIENT_LEFT, {}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["traceparent"] = trace.header()
                if self._is_draining():
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            # Frames without the message of the error, which may quote the request.
            fault = {"error": type(error).__name__, "at": traceback.format_tb(error.__traceback__)}
            if status == _CLIENT_LEFT:
                detail = f"fault of the server, trace {trace.trace_id} in its log"
                await problem(scope, 500, detail)(scope, receive, answer)
            status = 500
        finally:
            seconds = time.perf_counter() - began
            fields = {"trace_id": trace.trace_id, "span_id": trace.span_id} | fault
            self._tell(scope, status, seconds, fields)

    def _tell(self, scope: Scope, status: int, seconds: float, fields: dict[str, Any]) -> None:
        # The path itself may hold a user's id, and there are too many paths for a metric.
        route = getattr(scope.get("route"), "path", "unrouted")
        self._metrics.answered(route, status, seconds)
        told = scope.get("state", {})
        log_request(
            status,
            {
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 3),
                "candidates": told.get("candidates", 0),
                "bundle": told.get("bundle"),
            }
            | fields,
        )
