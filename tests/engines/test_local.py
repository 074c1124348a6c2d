"""The local engine: rows reach their buckets, once, and nothing is left behind."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from encode.config import Places, RefreshConfig
from encode.engines.local import LocalEngine
from encode.errors import ConfigError
from encode.schema import bucket_of

NUM_BUCKETS = 8


@pytest.fixture
def scratch(tmp_path):
    return tmp_path / "scratch"


@pytest.fixture
def engine(tmp_path, scratch, monkeypatch):
    """On three cores, however many this machine has."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    return LocalEngine(RefreshConfig(), Places(store=str(tmp_path), scratch=scratch))


def rows_of(source):
    rng = np.random.default_rng(source)
    return np.column_stack([rng.integers(1, 100, 500), *(rng.integers(0, 9, 500) for _ in range(3))])


def read(source):
    rows = rows_of(source)
    yield rows[:123]
    yield rows[123:123]
    yield rows[123:]


def tell(bucket, rows):
    return {"bucket": bucket, "rows": sorted(rows.tolist())}


def test_every_row_reaches_its_bucket_once(engine, scratch):
    everything = np.concatenate([rows_of(source) for source in range(7)])
    expected = bucket_of(everything[:, 0], NUM_BUCKETS)
    results = {r["bucket"]: r["rows"] for r in engine.shuffle(range(7), read, range(NUM_BUCKETS), NUM_BUCKETS, tell)}
    assert results == {b: sorted(everything[expected == b].tolist()) for b in range(NUM_BUCKETS)}
    assert list(scratch.iterdir()) == []


def test_only_wanted_buckets_are_worked_on_even_without_rows(engine):
    results = {r["bucket"]: r["rows"] for r in engine.shuffle([3], read, [1, 6], NUM_BUCKETS, tell)}
    rows = rows_of(3)
    assert results == {b: sorted(rows[bucket_of(rows[:, 0], NUM_BUCKETS) == b].tolist()) for b in (1, 6)}
    assert [r["rows"] for r in engine.shuffle([], read, [2], NUM_BUCKETS, tell)] == [[]]


def test_buckets_are_worked_on_at_the_same_time(engine):
    """Each waits for the other."""
    meeting = threading.Barrier(engine.num_workers, timeout=20)

    def work(bucket):
        meeting.wait()
        return {"bucket": bucket}

    assert engine.num_workers == 3
    assert len(list(engine.map(range(2 * engine.num_workers), work))) == 2 * engine.num_workers


def test_after_a_failure_nothing_more_is_started_or_left(engine, scratch):
    begun = []

    def work(bucket, rows):
        begun.append(bucket)
        raise ValueError(f"bucket {bucket}")

    with pytest.raises(ValueError, match="bucket"):
        list(engine.shuffle([1], read, range(NUM_BUCKETS), NUM_BUCKETS, work))
    assert len(begun) <= engine.num_workers
    assert list(scratch.iterdir()) == []


def test_rows_of_a_process_that_died_are_removed_and_of_one_that_lives_are_kept(engine, scratch):
    dead = scratch / "encode-rows-dead"
    dead.mkdir(parents=True)
    (dead / "bucket-00000").write_bytes(b"x")
    shuffling = engine.shuffle([1], read, range(NUM_BUCKETS), NUM_BUCKETS, tell)
    next(shuffling)
    assert not dead.exists()
    (alive,) = scratch.iterdir()
    list(engine.shuffle([1], read, range(NUM_BUCKETS), NUM_BUCKETS, tell))
    assert list(scratch.iterdir()) == [alive]
    shuffling.close()
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("memory_gb", "at_once"), [(0.1, 1), (1.0, 1), (1.3, 2), (9.0, 3)])
def test_less_memory_means_fewer_at_a_time(engine, tmp_path, memory_gb, at_once):
    """768 MiB are the process; a bucket takes 256; one is worked on whatever it takes."""
    engine = LocalEngine(RefreshConfig(memory_gb=memory_gb), Places(store=str(tmp_path), scratch=tmp_path))
    working, most, lock = set(), [], threading.Lock()

    def work(bucket, *_):
        with lock:
            working.add(bucket)
            most.append(len(working))
        time.sleep(0.02)
        with lock:
            working.discard(bucket)
        return {}

    list(engine.map(range(6), work, lambda bucket: 256 << 20))
    assert max(most) == at_once
    most.clear()
    list(engine.shuffle([1], read, range(6), NUM_BUCKETS, work, lambda bucket, rows: 256 << 20))
    assert max(most) == at_once


def test_memory_is_asked_for_with_the_rows_that_there_are(engine):
    asked = {}
    list(engine.shuffle([1], read, range(NUM_BUCKETS), NUM_BUCKETS, tell, lambda *told: asked.update([told]) or 0))
    expected = np.bincount(bucket_of(rows_of(1)[:, 0], NUM_BUCKETS), minlength=NUM_BUCKETS)
    assert all(expected[bucket] <= rows <= expected[bucket] + 2 for bucket, rows in asked.items())  # 2 pieces
    assert len(asked) == NUM_BUCKETS


def test_without_buckets_nothing_is_read(engine):
    def unreadable(source):
        raise AssertionError(source)

    assert list(engine.shuffle([1, 2], unreadable, [], NUM_BUCKETS, tell)) == []


def test_a_scratch_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    engine = LocalEngine(RefreshConfig(), Places(store=str(tmp_path), scratch=tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"scratch folder .*file: .*; set ENCODE_SCRATCH to another"):
        list(engine.shuffle([1], read, [0], 1, tell))
