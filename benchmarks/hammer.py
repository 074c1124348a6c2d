"""What it takes to break the serving process: bad requests by the hundred thousand, slow clients, strangers, kill -9.

    python -m benchmarks.hammer [--json] [--requests N] [--quick]

The real `encode serve` answers on a release of the tiny preset that is made first. A fifth of the requests is drawn: by
schemathesis from the server's own description of itself, both as described and not, and by hypothesis
(benchmarks/strange.py), which knows what a schema cannot say. The others are damaged copies. No answer may be a fault
(5xx, but for the documented 503), none may be missing, late or of another form than is documented, and the memory of
the process may not grow. The status is 1 if any of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
import psutil
import requests
import schemathesis
from hypothesis import strategies as st

from benchmarks.load import as_request, offer, poisson
from benchmarks.serve_http import encode_serve
from benchmarks.strange import JSON, Strange, damaged, drawn, strange_requests
from benchmarks.train import num_cores, processor, say
from encode.config import load_config

COPIES = 4
"""Damaged ones of each request that is drawn."""
CONNECTIONS = 8
PATIENCE_SECONDS = 30.0
"""For an answer; one that is later counts as hung. The deadline of the server is 5 s."""
WARM_UP = 20_000
"""Requests until which memory may grow. Later it still moves in steps of some MB, as allocators do."""
SLOW_CLIENTS, RATE = 200, 50
GOOD = {"user_id": 1, "item_ids": [10, 11, 12]}
TARGETS = {
    "faults": "0",
    "hung": "0",
    "closed": "0",
    "misshapen": "0",
    "growth_mb_per_10_000": "at most 2",
    "failed_beside_slow_clients": "0",
    "strangers_not_answered": "0",
    "strangers_not_counted": "0",
    "changed_by_kill": "0",
}
SHOWN = (
    "requests",
    "seconds",
    "slow_clients_refused",
    "requests_beside_slow_clients",
    "p99_ms_beside_slow_clients",
    "strangers",
    "ready_again_s",
)
MOST = {name: float(text.split()[-1]) for name, text in TARGETS.items()}


@dataclass
class Storm:
    """What came of the requests."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By route, as in the server's description, or `other`."""
    hung: int = 0
    closed: int = 0
    """Connections that were closed without an answer."""
    misshapen: int = 0
    """Refusals that are not the documented JSON."""
    memory: list[tuple[int, float]] = field(default_factory=list)
    """Requests answered so far, MB resident."""
    examples: list[str] = field(default_factory=list)
    """Of what must not be."""

    @property
    def answered(self) -> int:
        return self.statuses.total()

    @property
    def faults(self) -> int:
        return sum(count for (_, status), count in self.statuses.items() if status >= 500 and status != 503)

    def note(self, what: str, request: Strange) -> None:
        """Keep an example."""
        if len(self.examples) < 20:
            self.examples.append(f"{what}: {request.wire()[:300]!r}")


# --- requests ----------------------------------------------------------------------------------------------


def described_requests(description: dict[str, Any], model: str) -> list[st.SearchStrategy[Strange]]:
    """Return what draws requests from a description in OpenAPI, for each operation as described and not."""
    schema = schemathesis.openapi.from_dict(description)
    operations = [found.ok() for found in schema.get_all_operations()]
    return [
        operation.as_strategy(generation_mode=mode).map(lambda case: _from_case(case, model))
        for operation in operations
        for mode in schemathesis.GenerationMode
        if mode is schemathesis.GenerationMode.POSITIVE or operation.body or operation.path_parameters
    ]


def _from_case(case: Any, model: str) -> Strange:
    known = ("method", "url", "headers", "params", "data", "json", "cookies")
    told = {name: value for name, value in case.as_transport_kwargs(base_url="http://any").items() if name in known}
    made = requests.Request(**told).prepare()
    body = made.body or b""
    target = made.path_url if len(made.path_url) % 2 else re.sub("/models/[^/?]*", f"/models/{model}", made.path_url)
    headers = tuple(
        (name, value if isinstance(value, bytes) else value.encode("latin-1"))
        for name, value in made.headers.items()
        if name.lower() not in ("content-length", "transfer-encoding")
    )
    return Strange(made.method, target, headers, body if isinstance(body, bytes) else body.encode())


def all_requests(description: dict[str, Any], model: str, count: int) -> Iterator[list[Strange]]:
    """Yield requests in lots of some thousands, each lot with its own seed."""
    described, random, made, number = described_requests(description, model), Random(0), 0, 0
    while made < count:
        wanted = min(1_000, -(-(count - made) // (1 + COPIES)))
        lot = drawn(strange_requests(model), wanted * 3 // 5, number)
        for strategy in described:
            lot += drawn(strategy, max(1, (wanted - wanted * 3 // 5) // len(described)), number)
        lot += [damaged(request, random) for request in lot for _ in range(COPIES)]
        random.shuffle(lot)
        yield lot[: count - made]
        made, number = made + len(lot), number + 1


# --- the storm ---------------------------------------------------------------------------------------------


class Sender:
    """Sends requests over a few connections and notes what comes back."""

    def __init__(self, port: int, routes: Sequence[str], memory: Callable[[], float], every: int = 500) -> None:
        self._port, self._memory, self._every, self.storm = port, memory, every, Storm()
        self._routes = [(route, re.compile(re.sub(r"\{\w+\}", "[^/]+", route))) for route in routes]

    async def send(self, lot: Sequence[Strange]) -> None:
        """Send requests, and return when all are answered or given up."""
        left = iter(lot)
        await asyncio.gather(*(self._client(left) for _ in range(CONNECTIONS)))

    async def _client(self, left: Iterator[Strange]) -> None:
        connection = None
        for request in left:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    connection = connection or await asyncio.open_connection("127.0.0.1", self._port)
                    stays = await self._ask(*connection, request)
            except TimeoutError:
                self.storm.hung += 1
                self.storm.note("hung", request)
                stays = False
            except (OSError, asyncio.IncompleteReadError) as error:
                self.storm.closed += 1
                self.storm.note(f"closed ({error!r})", request)
                stays = False
            if not stays and connection:
                connection[1].close()
                connection = None
        if connection:
            connection[1].close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Strange) -> bool:
        """Tell whether the connection may be used again."""
        writer.write(request.wire())
        status = 100
        while status < 200:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head.split(maxsplit=2)[1])
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        if request.method == "HEAD" or status in (204, 304):
            body = b""
        else:
            body = await reader.readexactly(int(length[1])) if length else await reader.read()
        self._note(request, status, head, body)
        return bool(length) and b"\r\nconnection: close" not in head

    def _note(self, request: Strange, status: int, head: bytes, body: bytes) -> None:
        storm = self.storm
        route = next((name for name, form in self._routes if form.fullmatch(request.path)), "other")
        storm.statuses[route, status] += 1
        if status >= 500 and status != 503:
            storm.note(str(status), request)
        # What is no HTTP is refused by uvicorn, in text, before it reaches the application.
        of_app = b"\r\ntraceparent:" in head
        if request.method != "HEAD" and status >= 400 and not (_is_refusal(body) if of_app else status == 400):
            storm.misshapen += 1
            storm.note(f"misshapen, {body[:100]!r}", request)
        if storm.answered % self._every == 0:
            storm.memory.append((storm.answered, self._memory()))


def _is_refusal(body: bytes) -> bool:
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return list(found) in (["detail"], ["error"])


def growth(memory: Sequence[tuple[int, float]]) -> float | None:
    """Return MB by which memory grows in 10,000 requests: the slope of a line through what follows the warm-up.

    None if the line would be shorter than the warm-up.
    """
    done, used = np.array(memory).T
    if done[-1] < 2 * WARM_UP:
        return None
    settled = done > WARM_UP
    return round(float(1e4 * np.polyfit(done[settled], used[settled], 1)[0]), 3)


def storm(port: int, process: psutil.Process, model: str, count: int) -> dict[str, Any]:
    """Send that many requests."""
    description = httpx.get(f"http://127.0.0.1:{port}/openapi.json").json()
    memory = lambda: process.memory_info().rss / 2**20  # noqa: E731
    sender = Sender(port, [*description["paths"], "/openapi.json", "/"], memory, max(1, count // 200))
    before, began = memory(), time.monotonic()
    for lot in all_requests(description, model, count):
        asyncio.run(sender.send(lot))
        found = sender.storm
        say(
            f"  {found.answered:,} of {count:,} answered in {time.monotonic() - began:.0f} s: {found.faults} faults, "
            f"{found.hung} hung, {found.closed} closed, {found.misshapen} misshapen, {memory():.0f} MB"
        )
    statuses: dict[str, dict[str, int]] = {}
    for (route, status), times in sorted(sender.storm.statuses.items()):
        statuses.setdefault(route, {})[str(status)] = times
    return {
        "requests": sender.storm.answered,
        "seconds": round(time.monotonic() - began, 1),
        "faults": sender.storm.faults,
        "hung": sender.storm.hung,
        "closed": sender.storm.closed,
        "misshapen": sender.storm.misshapen,
        "memory_mb": {"0": round(before, 1)} | {str(done): round(used, 1) for done, used in sender.storm.memory[9::10]},
        "growth_mb_per_10_000": growth(sender.storm.memory),
        "statuses": statuses,
        "examples": sender.storm.examples,
    }


# --- slow clients, strangers, kill -9 ----------------------------------------------------------------------


async def _trickle(port: int, until: float, refused: Counter[int]) -> None:
    """Send a byte of a body every half second, over and over, and count what it is refused with."""
    head = f"POST /v1/score HTTP/1.1\r\nHost: any\r\nContent-Type: {JSON}\r\nContent-Length: 100000\r\n\r\n".encode()
    while time.monotonic() < until:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            status = b""
            while not status and not reader.at_eof() and time.monotonic() < until:
                writer.write(b" ")
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        status = await reader.readline()
            if status:
                refused[int(status.split()[1])] += 1
            writer.close()


def slow_clients(port: int, seconds: float) -> dict[str, Any]:
    """Let slow clients hold connections while good requests come."""
    refused: Counter[int] = Counter()

    async def all_of_them() -> None:
        until = time.monotonic() + seconds + 2
        await asyncio.gather(*(_trickle(port, until, refused) for _ in range(SLOW_CLIENTS)))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()), daemon=True)
    thread.start()
    time.sleep(1)
    trial = offer(port, [as_request("/v1/score", JSON, json.dumps(GOOD).encode())], poisson(RATE, seconds))
    thread.join()
    return {
        "slow_clients": SLOW_CLIENTS,
        "slow_clients_refused": {str(status): times for status, times in sorted(refused.items())},
        "requests_beside_slow_clients": len(trial.ms),
        "failed_beside_slow_clients": trial.failed,
        "p99_ms_beside_slow_clients": round(trial.quantile(0.99), 2),
    }


def _unknown_users(port: int) -> float:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return float(re.search(r'encode_fallbacks_total\{kind="unknown_user"\} (\S+)', text)[1])  # type: ignore[index]


def strangers(port: int, count: int) -> dict[str, Any]:
    """Ask for users whom nobody knows: each must be answered, and counted."""
    users = [
        Strange("POST", "/v1/score", (("Content-Type", JSON.encode()),), json.dumps(GOOD | {"user_id": user}).encode())
        for user in range(10**15, 10**15 + count)
    ]
    before, sender = _unknown_users(port), Sender(port, ["/v1/score"], lambda: 0.0)
    asyncio.run(sender.send(users))
    answered = sender.storm.statuses["/v1/score", 200]
    return {
        "strangers": count,
        "strangers_not_answered": count - answered,
        "strangers_not_counted": answered - int(_unknown_users(port) - before),
    }


def ask(port: int) -> list[float]:
    """Return probabilities."""
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/score", json=GOOD).raise_for_status().json()
    return [float(one) for one in answer["probabilities"]]


# --- results -----------------------------------------------------------------------------------------------


def make_release(folder: Path) -> None:
    """Run the tiny preset.

    Raises:
        SystemExit: it fails.
    """
    command = [sys.executable, "-m", "encode.cli", "run", "--preset", "tiny", "--workdir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"encode run: status {done.returncode}: {done.stderr[-2_000:]}")


def serving_process() -> psutil.Process:
    """Return the server that this process started."""
    (found,) = (one for one in psutil.Process().children() if "serve" in one.cmdline())
    return found


def measure(folder: Path, count: int, seconds: float, num_strangers: int) -> dict[str, Any]:
    """Everything."""
    say("making a release")
    make_release(folder)
    with encode_serve(folder) as port:
        say(f"{count:,} requests that are bad or strange")
        found = storm(port, serving_process(), load_config("tiny").registry.model_name, count)
        say(f"{SLOW_CLIENTS} slow clients, for {seconds:g} s")
        found |= slow_clients(port, seconds)
        say(f"{num_strangers:,} unknown users")
        found |= strangers(port, num_strangers)
        before = ask(port)
        serving_process().kill()
    say("killed; starting again")
    began = time.monotonic()
    with encode_serve(folder) as port:
        found["ready_again_s"] = round(time.monotonic() - began, 1)
        found["changed_by_kill"] = sum(one != other for one, other in zip(before, ask(port), strict=True))
    return found


def broken(found: dict[str, Any]) -> list[str]:
    """Return the names of what does not hold; what could not be told is None and breaks nothing."""
    return [name for name, most in MOST.items() if found[name] is not None and not found[name] <= most]


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    for route, statuses in found["statuses"].items():
        print(f"{route:<34}" + "  ".join(f"{status}: {times:,}" for status, times in statuses.items()))
    print()
    print(f"{'memory_mb':<34}" + " ".join(f"{used:g}" for used in list(found["memory_mb"].values())[::4]))
    for name in SHOWN:
        print(f"{name:<34}{found[name]}")
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items()) + "\n")
    for name, target in TARGETS.items():
        print(f"{name:<34}{'-' if found[name] is None else found[name]:<10}   target: {target}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print tables or, as the last line, one JSON object; return the status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, metavar="N", help="default: 100,000, or 2,000 with --quick")
    parser.add_argument("--quick", action="store_true", help="few of everything, for a first look: two minutes")
    options = parser.parse_args(arguments)
    count = options.requests or (2_000 if options.quick else 100_000)
    if count < 1_000:
        raise SystemExit(f"--requests {count}: expected 1,000 or more; memory is told from {2 * WARM_UP:,} on")
    with tempfile.TemporaryDirectory(prefix="encode-bench-") as folder:
        found = measure(Path(folder), count, 3 if options.quick else 15, 500 if options.quick else 10_000)
    found["environment"] = {"machine": f"{processor()}, {num_cores()} cores"}
    found["broken"] = broken(found)
    for example in found["examples"]:
        say(example)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    return int(bool(found["broken"]))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # so that servers are stopped on the way out
        signal.signal(number, lambda found, _frame: sys.exit(128 + found))
    sys.exit(main())
