"""The made-up log: same seed, same rows; what is planted can be found again."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from encode.config import GeneratorConfig
from encode.data import generate as module
from encode.data.generate import generate, planted_categories, user_interests
from encode.errors import ConfigError
from encode.schema import SECONDS_PER_DAY, day_start

CONFIG = GeneratorConfig(num_users=60, num_items=500, num_categories=20, num_days=30, seed=3)


def table(config):
    return pa.Table.from_batches([raw.batch for raw in generate(config)])


def column(rows, name):
    return rows[name].cast(pa.int64()).to_numpy()


def test_the_same_seed_gives_the_same_rows_however_they_are_batched(monkeypatch):
    rows = table(CONFIG)
    monkeypatch.setattr(module, "_ROWS_PER_BATCH", 500)
    batches = list(generate(CONFIG))
    assert len(batches) > 5
    assert [b.first_row for b in batches[:2]] == [1, 1 + batches[0].batch.num_rows]
    assert pa.Table.from_batches([b.batch for b in batches]).combine_chunks().equals(rows.combine_chunks())
    other = table(CONFIG.model_copy(update={"seed": 4}))
    assert not other.combine_chunks().equals(rows.combine_chunks())


def test_rows_keep_the_contract():
    rows = table(CONFIG)
    users, items, categories = (column(rows, name) for name in ("user_id", "item_id", "category_id"))
    seconds = column(rows, "timestamp") // 1000
    assert np.unique(users).tolist() == list(range(1, 61))
    assert items.min() >= 1
    assert items.max() <= 500
    assert categories.min() >= 1
    assert categories.max() <= 20
    assert seconds.min() >= day_start(CONFIG.start)
    assert seconds.max() < day_start(CONFIG.start) + 30 * SECONDS_PER_DAY
    same_user = users[1:] == users[:-1]
    assert (np.diff(seconds)[same_user] > 0).all()
    # An item has one category.
    assert len(np.unique(items)) == len(np.unique(np.stack([items, categories]), axis=1).T)


def test_users_mostly_stay_with_their_interests_and_noise_has_its_share():
    rows, planted = table(CONFIG), planted_categories(CONFIG)
    users, categories = column(rows, "user_id"), column(rows, "category_id")
    assert len(planted) == len(users)
    assert (categories[planted != 0] == planted[planted != 0]).all()
    assert np.mean(planted == 0) == pytest.approx(CONFIG.noise, abs=0.02)
    for user in (1, 30, 60):
        interests = user_interests(CONFIG, user)
        assert len(set(interests)) == CONFIG.interests_per_user
        assert set(planted[users == user]) <= {0, *interests}


def test_items_are_popular_by_zipf_inside_a_category():
    config = GeneratorConfig(num_users=50, num_items=200, num_categories=2, interests_per_user=2, noise=0, seed=1)
    rows = table(config)
    items, categories = column(rows, "item_id"), column(rows, "category_id")
    counts = np.sort(np.unique(items[categories == 1], return_counts=True)[1])[::-1]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.35)


def test_lengths_reach_the_cap_and_time_still_suffices():
    config = GeneratorConfig(num_users=2, median_length=10**9, max_length=100_000, num_days=2)
    rows = table(config)
    assert rows.num_rows == 2 * SECONDS_PER_DAY  # half of the window's seconds, below the cap
    config = config.model_copy(update={"num_days": 60})
    assert table(config).num_rows == 200_000


@pytest.mark.parametrize(("key", "value"), [("interests_per_user", 21), ("num_categories", 501)])
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} {value} exceeds"):
        list(generate(CONFIG.model_copy(update={key: value})))
