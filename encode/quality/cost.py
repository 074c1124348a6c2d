"""Online cost: what scoring a request's candidates takes, given what may be kept of the user beforehand.

L behaviors of the history   T candidates
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from encode.model.ctr import Reader, Recent, User
from encode.model.long_term import Behaviors, Catalog, History, Target
from encode.schema import SECONDS_PER_DAY

_CANDIDATES = 1_000
_RECENT = 50
_REPEATS = 5
LENGTHS = (100, 1_000, 10_000)


class Cost(NamedTuple):
    """Milliseconds of one user's request of 1,000 candidates on the threads of this process, the best of several."""

    ms_per_1000: float
    """At a history of 1,000 behaviors, from embeddings in memory to logits."""
    ms_by_length: dict[str, float]
    """The same at other lengths of the history."""
    state_bytes: int
    """What is kept of a user between requests at 1,000 behaviors: the model's state, or the history's ids."""


def measure_cost(table: Catalog, reader: Reader) -> Cost:
    """Time requests on drawn histories and candidates.

    A model whose state is target-free has it computed beforehand, as a refresh would. Any other gets the history's
    ids, and looks up and reads the embeddings within the request.
    """
    reader.eval()
    times, kept = {}, 0
    with torch.no_grad():
        for length in LENGTHS:
            milliseconds, size = _measure(table, reader, length)
            times[str(length)] = milliseconds
            kept = size if length == 1_000 else kept
    return Cost(times["1000"], times, kept)


def _measure(table: Catalog, reader: Reader, length: int) -> tuple[float, int]:
    rng = np.random.default_rng(length)
    items = torch.from_numpy(rng.integers(1, len(table.key), (1, length)))
    kind = torch.from_numpy(rng.integers(0, len(table.kind), (1, length)))
    times = np.sort(rng.integers(0, 365 * SECONDS_PER_DAY, length))
    category = table.category[items]
    item_of, category_of, kind_of = (column[0].numpy() for column in (items, category, kind))
    behaviors = Behaviors(np.array([0, length]), np.array([1]), item_of, category_of, kind_of, times)
    labels = reader.long_term.assign(table, behaviors)
    cluster = torch.zeros_like(items) if labels is None else torch.from_numpy(labels.astype(np.int64))[None]
    age = torch.from_numpy((times[-1] + 1 - times) / SECONDS_PER_DAY).float()[None]
    target = torch.from_numpy(rng.integers(1, len(table.key), (1, _CANDIDATES)))
    recent = items[:, -_RECENT:]

    def summarised() -> User:
        embedding = F.embedding(items, table.embedding)
        if len(table.kind) > 1:
            embedding = embedding + F.embedding(kind, table.kind)
        key, mask = F.embedding(items, table.key), torch.ones_like(items, dtype=torch.bool)
        return reader.summarise(History(embedding, key, mask, items, category, kind, age, cluster, reader.scale))

    kept = summarised()

    def request() -> None:
        user = kept if reader.long_term.target_free else summarised()
        candidates = Target(
            F.embedding(target, table.embedding), F.embedding(target, table.key), target, table.category[target]
        )
        latest = Recent(
            F.embedding(recent, table.embedding),
            F.embedding(recent, table.key),
            torch.ones_like(recent).bool(),
            torch.zeros_like(target[0]),
        )
        reader(user, latest, candidates)

    request()
    best = min(_timed(request) for _ in range(_REPEATS))
    size = _bytes(kept.long_term) + kept.profile.nbytes if reader.long_term.target_free else items.nbytes + kind.nbytes
    return 1e3 * best, size


def _timed(request: Callable[[], None]) -> float:
    started = time.perf_counter()
    request()
    return time.perf_counter() - started


def _bytes(state: object) -> int:
    """Size of all tensors in a state, nested or not."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    return sum(_bytes(part) for part in state) if isinstance(state, tuple | list) else 0
