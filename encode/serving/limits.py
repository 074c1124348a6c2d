"""Limits before anything is parsed: size and arrival time of bodies, requests at work, time to an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Set
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
    """At work or waiting, with their body complete; more are told to come back. What has arrived of other bodies may be
    as many times `max_body_bytes` in all: this bounds the memory of bodies, and slow clients take nobody's place."""
    deadline_seconds: float = 5.0
    """From the end of the body to the end of the answer."""


@dataclass
class Work:
    """What is held now."""

    count: int = 0
    """Requests that have a place."""
    arrived: int = 0
    """Bytes of bodies that are not complete."""


class _RefusedError(Exception):
    def __init__(self, status: int, detail: str, headers: Mapping[str, str]) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


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
        try:
            self._check_place()
            body = await self._body(Request(scope, receive))
            self._check_place()
        except _RefusedError as error:
            await problem(scope, error.status, error.detail, error.headers)(scope, receive, send)
            return
        if body is not None:
            self._work.count += 1
            await self._answer(scope, body, receive, send)

    def _check_place(self) -> None:
        if self._work.count >= self._limits.max_requests:
            self._on_shed()
            detail = f"{self._work.count} requests at work, which is the most; try again"
            raise _RefusedError(503, detail, {"Retry-After": "1"})

    async def _body(self, request: Request) -> bytes | None:
        """Return the whole body, or None where the client has gone."""
        most, size, chunks = self._limits.max_body_bytes, 0, []
        most_in_all = most * self._limits.max_requests
        declared = request.headers.get("content-length", "")
        too_large = _RefusedError(413, f"body of more than {most:,} bytes, which is the most", {"Connection": "close"})
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
                    self._work.arrived += len(chunks[-1])
                    if size > most:
                        raise too_large
                    if self._work.arrived > most_in_all:
                        self._on_shed()
                        detail = f"more than {most_in_all:,} bytes of bodies are arriving, which is the most; try again"
                        raise _RefusedError(503, detail, {"Retry-After": "1", "Connection": "close"})
                    more = message.get("more_body", False)
        except TimeoutError:
            detail = f"{size:,} bytes in {self._limits.receive_seconds:g} s, but not the whole body"
            raise _RefusedError(408, detail, {"Connection": "close"}) from None
        finally:
            self._work.arrived -= size
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
