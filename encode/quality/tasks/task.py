"""What a task is: a data set with a question, its impressions in three splits, and what may be known at each of them.

N behaviors   U users   I impressions
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from encode.data.histories import Histories
from encode.data.impressions import Impressions
from encode.data.vocabulary import Vocabulary, build_vocabulary
from encode.errors import DataError

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MIN_ITEM_COUNT = 5
QUICK_MIN_ITEM_COUNT = 2
"""Rarer items share one embedding per category; a quick task has fewer behaviors an item."""
QUICK_USERS = 300
QUICK_TRAIN, QUICK_EVAL = 4_000, 1_500
"""Impressions of a quick task, at most, in the training split and in each of the others."""


@dataclass(frozen=True)
class Shown:
    """Impressions of one split and the moment as of which each may know its user's long-term history."""

    impressions: Impressions
    as_of: Ints
    """The history of an impression is its user's behaviors strictly before this second, which is never after the
    impression's own and never falls within a user, [I]."""

    def group_starts(self) -> Ints:
        """Return the first impression of each (user, as_of): those behind it read the same history."""
        user = self.impressions.user
        return np.flatnonzero(np.append(True, (user[1:] != user[:-1]) | (self.as_of[1:] != self.as_of[:-1])))


@dataclass(frozen=True)
class Task:
    """A data set with a question."""

    name: str
    question: str
    """One sentence for people."""
    histories: Histories
    """All behaviors, those of the splits too; `behavior_names` are the kinds."""
    vocabulary: Vocabulary
    """Of behaviors before the first validation impression: of all, or of the user where splits are per user."""
    train: Shown
    valid: Shown
    test: Shown
    details: dict[str, Any]
    """Counts, shares, lengths and notes for the report, as JSON can hold them."""


def make_task(
    name: str,
    question: str,
    histories: Histories,
    known: Histories,
    splits: Mapping[str, Shown],
    min_item_count: int,
    details: Mapping[str, Any],
) -> Task:
    """Put a task together and describe it.

    Args:
        name: as users call it.
        question: one sentence.
        histories: all behaviors.
        known: those that the vocabulary is made of.
        splits: `train`, `valid` and `test`.
        min_item_count: of the vocabulary.
        details: what else the report should say.

    Raises:
        DataError: a split lacks positives or negatives, or no item is frequent enough.
    """
    for split, shown in splits.items():
        labels = shown.impressions.labels
        if not 0 < labels.sum() < len(labels):
            raise DataError(
                f"task {name}, split {split}: found {len(labels):,} impressions with {int(labels.sum()):,} positives, "
                "expected both labels; give more users or a longer time"
            )
    vocabulary = build_vocabulary(known, min_item_count)
    described = _describe(histories, vocabulary) | {
        "splits": {split: _describe_split(histories, shown) for split, shown in splits.items()},
        **details,
    }
    return Task(name, question, histories, vocabulary, splits["train"], splits["valid"], splits["test"], described)


def _describe(histories: Histories, vocabulary: Vocabulary) -> dict[str, Any]:
    counts = np.bincount(histories.behaviors, minlength=len(histories.behavior_names))
    known = vocabulary.is_item(vocabulary.index(histories.item_ids, histories.category_ids))
    return {
        "users": len(histories),
        "behaviors": len(histories.item_ids),
        "items": len(np.unique(histories.item_ids)),
        "categories": len(vocabulary.category_ids),
        "kinds": {kind: int(count) for kind, count in zip(histories.behavior_names, counts, strict=True)},
        "history_length": _lengths(np.diff(histories.offsets)),
        "vocabulary_items": len(vocabulary.item_ids),
        "share_of_behaviors_in_vocabulary": float(known.mean()),
    }


def _describe_split(histories: Histories, shown: Shown) -> dict[str, Any]:
    impressions = shown.impressions
    return {
        "impressions": len(impressions),
        "positives": int(impressions.labels.sum()),
        "share_positive": float(impressions.labels.mean()),
        "share_first_time": float(impressions.first_time.mean()),
        "users": len(np.unique(impressions.user)),
        "histories": len(shown.group_starts()),
        "history_length": _lengths(history_lengths(histories, shown)),
    }


def _lengths(lengths: Ints) -> dict[str, int]:
    p50, p90 = np.percentile(lengths, (50, 90))
    return {"p50": round(p50), "p90": round(p90), "max": int(lengths.max())}


# --- histories and impressions -----------------------------------------------------------------------------


def history_lengths(histories: Histories, shown: Shown) -> Ints:
    """Return the length of the history of each impression, [I]."""
    user = shown.impressions.user
    return histories.rows_before(user, shown.as_of) - histories.offsets[user]


def only_users(histories: Histories, kept: Mask) -> Histories:
    """Return all behaviors of some of the users, [U]."""
    return histories.keep(kept[histories.user_of])


def some_users(histories: Histories, limit: int, rng: np.random.Generator) -> Histories:
    """Return all behaviors of `limit` users drawn at random; of all where there are no more."""
    if len(histories) <= limit:
        return histories
    kept = np.zeros(len(histories), bool)
    kept[rng.choice(len(histories), limit, replace=False)] = True
    return only_users(histories, kept)


def with_users(histories: Histories, user_ids: Ints) -> Histories:
    """Add the users that are not there yet, with no behaviors."""
    users = np.union1d(histories.user_ids, user_ids)
    counts = np.zeros(len(users), np.int64)
    counts[np.searchsorted(users, histories.user_ids)] = np.diff(histories.offsets)
    return replace(histories, user_ids=users, offsets=np.append(0, np.cumsum(counts)))


def some_impressions(impressions: Impressions, rows: Ints | Mask) -> Impressions:
    """Return some of the impressions, in their order."""
    return Impressions(
        impressions.user[rows],
        impressions.item_ids[rows],
        impressions.category_ids[rows],
        impressions.labels[rows],
        impressions.timestamps[rows],
        impressions.first_time[rows],
    )


def thin(shown: Shown, limit: int, rng: np.random.Generator) -> Shown:
    """Keep at most `limit` impressions, at least one history: all those of histories drawn at random."""
    if len(shown.as_of) <= limit:
        return shown
    starts = shown.group_starts()
    sizes = np.diff(np.append(starts, len(shown.as_of)))
    order = rng.permutation(len(starts))
    fits = np.cumsum(sizes[order]) <= limit
    fits[0] = True
    kept = np.zeros(len(starts), bool)
    kept[order[fits]] = True
    rows = np.repeat(kept, sizes)
    return Shown(some_impressions(shown.impressions, rows), shown.as_of[rows])


def quick_splits(splits: Mapping[str, Shown], rng: np.random.Generator) -> dict[str, Shown]:
    """Thin each split to what a quick task has."""
    return {split: thin(shown, QUICK_TRAIN if split == "train" else QUICK_EVAL, rng) for split, shown in splits.items()}
