"""Releases while requests are answered: none may fail, and none may mix two bundles.

    python -m benchmarks.swaps [--json] [--swaps N]

Three models with spaces and snapshots of their own (K = 8, 16, 32) become champion in turn, so that every swap fetches
files, verifies them, and passes the mirror test and the trial: the bundle before the last is gone by then. Clients ask
the real `encode serve` without a pause. Every answer is held against what the bundle that it names said when nothing
else went on. The status is 1 if an answer is missing or is another one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.release import Releases, make_served
from benchmarks.serve_http import encode_serve, follow
from benchmarks.train import num_cores, processor, say

SWAPS, CLIENTS, CANDIDATES, LENGTH = 200, 2, 100, 1_000
CLUSTERS = (8, 16, 32)
TARGETS = ("failed", "mixed")


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """Return an answer.

    Raises:
        HTTPError: there is none, or it is a refusal.
    """
    return dict(client.post("/v1/score", json=body).raise_for_status().json())


class Clients:
    """Threads that ask without a pause until they are told to end."""

    def __init__(self, port: int, body: dict[str, Any], expected: Mapping[str, Any]) -> None:
        self.milliseconds: list[float] = []
        self.failed = self.mixed = 0
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._url, self._body, self._expected = f"http://127.0.0.1:{port}", body, expected
        self._asking = [self._pool.submit(self._ask) for _ in range(CLIENTS)]

    def end(self) -> None:
        """Wait for the last answers."""
        self._done.set()
        for one in self._asking:
            one.result()
        self._pool.shutdown()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._done.is_set():
                began = time.perf_counter()
                try:
                    answer = ask(client, self._body)
                except httpx.HTTPError:
                    self.failed += 1
                    continue
                self.milliseconds.append(1e3 * (time.perf_counter() - began))
                self.mixed += answer != self._expected.get(answer["bundle"]["id"])


def measure(folder: Path, swaps: int) -> dict[str, Any]:
    """Swap and count."""
    say("three releases")
    several = [make_served(folder, (LENGTH,), num_clusters) for num_clusters in CLUSTERS]
    items = several[0].space.vocabulary.items_at(several[0].candidates(LENGTH, 0, CANDIDATES))
    body = {"user_id": several[0].user_id(LENGTH, 0), "item_ids": items.tolist()}
    releases, expected, took = Releases(folder), {}, []
    releases.release(several[0])
    with encode_serve(folder) as port:
        for served in several:
            follow(port, releases.release(served))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                answer = ask(client, body)
            expected[answer["bundle"]["id"]] = answer
        clients = Clients(port, body, expected)
        try:
            for number in range(swaps):
                began = time.monotonic()
                follow(port, releases.release(several[number % len(several)]))
                took.append(time.monotonic() - began)
                if (number + 1) % max(1, swaps // 5) == 0:
                    say(f"  {number + 1} of {swaps} swaps, {len(clients.milliseconds):,} answers")
        finally:
            clients.end()
    return {
        "swaps": swaps,
        "bundles": len(expected),
        "answers": len(clients.milliseconds),
        "failed": clients.failed,
        "mixed": clients.mixed,
        "seconds_per_swap": round(float(np.median(took)), 3),
        "p50_ms": round(float(np.quantile(clients.milliseconds, 0.5)), 2),
        "p99_ms": round(float(np.quantile(clients.milliseconds, 0.99)), 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print the figures or, as the last line, one JSON object; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--swaps", type=int, default=SWAPS, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.swaps < 1:
        parser.error(f"--swaps {options.swaps}: expected at least 1")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="encode-bench-") as folder:
        found = measure(Path(folder), options.swaps)
    found["environment"] = {"machine": f"{processor()}, {num_cores()} cores", "load_before": round(load, 2)}
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<20}{value}" + ("   target: 0" if name in TARGETS else ""))
    return int(any(found[name] for name in TARGETS))


if __name__ == "__main__":
    raise SystemExit(main())
