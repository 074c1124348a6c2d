"""Histories against a ten-line loop, and what counts as a partition."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encode.data.histories import Histories, history_batch, read_histories, to_histories
from encode.data.parquet import parquet_bytes
from encode.errors import ArtifactError
from encode.outputs import read_manifest, write_output
from encode.schema import BEHAVIORS, day_start
from encode.storage import FolderStorage

DAY = date(2024, 3, 5)


def table(rows):
    columns = list(zip(*rows, strict=True)) if rows else [()] * 5
    arrays = [pa.array(column, field.type) for column, field in zip(columns, BEHAVIORS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=BEHAVIORS)


def publish(storage, day, rows):
    prefix = f"behaviors/dt={day}"
    data = {"part-00000.parquet": parquet_bytes(table(rows))}
    return write_output(
        storage, prefix, data, kind="behaviors", fingerprint="f", config={}, inputs={}, counts={"rows": len(rows)}
    )


def as_dict(histories):
    found = {}
    for u, user in enumerate(histories.user_ids.tolist()):
        rows = slice(histories.offsets[u], histories.offsets[u + 1])
        names = [histories.behavior_names[code] for code in histories.behaviors[rows]]
        columns = (histories.timestamps[rows], histories.item_ids[rows], histories.category_ids[rows])
        found[user] = list(zip(*(c.tolist() for c in columns), names, strict=True))
    return found


def slow(rows, before=None):
    found = {}
    for user, item, category, behavior, timestamp in rows:
        if before is None or timestamp < before:
            found.setdefault(user, []).append((timestamp, item, category, behavior))
    return {user: sorted(found[user], key=lambda row: row[:3]) for user in sorted(found)}


behaviors = st.tuples(
    st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.sampled_from(["pv", "buy", "cart"]), st.integers(0, 9)
)


@given(st.lists(behaviors, max_size=40), st.integers(-1, 11))
def test_histories_agree_with_a_loop(rows, timestamp):
    histories = to_histories(table(rows))
    assert as_dict(histories) == slow(rows)
    assert as_dict(histories.before(timestamp)) == slow(rows, timestamp)
    assert len(histories) == len(slow(rows))
    assert histories.offsets[-1] == len(rows)
    assert histories.behavior_names == tuple(sorted({row[3] for row in rows}))
    kinds = [a.dtype for a in (histories.user_ids, histories.offsets, histories.item_ids, histories.timestamps)]
    assert kinds == [np.dtype(np.int64)] * 4
    assert histories.behaviors.dtype == np.int32


def test_days_are_read_up_to_the_end_and_from_the_start(tmp_path):
    storage = FolderStorage(tmp_path)
    rows, manifests = {}, {}
    for i in range(4):
        day = DAY + timedelta(days=i)
        # Each day has other behaviors, so that the dictionaries of the files differ.
        rows[day] = [(2, i + 1, 0, "abcd"[3 - i], day_start(day)), (1, 9, 1, "pv", day_start(day) + i)]
        manifests[day] = publish(storage, day, rows[day])
    days = sorted(rows)
    histories, inputs = read_histories(storage, days[3])
    assert as_dict(histories) == slow([row for day in days[:3] for row in rows[day]])
    assert inputs == {f"behaviors/dt={day}": manifests[day].digest() for day in days[:3]}
    histories, inputs = read_histories(storage, days[3], start=days[2])
    assert list(inputs) == [f"behaviors/dt={days[2]}"]
    assert as_dict(histories) == slow(rows[days[2]])


def test_an_unfinished_partition_counts_as_absent(tmp_path):
    storage = FolderStorage(tmp_path)
    publish(storage, DAY, [(1, 1, 1, "pv", day_start(DAY))])
    storage.put(f"behaviors/dt={DAY + timedelta(days=1)}/part-00000.parquet", b"half")
    assert len(read_histories(storage, date(2025, 1, 1))[1]) == 1
    with pytest.raises(ArtifactError, match=f"no validated day before {DAY}; validate the window first"):
        read_histories(storage, DAY)


def test_a_damaged_file_is_refused(tmp_path):
    storage = FolderStorage(tmp_path)
    publish(storage, DAY, [(1, 1, 1, "pv", day_start(DAY))])
    assert read_manifest(storage, f"behaviors/dt={DAY}") is not None
    storage.put(f"behaviors/dt={DAY}/part-00000.parquet", b"other")
    with pytest.raises(ArtifactError, match="damaged"):
        read_histories(storage, date(2025, 1, 1))


def test_history_batch_takes_users_in_any_order():
    rng = np.random.default_rng(0)
    rows = [(int(u), int(i), int(c), "pv", int(t)) for u, i, c, t in rng.integers(1, 9, (60, 4))]
    histories = to_histories(table(rows))
    for row, user in zip(history_batch(histories, np.array([3, 0, 3])).to_pylist(), (3, 0, 3), strict=True):
        own = slice(histories.offsets[user], histories.offsets[user + 1])
        assert row == {
            "user_id": histories.user_ids[user],
            "item_id": histories.item_ids[own].tolist(),
            "category_id": histories.category_ids[own].tolist(),
            "timestamp": histories.timestamps[own].tolist(),
        }
    none = Histories(*(np.zeros(n, np.int64) for n in (0, 1, 0, 0, 0)), np.zeros(0, np.int32), ())
    assert history_batch(none, np.zeros(0, np.int64)).num_rows == 0
