"""Limits before anything is parsed: size and arrival time of bodies, requests at work, time to an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Set
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from encode.serving.problems import problem

_LOG = logging.getLogger("encode.serving")


@dataclass(frozen=True)
class Limits:
    """What a request may take."""

    max_body_bytes: int = 1 << 20
    receive_seconds: float = 5.0
    """From the end of the headers to the end of the body."""
    max_requests: int = 64
    """At work or waiting; more are told to come back. With `max_body_bytes` this bounds the memory of all bodies."""
    deadline_seconds: float = 5.0
    """From the end of the body to the end of the answer."""


@dataclass
class Work:
    """How many requests have a place now."""

    count: int = 0


class _RefusedError(Exception):
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Limited:
    """ASGI middleware that holds requests to limits; those of `spared` paths are never counted or shed.

    The application sees a request when its body is complete. It runs in a task of its own: a thread cannot be stopped,
    so a request that is over its deadline is answered, but keeps its place until the work on it ends.
    """

    def __init__(self, app: ASGIApp, limits: Limits, work: Work, spared: Set[str], on_shed: Callable[[], None]) -> None:
        self._app, self._limits, self._work, self._spared, self._on_shed = app, limits, work, spared, on_shed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._spared:
            await self._app(scope, receive, send)
            return
        if self._work.count >= self._limits.max_requests:
            self._on_shed()
            detail = f"{self._work.count} requests at work, which is the most; try again"
            await problem(scope, 503, detail, {"Retry-After": "1"})(scope, receive, send)
            return
        self._work.count += 1
        try:
            body = await self._body(Request(scope, receive))
        except _RefusedError as error:
            self._work.count -= 1
            await problem(scope, error.status, error.detail, {"Connection": "close"})(scope, receive, send)
            return
        except BaseException:
            self._work.count -= 1
            raise
        if body is None:
            self._work.count -= 1
            return
        await self._answer(scope, body, receive, send)

    async def _body(self, request: Request) -> bytes | None:
        """Return the whole body, or None where the client has gone."""
        most, size, chunks = self._limits.max_body_bytes, 0, []
        declared = request.headers.get("content-length", "")
        too_large = _RefusedError(413, f"body of more than {most:,} bytes, which is the most")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.receive_seconds):
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            detail = f"{size:,} bytes in {self._limits.receive_seconds:g} s, but not the whole body"
            raise _RefusedError(408, detail) from None
        return b"".join(chunks)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        replayed = started = over = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def answer(message: Message) -> None:
            nonlocal started
            if not over:
                started = True
                await send(message)

        task = asyncio.ensure_future(self._app(scope, replay, answer))
        task.add_done_callback(self._leave)
        await asyncio.wait({task}, timeout=self._limits.deadline_seconds)
        if task.done():
            task.result()
        elif started:
            task.cancel()  # the client does not read; without the rest of the answer its connection is closed
        else:
            over = True
            detail = f"not answered in {self._limits.deadline_seconds:g} s"
            task.add_done_callback(_report)
            await problem(scope, 503, detail, {"Retry-After": "1"})(scope, receive, send)

    def _leave(self, _: asyncio.Future[None]) -> None:
        self._work.count -= 1


def _report(task: asyncio.Future[None]) -> None:
    """Log the failure of a request that was answered already."""
    if not task.cancelled() and (error := task.exception()):
        _LOG.error("failed after its deadline: %s", type(error).__name__)
