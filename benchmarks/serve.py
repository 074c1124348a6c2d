"""Time of a scoring request inside the serving process, on one thread: from a user's stored row to probabilities.

    python -m benchmarks.serve [--json] [--candidates N] [--quick]

Histories of 100 to 100,000 behaviors are drawn, clustered and pooled by the real `extract`, written as a snapshot and
mapped from disk. Timed is what happens between a user's id and probabilities: the row is found and read (`find`,
`state_of`), the user prepared, the candidates scored (encode/serving/engine.py). Users take turns, and each has
candidates of its own, of which a part is what the user had before.

Held against it: the training code's `read_user` with the same users, full target attention over a history of 10,000
behaviors through the same MLP (keys and embeddings of the history at hand, which flatters it), and the floor: what
multiplying matrices of the size of its largest layer says that the FLOPs of a request take at least.
Model and space are of the default size, with weights that nobody trained, which changes no time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.behaviors import Log, make_log, make_space
from benchmarks.train import num_cores, processor, say
from encode.config import ModelConfig
from encode.data.histories import to_batch
from encode.interests.extract import extract, schema_of, state_of
from encode.interests.snapshots import snapshot_bytes, snapshot_file
from encode.model.ctr import Encode, Reader, Recent, User
from encode.model.files import UserState, read_user
from encode.model.long_term import Sizes, Target
from encode.model.space import Space
from encode.outputs import write_output
from encode.quality.rivals.attention import FullAttention, Whole
from encode.serving.engine import Engine
from encode.serving.local_snapshot import LocalSnapshot, fetch_snapshot
from encode.storage import FolderStorage

MODEL = ModelConfig()
CANDIDATES, LENGTH, FULL_LENGTH, MODEL_CLUSTERS = 1_000, 1_000, 10_000, 32
COUNTS, CLUSTERS, LENGTHS = (100, 300, 1_000, 3_000, 5_000), (8, 16, 32, 64), (100, 1_000, 10_000, 100_000)
USERS = 8
"""Of each length."""
SHARE_HAD = 0.1
"""Of the candidates, drawn from the user's own history."""
TARGETS = {"model_p99_ms": "at most 3", "flatness": "at most 1.1"}


@dataclass(frozen=True)
class Pace:
    """How often it is timed."""

    requests: int = 1_000
    """For the headline figures."""
    curve: int = 200
    """For each point of a curve; the points take turns."""
    warm_up: int = 20


QUICK = Pace(requests=100, curve=20, warm_up=5)


# --- data --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A space, a model of it, and a mapped snapshot of users with histories of several lengths."""

    space: Space
    reader: Reader
    snapshot: LocalSnapshot
    histories: dict[int, list[np.ndarray]]
    """Item ids of USERS users by length of the history; user ids count up, length after length."""

    def user_id(self, length: int, place: int) -> int:
        """Return the id of a user with a history of this length; ids start at 1."""
        return 1 + USERS * list(self.histories).index(length) + place

    def candidates(self, length: int, place: int, count: int) -> np.ndarray:
        """Draw the vocabulary indices of candidates, some of them from the user's history."""
        random = np.random.default_rng([length, place, count])
        index = random.integers(self.space.vocabulary.num_categories, len(self.space.vocabulary), count)
        had = random.choice(self.histories[length][place], round(SHARE_HAD * count))
        index[: len(had)] = self.space.vocabulary.index(had)
        return random.permutation(index)


def draw_histories(log: Log, lengths: Sequence[int]) -> dict[int, list[np.ndarray]]:
    """Draw histories from ten categories each, popular items of them more often."""
    random = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        own = log.items[random.integers(0, len(log.items), 10)]
        rank = np.exp(random.random(length) * np.log(own.shape[1])).astype(np.int64) - 1
        drawn: np.ndarray = own[random.integers(0, len(own), length), rank]
        return drawn

    return {length: [draw(length) for _ in range(USERS)] for length in lengths}


def make_served(folder: Path, lengths: Sequence[int], num_clusters: int) -> Served:
    """Extract, write and map the interests of users with these lengths."""
    log = make_log(2_000)
    space = make_space(log)
    clustering = space.config.clustering.model_copy(update={"num_clusters": num_clusters})
    space = replace(space, config=replace(space.config, clustering=clustering))
    torch.manual_seed(0)
    reader = Reader(MODEL, Encode(MODEL)).eval()
    reader.long_term.decoder = 0.1 * torch.randn(MODEL.projected_dim, MODEL.embedding_dim)
    histories = draw_histories(log, lengths)
    items = [one for group in histories.values() for one in group]
    offsets = np.append(0, np.cumsum([len(one) for one in items]))
    joined = np.concatenate(items)
    batch = to_batch(np.arange(len(items)) + 1, offsets, [joined, log.category_of[joined], np.arange(len(joined))])
    storage, prefix = FolderStorage(folder / "store"), f"interests/{num_clusters}/{len(items)}"
    manifest = write_output(
        storage,
        prefix,
        {snapshot_file(0): snapshot_bytes(schema_of(space), [extract(batch, space)])},
        kind="interests",
        fingerprint="benchmark",
        config={"num_buckets": 1},
        inputs={},
        counts={"users": len(items)},
    )
    return Served(space, reader, fetch_snapshot(storage, prefix, manifest, folder / "cache"), histories)


# --- what is timed -----------------------------------------------------------------------------------------

Request = Callable[[int], Any]
"""Answers the request with this number."""


def model_time(served: Served, length: int, count: int) -> Request:
    """Return what answers from a user's id and the vocabulary indices of candidates."""
    engine = Engine(served.space, served.reader)
    return _from_row(served, length, count, engine.score_user)


def by_training_code(served: Served, length: int, count: int) -> Request:
    """Return the same by `read_user`."""
    reader, items = served.reader, served.space.items
    return _from_row(served, length, count, lambda user, target: read_user(reader, items, user, target).sigmoid())


def _from_row(
    served: Served, length: int, count: int, score: Callable[[UserState, torch.Tensor], torch.Tensor]
) -> Request:
    targets = [torch.from_numpy(served.candidates(length, place, count)) for place in range(USERS)]
    users = [served.user_id(length, place) for place in range(USERS)]

    def request(number: int) -> torch.Tensor:
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
    widths = [5 * D + 3, *MODEL.hidden_dims, 1]
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_model(folder: Path, count: int, pace: Pace) -> dict[str, Any]:
    """Return the time that the model takes of a request, its curves, and what it is held against."""
    say("users with histories of " + ", ".join(f"{length:,}" for length in LENGTHS))
    served = make_served(folder, LENGTHS, MODEL_CLUSTERS)
    say(f"{pace.requests:,} requests of {count:,} candidates")
    (headline,) = times_of([model_time(served, LENGTH, count)], pace.requests, pace.warm_up)

    def curve(points: Sequence[int], requests: Sequence[Request]) -> dict[str, float]:
        found = np.median(times_of(requests, pace.curve, pace.warm_up), axis=1)
        return {str(point): round(float(ms), 3) for point, ms in zip(points, found, strict=True)}

    say("curves")
    by_candidates = curve(COUNTS, [model_time(served, LENGTH, one) for one in COUNTS])
    by_length = curve(LENGTHS, [model_time(served, one, count) for one in LENGTHS])
    several = [make_served(folder, [LENGTH], one) for one in CLUSTERS]
    by_clusters = curve(CLUSTERS, [model_time(one, LENGTH, count) for one in several])
    say(f"full attention over {FULL_LENGTH:,} behaviors")
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
        "ms_by_clusters": by_clusters,
        "ms_by_length": by_length,
        "floor": least,
    }


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    for name in ("candidates", "clusters", "length"):
        row = found[f"ms_by_{name}"]
        print(f"{name:<20}" + "".join(f"{int(point):>10,}" for point in row))
        print(f"{'ms':<20}" + "".join(f"{ms:>10.3f}" for ms in row.values()) + "\n")
    for name in ("full_attention_ms", "vs_full_attention", "training_code_ms", "vs_training_code", "vs_floor"):
        print(f"{name:<20}{found[name]:>10g}")
    print(", ".join(f"{name} {value:g}" for name, value in found["floor"].items()))
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items()) + "\n")
    print(f"{'model_p50_ms':<20}{found['model_p50_ms']:>10g}   {found['candidates']:,} candidates")
    for name, target in TARGETS.items():
        print(f"{name:<20}{found[name]:>10g}   target: {target}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print a table or, as the last line, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, metavar="N", help=f"default: {CANDIDATES:,}")
    parser.add_argument("--quick", action="store_true", help="few requests, for a first look")
    options = parser.parse_args(arguments)
    if options.candidates < 1:
        raise SystemExit(f"--candidates {options.candidates}: expected at least 1")
    if (load := os.getloadavg()[0]) > 0.5:
        say(f"the machine is busy (load {load:.1f}): the figures will be too high, the 99th percentile most of all")
    with tempfile.TemporaryDirectory(prefix="encode-bench-") as folder, one_thread():
        found = measure_model(Path(folder), options.candidates, QUICK if options.quick else Pace())
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
    main()
