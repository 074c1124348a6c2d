"""The most frequent items of each user, counted by sorting: compiled, and free of the GIL.

U users   N behaviors of all users   M items kept of a user   R items kept of all users
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from encode.compiled import compiled, read_only
from encode.schema import MOST_TIMES, UNKNOWN

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]
Counts = npt.NDArray[np.uint16]


class Items(NamedTuple):
    """The remembered items of U users, one user after the other, each user's ascending."""

    offsets: Ints32
    """Start of each user's items, then the end of the last, [U + 1]."""
    item: Ints32
    """Index in the vocabulary, [R]."""
    times: Counts
    """How many behaviors are with it, 1 to 65,535, [R]."""


def most_frequent(index: Ints, offsets: Ints, num_items: int) -> Items:
    """Return the items of each user that are most frequent, the smaller index first among equals.

    `relevance.remember` is the same for training. Padding and unknown items are not remembered.

    Args:
        index: of each behavior in the vocabulary, [N].
        offsets: start of each user's behaviors, then the end of the last, [U + 1].
        num_items: M at most, of a user.
    """
    room = int(np.minimum(np.diff(offsets), num_items).sum())
    found = Items(np.zeros(len(offsets), np.int32), np.empty(room, np.int32), np.empty(room, np.uint16))
    if room:
        _fill(read_only(_ordered(index, offsets)), read_only(offsets), num_items, *found)
    end = found.offsets[-1]
    return Items(found.offsets, found.item[:end], found.times[:end])


def _ordered(index: Ints, offsets: Ints) -> Ints:
    """Return the indices with those of each user ascending, [N]: numpy sorts in vectors, as no kernel of ours does."""
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.sort(user << 32 | index) & 0xFFFFFFFF


@compiled
def _fill(ordered: Ints, offsets: Ints, num_items: int, ends: Ints32, items: Ints32, counts: Counts) -> None:
    longest = np.diff(offsets).max()
    item, times = np.empty(longest, np.int64), np.empty(longest, np.int64)
    filled = 0
    for user in range(len(offsets) - 1):
        distinct = _count(ordered[offsets[user] : offsets[user + 1]], item, times)
        # Of the items with the smallest count that is kept, the first `of_lowest` are.
        lowest, of_lowest = 0, 0
        if distinct > num_items:
            kept = np.sort(times[:distinct])[distinct - num_items :]
            lowest = kept[0]
            of_lowest = (kept == lowest).sum()
        for place in range(distinct):
            if times[place] > lowest or (times[place] == lowest and of_lowest > 0):
                of_lowest -= times[place] == lowest
                items[filled] = item[place]
                counts[filled] = min(times[place], MOST_TIMES)
                filled += 1
        ends[user + 1] = filled


@compiled
def _count(ordered: Ints, item: Ints, times: Ints) -> int:
    """Fill in the distinct items of a user, ascending, and how often each occurs; return how many there are."""
    distinct = 0
    for i in range(len(ordered)):
        if ordered[i] > UNKNOWN:
            if distinct == 0 or ordered[i] != item[distinct - 1]:
                item[distinct] = ordered[i]
                times[distinct] = 0
                distinct += 1
            times[distinct - 1] += 1
    return distinct
