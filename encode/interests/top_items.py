"""The most frequent items of an interest, counted by hash: compiled, and linear in the items."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from encode.compiled import compiled, hash_slot, table_bits

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]
NUM_TOP_ITEMS = 5


class Counter(NamedTuple):
    """A hash table with open addressing; all counts are 0 between uses."""

    item: Ints
    """[2^b], at least 2 n."""
    counts: Ints32
    """[2^b]"""
    used: Ints
    """Places of the items that were met, [n]."""
    top_counts: Ints
    """Of the top items, [5]."""


def counter_of(longest: int) -> Counter:
    """Return a table with room for `longest` items."""
    room = 1 << (2 * longest).bit_length()
    return Counter(
        np.empty(room, np.int64),
        np.zeros(room, np.int32),
        np.empty(longest, np.int64),
        np.empty(NUM_TOP_ITEMS, np.int64),
    )


@compiled
def top_items(items: Ints, counter: Counter, top: Ints) -> int:
    """Fill in the most frequent items, then the smaller id first, and return how many; linear in the items.

    Counting by hash leaves the order of the items undefined until here, where count and id decide it alone.
    """
    bits = table_bits(len(items))
    known, counts, used, top_counts = counter
    num_used, num_top = 0, 0
    for item in items:
        place = hash_slot(item, bits)
        while counts[place] != 0 and known[place] != item:
            place = (place + 1) & ((1 << bits) - 1)
        if counts[place] == 0:
            known[place] = item
            used[num_used] = place
            num_used += 1
        counts[place] += 1
    for place in used[:num_used]:
        item, count = known[place], np.int64(counts[place])
        counts[place] = 0
        rank = num_top
        while rank > 0 and (top_counts[rank - 1] < count or (top_counts[rank - 1] == count and top[rank - 1] > item)):
            rank -= 1
        if rank == NUM_TOP_ITEMS:
            continue
        num_top = min(num_top + 1, NUM_TOP_ITEMS)
        for other in range(num_top - 1, rank, -1):
            top_counts[other], top[other] = top_counts[other - 1], top[other - 1]
        top_counts[rank], top[rank] = count, item
    return num_top
