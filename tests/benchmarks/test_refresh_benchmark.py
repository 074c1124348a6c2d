"""The benchmark of the refresh: its log is what it says, and it runs from end to end."""

from __future__ import annotations

import json
import math
import sys
from datetime import timedelta
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import floor, refresh, stages
from benchmarks.behaviors import (
    ACTIVE_SHARE,
    FIRST_DAY,
    LAST_DAY,
    MAX_LENGTH,
    MEDIAN_LENGTH,
    NUM_DAYS,
    bytes_per_behavior,
    make_log,
    make_space,
    write_days,
    write_last_day,
)
from encode.data.histories import read_histories
from encode.schema import day_start
from encode.storage import FolderStorage


def test_a_log_has_the_lengths_that_it_says():
    log = make_log(10_000_000)
    assert log.lengths.sum() == 10_000_000
    assert log.lengths.max() == MAX_LENGTH
    assert abs(np.median(log.lengths) / MEDIAN_LENGTH - 1) < 0.05
    assert len(np.unique(log.user_ids)) == len(log.user_ids)


def test_days_hold_all_behaviors_of_all_users(tmp_path):
    log, storage = make_log(30_000), FolderStorage(tmp_path / "store")
    write_days(storage, log, tmp_path / "scratch")
    histories, inputs = read_histories(storage, LAST_DAY)
    order = np.argsort(log.user_ids)
    assert len(inputs) == NUM_DAYS
    np.testing.assert_array_equal(histories.user_ids, log.user_ids[order])
    np.testing.assert_array_equal(np.diff(histories.offsets), log.lengths[order])
    np.testing.assert_array_equal(histories.category_ids, log.category_of[histories.item_ids])
    assert histories.timestamps.min() >= day_start(FIRST_DAY)
    assert not any((tmp_path / "scratch").iterdir())

    active = write_last_day(storage, log)
    after, _ = read_histories(storage, LAST_DAY + timedelta(days=1))
    assert active == max(1, round(ACTIVE_SHARE * len(log.user_ids)))
    assert int((np.diff(after.offsets) > np.diff(histories.offsets)).sum()) == active
    assert after.timestamps.max() < day_start(LAST_DAY + timedelta(days=1))


def test_items_of_a_category_lie_together_in_the_space():
    log = make_log(2_000)
    space = make_space(log)
    index = space.vocabulary.index(log.items[:20, :10])
    similarity = np.einsum("cip,djp->cdij", space.key[index], space.key[index]).mean((2, 3))
    assert similarity.diagonal().min() > 0.5 > np.abs(similarity - np.diag(similarity.diagonal())).mean() + 0.1


def test_a_behavior_is_longer_where_there_are_more_users():
    few, many = bytes_per_behavior(300_000, 10**9)
    assert 1 < few < many < 100


@pytest.mark.parametrize("tool", floor.tools())
def test_the_floor_moves_what_a_refresh_moves(tmp_path, tool):
    """The columns that histories hold, by user and time, and no other."""
    stages.generate(tmp_path, 3_000)
    files = sorted(str(path) for path in (tmp_path / "store").glob("behaviors/*/*.parquet"))
    floor.tools()[tool](files, tmp_path / "sorted.parquet")()
    table = pq.read_table(tmp_path / "sorted.parquet")
    assert table.column_names == ["user_id", "item_id", "category_id", "timestamp"]
    order = table.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    assert table["user_id"].equals(order["user_id"])
    assert table["timestamp"].equals(order["timestamp"])
    assert len(table) == 3_000


@pytest.mark.skipif(not floor.tools(), reason="the floor needs duckdb or polars")
def test_the_benchmark_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    def here(function, *args):
        return function(*args) | {"rss_gb": 1.0}

    monkeypatch.setattr(stages, "in_child", here)
    monkeypatch.setattr(stages, "_warm_up", cache(stages._warm_up))
    monkeypatch.setattr(refresh.signal, "signal", lambda *_: None)
    sizes, work, plot = (5_000, 15_000), tmp_path / "work", tmp_path / "plot.png"
    arguments = ["--json", "--behaviors", *map(str, sizes), "--plot", str(plot), "--workdir", str(work)]
    monkeypatch.setattr(sys, "argv", ["refresh", *arguments])
    refresh.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = result.pop("sizes")
    assert result.keys() >= {"vs_floor", "rss_ratio", "rss_gb", "incremental_ratio", "behaviors_per_s"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert [row["behaviors"] for row in rows] == list(sizes)
    assert all(1 < row["log_bytes_per_behavior"] < 100 for row in rows)
    assert plot.stat().st_size > 10_000
    assert not any(work.iterdir())


def test_a_child_reports_its_own_peak_memory_and_its_failure():
    assert 0.01 < stages.in_child(dict, [("x", 1)])["rss_gb"] < 10
    with pytest.raises(SystemExit, match="failed with 1"):
        stages.in_child(int, "not a number")


def test_the_second_round_is_in_another_order():
    (once, twice) = (refresh.plan([size], ["sorter"]) for size in (1_000, 10_000_000))
    assert [step.what for step in once] == ["generate", "sorter", "full", "active"]
    assert [step.what for step in twice] == ["generate", "sorter", "full", "active", "full", "active", "sorter"]


def test_a_folder_that_is_too_small_is_refused_and_left_clean(tmp_path):
    with pytest.raises(SystemExit, match="GB free"), refresh.scratch_folder(tmp_path, 10**15, keep=False):
        pass
    assert not any(tmp_path.iterdir())
