"""Load on an HTTP server: requests at moments fixed in advance, whatever the server does.

Latency counts from the moment at which a request was due, not from the one at which it could be sent: a server that
stalls is charged with all who wait for it (no coordinated omission). The generator tells how late itself was.
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

CONNECTIONS = 64
"""At most; requests that are due wait for one, and their time counts."""
PATIENCE_SECONDS = 5.0
"""For answers, after the last request was due."""
_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Trial:
    """What came of a number of requests."""

    ms: np.ndarray
    """From the moment it was due to the last byte of its answer, of each request; infinite where it got none or
    another status than 200."""
    late_ms: np.ndarray
    """From the moment it was due to the one at which the generator took it up."""
    seconds: float

    @property
    def failed(self) -> int:
        """Requests that were not answered with 200."""
        return int(np.isinf(self.ms).sum())

    def quantile(self, share: float) -> float:
        """Return the milliseconds within which a share of the requests was answered."""
        return float(np.quantile(self.ms, share, method="inverted_cdf"))


def as_request(path: str, content_type: str, body: bytes) -> bytes:
    """Return a POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + _END + body


def poisson(rate: float, seconds: float, least: int = 1) -> np.ndarray:
    """Return moments of independent arrivals, in seconds from the start.

    Args:
        rate: arrivals a second, on average.
        seconds: that they take, on average.
        least: arrivals, however long they take.
    """
    count = max(least, round(rate * seconds))
    return np.cumsum(np.random.default_rng(0).exponential(1 / rate, count))


def offer(port: int, requests: Sequence[bytes], arrivals: np.ndarray, give_up_ms: float | None = None) -> Trial:
    """Send a request at each moment, one after the other of `requests`, over and over.

    Args:
        port: of a server on this machine.
        requests: as made by `as_request`.
        arrivals: seconds from the start, ascending.
        give_up_ms: stop as soon as more than 1% of all requests took longer than this or failed; what is left counts as
            failed, too. None never stops.
    """
    return _run(_offer(port, requests, arrivals, give_up_ms))


def ask_in_turn(port: int, requests: Sequence[bytes], seconds: float, clients: int = 1) -> Trial:
    """Let clients send a request whenever they have the answer to the one before: latency without waiting for others.

    Args:
        port: of a server on this machine.
        requests: as made by `as_request`.
        seconds: after which no more are sent; each client sends one at least.
        clients: at once.
    """
    return _run(_ask_in_turn(port, requests, seconds, clients))


def highest_rate(sustained: Callable[[float], bool], first: float, steps: int) -> float:
    """Return the highest rate that is sustained: doubling or halving from `first`, then bisection.

    Args:
        sustained: tries a rate.
        first: to be tried.
        steps: of the bisection; each halves the logarithm of the ratio of the bounds, which begins at log 2.

    Returns:
        Requests a second, 0 if not even a sixteenth of `first` is sustained.
    """
    low = first
    while not sustained(low):
        low /= 2
        if low < first / 16:
            return 0
    high = 2 * low
    while low >= first and sustained(high):
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if sustained(middle) else (low, middle)
    return low


# --- the generator -----------------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """Kept alive, with one request at a time; answers must have a Content-Length."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[bool] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self, request: bytes) -> bool:
        """Send a request, and tell whether the status is 200 when all of the answer is there."""
        if self._transport.is_closing():
            raise ConnectionError("closed by the server")
        self._answer = answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return bool(await answer)
        except BaseException:
            self.close()  # what may still come would be taken for the next answer
            raise

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(_END)
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        _, found, length = head.partition(b"content-length:")
        if not found:
            self._end(ConnectionError("an answer without Content-Length"))
        elif len(self._received) >= end + len(_END) + int(length.partition(b"\r\n")[0]):
            self._received.clear()
            self._end(head.split(maxsplit=2)[1] == b"200")

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("closed by the server"))

    def _end(self, found: bool | Exception) -> None:
        if self._answer is None or self._answer.done():
            return
        if isinstance(found, Exception):
            self._answer.set_exception(found)
        else:
            self._answer.set_result(found)

    def close(self) -> None:
        self._transport.close()


class _Pool:
    """Connections to a server; a new one is opened where none is idle."""

    def __init__(self, port: int) -> None:
        self._port, self._places = port, asyncio.Semaphore(CONNECTIONS)
        self._idle: deque[_Connection] = deque()

    async def ask(self, request: bytes) -> bool:
        """Tell whether the answer has the status 200."""
        async with self._places:
            try:
                connection = self._idle.pop() if self._idle else await self._open()
                answered = await connection.ask(request)
            except OSError:
                return False
            self._idle.append(connection)
            return answered

    async def open(self, count: int) -> None:
        """Open connections beforehand."""
        self._idle.extend([await self._open() for _ in range(count)])

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    async def _open(self) -> _Connection:
        _, made = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", self._port)
        return made


def _run(trial: Coroutine[Any, Any, Trial]) -> Trial:
    # The timers of epoll, and of uvloop, are of whole milliseconds; those of select are not.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(trial)


async def _offer(port: int, requests: Sequence[bytes], arrivals: np.ndarray, give_up_ms: float | None) -> Trial:
    pool, count = _Pool(port), len(arrivals)
    ms, late = np.full(count, np.inf), np.zeros(count)
    tasks: set[asyncio.Task[None]] = set()
    lost = 0

    async def ask(number: int, due: float) -> None:
        nonlocal lost
        answered = await pool.ask(requests[number % len(requests)])
        took = 1e3 * (time.perf_counter() - due)
        lost += give_up_ms is not None and not (answered and took <= give_up_ms)
        if answered:
            ms[number] = took

    await pool.open(8)
    began = time.perf_counter() + 0.05
    for number, due in enumerate(began + arrivals):
        await asyncio.sleep(due - time.perf_counter())
        late[number] = 1e3 * (time.perf_counter() - due)
        tasks.add(task := asyncio.create_task(ask(number, due)))
        task.add_done_callback(tasks.discard)
        if lost > count / 100:
            break
    if tasks:
        _, left = await asyncio.wait(set(tasks), timeout=PATIENCE_SECONDS)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    pool.close()
    return Trial(ms, late, time.perf_counter() - began)


async def _ask_in_turn(port: int, requests: Sequence[bytes], seconds: float, clients: int) -> Trial:
    pool, ms, number = _Pool(port), [], itertools.count()

    async def client() -> None:
        while True:
            sent = time.perf_counter()
            answered = await pool.ask(requests[next(number) % len(requests)])
            ended = time.perf_counter()
            ms.append(1e3 * (ended - sent) if answered else np.inf)
            if ended > began + seconds:
                return

    await pool.open(clients)
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    pool.close()
    return Trial(np.array(ms), np.zeros(len(ms)), time.perf_counter() - began)
