"""A bucket's histories against plain sorting, its two files, and users read alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.data import buckets
from encode.data.buckets import ROWS, USERS, bucket_files, files_of, read_bucket, read_index
from encode.data.by_user import group
from encode.errors import ArtifactError
from encode.outputs import write_part
from encode.schema import HISTORIES
from encode.storage import FolderStorage

rows = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(0, 4))
ids = st.integers(1, 2**63 - 1)
large = st.tuples(ids, ids, st.integers(0, 2**63 - 1), st.integers(-(2**40), 2**40))


def as_array(rows):
    return np.array(rows, np.int64).reshape(-1, 4)


def slow(rows):
    return sorted(rows, key=lambda row: (row[0], row[3], row[1], row[2]))


def write(storage, prefix, rows, bucket=0):
    """Write the files of a bucket as a part of an output."""
    grouped = group(as_array(rows))
    users, behaviors = bucket_files(grouped)
    return [
        write_part(storage, prefix, f"part-{bucket:03d}{ending}", data).referenced(prefix)
        for ending, data in ((USERS, users), (ROWS, behaviors))
    ]


def draw(num_users=20, longest=30, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, num_users)
    users = np.repeat(rng.choice(10**6, num_users, replace=False) + 1, lengths)
    return np.column_stack([users, *(rng.integers(1, 100, len(users)) for _ in range(3))])


@settings(deadline=None)  # the first call compiles
@given(st.lists(rows, max_size=40) | st.lists(large, max_size=20))
def test_grouping_is_sorting(rows):
    grouped = group(as_array(rows))
    assert grouped.behaviors().tolist() == [list(row) for row in slow(rows)]
    assert grouped.user_ids.tolist() == sorted({row[0] for row in rows})
    assert np.diff(grouped.offsets).tolist() == [sum(r[0] == u for r in rows) for u in grouped.user_ids.tolist()]


@settings(deadline=None)  # the first call compiles
@given(st.lists(rows, max_size=30), st.randoms())
def test_the_order_of_rows_does_not_change_a_byte(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert bucket_files(group(as_array(rows))) == bucket_files(group(as_array(shuffled)))


def test_a_batch_is_histories():
    grouped = group(as_array([(7, 3, 1, 20), (5, 1, 1, 9), (7, 2, 0, 10), (5, 4, 2, 8), (9, 6, 3, 1)]))
    batch = grouped.batch(1, 3)
    assert batch.schema == HISTORIES
    assert batch.to_pylist() == [
        {"user_id": 7, "item_id": [2, 3], "category_id": [0, 1], "timestamp": [10, 20]},
        {"user_id": 9, "item_id": [6], "category_id": [3], "timestamp": [1]},
    ]


def test_marks_are_of_rows_and_add_up(tmp_path):
    """So that two states of a history are told apart without reading it, however it is spread over files."""
    storage = FolderStorage(tmp_path)
    everything = draw()
    whole = write(storage, "whole", everything)
    halves = write(storage, "first", everything[::2]) + write(storage, "second", everything[1::2])
    one, two = read_index(storage, "", whole, 0), read_index(storage, "", halves, 0)
    assert all((getattr(one, f.name) == getattr(two, f.name)).all() for f in dataclasses.fields(one))
    assert one.changed_since(two).tolist() == []
    swapped = everything.copy()
    swapped[0, [1, 2]] = swapped[0, [2, 1]] + 1000
    other = read_index(storage, "", write(storage, "other", swapped), 0)
    assert other.changed_since(one).tolist() == [everything[0, 0]]
    nobody = read_index(storage, "", [], 0)
    assert one.changed_since(nobody).tolist() == one.user_ids.tolist()
    assert nobody.changed_since(one).tolist() == []


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["whole files", "ranges"])
def test_users_read_alone_have_their_whole_history(tmp_path, monkeypatch, share):
    monkeypatch.setattr(buckets, "_WHOLE_FILE_SHARE", share)
    storage = FolderStorage(tmp_path)
    everything = draw()
    parts = write(storage, "first", everything[:150]) + write(storage, "second", everything[150:])
    parts += write(storage, "second", draw(seed=9), bucket=1)
    users = np.unique(everything[:, 0])
    for chosen in (users[:1], users[3:6], users[::4], np.array([users[2], 10**7]), np.zeros(0, np.int64), None):
        expected = everything if chosen is None else everything[np.isin(everything[:, 0], chosen)]
        found = read_bucket(storage, "", parts, 0, chosen)
        assert found.behaviors().tolist() == group(expected).behaviors().tolist()


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["whole files", "ranges"])
def test_damage_is_found(tmp_path, monkeypatch, share):
    monkeypatch.setattr(buckets, "_WHOLE_FILE_SHARE", share)
    storage = FolderStorage(tmp_path)
    parts = write(storage, "first", draw())
    key = parts[1].key("")
    data = bytearray(storage.get(key))
    data[-1] ^= 1
    storage.put(key, bytes(data))
    with pytest.raises(ArtifactError, match=r"part-000\.rows\.npy: damaged"):
        read_bucket(storage, "", parts, 0, read_index(storage, "", parts, 0).user_ids)
    storage.put(key, bytes(data[:-200]))
    with pytest.raises(ArtifactError, match=r"part-000\.rows\.npy: (damaged|ends before)"):
        read_bucket(storage, "", parts, 0, read_index(storage, "", parts, 0).user_ids)


def test_names_of_buckets_do_not_run_into_each_other(tmp_path):
    storage = FolderStorage(tmp_path)
    parts = [part for bucket in (1, 10, 100, 1000) for part in write(storage, "x", draw(), bucket)]
    for place, bucket in enumerate((1, 10, 100, 1000)):
        assert files_of(parts, bucket, "x") == parts[2 * place : 2 * place + 2]
