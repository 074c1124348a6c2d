"""Behaviors clustered a second: ours, and scikit-learn's KMeans user by user, on the same data and threads.

    python -m benchmarks.cluster [--json]

2,000 users x 1,000 behaviors, P = 16, K = 32, 10 iterations, planted clusters. scikit-learn is timed on the first 100
users, one start, no early stop; its k-means++ is the greedy one, which tries several candidates for each center.
"""

import argparse
import json
import time
import warnings

import numpy as np

from encode.config import ClusteringConfig
from encode.interests.kmeans import cluster

USERS, LENGTH, P, K, ITERATIONS, RIVAL_USERS = 2_000, 1_000, 16, 32, 10, 100


def planted(seed: int = 0) -> np.ndarray:
    """Return unit vectors around K random directions a user, [USERS * LENGTH, P]."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(USERS, K, P))
    chosen = rng.integers(K, size=(USERS, LENGTH))
    keys = np.take_along_axis(centers, chosen[..., None], 1) + 0.5 * rng.normal(size=(USERS, LENGTH, P))
    keys /= np.linalg.norm(keys, axis=2, keepdims=True)
    return keys.reshape(-1, P).astype(np.float32)


def inertia(keys: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over users of sum_i ||h_i - c||^2 with c the normalized mean of the cluster."""
    total = 0.0
    for user in range(len(keys) // LENGTH):
        own = slice(user * LENGTH, (user + 1) * LENGTH)
        sums = np.zeros((K, P))
        np.add.at(sums, labels[own], keys[own])
        centers = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        total += float(((keys[own] - centers[labels[own]]) ** 2).sum())
    return total / (len(keys) // LENGTH)


def main() -> None:
    """Run, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sklearn.cluster import KMeans
    keys = planted()
    offsets = np.arange(0, len(keys) + 1, LENGTH)
    config = ClusteringConfig(num_clusters=K, num_iterations=ITERATIONS)
    cluster(keys[: 2 * LENGTH], offsets[:3], np.arange(2), config)  # compiles
    began = time.perf_counter()
    labels = cluster(keys, offsets, np.arange(USERS), config)
    ours = len(keys) / (time.perf_counter() - began)
    began = time.perf_counter()
    rival_labels = np.concatenate(
        [
            KMeans(K, n_init=1, max_iter=ITERATIONS, tol=0, random_state=user)
            .fit(keys[user * LENGTH : (user + 1) * LENGTH])
            .labels_
            for user in range(RIVAL_USERS)
        ]
    )
    rival = RIVAL_USERS * LENGTH / (time.perf_counter() - began)
    some = slice(0, RIVAL_USERS * LENGTH)
    result = {
        "behaviors_per_s": round(ours),
        "scikit_learn_behaviors_per_s": round(rival),
        "vs_scikit_learn": round(ours / rival, 2),
        "inertia_ratio": round(inertia(keys[some], labels[some]) / inertia(keys[some], rival_labels), 4),
    }
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<30} {value:,}")


if __name__ == "__main__":
    main()
