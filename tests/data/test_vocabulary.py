"""The vocabulary's index against a dictionary, for ids of any kind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.data.vocabulary import Vocabulary

LARGEST, SMALLEST = 2**63 - 1, -(2**63)
IDS = st.one_of(st.integers(1, 60), st.integers(1, 40).map(lambda k: k << 45), st.integers(1, LARGEST))


def ints(values):
    return np.array(list(values), np.int64)


def slow_index(words, items, categories):
    """A dictionary for the items, then one for the categories, then 1; 0 is padding."""
    known = {item: words.num_categories + place for place, item in enumerate(words.item_ids.tolist())}
    others = {category: 2 + place for place, category in enumerate(words.category_ids.tolist())}
    categories = [None] * len(items) if categories is None else categories
    return [0 if item == 0 else known.get(item, others.get(c, 1)) for item, c in zip(items, categories, strict=True)]


@given(st.sets(IDS, max_size=50), st.sets(IDS, max_size=9), st.lists(st.tuples(IDS, IDS), max_size=50), st.booleans())
@settings(deadline=None, max_examples=100)
def test_index_is_the_dictionary(items, categories, others, with_categories):
    words = Vocabulary(ints(sorted(categories)), ints(sorted(items)), ints([0] * len(items)))
    odd = [(item, 0) for item in (0, -1, SMALLEST, LARGEST, *items)] + [(-7, c) for c in (*categories, -1, LARGEST)]
    asked, of = (list(column) for column in zip(*others, *odd, strict=True))
    found = words.index(ints(asked), ints(of) if with_categories else None)
    assert found.dtype == np.int64
    assert found.tolist() == slow_index(words, asked, of if with_categories else None)


def test_index_by_hand():
    words = Vocabulary(ints([5, 9]), ints([100, 101, 107]), ints([5, 9, 0]))
    assert words.index(ints([0, 100, 107, 99, 99, 99]), ints([5, 5, 9, 9, 8, 0])).tolist() == [0, 4, 6, 3, 1, 1]
    assert words.index(ints([0, 100, 99])).tolist() == [0, 4, 1]
    assert words.index(ints([[100], [99]]), ints([[9], [5]])).tolist() == [[4], [2]]
    assert words.index(np.arange(100, 108)[::-1][::2]).tolist() == [6, 1, 1, 5]
    assert words.index(ints([])).shape == (0,)
    assert words.category_index.tolist() == [0, 1, 2, 3, 2, 3, 1]


@pytest.mark.parametrize("stride", [1, 987, 2**20, 2**40 + 2**20])
def test_many_items_in_regular_steps(stride):
    words = Vocabulary(ints([]), stride * np.arange(1, 100_001), np.zeros(100_000, np.int64))
    index = words.index(stride * np.arange(200_002))
    assert (index[1:100_001] == 2 + np.arange(100_000)).all()
    assert index[0] == 0
    assert (index[100_001:] == 1).all()


def test_arrays_that_cannot_be_written_and_many_threads():
    frozen = [ints(range(1, 4)), ints(range(10, 5000)), ints([1] * 4990)]
    for array in frozen:
        array.flags.writeable = False
    words, asked = Vocabulary(*frozen), np.arange(6000)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: words.index(asked, asked % 5), range(8)))
    expected = slow_index(words, asked.tolist(), (asked % 5).tolist())
    assert all(index.tolist() == expected for index in found)
