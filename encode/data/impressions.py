"""Impressions made from a log that has none: held-out behaviors against drawn negatives, split by time.

I impressions   N behaviors
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import numpy.typing as npt

from encode.config import TrainingConfig
from encode.data.histories import Histories
from encode.errors import DataError
from encode.schema import SECONDS_PER_DAY, Window, day_start

Ints = npt.NDArray[np.int64]
_MAX_REDRAWS = 20


@dataclass(frozen=True)
class Impressions:
    """Items shown to users, sorted by user, then time; all arrays [I]."""

    user: Ints
    """Position of the user in `Histories.user_ids`."""
    item_ids: Ints
    category_ids: Ints
    labels: npt.NDArray[np.int8]
    timestamps: Ints
    first_time: npt.NDArray[np.bool_]
    """The user had no behavior with the item before."""

    def __len__(self) -> int:
        """Return I."""
        return len(self.user)


@dataclass(frozen=True)
class Splits:
    """Days of the three splits, one after the other."""

    train: Window
    valid: Window
    test: Window


def split_days(window: Window, config: TrainingConfig) -> Splits:
    """Count test, valid and train days back from the end of the window.

    Raises:
        DataError: the window has too few days to leave one day of history before the first training day.
    """
    test = Window(window.end - timedelta(days=config.test_days), window.end)
    valid = Window(test.start - timedelta(days=config.valid_days), test.start)
    train = Window(valid.start - timedelta(days=config.train_days), valid.start)
    if train.start <= window.start:
        needed = config.train_days + config.valid_days + config.test_days
        raise DataError(
            f"days {window.in_words()}: training needs more than {needed} "
            f"(training.train_days {config.train_days} + valid_days {config.valid_days} + test_days "
            f"{config.test_days}, and history before them); give more days or lower one of these"
        )
    return Splits(train, valid, test)


def snapshot_times(impressions: Impressions, days: Window, snapshot_days: int) -> Ints:
    """Return the start of the last snapshot's day before or on which each impression is, [I].

    Snapshots are taken every `snapshot_days` from the first of the days on.
    """
    first_day, every = day_start(days.start), snapshot_days * SECONDS_PER_DAY
    return first_day + (impressions.timestamps - first_day) // every * every


def draw_impressions(histories: Histories, days: Window, config: TrainingConfig, max_positives: int) -> Impressions:
    """Take the days' behaviors as positives and draw negatives for each, seeded.

    A negative is drawn from the behaviors (popularity) or the items (uniform) before the impression's day, and is never
    an item with which the user had a behavior up to the end of that day. Later behaviors are not looked at.

    So an item that the user had before can only be a positive: where people repeat themselves, having seen it before is
    most of the answer. `evaluate.metrics.summary` reports first-time items apart, and what that one bit is worth.

    Raises:
        DataError: the days hold no positive, or there is nothing before them to draw from.
    """
    rng = np.random.default_rng([config.seed, day_start(days.start)])
    inside = (histories.timestamps >= day_start(days.start)) & (histories.timestamps < day_start(days.end))
    wanted = config.positive_behaviors
    if wanted is not None:
        codes = [code for code, name in enumerate(histories.behavior_names) if name in wanted]
        inside &= np.isin(histories.behaviors, codes)
    positives = np.flatnonzero(inside)
    if len(positives) == 0:
        kinds = "any behavior" if wanted is None else " or ".join(wanted)
        raise DataError(
            f"days {days.in_words()}: no positives: expected {kinds}, have {', '.join(histories.behavior_names)}"
        )
    if len(positives) > max_positives:
        positives = np.sort(rng.choice(positives, max_positives, replace=False))
    seen = FirstSeen(histories)
    user = np.repeat(seen.user_of[positives], config.num_negatives)
    until = (histories.timestamps[positives] // SECONDS_PER_DAY + 1) * SECONDS_PER_DAY
    rows, drawn = _draw_negatives(histories, days, config, seen, user, np.repeat(until, config.num_negatives), rng)
    parent = np.repeat(np.arange(len(positives)), config.num_negatives)[drawn]
    row = np.concatenate([positives, rows[drawn]])
    owner = np.concatenate([np.arange(len(positives)), parent])
    labels = np.repeat(np.array([1, 0], np.int8), [len(positives), len(parent)])
    order = np.lexsort((-labels, owner))
    row, timestamps = row[order], histories.timestamps[positives][owner[order]]
    users = seen.user_of[positives][owner[order]]
    return Impressions(
        users,
        histories.item_ids[row],
        histories.category_ids[row],
        labels[order],
        timestamps,
        seen.first_timestamp(users, seen.code_of[row]) >= timestamps,
    )


class FirstSeen:
    """When each user first had a behavior with each item."""

    def __init__(self, histories: Histories) -> None:
        self._items, code_of = np.unique(histories.item_ids, return_inverse=True)
        self.code_of: Ints = code_of
        self.user_of = histories.user_of
        self._num_items = len(self._items)
        # Rows are in time order within a user, so the first row of a pair is its earliest.
        self._pairs, first = np.unique(self.user_of * self._num_items + self.code_of, return_index=True)
        self._timestamps = histories.timestamps[first]

    def first_timestamp(self, user: Ints, code: Ints) -> Ints:
        """Return the time of the first behavior of each (user, item), the largest int64 where there is none."""
        pair = user * self._num_items + code
        place = np.searchsorted(self._pairs, pair).clip(max=len(self._pairs) - 1)
        return np.where(self._pairs[place] == pair, self._timestamps[place], np.iinfo(np.int64).max)

    def is_first(self, user: Ints, item_ids: Ints, timestamps: Ints) -> npt.NDArray[np.bool_]:
        """Tell where a user had no behavior with an item strictly before a timestamp; items may be unknown here."""
        code = np.searchsorted(self._items, item_ids).clip(max=self._num_items - 1)
        fresh = (self._items[code] != item_ids) | (self.first_timestamp(user, code) >= timestamps)
        return np.asarray(fresh)


def _draw_negatives(
    histories: Histories,
    days: Window,
    config: TrainingConfig,
    seen: FirstSeen,
    user: Ints,
    until: Ints,
    rng: np.random.Generator,
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return a behavior row whose item is the negative, and whether one was found in time."""
    pool = np.argsort(histories.timestamps, kind="stable")
    if config.negative_sampling == "uniform":
        pool = pool[np.sort(np.unique(histories.item_ids[pool], return_index=True)[1])]
    # How much of the pool, oldest first, is from before the impression's day.
    size = np.searchsorted(histories.timestamps[pool], until - SECONDS_PER_DAY)
    if not size.all():
        raise DataError(f"days {days.in_words()}: no behaviors before them to draw negatives from; give earlier days")
    rows = np.zeros(len(user), np.int64)
    left = np.arange(len(user))
    for _ in range(_MAX_REDRAWS):
        rows[left] = pool[rng.integers(size[left])]
        left = left[seen.first_timestamp(user[left], seen.code_of[rows[left]]) < until[left]]
        if len(left) == 0:
            break
    found = np.ones(len(user), bool)
    found[left] = False
    return rows, found
