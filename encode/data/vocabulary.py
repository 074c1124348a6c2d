"""From item and category ids to the dense index that every table uses.

Layout of the index: 0 padding, 1 unknown, then one "other item" for each category, then the items themselves.
An item that is rare or new is thus still known by its category.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from encode.data.histories import Histories
from encode.errors import DataError
from encode.schema import UNKNOWN

Ints = npt.NDArray[np.int64]
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
        place, known = _find(self.item_ids, item_ids)
        outside = np.full(item_ids.shape, UNKNOWN) if category_ids is None else self._find_categories(category_ids)
        return np.where(item_ids == 0, 0, np.where(known, self.num_categories + place, outside))

    def is_item(self, index: Ints) -> npt.NDArray[np.bool_]:
        """Tell which indices stand for one item rather than for padding, unknown or a category's others."""
        return index >= self.num_categories

    def items_at(self, index: Ints) -> Ints:
        """Return the item id of each index that `is_item`."""
        return self.item_ids[index - self.num_categories]

    def _find_categories(self, category_ids: Ints) -> Ints:
        place, known = _find(self.category_ids, category_ids)
        return np.where(known, _FIRST_CATEGORY + place, UNKNOWN)


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


def _find(sorted_ids: Ints, ids: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    if len(sorted_ids) == 0:
        return np.zeros(ids.shape, np.int64), np.zeros(ids.shape, bool)
    place = np.searchsorted(sorted_ids, ids).clip(max=len(sorted_ids) - 1)
    return place, sorted_ids[place] == ids
