"""Time of a scoring request: inside the serving process, on one thread, and over HTTP (benchmarks/serve_http.py).

    python -m benchmarks.serve [--json] [--candidates N] [--quick]

Histories of 100 to 100,000 behaviors are drawn, clustered and pooled by the real `extract`, published as a snapshot and
mapped from disk (benchmarks/release.py). Timed in the process is what happens between a user's id and probabilities:
the row is found and read (`find`, `state_of`), the user prepared, the candidates scored (encode/serving/engine.py).
Users take turns, and each has candidates of its own, of which a part is what the user had before.

Held against it: the training code's `read_user` with the same users, full target attention over a history of 10,000
behaviors through the same MLP (keys and embeddings of the history at hand, which flatters it), and the floor: what
multiplying matrices of the size of its largest layer says that the FLOPs of a request take at least.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.release import MODEL, USERS, Served, make_served
from benchmarks.serve_http import HTTP_QUICK, HttpPace, Points, measure_http
from benchmarks.train import num_cores, processor, say
from encode.interests.extract import state_of
from encode.model.ctr import Encode, Reader, Recent, User
from encode.model.files import UserState, read_user
from encode.model.long_term import Sizes, Target
from encode.quality.rivals.attention import FullAttention, Whole
from encode.serving.engine import Engine, one_thread
from encode.serving.messages import MAX_CANDIDATES

CANDIDATES, LENGTH, FULL_LENGTH, MODEL_CLUSTERS = 1_000, 1_000, 10_000, 32
COUNTS, CLUSTERS, LENGTHS = (100, 300, 1_000, 3_000, 5_000), (8, 16, 32, 64), (100, 1_000, 10_000, 100_000)
SHOWN = (
    "vs_floor",
    "vs_training_code",
    "vs_full_attention_http",
    "vs_mlflow_serve_per_s",
    "p50_ms",
    "p50_ms_json",
    "p99_ms_json",
    "max_rate",
)
TARGETS = {
    "model_p99_ms": ("at most", 3),
    "flatness": ("at most", 1.1),
    "vs_full_attention": ("at least", 20),
    "p99_ms": ("at most", 10),
    "vs_mlflow_serve": ("at least", 10),
}


@dataclass(frozen=True)
class Pace:
    """How often it is timed."""

    requests: int = 1_000
    """For the headline figures."""
    curve: int = 200
    """For each point of a curve; the points take turns."""
    warm_up: int = 20
    http: HttpPace = field(default_factory=HttpPace)


QUICK = Pace(requests=100, curve=20, warm_up=5, http=HTTP_QUICK)


# --- what is timed -----------------------------------------------------------------------------------------

Request = Callable[[int], Any]
"""Answers the request with this number."""


def model_time(served: Served, length: int, count: int) -> Request:
    """Return what answers from a user's id and the vocabulary indices of candidates."""
    engine = Engine(served.space, served.reader)
    return _from_row(served, length, count, engine.score)


def by_training_code(served: Served, length: int, count: int) -> Request:
    """Return the same by `read_user`."""
    reader, items = served.reader, served.space.items

    def score(user: UserState, target: np.ndarray) -> np.ndarray:
        return read_user(reader, items, user, torch.from_numpy(target)).sigmoid().numpy()

    return _from_row(served, length, count, score)


def _from_row(served: Served, length: int, count: int, score: Callable[[UserState, np.ndarray], np.ndarray]) -> Request:
    targets = [served.candidates(length, place, count) for place in range(USERS)]
    users = [served.user_id(length, place) for place in range(USERS)]

    def request(number: int) -> np.ndarray:
        place = number % USERS
        return score(state_of(served.snapshot.find(users[place]), served.space), targets[place])

    return request


def by_full_attention(served: Served, length: int, count: int) -> Request:
    """Return what reads the whole history: its keys and embeddings are at hand, free of charge."""
    items, vocabulary = served.space.items, served.space.vocabulary
    sizes = Sizes(len(vocabulary), vocabulary.num_categories, 1, MODEL.embedding_dim, MODEL.projected_dim)
    reader = Reader(MODEL, FullAttention(sizes)).eval()
    scale = torch.tensor(served.space.scale)
    users, recents, targets = [], [], []
    for place, history in enumerate(served.histories[length]):
        index = torch.from_numpy(vocabulary.index(history))[None]
        mask = torch.ones_like(index, dtype=torch.bool)
        whole = Whole(items.embedding[index], items.key[index], mask, index, scale)
        users.append(User(whole, whole.embedding.mean(1), torch.tensor([float(length)])))
        last = slice(-MODEL.recent_length, None)
        moment = torch.zeros(count, dtype=torch.int64)
        recents.append(Recent(whole.embedding[:, last], whole.key[:, last], mask[:, last], moment))
        targets.append(torch.from_numpy(served.candidates(length, place, count)))

    def request(number: int) -> torch.Tensor:
        place = number % USERS
        target = targets[place]
        gathered = Target(
            items.embedding[target][None], items.key[target][None], target[None], items.category[target][None]
        )
        with torch.inference_mode():
            logit: torch.Tensor = reader(users[place], recents[place], gathered)
            return logit.sigmoid()

    return request


def times_of(requests: Sequence[Request], repeats: int, warm_up: int) -> np.ndarray:
    """Return milliseconds of each repeat of each request, [requests, repeats]; requests take turns."""
    for request in requests:
        for number in range(warm_up):
            request(number)
    found = np.zeros((len(requests), repeats))
    for number in range(repeats):
        for place, request in enumerate(requests):
            began = time.perf_counter()
            request(number)
            found[place, number] = time.perf_counter() - began
    return found * 1e3


# --- the floor ---------------------------------------------------------------------------------------------


def floor(count: int, num_clusters: int, pace: Pace) -> dict[str, float]:
    """Return FLOPs and bytes of a request, and how long the FLOPs take at the speed of its largest product."""
    D, P, K, R = MODEL.embedding_dim, MODEL.projected_dim, num_clusters, MODEL.recent_length
    widths = [5 * D + Encode.num_scalars + 1, *MODEL.hidden_dims, 1]
    dense = sum(width * after for width, after in pairwise(widths))
    attention = 2 * P * K + K * (D + P) + P * D + P * R + R * D
    flops = 2 * count * (dense + attention)
    per_user = K * (2 * P + D + 1) + R * (P + D) + dense + P * D
    touched = 4 * (count * (D + P + 1) + per_user) + 12 * MODEL.num_remembered
    x, weight = torch.randn(count, widths[0]), torch.randn(widths[0], widths[1])
    ms = float(np.median(times_of([lambda _: x @ weight], pace.curve, pace.warm_up)))
    speed = 2 * count * widths[0] * widths[1] / ms / 1e6
    return {
        "mflop": round(flops / 1e6, 2),
        "bytes_touched": touched,
        "sgemm_gflop_per_s": round(speed, 1),
        "floor_ms": round(flops / speed / 1e6, 4),
    }


# --- results -----------------------------------------------------------------------------------------------


def measure_model(by_clusters: Mapping[int, Served], count: int, pace: Pace) -> dict[str, Any]:
    """Return the time that the model takes of a request, its curves, and what it is held against."""
    served = by_clusters[MODEL_CLUSTERS]
    say(f"inside the process: {pace.requests:,} requests of {count:,} candidates")
    (headline,) = times_of([model_time(served, LENGTH, count)], pace.requests, pace.warm_up)

    def curve(points: Sequence[int], requests: Sequence[Request]) -> dict[str, float]:
        found = np.median(times_of(requests, pace.curve, pace.warm_up), axis=1)
        return {str(point): round(float(ms), 3) for point, ms in zip(points, found, strict=True)}

    say("  curves")
    by_candidates = curve(COUNTS, [model_time(served, LENGTH, one) for one in COUNTS])
    by_length = curve(LENGTHS, [model_time(served, one, count) for one in LENGTHS])
    by_k = curve(list(by_clusters), [model_time(one, LENGTH, count) for one in by_clusters.values()])
    say(f"  full attention over {FULL_LENGTH:,} behaviors")
    ours, training, full = (
        make(served, FULL_LENGTH, count) for make in (model_time, by_training_code, by_full_attention)
    )
    few = max(3, pace.curve // 20)
    own_ms, training_ms = np.median(times_of([ours, training], pace.curve, pace.warm_up), axis=1)
    full_ms = float(np.median(times_of([full], few, 1)))
    least = floor(count, MODEL_CLUSTERS, pace)
    p50, p99 = np.quantile(headline, [0.5, 0.99])
    return {
        "model_p50_ms": round(float(p50), 3),
        "model_p99_ms": round(float(p99), 3),
        "candidates": count,
        "flatness": round(by_length[str(LENGTHS[-1])] / by_length[str(LENGTHS[0])], 3),
        "vs_full_attention": round(full_ms / float(own_ms), 2),
        "vs_training_code": round(float(training_ms / own_ms), 2),
        "vs_floor": round(float(p50) / least["floor_ms"], 2),
        "full_attention_ms": round(full_ms, 2),
        "training_code_ms": round(float(training_ms), 3),
        "ms_by_candidates": by_candidates,
        "ms_by_clusters": by_k,
        "ms_by_length": by_length,
        "floor": least,
    }


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    for name in ("candidates", "clusters", "length"):
        row, http = found[f"ms_by_{name}"], found[f"http_ms_by_{name}"]
        print(f"{name:<24}" + "".join(f"{int(point):>10,}" for point in row))
        print(f"{'ms in the process':<24}" + "".join(f"{ms:>10.3f}" for ms in row.values()))
        print(f"{'ms over HTTP, one client':<24}" + "".join(f"{ms:>10.3f}" for ms in http.values()) + "\n")
    print(f"{'requests/s':<24}" + "".join(f"{rate:>10}" for rate in found["by_rate"]))
    for name in ("p50_ms", "p99_ms", "late_p99_ms"):
        print(f"{name:<24}" + "".join(f"{_text(one[name]):>10}" for one in found["by_rate"].values()))
    print(f"\n{'':<28}{'ms':>12}{'per_s':>12}{'max_rate':>12}{'loose_rate':>12}")
    for title, servers in (("", found["servers"]), (f" over {FULL_LENGTH:,}", found["whole_histories"])):
        for name, one in servers.items():
            print(f"{name + title:<28}" + "".join(f"{value:>12.1f}" for value in one.values()))
    print()
    for name in SHOWN:
        print(f"{name:<24}{_text(found[name]):>10}")
    print(", ".join(f"{name} {value:g}" for name, value in found["floor"].items()))
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items()) + "\n")
    for name, (bound, target) in TARGETS.items():
        value = found[name]
        is_met = value is not None and (value <= target if bound == "at most" else value >= target)
        print(f"{name:<24}{_text(value):>10}   target: {bound} {target:g}{'' if is_met else ', MISSED'}")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def measure(folder: Path, count: int, pace: Pace) -> dict[str, Any]:
    """Everything."""
    say("users with histories of " + ", ".join(f"{length:,}" for length in LENGTHS))
    by_clusters = {one: make_served(folder, LENGTHS if one == MODEL_CLUSTERS else [LENGTH], one) for one in CLUSTERS}
    points = Points(LENGTH, FULL_LENGTH, LENGTHS, count, COUNTS)
    with one_thread():
        found = measure_model(by_clusters, count, pace)
    return found | measure_http(folder, by_clusters, MODEL_CLUSTERS, points, pace.http)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print a table or, as the last line, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, metavar="N", help=f"default: {CANDIDATES:,}")
    parser.add_argument("--quick", action="store_true", help="few requests, for a first look: a minute")
    options = parser.parse_args(arguments)
    if not 1 <= options.candidates <= MAX_CANDIDATES:
        raise SystemExit(f"--candidates {options.candidates}: expected 1 to {MAX_CANDIDATES}, the most in a request")
    if (load := os.getloadavg()[0]) > 0.5:
        say(f"the machine is busy (load {load:.1f}): the figures will be too high, the 99th percentile most of all")
    with tempfile.TemporaryDirectory(prefix="encode-bench-") as folder:
        found = measure(Path(folder), options.candidates, QUICK if options.quick else Pace())
    found["environment"] = {
        "torch": torch.__version__,
        "threads": 1,
        "machine": f"{processor()}, {num_cores()} cores",
        "load_before": round(load, 2),
    }
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # so that servers are stopped on the way out
        signal.signal(number, lambda found, _frame: sys.exit(128 + found))
    main()
