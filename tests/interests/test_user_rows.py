"""Rows as views are the rows that Arrow reads."""

import numpy as np
import pyarrow as pa
import pytest
from plain_rows import plain

from encode.interests.user_rows import UserRows
from encode.schema import interests_schema

SCHEMA = interests_schema(2, 3)


def batch(interests):
    """A row for each number of interests."""
    rng = np.random.default_rng(0)
    rows = []
    for user, count in enumerate(interests):
        row = {"user_id": user, "num_behaviors": 10 * count}
        row |= {name: rng.normal(size=(count, 2)).astype(np.float32).tolist() for name in ("center", "variance")}
        row["value"] = rng.normal(size=(count, 3)).astype(np.float32).tolist()
        row |= {name: rng.integers(1, 99, count).tolist() for name in ("size", "newest", "item_index", "item_times")}
        row["top_items"] = [rng.integers(1, 99, place % 4).tolist() for place in range(count)]
        row |= {f"recent_{name}": [user, count] for name in ("item_id", "category_id", "timestamp")}
        rows.append(row)
    return pa.RecordBatch.from_pylist(rows, SCHEMA)


@pytest.mark.parametrize(
    "rows",
    [
        batch([3, 0, 5, 1]),
        batch([3, 0, 5, 1]).slice(1, 2),
        batch([]),
        pa.Table.from_batches([batch([2, 0]), batch([4]).slice(0, 1)]).slice(1),
        SCHEMA.empty_table(),
    ],
    ids=["batch", "slice", "empty", "table", "empty table"],
)
def test_rows_are_those_that_arrow_reads(rows):
    found = [{name: plain(row[name]) for name in SCHEMA.names} for row in UserRows(rows)]
    assert found == rows.to_pylist()
    assert len(UserRows(rows)) == rows.num_rows
    for place in (-1, rows.num_rows):
        with pytest.raises(IndexError):
            UserRows(rows)[place]


def test_vectors_are_not_copied():
    rows = batch([3, 2])
    buffer = rows.column("center").values.values.buffers()[1]
    view = UserRows(rows)[1]["center"]
    assert view.shape == (2, 2)
    assert buffer.address <= view.__array_interface__["data"][0] < buffer.address + buffer.size
