"""A generated log of any size, written as validated days, and a space that fits it.

Lengths of histories are lognormal with a median of 300 and sigma 1.4: the mean is then about 800, and the longest of
the 125,000 users of 100 M behaviors reach the end of the tail at 100,000. One user always does, so that a smaller log
has the same longest history. Items are zipf-like, within a category and among categories, and a user draws from ten
categories. A day's rows are in order of time, so users are mixed.

    python -m benchmarks.behaviors    how many bytes a behavior takes

    U users   N behaviors   C categories   I items   V indices of the vocabulary   D embedding_dim   P projected_dim
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from encode.config import ClusteringConfig
from encode.data.parquet import parquet_bytes
from encode.data.vocabulary import Vocabulary
from encode.model.space import Space, SpaceConfig
from encode.outputs import recipe, write_output
from encode.schema import BEHAVIORS, SECONDS_PER_DAY, day_start
from encode.storage import Storage

FIRST_DAY, NUM_DAYS = date(2024, 1, 1), 60
LAST_DAY = FIRST_DAY + timedelta(days=NUM_DAYS)
"""The day on which only some users are active; the full refresh is as of its start."""
MEDIAN_LENGTH, LENGTH_SIGMA, MAX_LENGTH = 300, 1.4, 100_000
NUM_CATEGORIES, ITEMS_PER_CATEGORY, INTERESTS_PER_USER = 1_000, 100, 10
NOISE = 0.1
"""Share of behaviors outside of the user's own categories."""
ACTIVE_SHARE, MAX_ACTIVE_LENGTH = 0.01, 20
NAMES = ("buy", "cart", "fav", "pv")
NAME_SHARES = (0.02, 0.06, 0.03, 0.89)
D, P, K, NUM_ITERATIONS, RECENT_LENGTH, NUM_REMEMBERED = 64, 16, 32, 10, 50, 4096
_ROWS_PER_BLOCK = 1 << 21
_ROWS_PER_PART = 4_000_000
_ROW = np.dtype([("user", np.int32), ("item", np.int32), ("second", np.int32), ("name", np.uint8)])


@dataclass(frozen=True)
class Log:
    """Who is in the log, and what there is to choose from."""

    user_ids: np.ndarray
    """In no order, [U]."""
    lengths: np.ndarray
    """Behaviors of each user, N in all, [U]."""
    interests: np.ndarray
    """Categories that each user draws from, most drawn first, [U, INTERESTS_PER_USER]."""
    items: np.ndarray
    """Item ids of each category, most frequent first, [C, I / C]."""
    category_of: np.ndarray
    """Category id of each item id; index 0 is unused, [I + 1]."""
    seed: int


def make_log(num_behaviors: int, seed: int = 0) -> Log:
    """Draw users until they have `num_behaviors` together; the last one's history is cut to fit."""
    random = np.random.default_rng([seed, num_behaviors])
    lengths = random.lognormal(np.log(MEDIAN_LENGTH), LENGTH_SIGMA, num_behaviors // MEDIAN_LENGTH + 1)
    lengths = lengths.clip(1, min(MAX_LENGTH, num_behaviors)).astype(np.int64)
    # A small log keeps most of its behaviors for the others.
    lengths[0] = min(MAX_LENGTH, max(1, num_behaviors // 20))
    ends = np.cumsum(lengths)
    num_users = int(np.searchsorted(ends, num_behaviors)) + 1
    lengths = lengths[:num_users]
    lengths[-1] -= ends[num_users - 1] - num_behaviors
    user_ids = random.permutation(4 * num_users)[:num_users] + 1
    interests = _zipf(random.random((num_users, INTERESTS_PER_USER)), NUM_CATEGORIES)
    # The ids of items tell nothing about their categories.
    items = np.random.default_rng(seed).permutation(NUM_CATEGORIES * ITEMS_PER_CATEGORY) + 1
    category_of = np.zeros(len(items) + 1, np.int64)
    category_of[items] = np.repeat(np.arange(NUM_CATEGORIES) + 1, ITEMS_PER_CATEGORY)
    return Log(user_ids, lengths, interests, items.reshape(NUM_CATEGORIES, -1), category_of, seed)


def write_days(storage: Storage, log: Log, scratch: Path) -> None:
    """Write the first NUM_DAYS days; rows wait in `scratch` for the rest of their day, so memory does not grow."""
    scratch.mkdir(parents=True, exist_ok=True)
    waiting = [scratch / f"day-{day}" for day in range(NUM_DAYS)]
    files = [path.open("wb") for path in waiting]
    for rows in _blocks(log):
        day = (rows["second"] // SECONDS_PER_DAY).astype(np.uint8)
        rows = rows[np.argsort(day, kind="stable")]
        for file, own in zip(files, np.split(rows, np.cumsum(np.bincount(day, minlength=NUM_DAYS))[:-1]), strict=True):
            own.tofile(file)
    for file in files:
        file.close()

    def finish(day: int) -> None:
        rows = np.fromfile(waiting[day], _ROW)
        waiting[day].unlink()
        _write_day(storage, log, FIRST_DAY + timedelta(days=day), rows)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(finish, range(NUM_DAYS)))


def write_last_day(storage: Storage, log: Log) -> int:
    """Write the day on which 1% of the users, drawn at random, have 1 to 20 new behaviors; return how many users."""
    random = np.random.default_rng([log.seed, len(log.user_ids)])
    active = random.choice(len(log.user_ids), max(1, round(ACTIVE_SHARE * len(log.user_ids))), replace=False)
    lengths = random.integers(1, MAX_ACTIVE_LENGTH + 1, len(active))
    _write_day(storage, log, LAST_DAY, _draw(log, active, lengths, NUM_DAYS, 1, random))
    return len(active)


def make_space(log: Log) -> Space:
    """Return a space in which an item's embedding is its category's direction plus noise: keys come in clusters."""
    random = np.random.default_rng(log.seed)
    item_ids = np.arange(1, len(log.category_of))
    vocabulary = Vocabulary(np.arange(NUM_CATEGORIES) + 1, item_ids, log.category_of[1:])
    directions = random.normal(size=(NUM_CATEGORIES + 2, D))
    embedding = directions[vocabulary.category_index] + 0.5 * random.normal(size=(len(vocabulary), D))
    embedding[0] = 0
    projection = np.linalg.qr(random.normal(size=(D, P)))[0]
    key = embedding @ projection
    key[1:] /= np.linalg.norm(key[1:], axis=1, keepdims=True)
    clustering = ClusteringConfig(num_clusters=K, num_iterations=NUM_ITERATIONS)
    embedding, key, projection = (array.astype(np.float32) for array in (embedding, key, projection))
    return Space(
        SpaceConfig(clustering, "mean", RECENT_LENGTH, NUM_REMEMBERED), vocabulary, embedding, key, projection, 8.0
    )


def bytes_per_behavior(num_behaviors: int, max_user_id: int) -> tuple[float, float]:
    """Return how long a behavior is in a day's file of such a log, and if each is of any user up to an id.

    Of a billion users hardly one is in a file twice, which no log of a few users shows, whatever their ids.
    """
    log, random = make_log(num_behaviors), np.random.default_rng(0)
    count = min(_ROWS_PER_PART, num_behaviors // NUM_DAYS)
    users = random.choice(len(log.lengths), count, p=log.lengths / num_behaviors)
    rows = _draw(log, users, np.ones(count, np.int64), 0, 1, random)
    rows = rows[np.argsort(rows["second"], kind="stable")]
    few = _table(log, rows)
    many = few.set_column(0, "user_id", pa.array(random.integers(1, max_user_id, count, endpoint=True)))
    return len(parquet_bytes(few)) / count, len(parquet_bytes(many)) / count


# --- rows ----------------------------------------------------------------------------------------------------


def _zipf(uniform: np.ndarray, num_ranks: int) -> np.ndarray:
    """Turn numbers in [0, 1) into ranks 0 to `num_ranks` - 1; rank r has a share of about 1 / (r + 1)."""
    ranks = np.exp(uniform * uniform.dtype.type(np.log(num_ranks))).astype(np.int32) - 1
    return ranks.clip(0, num_ranks - 1)  # float32 rounds up to the end now and then


def _blocks(log: Log) -> Iterator[np.ndarray]:
    """Yield the rows of some users after the other, those of a user in no order."""
    ends = np.cumsum(log.lengths)
    edges = np.unique(np.searchsorted(ends, np.arange(0, ends[-1], _ROWS_PER_BLOCK)))
    for first, last in zip(edges, np.append(edges[1:], len(ends)), strict=True):
        random = np.random.default_rng([log.seed, len(ends), first])
        yield _draw(log, np.arange(first, last), log.lengths[first:last], 0, NUM_DAYS, random)


def _draw(
    log: Log, users: np.ndarray, lengths: np.ndarray, first_day: int, num_days: int, random: np.random.Generator
) -> np.ndarray:
    """Return `lengths` behaviors of the users at these places, spread evenly over the days."""
    count = int(lengths.sum())
    rows = np.empty(count, _ROW)
    rows["user"] = user = np.repeat(users, lengths)
    category = log.interests[user, _zipf(random.random(count, np.float32), INTERESTS_PER_USER)]
    noise = np.flatnonzero(random.random(count, np.float32) < NOISE)
    category[noise] = _zipf(random.random(len(noise), np.float32), NUM_CATEGORIES)
    rows["item"] = log.items[category, _zipf(random.random(count, np.float32), ITEMS_PER_CATEGORY)]
    begin, end = first_day * SECONDS_PER_DAY, (first_day + num_days) * SECONDS_PER_DAY
    rows["second"] = random.integers(begin, end, count, np.int32)
    rows["name"] = np.searchsorted(np.cumsum(NAME_SHARES)[:-1], random.random(count, np.float32), side="right")
    return rows


def _write_day(storage: Storage, log: Log, day: date, rows: np.ndarray) -> None:
    """Write a day as `encode.data.daily` does after validation."""
    rows = rows[np.argsort(rows["second"], kind="stable")]
    tables = {
        f"part-{place:05d}.parquet": _table(log, rows[begin : begin + _ROWS_PER_PART])
        for place, begin in enumerate(range(0, len(rows), _ROWS_PER_PART))
    }
    config = {"benchmark": {"behaviors": int(log.lengths.sum()), "seed": log.seed}}
    write_output(
        storage,
        f"behaviors/dt={day}",
        {name: parquet_bytes(table) for name, table in tables.items()},
        kind="behaviors",
        fingerprint=recipe("behaviors", config, {}),
        config=config,
        inputs={},
        rows={name: table.num_rows for name, table in tables.items()},
        columns={field.name: str(field.type) for field in BEHAVIORS},
        counts={
            "rows": len(rows),
            "raw_rows": len(rows),
            "rejected": 0,
            "without_category": 0,
            "users": len(np.unique(rows["user"])),
        },
        details={"reasons": {}, "warnings": []},
    )


def _table(log: Log, rows: np.ndarray) -> pa.Table:
    names = pa.DictionaryArray.from_arrays(rows["name"].astype(np.int32), pa.array(NAMES))
    seconds = rows["second"].astype(np.int64) + day_start(FIRST_DAY)
    ids = log.user_ids[rows["user"]], rows["item"].astype(np.int64), log.category_of[rows["item"]]
    return pa.Table.from_arrays([*map(pa.array, ids), names, pa.array(seconds)], schema=BEHAVIORS)


def main() -> None:
    """Print how long a behavior is in a validated day of 100 million behaviors in 60 days."""
    few, many = bytes_per_behavior(100_000_000, 10**9)
    print(f"{few:.1f} bytes a behavior with the ids of 124,000 users, {many:.1f} with ids up to 10^9")


if __name__ == "__main__":
    main()
