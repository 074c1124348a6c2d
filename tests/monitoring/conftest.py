"""A store with two snapshots of one space: 60 users, then a day more, a user erased and two new ones."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pytest

from encode.config import ClusteringConfig, Places, RefreshConfig
from encode.data.erasures import erase_users
from encode.data.vocabulary import Vocabulary
from encode.engines.local import LocalEngine
from encode.interests.refresh import refresh_interests
from encode.interests.snapshots import folder_of, write_space
from encode.model.space import Space, SpaceConfig
from encode.outputs import read_manifest
from encode.pointers import read_pointer
from encode.schema import day_start

START, NUM_USERS, NUM_ITEMS = date(2024, 3, 1), 60, 80
CONFIG = RefreshConfig(min_buckets=4, max_drift=9.0)


def make_space():
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(np.arange(1, 9), np.arange(1, NUM_ITEMS + 1), 1 + np.arange(NUM_ITEMS) % 8)
    embedding = rng.normal(size=(len(vocabulary), 6)).astype(np.float32)
    key = embedding[:, :4] / np.linalg.norm(embedding[:, :4], axis=1, keepdims=True)
    config = SpaceConfig(ClusteringConfig(num_clusters=4), "relevance", 5, 50)
    return Space(config, vocabulary, embedding, key, np.zeros((6, 4), np.float32), 8.0)


def draw(number, users, num_rows):
    rng = np.random.default_rng(number)
    items = rng.integers(1, NUM_ITEMS + 1, num_rows)
    times = day_start(START + timedelta(number)) + rng.integers(0, 86_400, num_rows)
    return np.column_stack([rng.choice(users, num_rows), items, 1 + (items - 1) % 8, times])


@pytest.fixture(scope="session")
def space():
    return make_space()


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
