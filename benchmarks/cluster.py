"""Behaviors clustered a second and how well: ours, scikit-learn, faiss, padded torch, and the hand-vectorised limit.

    python -m benchmarks.cluster [--json]

Planted clusters, P = 16, K = 32, 10 iterations: 2,000 users x 1,000 behaviors, which the ratios are of, then 100 users
x 50,000. All in one process with two threads; a rival gets the faster of its ways to use them (within a user, over
users, or none), and some of the users only, as it is slow. Each is timed three times, in turns, and its best counts.
`inertia_ratio` is ours to scikit-learn's when both begin from scikit-learn's k-means++, `inertia_ratio_own_seeding`
when each begins as it does by itself (scikit-learn with one start). faiss begins from random behaviors and trains on
256 a center at most; faiss_of_60 keeps the best of 60 starts, which brings its inertia near the others'.

The limit (limit.c) is given its centers and skips nothing; ours finds its own, and skips comparisons that cannot
change a label: it may be faster than the limit.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from encode.config import ClusteringConfig
from encode.interests import kmeans, kmeans_torch
from encode.interests.kmeans import Starts, cluster, inertia
from encode.interests.seeding import start_users

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sklearn.cluster import KMeans, kmeans_plusplus

P, K, ITERATIONS, THREADS, ROUNDS = 16, 32, 10, 2, 3
CONFIG = ClusteringConfig(num_clusters=K, num_iterations=ITERATIONS)


class Shape(NamedTuple):
    """Users x behaviors each, and how many of the users are timed on slow rivals."""

    users: int
    length: int
    rival_users: int


SHAPES = (Shape(2_000, 1_000, 100), Shape(100, 50_000, 10))
Labels = np.ndarray
Way = Callable[[], Labels]


def planted(shape: Shape, seed: int = 0) -> np.ndarray:
    """Return unit vectors around K random directions a user, [users * length, P]."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(shape.users, K, P))
    chosen = rng.integers(K, size=(shape.users, shape.length))
    keys = np.take_along_axis(centers, chosen[..., None], 1) + 0.5 * rng.normal(size=(shape.users, shape.length, P))
    keys /= np.linalg.norm(keys, axis=2, keepdims=True)
    return keys.reshape(-1, P).astype(np.float32)


def offsets_of(num_users: int, length: int) -> np.ndarray:
    """Return where each user's behaviors begin, and the end of the last."""
    return np.arange(num_users + 1) * length


# --- rivals ------------------------------------------------------------------------------------------------


def each_user(one: Callable[[np.ndarray, int], Labels], keys: np.ndarray, shape: Shape, threads: int = 1) -> Labels:
    """Cluster the first users one by one, or on several threads."""
    histories = [keys[user * shape.length : (user + 1) * shape.length] for user in range(shape.rival_users)]
    if threads == 1:
        found = [one(x, user) for user, x in enumerate(histories)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(one, histories, range(len(histories))))
    return np.concatenate(found).astype(np.uint8)


def scikit_learn(x: np.ndarray, user: int) -> Labels:
    """Label one user: its own defaults, but for one start and our iterations."""
    return KMeans(K, n_init=1, max_iter=ITERATIONS, random_state=user).fit(x).labels_


def scikit_learn_ways(keys: np.ndarray, shape: Shape) -> dict[str, Way]:
    """Return the ways to use two threads; threads of two users wait for each other's Python."""

    def limited(threads: int, users_at_once: int) -> Labels:
        with threadpool_limits(threads):
            return each_user(scikit_learn, keys, shape, users_at_once)

    return {
        "threads within a user": lambda: limited(THREADS, 1),
        "a thread a user": lambda: limited(1, THREADS),
        "one thread": lambda: limited(1, 1),
    }


def faiss_ways(keys: np.ndarray, shape: Shape, num_starts: int = 1) -> dict[str, Way]:
    """Return the ways to use two threads; none if faiss is not installed."""
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: `pip install faiss-cpu` to compare with it", file=sys.stderr)
        return {}

    settings = {"niter": ITERATIONS, "nredo": num_starts, "spherical": True, "min_points_per_centroid": 1}

    def one(x: np.ndarray, user: int) -> Labels:
        trained = faiss.Kmeans(P, K, seed=user + 1, **settings)
        trained.train(x)
        return trained.index.search(x, 1)[1][:, 0]

    def limited(threads: int, users_at_once: int) -> Labels:
        with threadpool_limits(threads):
            faiss.omp_set_num_threads(threads)
            return each_user(one, keys, shape, users_at_once)

    return {
        "threads within a user": lambda: limited(THREADS, 1),
        "a thread a user": lambda: limited(1, THREADS),
        "one thread": lambda: limited(1, 1),
    }


def torch_ways(keys: np.ndarray, shape: Shape) -> dict[str, Way]:
    """Our own torch path, with our seeding."""
    count = shape.rival_users
    arguments = keys[: count * shape.length], offsets_of(count, shape.length), np.arange(count), CONFIG
    ways: dict[str, Way] = {"threads within a batch": lambda: kmeans_torch.cluster(*arguments)}
    if torch.cuda.is_available():
        ways["iterations on the GPU"] = lambda: kmeans_torch.cluster(*arguments, device="cuda")
    return ways


def build_limit(folder: Path) -> Any:
    """Compile limit.c; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        print("limit: no C compiler (cc, gcc, clang) to build benchmarks/limit.c with", file=sys.stderr)
        return None
    source, library = Path(__file__).with_name("limit.c"), folder / "limit.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-pthread", "-shared", "-fPIC", f"-DP={P}", f"-DK={K}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library)).limit


def limit_ways(built: Any, keys: np.ndarray, shape: Shape, centers: np.ndarray) -> dict[str, Way]:
    """Return how to call what limit.c was built to, from our starting centers."""
    labels = np.empty(len(keys), np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (keys, centers, labels)]
    sizes = ctypes.c_long(shape.users), ctypes.c_long(shape.length)

    def run() -> Labels:
        built(*pointers, *sizes, ctypes.c_int(ITERATIONS), ctypes.c_int(THREADS))
        return labels

    return {"a thread a user": run} if built else {}


# --- measures ----------------------------------------------------------------------------------------------


def our_starts(keys: np.ndarray, shape: Shape) -> tuple[np.ndarray, float]:
    """Return the centers that ours begins from, [users, K, P], and the seconds that one thread takes to find them."""
    none, bounds = np.empty((0, P), np.float32), np.zeros(shape.users + 1, np.int64)
    keys, offsets, given, given_offsets = kmeans.checked(
        keys, offsets_of(shape.users, shape.length), np.arange(shape.users), Starts(none, bounds)
    )
    centers, counts = np.zeros((shape.users, K, P), np.float32), np.zeros(shape.users, np.int64)
    users = np.arange(shape.users)
    streams = kmeans.mixed(users, CONFIG)
    start_users(keys, offsets, users[:1], streams, given, given_offsets, centers, counts)  # compiled or loaded
    began = time.perf_counter()
    start_users(keys, offsets, users, streams, given, given_offsets, centers, counts)
    return centers, time.perf_counter() - began


def same_seeding_ratio(keys: np.ndarray, shape: Shape) -> float:
    """Our inertia to scikit-learn's, both from what scikit-learn's k-means++ chooses; mean over users."""
    count, length = shape.rival_users, shape.length
    begin = [kmeans_plusplus(keys[u * length : (u + 1) * length], K, random_state=u)[0] for u in range(count)]
    keys, offsets = keys[: count * length], offsets_of(count, length)
    ours = cluster(keys, offsets, np.arange(count), CONFIG, Starts(np.concatenate(begin), offsets_of(count, K)))
    theirs = each_user(lambda x, u: KMeans(K, init=begin[u], n_init=1, max_iter=ITERATIONS).fit(x).labels_, keys, shape)
    return float(inertia(keys, offsets, ours, K).mean() / inertia(keys, offsets, theirs, K).mean())


def race(contenders: dict[str, dict[str, Way]]) -> tuple[dict[str, dict[str, float]], dict[str, Labels]]:
    """Time every way of every contender in turns; return the best behaviors/s of each way, and labels."""
    best: dict[str, dict[str, float]] = {name: dict.fromkeys(ways, 0.0) for name, ways in contenders.items() if ways}
    labels = {}
    for turn in range(ROUNDS):
        for name in best:
            for way, run in contenders[name].items():
                began = time.perf_counter()
                labels[name] = run()
                best[name][way] = max(best[name][way], len(labels[name]) / (time.perf_counter() - began))
        print(f"  round {turn + 1} of {ROUNDS}", file=sys.stderr)
    return best, labels


def measure(shape: Shape, built: Any) -> dict[str, Any]:
    """Everything about one shape."""
    print(f"{shape.users:,} users x {shape.length:,} behaviors", file=sys.stderr)
    keys, offsets, seeds = planted(shape), offsets_of(shape.users, shape.length), np.arange(shape.users)
    centers, seeding = our_starts(keys, shape)
    cluster(keys[: shape.length], offsets[:2], seeds[:1], CONFIG)  # compiled or loaded
    torch.set_num_threads(THREADS)
    contenders = {
        "ours": {"a thread a user": lambda: cluster(keys, offsets, seeds, CONFIG, num_threads=THREADS)},
        "limit": limit_ways(built, keys, shape, centers),
        "scikit_learn": scikit_learn_ways(keys, shape),
        "faiss": faiss_ways(keys, shape),
        "faiss_of_60": faiss_ways(keys, shape, 60),
        "torch": torch_ways(keys, shape),
    }
    speeds, labels = race(contenders)
    began = time.perf_counter()
    cluster(keys, offsets, seeds, CONFIG, num_threads=1)
    alone = time.perf_counter() - began
    some, some_offsets = shape.rival_users * shape.length, offsets[: shape.rival_users + 1]
    means = {name: inertia(keys[:some], some_offsets, found[:some], K).mean() for name, found in labels.items()}
    best = {name: max(ways.values()) for name, ways in speeds.items()}
    return {
        "behaviors_per_s": {name: {way: round(speed) for way, speed in ways.items()} for name, ways in speeds.items()},
        **{f"vs_{name}": ratio(best["ours"], best.get(name)) for name in contenders if name != "ours"},
        "inertia_ratio": round(same_seeding_ratio(keys, shape), 4),
        "inertia_ratio_own_seeding": round(means["ours"] / means["scikit_learn"], 4),
        "inertia": {name: round(float(mean), 2) for name, mean in means.items()},
        "ns_a_behavior_on_one_thread": {
            "seeding": round(seeding / len(keys) * 1e9, 1),
            "iterations": round((alone - seeding) / len(keys) * 1e9, 1),
        },
    }


def ratio(ours: float, theirs: float | None) -> float | None:
    """Return how many times faster ours is; None if there is no such rival here."""
    return round(ours / theirs, 2) if theirs else None


def show(shape: Shape, found: dict[str, Any]) -> None:
    """Print one shape's table."""
    print(f"\n{shape.users:,} users x {shape.length:,} behaviors; rivals on {shape.rival_users} of the users")
    print(f"{'':<14}{'M behaviors/s':>14}{'ours is':>10}{'inertia':>12}")
    ours = max(found["behaviors_per_s"]["ours"].values())
    for name, ways in found["behaviors_per_s"].items():
        for way, speed in ways.items():
            print(f"{name:<14}{speed / 1e6:>14.3f}{ours / speed:>9.2f}x{found['inertia'][name]:>12.2f}  {way}")
    print(f"inertia to scikit-learn's: {found['inertia_ratio']} from the same k-means++", end=", ")
    print(f"{found['inertia_ratio_own_seeding']} each from its own")
    seeding, iterations = found["ns_a_behavior_on_one_thread"].values()
    print(f"ours on one thread, ns a behavior: {seeding} seeding, {iterations} iterations")


def main() -> None:
    """Run, and print a table or, as the last line, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        built = build_limit(Path(folder))
        results = {shape: measure(shape, built) for shape in SHAPES}
    if options.json:
        first, second = results.values()
        print(json.dumps(first | {f"at_{SHAPES[1].users}x{SHAPES[1].length}": second}))
        return
    for shape, found in results.items():
        show(shape, found)


if __name__ == "__main__":
    main()
