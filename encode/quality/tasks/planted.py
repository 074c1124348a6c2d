"""A made-up log in which what decides a click lies far in the past, and the most that can be known of it is known.

Time has three phases. In the old one each user is drawn to a few interests, each an item category in a period of its
own. In the recent one, before the impressions, and during the impressions, other categories fill the history: the
user's current interests. A share of all behaviors is noise. A target is clicked with a probability that depends on its
category alone: high for an old interest, more so the larger its share was; low for a category that the user was never
drawn to; for a current interest about what it is for all others. So the recent past says next to nothing, and the more
of the history a model reads, the more of the old interests it can know. Each split asks about users of its own: what
a model could remember of its training users helps it with no other.

    U users   C categories   M interests of a user, old ones first, then current ones   N behaviors   I impressions
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt

from encode.data.histories import Histories
from encode.data.impressions import FirstSeen, Impressions, snapshot_times
from encode.evaluate.metrics import auc
from encode.quality.tasks.task import MIN_ITEM_COUNT, Shown, Task, make_task
from encode.schema import SECONDS_PER_DAY, Window, day_of, day_start

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_START = day_start(date(2024, 1, 1))
_OLD_DAYS, _RECENT_DAYS = 300, 60
_SPLIT_DAYS = {"train": 21, "valid": 7, "test": 7}
_SNAPSHOT_DAYS = 7
_WINDOWS = (50, 200, 1000)
_NUM_BINS = 50


@dataclass(frozen=True)
class Planting:
    """How much is planted, and how plainly it shows."""

    num_users: int = 2_000
    median_length: int = 600
    length_sigma: float = 1.0
    min_length: int = 100
    max_length: int = 10_000
    num_categories: int = 200
    items_per_category: int = 20
    num_old: tuple[int, int] = (4, 10)
    """Old interests of a user, fewest and most."""
    num_current: int = 3
    recent_share: float = 0.2
    """Of the behaviors, in the days before the impressions; at least 60, so that the last 50 hold nothing older."""
    during_share: float = 0.1
    """Of the behaviors, in the days of the impressions."""
    noise: float = 0.1
    """Of the behaviors: any category."""
    target_shares: tuple[float, float] = (0.4, 0.2)
    """Of the targets: old interests, current ones; the rest is any category."""
    clicks: tuple[float, float, float, float] = (0.45, 0.95, 0.4, 0.05)
    """Probability of a click: an old interest with a share near 0, the largest old interest, a current interest,
    any other category."""
    user_shares: tuple[float, float] = (0.7, 0.1)
    """Of the users, who have training impressions and who have validation ones; the rest have test ones."""
    impressions: tuple[int, int, int] = (140, 100, 100)
    """Of each user of a split."""


QUICK = Planting(num_users=200, impressions=(28, 50, 35))


@dataclass(frozen=True)
class _Users:
    """What is planted in each user."""

    category: Ints
    """Distinct, [U, M]."""
    num_old: Ints
    """How many of the old ones are the user's, [U]."""
    share: Floats
    """Of each old interest in the old phase, 0 where it is not the user's, [U, most old interests]."""
    click: Floats
    """Probability of a click, [U, C]."""


def load_planted(seed: int, quick: bool, planting: Planting | None = None) -> Task:
    """Make the log; `planting` says how much, None takes the default or, for a quick task, a tenth of it.

    `details["auc"]` tells what the clicks of the test split are worth to know: to an `oracle` that knows each
    probability, and to whoever counts the target's category in the `last_50`, `last_200`, `last_1000` behaviors before
    the impression or in the `whole` history, and gives each share the click rate that it had in the training split.
    """
    planting = planting or (QUICK if quick else Planting())
    rng = np.random.default_rng(seed)
    users = _plant(planting, rng)
    histories = _behave(planting, users, rng)
    splits, probability, first = {}, {}, {}
    shuffled = rng.permutation(planting.num_users)
    cuts = np.round(np.cumsum(planting.user_shares) * planting.num_users).astype(np.int64)
    begin = _START + (_OLD_DAYS + _RECENT_DAYS) * SECONDS_PER_DAY
    for (split, num_days), who, each in zip(
        _SPLIT_DAYS.items(), np.split(shuffled, cuts), planting.impressions, strict=True
    ):
        end = begin + num_days * SECONDS_PER_DAY
        user = np.repeat(np.sort(who), each)
        impressions, probability[split] = _show(planting, users, histories, user, (begin, end), rng)
        days = Window(day_of(begin), day_of(end))
        splits[split] = Shown(impressions, snapshot_times(impressions, days, _SNAPSHOT_DAYS))
        first[split], begin = begin, end
    train, test = splits["train"].impressions, splits["test"].impressions
    known = {"oracle": auc(test.labels, probability["test"])}
    for window in (*_WINDOWS, None):
        before_train, before_test = (_category_shares(histories, one, window) for one in (train, test))
        rates = _click_rates(before_train, train.labels, before_test)
        known[f"last_{window}" if window else "whole"] = auc(test.labels, rates)
    return make_task(
        "planted",
        "Is the item clicked, where what decides is what the user was drawn to long ago?",
        histories,
        histories.before(first["valid"]),
        splits,
        MIN_ITEM_COUNT,
        {
            "split": "by days and by users: " + ", ".join(f"{split} {days}" for split, days in _SPLIT_DAYS.items()),
            "auc": known,
        },
    )


def _plant(planting: Planting, rng: np.random.Generator) -> _Users:
    num_users, (fewest, most) = planting.num_users, planting.num_old
    order = rng.random((num_users, planting.num_categories)).argsort(axis=1)
    category = order[:, : most + planting.num_current]
    num_old = rng.integers(fewest, most + 1, num_users)
    own = np.arange(most) < num_old[:, None]
    share = np.where(own, rng.exponential(size=(num_users, most)), 0.0)
    share /= share.sum(1, keepdims=True)
    least, largest, current, other = planting.clicks
    click = np.full((num_users, planting.num_categories), other)
    rows = np.arange(num_users)[:, None]
    old_click = least + (largest - least) * np.sqrt(share / share.max(1, keepdims=True))
    click[rows, category[:, :most]] = np.where(own, old_click, other)
    click[rows, category[:, most:]] = current
    return _Users(category, num_old, share, click)


def _behave(planting: Planting, users: _Users, rng: np.random.Generator) -> Histories:
    """Draw the behaviors of all phases."""
    num_users, most = users.share.shape
    drawn = rng.lognormal(np.log(planting.median_length), planting.length_sigma, num_users)
    length = np.clip(drawn, planting.min_length, planting.max_length).astype(np.int64)
    recent = np.maximum(60, (length * planting.recent_share).astype(np.int64))
    during = (length * planting.during_share).astype(np.int64)
    old = np.maximum(length - recent - during, 0)
    rows = np.arange(num_users)
    # Old: an interest by its share, by inverting all users' cumulative shares at once, at a time within its period.
    user = np.repeat(rows, old)
    ladder = (np.cumsum(users.share, 1) + rows[:, None]).ravel()
    which = np.searchsorted(ladder, user + rng.random(len(user)), side="right") - user * most
    which = which.clip(max=users.num_old[user] - 1)
    width = rng.uniform(0.1, 0.3, users.share.shape)
    start = rng.random(users.share.shape) * (1 - width)
    when = (start[user, which] + width[user, which] * rng.random(len(user))) * _OLD_DAYS
    parts = [(user, users.category[user, which], when)]
    # Recent and during: a current interest at any time.
    impression_days = sum(_SPLIT_DAYS.values())
    phases = ((recent, _OLD_DAYS, _RECENT_DAYS), (during, _OLD_DAYS + _RECENT_DAYS, impression_days))
    for count, begin, days in phases:
        user = np.repeat(rows, count)
        which = most + rng.integers(0, planting.num_current, len(user))
        parts.append((user, users.category[user, which], begin + days * rng.random(len(user))))
    user, category, when = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    noise = rng.random(len(user)) < planting.noise
    category = np.where(noise, rng.integers(0, planting.num_categories, len(user)), category)
    item = _items(planting, category, rng)
    timestamp = _START + (when * SECONDS_PER_DAY).astype(np.int64)
    order = np.lexsort((item, timestamp, user))
    return Histories(
        user_ids=rows + 1,
        offsets=np.append(0, np.cumsum(old + recent + during)),
        item_ids=item[order],
        category_ids=category[order] + 1,
        timestamps=timestamp[order],
        behaviors=np.zeros(len(order), np.int32),
        behavior_names=("view",),
    )


def _items(planting: Planting, category: Ints, rng: np.random.Generator) -> Ints:
    """Draw an item of each category, by Zipf's law; item ids of a category follow one another, the first from 1."""
    cumulative = np.cumsum(1 / np.arange(1, planting.items_per_category + 1))
    place = np.searchsorted(cumulative, rng.random(len(category)) * cumulative[-1], side="right")
    items: Ints = category * planting.items_per_category + place.clip(max=planting.items_per_category - 1) + 1
    return items


def _show(
    planting: Planting,
    users: _Users,
    histories: Histories,
    user: Ints,
    seconds: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[Impressions, Floats]:
    """Return impressions of users, ascending, within some seconds, and the probability that each is clicked, [I]."""
    most = users.share.shape[1]
    timestamp = rng.integers(*seconds, len(user))
    timestamp = timestamp[np.lexsort((timestamp, user))]
    old = rng.integers(0, users.num_old[user])
    current = most + rng.integers(0, planting.num_current, len(user))
    any_category = rng.integers(0, planting.num_categories, len(user))
    kind = np.searchsorted(np.cumsum(planting.target_shares), rng.random(len(user)), side="right")
    category = np.choose(kind, [users.category[user, old], users.category[user, current], any_category])
    item = _items(planting, category, rng)
    probability = users.click[user, category]
    labels = (rng.random(len(user)) < probability).astype(np.int8)
    fresh = FirstSeen(histories).is_first(user, item, timestamp)
    return Impressions(user, item, category + 1, labels, timestamp, fresh), probability


# --- what there is to know ---------------------------------------------------------------------------------


def _category_shares(histories: Histories, impressions: Impressions, window: int | None) -> Floats:
    """Return the share of the target's category in the last `window` behaviors before each impression, [I]."""
    num_rows = len(histories.item_ids)
    num_categories = int(max(histories.category_ids.max(), impressions.category_ids.max())) + 1
    place = np.sort(
        (histories.user_of * num_categories + histories.category_ids) * num_rows + np.arange(num_rows, dtype=np.int64)
    )
    end = histories.rows_before(impressions.user, impressions.timestamps)
    begin = histories.offsets[impressions.user]
    if window:
        begin = np.maximum(begin, end - window)
    pair = (impressions.user * num_categories + impressions.category_ids) * num_rows
    counts = np.searchsorted(place, pair + end) - np.searchsorted(place, pair + begin)
    shares: Floats = counts / np.maximum(end - begin, 1)
    return shares


def _click_rates(train_shares: Floats, train_labels: npt.NDArray[np.int8], test_shares: Floats) -> Floats:
    """Return the click rate that shares like those of the test had in training, [I of test]: the best use of them."""
    some = train_shares[train_shares > 0]
    edges = np.unique(np.quantile(some, np.arange(_NUM_BINS) / _NUM_BINS)) if len(some) else np.ones(1)
    bins = np.searchsorted(edges, train_shares, side="right")
    clicked = np.bincount(bins, weights=train_labels, minlength=len(edges) + 1)
    shown = np.bincount(bins, minlength=len(edges) + 1)
    rates: Floats = (clicked + train_labels.mean()) / (shown + 1)
    return rates[np.searchsorted(edges, test_shares, side="right")]
