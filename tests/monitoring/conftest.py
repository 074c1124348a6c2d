"""A store with two snapshots of one space: 60 users, then a day more, a user erased and two new ones."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pytest
from made import draw_space

from encode.config import Places, RefreshConfig
from encode.data.erasures import erase_users
from encode.engines.local import LocalEngine
from encode.interests.refresh import refresh_interests
from encode.interests.snapshots import folder_of, write_space
from encode.outputs import read_manifest
from encode.pointers import read_pointer
from encode.schema import day_start

START, NUM_USERS, NUM_ITEMS = date(2024, 3, 1), 60, 80
CONFIG = RefreshConfig(min_buckets=4, max_drift=9.0)


def draw(number, users, num_rows):
    rng = np.random.default_rng(number)
    items = rng.integers(1, NUM_ITEMS + 1, num_rows)
    times = day_start(START + timedelta(number)) + rng.integers(0, 86_400, num_rows)
    return np.column_stack([rng.choice(users, num_rows), items, 1 + (items - 1) % 8, times])


@pytest.fixture(scope="session")
def space():
    return draw_space(NUM_ITEMS, 8, 4)


@pytest.fixture
def refresh(tmp_path, space):
    engine = LocalEngine(CONFIG, Places(store=str(tmp_path), scratch=tmp_path / "scratch"))

    def run(storage, number, config=CONFIG):
        day = START + timedelta(number)
        return refresh_interests(storage, [space.id], day, config, engine, lambda _: None)[1][space.id]

    return run


@pytest.fixture
def store(folder, write_day, refresh, space):
    write_space(folder, space, {})
    write_day(folder, START, draw(0, np.arange(1, NUM_USERS + 1), 1200))
    refresh(folder, 1)
    write_day(folder, START + timedelta(1), draw(1, [1, 2, 3, 101, 102], 90))
    erase_users(folder, [7])
    refresh(folder, 2)
    return folder


@pytest.fixture
def both(store, space):
    """Name and manifest of the earlier snapshot and the current one."""
    folder = folder_of(space.id)
    current = read_pointer(store, folder)[0].snapshot
    manifest = read_manifest(store, f"{folder}/{current}")
    [before] = [name.rpartition("/")[2] for name in manifest.inputs if name.startswith(f"{folder}/")]
    return [(name, read_manifest(store, f"{folder}/{name}")) for name in (before, current)]
