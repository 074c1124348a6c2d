"""From item and category ids to the dense index that every table uses.

Layout of the index: 0 padding, 1 unknown, then one "other item" for each category, then the items themselves.
An item that is rare or new is thus still known by its category.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from encode.compiled import compiled, hash_slot, read_only, table_bits
from encode.data.histories import Histories
from encode.errors import DataError
from encode.schema import PADDING, UNKNOWN

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]
_FIRST_CATEGORY = 2


@dataclass(frozen=True)
class Vocabulary:
    """The items and categories that a space knows."""

    category_ids: Ints
    """Ascending, [C]."""
    item_ids: Ints
    """Ascending, [I]."""
    item_category_ids: Ints
    """Category id of each item, 0 for none, [I]."""

    def __len__(self) -> int:
        """Return V: the number of indices."""
        return _FIRST_CATEGORY + len(self.category_ids) + len(self.item_ids)

    @property
    def num_categories(self) -> int:
        """Number of category indices, padding and unknown included."""
        return _FIRST_CATEGORY + len(self.category_ids)

    @cached_property
    def category_index(self) -> Ints:
        """Category index of each index, [V]."""
        own = np.arange(self.num_categories)
        return np.concatenate([own, self._find_categories(self.item_category_ids)])

    def index(self, item_ids: Ints, category_ids: Ints | None = None) -> Ints:
        """Return the index of each item; an item outside falls back to its category, then to unknown.

        Args:
            item_ids: any shape; 0 is padding and stays 0.
            category_ids: same shape; None where no category is known for items outside.
        """
        ids = np.asarray(item_ids, np.int64)
        index = _find(ids, self.item_ids, self._item_table)
        outside = np.flatnonzero(index < 0)
        index += self.num_categories
        if category_ids is None:
            index[outside] = UNKNOWN
        elif len(outside):
            index[outside] = self._find_categories(np.asarray(category_ids, np.int64).ravel()[outside])
        index[ids.ravel() == PADDING] = PADDING
        return index.reshape(ids.shape)

    def is_item(self, index: Ints) -> npt.NDArray[np.bool_]:
        """Tell which indices stand for one item rather than for padding, unknown or a category's others."""
        return index >= self.num_categories

    def items_at(self, index: Ints) -> Ints:
        """Return the item id of each index that `is_item`."""
        return self.item_ids[index - self.num_categories]

    @cached_property
    def _item_table(self) -> Ints32:
        table: Ints32 = _hash_table(read_only(self.item_ids))
        return table

    @cached_property
    def _category_table(self) -> Ints32:
        table: Ints32 = _hash_table(read_only(self.category_ids))
        return table

    def _find_categories(self, category_ids: Ints) -> Ints:
        place = _find(category_ids, self.category_ids, self._category_table)
        return np.where(place < 0, UNKNOWN, _FIRST_CATEGORY + place)


def build_vocabulary(histories: Histories, min_item_count: int) -> Vocabulary:
    """Take every category, and every item with at least `min_item_count` behaviors, as of the end of `histories`.

    An item that changed its category keeps the one of its last behavior.

    Raises:
        DataError: no item is frequent enough.
    """
    order = np.lexsort((histories.category_ids, histories.timestamps, histories.item_ids))
    items = histories.item_ids[order]
    last = np.flatnonzero(np.append(items[1:] != items[:-1], True)) if len(items) else np.zeros(0, np.int64)
    counts = np.diff(last, prepend=-1)
    kept = last[counts >= min_item_count]
    if len(kept) == 0:
        raise DataError(
            f"vocabulary: no item has {min_item_count} behaviors (most frequent: {counts.max(initial=0)} of "
            f"{len(items)} behaviors); lower training.min_item_count or give more days"
        )
    categories = np.unique(histories.category_ids)
    return Vocabulary(categories[categories != 0], items[kept], histories.category_ids[order][kept])


# --- compiled ----------------------------------------------------------------------------------------------


def _find(ids: Ints, sorted_ids: Ints, table: Ints32) -> Ints:
    """Return the place in `sorted_ids` of each id, flat, -1 where it is not there."""
    place = np.empty(ids.size, np.int64)
    _look_up(read_only(ids.ravel()), read_only(sorted_ids), read_only(table), place)
    return place


@compiled
def _look_up(ids: Ints, sorted_ids: Ints, table: Ints32, place: Ints) -> None:
    mask = len(table) - 1
    bits = table_bits(len(table) // 2)
    for i in range(len(ids)):
        slot = hash_slot(ids[i], bits)
        while table[slot] >= 0 and sorted_ids[table[slot]] != ids[i]:
            slot = (slot + 1) & mask
        place[i] = table[slot]


@compiled
def _hash_table(ids: Ints) -> Ints32:
    """Return an open-addressing table of places in `ids`, at most half full, -1 where it is empty."""
    bits = table_bits(len(ids))
    table = np.full(1 << bits, -1, np.int32)
    for place in range(len(ids)):
        slot = hash_slot(ids[place], bits)
        while table[slot] >= 0:
            slot = (slot + 1) & (len(table) - 1)
        table[slot] = place
    return table
