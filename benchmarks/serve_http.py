"""Time of a scoring request over HTTP: the real `encode serve` under open-loop load, and its rivals under the same.

All servers are processes on this machine, one at work at a time, and the load (benchmarks/load.py) comes from another
process on the same cores. Bodies are Arrow unless it says JSON. The rivals are `mlflow models serve` on the same
registered model, and the same server with models that read whole histories (benchmarks/whole_history.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from benchmarks.load import Trial, as_request, ask_in_turn, highest_rate, offer, poisson
from benchmarks.release import USERS, Releases, Served
from benchmarks.train import say
from benchmarks.whole_history import MODELS
from encode.config import Places
from encode.serving.arrow import CONTENT_TYPE
from encode.stack.ports import free_port

RATE = 50
"""Requests a second of the headline."""
LIMIT_MS = 30.0
"""Of the 99th percentile, for a rate to count as sustained."""
LOOSE_LIMIT_MS = 100.0
"""The same where a slower server is to get a chance."""
RATES = (10, 25, 50, 100, 150, 200)
DRAWS = 4
"""Requests with candidates of their own, of each user."""
Measured = dict[str, float]
"""Figures by name."""
_START_SECONDS = 120
_STOP_SECONDS = 15


@dataclass(frozen=True)
class HttpPace:
    """Seconds that things are timed for."""

    headline: float = 12
    rate: float = 3
    """For each of RATES."""
    trial: float = 1.5
    """For each rate that is tried in the search for the highest, but until `requests` at least."""
    requests: int = 300
    """A count, so that the 99th percentile of few is not their maximum."""
    steps: int = 3
    """Of the bisection in that search, a count."""
    one_client: float = 1
    """For each point of a curve, and for each server that is held against another; beside a fifth to warm up."""
    clients: float = 3
    """For four clients at once."""


HTTP_QUICK = HttpPace(headline=2, rate=0.3, trial=0.3, requests=10, steps=1, one_client=0.2, clients=0.5)


# --- requests ----------------------------------------------------------------------------------------------


def in_arrow(user_id: int, item_ids: np.ndarray) -> bytes:
    """Return a request of `/v1/score` in Arrow."""
    schema = pa.schema([("item_id", pa.int64())], {"user_id": str(user_id)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(item_ids)], schema=schema))
    return as_request("/v1/score", CONTENT_TYPE, sink.getvalue().to_pybytes())


def in_json(user_id: int, item_ids: np.ndarray) -> bytes:
    """Return a request of `/v1/score` in JSON."""
    body = {"user_id": user_id, "item_ids": item_ids.tolist()}
    return as_request("/v1/score", "application/json", json.dumps(body).encode())


def in_mlflow(user_id: int, item_ids: np.ndarray) -> bytes:
    """Return a request of MLflow's `/invocations`, in the form that it reads fastest."""
    data = [[user_id, item] for item in item_ids.tolist()]
    body = {"dataframe_split": {"columns": ["user_id", "item_id"], "data": data}}
    return as_request("/invocations", "application/json", json.dumps(body).encode())


def requests_of(
    served: Served, length: int, count: int, write: Callable[[int, np.ndarray], bytes] = in_arrow
) -> list[bytes]:
    """Return requests of all users with histories of a length, who take turns."""
    return [
        write(
            served.user_id(length, place),
            served.space.vocabulary.items_at(served.candidates(length, place, count, draw)),
        )
        for draw in range(DRAWS)
        for place in range(USERS)
    ]


# --- servers -----------------------------------------------------------------------------------------------


@contextmanager
def running(command: Sequence[str], port: int, ready: str, folder: Path, **environment: str) -> Iterator[None]:
    """Run a server in a process group of its own until it is left; nothing of the group outlives this.

    Args:
        command: after the interpreter.
        port: that it listens on.
        ready: path that answers 200 when it is ready.
        folder: for its log.
        environment: beside this process's, but for what says where encode and its clients run.

    Raises:
        SystemExit: it ends, or is not ready in time; the end of its log is in the message.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "ENCODE_", "MLFLOW_"))}
    # `mlflow models serve` looks for uvicorn on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])
    with tempfile.TemporaryFile(dir=folder) as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=own | {"PATH": path} | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            if not _becomes_ready(process, f"http://127.0.0.1:{port}{ready}"):
                log.seek(0)
                end = log.read().decode(errors="replace")[-2_000:]
                raise SystemExit(f"{' '.join(command[:4])}: not ready, status {process.poll()}: {end}")
            yield
        finally:
            _end(process)


def _becomes_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_STOP_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


@contextmanager
def encode_serve(folder: Path) -> Iterator[int]:
    """Run `encode serve` on the release of a folder; give its port."""
    port = free_port(())
    command = ["-m", "encode.cli", "serve", "--preset", "tiny", "--workdir", str(folder), "--port", str(port)]
    command += ["--cache", str(folder / "serving"), "--drain-delay", "0", "--poll", "3600"]
    with running(command, port, "/ready", folder):
        yield port


@contextmanager
def mlflow_serve(folder: Path, model: str) -> Iterator[int]:
    """Run `mlflow models serve` on a folder's champion, in this environment; give its port."""
    port = free_port(())
    command = ["-m", "mlflow", "models", "serve", "-m", f"models:/{model}@champion", "--env-manager", "local"]
    uri = str(Places.in_folder(folder).tracking_uri)
    with running([*command, "--port", str(port)], port, "/ping", folder, MLFLOW_TRACKING_URI=uri):
        yield port


@contextmanager
def whole_history_serve(folder: Path, model: str, histories: Path) -> Iterator[int]:
    """Run the server with another model of long-term interest; give its port."""
    port = free_port(())
    command = ["-m", "benchmarks.whole_history", model, "--workdir", str(folder), "--port", str(port)]
    command += ["--histories", str(histories), "--cache", str(folder / f"serving-{model}")]
    with running(command, port, "/ready", folder):
        yield port


def follow(port: int, version: str) -> None:
    """Let a server look at the registry, and wait until it serves a model version.

    Raises:
        SystemExit: it does not.
    """
    url = f"http://127.0.0.1:{port}/v1/release"
    httpx.post(f"{url}/reload").raise_for_status()
    until = time.monotonic() + _START_SECONDS
    while (found := httpx.get(url).json())["bundle"]["model_version"] != version:
        if time.monotonic() > until:
            raise SystemExit(f"encode serve: expected model version {version}, found {found}")
        time.sleep(0.1)


# --- measurements ------------------------------------------------------------------------------------------


def in_turn_ms(port: int, requests: Sequence[bytes], pace: HttpPace) -> float:
    """Return the median of requests that wait for nobody."""
    _all_answered(ask_in_turn(port, requests, pace.one_client / 5))
    return round(_all_answered(ask_in_turn(port, requests, pace.one_client)).quantile(0.5), 3)


def at_rate(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> dict[str, float | None]:
    """Return quantiles of the latency at an open-loop rate, None if so many got no answer, and the generator's own."""
    trial = offer(port, requests, poisson(rate, seconds))
    p50, p99 = (round(ms, 2) if (ms := trial.quantile(share)) < np.inf else None for share in (0.5, 0.99))
    return {"p50_ms": p50, "p99_ms": p99, "late_p99_ms": round(float(np.quantile(trial.late_ms, 0.99)), 2)}


def max_rate(port: int, requests: Sequence[bytes], ms: float, pace: HttpPace, limit_ms: float) -> float:
    """Return the highest open-loop rate whose 99th percentile is under a limit.

    Args:
        port: of the server.
        requests: for it.
        ms: the median of requests that wait for nobody; where that is over the limit already, no rate is tried.
        pace: how long it takes.
        limit_ms: of the 99th percentile.
    """

    def sustained(rate: float) -> bool:
        # In one trial of two: a moment in which the machine did something else is not the server's.
        return any(
            offer(port, requests, poisson(rate, pace.trial, pace.requests), give_up_ms=limit_ms).quantile(0.99)
            < limit_ms
            for _ in range(2)
        )

    return round(highest_rate(sustained, 500 / ms, pace.steps), 1) if ms < limit_ms else 0


def _all_answered(trial: Trial) -> Trial:
    if trial.failed:
        raise SystemExit(f"{trial.failed} of {len(trial.ms)} requests were not answered with 200")
    return trial


def measure(port: int, requests: Sequence[bytes], pace: HttpPace, title: str, *, loose: bool = False) -> Measured:
    """Return what is measured of every server: one client, four clients at once, and the highest open-loop rates."""
    ms = in_turn_ms(port, requests, pace)
    together = _all_answered(ask_in_turn(port, requests, pace.clients, clients=4))
    found = {
        "ms": ms,
        "per_s": round(len(together.ms) / together.seconds, 1),
        "max_rate": max_rate(port, requests, ms, pace, LIMIT_MS),
    }
    if loose:
        found["loose_rate"] = max_rate(port, requests, ms, pace, LOOSE_LIMIT_MS)
    say(f"{title}: " + ", ".join(f"{name} {value:g}" for name, value in found.items()))
    return found


# --- results -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """What is asked for."""

    length: int
    """Of the histories, for all figures but those by length."""
    full_length: int
    """Of the histories that models read whole."""
    lengths: Sequence[int]
    candidates: int
    counts: Sequence[int]
    """Candidates of the curve over them."""


def measure_http(
    folder: Path, by_clusters: Mapping[int, Served], num_clusters: int, points: Points, pace: HttpPace
) -> dict[str, Any]:
    """Return latency and highest rates over HTTP, of ours and of the rivals.

    Args:
        folder: in which all that is served was made.
        by_clusters: what is served, by K.
        num_clusters: K of all figures but the curve over K.
        points: what is asked for.
        pace: how long it takes.
    """
    served = by_clusters[num_clusters]
    arrow, jsons, for_mlflow = (
        requests_of(served, points.length, points.candidates, write) for write in (in_arrow, in_json, in_mlflow)
    )
    whole = requests_of(served, points.full_length, points.candidates)
    say("registering")
    releases = Releases(folder)
    releases.release(served)
    with encode_serve(folder) as port:
        found = at_rates(port, arrow, jsons, pace)
        say("  curves")
        found |= curves(port, served, points, pace)
        found["http_ms_by_clusters"] = curve_over_clusters(port, releases, by_clusters, points, pace)
        follow(port, releases.release(served))
        servers = {
            "encode": measure(port, arrow, pace, "encode serve", loose=True),
            "encode_json": measure(port, jsons, pace, "encode serve, JSON"),
        }
        wholes = {"encode": measure(port, whole, pace, f"encode serve, {points.full_length:,} behaviors")}
    with mlflow_serve(folder, releases.config.registry.model_name) as port:
        servers["mlflow"] = measure(port, for_mlflow, pace, "mlflow models serve", loose=True)
    wholes |= whole_histories(folder, served, points.full_length, whole, pace)
    return found | {
        "max_rate": servers["encode"]["max_rate"],
        "vs_mlflow_serve": _ratio("loose_rate", servers["encode"], servers["mlflow"]),
        "vs_mlflow_serve_per_s": _ratio("per_s", servers["encode"], servers["mlflow"]),
        "vs_full_attention_http": _ratio("ms", wholes["full_attention"], wholes["encode"]),
        "servers": servers,
        "whole_histories": wholes,
    }


def at_rates(port: int, arrow: Sequence[bytes], jsons: Sequence[bytes], pace: HttpPace) -> dict[str, Any]:
    """Return latencies at fixed open-loop rates, in Arrow but for those that say JSON."""
    for one in (arrow, jsons):
        in_turn_ms(port, one, pace)
    say(f"encode serve: {RATE} requests/s, Arrow, then JSON")
    headline, other = (at_rate(port, one, RATE, pace.headline) for one in (arrow, jsons))
    by_rate = {}
    for rate in RATES:
        by_rate[str(rate)] = found = at_rate(port, arrow, rate, pace.rate)
        say(f"  {rate} requests/s: p50 {found['p50_ms']} ms, p99 {found['p99_ms']} ms")
    return headline | {"p50_ms_json": other["p50_ms"], "p99_ms_json": other["p99_ms"], "by_rate": by_rate}


def curves(port: int, served: Served, points: Points, pace: HttpPace) -> dict[str, Measured]:
    """Return the median of requests that wait for nobody, by candidates and by length of the history."""
    return {
        "http_ms_by_candidates": {
            str(one): in_turn_ms(port, requests_of(served, points.length, one), pace) for one in points.counts
        },
        "http_ms_by_length": {
            str(one): in_turn_ms(port, requests_of(served, one, points.candidates), pace) for one in points.lengths
        },
    }


def curve_over_clusters(
    port: int, releases: Releases, by_clusters: Mapping[int, Served], points: Points, pace: HttpPace
) -> Measured:
    """Return the same by K: each in turn is released, and the server follows."""
    found = {}
    for one, served in by_clusters.items():
        follow(port, releases.release(served))
        found[str(one)] = in_turn_ms(port, requests_of(served, points.length, points.candidates), pace)
    return found


def whole_histories(
    folder: Path, served: Served, length: int, requests: Sequence[bytes], pace: HttpPace
) -> dict[str, Measured]:
    """Return what is measured of the models that read whole histories of a length."""
    histories = write_histories(folder / "histories", served, length)
    found = {}
    for name in MODELS:
        with whole_history_serve(folder, name, histories) as port:
            found[name] = measure(port, requests, pace, f"{name}, {length:,} behaviors")
    return found


def write_histories(folder: Path, served: Served, length: int) -> Path:
    """Write the histories of a length, a file a user, and return the folder."""
    folder.mkdir()
    for place, items in enumerate(served.histories[length]):
        np.save(folder / f"{served.user_id(length, place)}.npy", served.space.vocabulary.index(items))
    return folder


def _ratio(name: str, one: Measured, other: Measured) -> float | None:
    return round(one[name] / other[name], 2) if other[name] else None
