"""A made-up log whose interests are known: what a method should find is planted in it.

Each user is drawn to a few categories, with weights that drift from the first day to the last; inside a category
items are popular by Zipf's law; a share of the rows is noise over all items. Users are drawn one by one, each from
a random stream of its own, so that the same seed gives the same rows however they are batched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.config import GeneratorConfig
from encode.data.readers import RAW_COLUMNS, RawBatch
from encode.errors import ConfigError
from encode.schema import SECONDS_PER_DAY, day_start

Ints = npt.NDArray[np.int64]
BEHAVIORS = ("view", "cart", "buy")
_BEHAVIOR_SHARES = (0.85, 0.1, 0.05)
_ROWS_PER_BATCH = 1 << 17


@dataclass(frozen=True)
class _Catalog:
    """Items of all categories, most popular first inside each."""

    items: list[Ints]
    cumulative: list[npt.NDArray[np.float64]]
    category_of: Ints
    """Category id of each item id; index 0 is unused."""


def generate(config: GeneratorConfig) -> Iterator[RawBatch]:
    """Yield the log, users ascending, each user's behaviors oldest first and at distinct seconds.

    Raises:
        ConfigError: more interests than categories, or more categories than items.
    """
    row = 1
    for batch, _ in _batches(config):
        yield RawBatch("generated", row, batch)
        row += batch.num_rows


def planted_categories(config: GeneratorConfig) -> Ints:
    """Return for each row of `generate`, in order, the category of the interest behind it, 0 for noise."""
    return np.concatenate([planted for _, planted in _batches(config)])


def user_interests(config: GeneratorConfig, user_id: int) -> Ints:
    """Return the categories that a user is drawn to, [interests_per_user]."""
    _check(config)
    return _interests(config, np.random.default_rng([config.seed, user_id]))


def _check(config: GeneratorConfig) -> None:
    if config.interests_per_user > config.num_categories:
        raise ConfigError(
            f"generator: interests_per_user {config.interests_per_user} exceeds num_categories {config.num_categories}"
        )
    if config.num_categories > config.num_items:
        raise ConfigError(f"generator: num_categories {config.num_categories} exceeds num_items {config.num_items}")


def _catalog(config: GeneratorConfig) -> _Catalog:
    random = np.random.default_rng([config.seed, 0])
    shuffled = random.permutation(config.num_items) + 1
    items = [shuffled[category :: config.num_categories] for category in range(config.num_categories)]
    weights = [1 / np.arange(1, len(group) + 1) for group in items]
    category_of = np.zeros(config.num_items + 1, np.int64)
    for category, group in enumerate(items):
        category_of[group] = category + 1
    return _Catalog(items, [np.cumsum(w) / w.sum() for w in weights], category_of)


def _interests(config: GeneratorConfig, random: np.random.Generator) -> Ints:
    return random.choice(config.num_categories, config.interests_per_user, replace=False).astype(np.int64) + 1


def _batches(config: GeneratorConfig) -> Iterator[tuple[pa.RecordBatch, Ints]]:
    _check(config)
    catalog = _catalog(config)
    users: list[tuple[Ints, ...]] = []
    held = 0
    for user_id in range(1, config.num_users + 1):
        users.append(_user(config, catalog, user_id))
        held += len(users[-1][0])
        if held >= _ROWS_PER_BATCH:
            yield _to_batch(users)
            users, held = [], 0
    if users:
        yield _to_batch(users)


def _user(config: GeneratorConfig, catalog: _Catalog, user_id: int) -> tuple[Ints, ...]:
    """Return user, item, category, behavior code, timestamp and planted category of each behavior of one user."""
    random = np.random.default_rng([config.seed, user_id])
    interests = _interests(config, random)
    seconds = config.num_days * SECONDS_PER_DAY
    drawn = random.lognormal(np.log(config.median_length), config.length_sigma)
    length = int(np.clip(drawn, 1, min(config.max_length, seconds // 2)))
    # Adding 0, 1, 2, ... to sorted draws makes the seconds distinct, so that no two rows are equal.
    offset = np.sort(random.integers(0, seconds - length, length)) + np.arange(length)
    first, last = random.dirichlet(np.ones(len(interests)), 2)
    late = random.random(length) < offset / seconds
    choice = np.where(
        late, random.choice(len(interests), length, p=last), random.choice(len(interests), length, p=first)
    )
    noise = random.random(length) < config.noise
    category = interests[choice]
    item = np.empty(length, np.int64)
    position = random.random(length)
    for interest in interests:
        rows = np.flatnonzero(category == interest)
        place = np.searchsorted(catalog.cumulative[interest - 1], position[rows], side="right")
        item[rows] = catalog.items[interest - 1][place.clip(max=len(catalog.items[interest - 1]) - 1)]
    item[noise] = random.integers(1, config.num_items + 1, int(noise.sum()))
    behavior = np.searchsorted(np.cumsum(_BEHAVIOR_SHARES)[:-1], random.random(length), side="right")
    return (
        np.full(length, user_id, np.int64),
        item,
        catalog.category_of[item],
        behavior.astype(np.int64),
        day_start(config.start) + offset,
        np.where(noise, 0, category),
    )


def _to_batch(users: list[tuple[Ints, ...]]) -> tuple[pa.RecordBatch, Ints]:
    user, item, category, behavior, timestamp, planted = (np.concatenate(parts) for parts in zip(*users, strict=True))
    names = pa.array(BEHAVIORS).take(pa.array(behavior))
    # A timestamp type rather than integers: independent of source.time_unit.
    when = pa.array(timestamp * 1000).cast(pa.timestamp("ms", "UTC"))
    arrays = [pa.array(user), pa.array(item), pa.array(category), names, when]
    return pa.RecordBatch.from_arrays(arrays, names=list(RAW_COLUMNS)), planted
