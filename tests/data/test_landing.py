"""A log into raw days: counts reconcile, a second time is a no-op, a conflict overwrites nothing."""

from __future__ import annotations

import hashlib
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encode.config import GeneratorConfig, SourceConfig
from encode.data import landing
from encode.data.landing import land
from encode.data.parquet import read_parquet
from encode.errors import DataError
from encode.outputs import read_manifest
from encode.schema import day_start
from encode.storage import FolderStorage

FIRST, SECOND = date(2017, 11, 25), date(2017, 11, 26)
T1, T2 = day_start(FIRST), day_start(SECOND)
GENERATED = SourceConfig(reader="generated", generator=GeneratorConfig(num_users=20, median_length=50, num_days=5))


def taobao(folder, text, name="log.csv", **settings):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return SourceConfig(reader="taobao", path=folder / name, **settings)


def content(storage):
    return {key: hashlib.sha256(storage.get(key)).hexdigest() for key in storage.list("")}


def rows(storage, key):
    return read_parquet(storage.get(key)).to_pylist()


def test_rows_go_to_their_day_and_those_without_one_to_quarantine(tmp_path):
    storage = FolderStorage(tmp_path / "store")
    lines = [f"1,11,5,pv,{T1}", f"2,x,5,buy,{T2 - 1}", f"3,12,6,pv,{T2}", "4,1,1,pv,", f"5,1,1,pv,{T1}000", "oops"]
    said = []
    report = land(storage, taobao(tmp_path / "in", "\n".join(lines)), say=said.append)
    assert report.days == (FIRST, SECOND)
    assert (report.rows, report.landed, report.quarantined) == (6, 3, 3)
    assert report.reasons == {"malformed_row": 1, "timestamp_looks_like_ms": 1, "timestamp_missing": 1}
    assert any("3 rows without a day" in line for line in said)
    # What is wrong with other columns is none of landing's business.
    assert rows(storage, f"raw/dt={FIRST}/part-00000.landed.parquet") == [
        {"user_id": "1", "item_id": "11", "category_id": "5", "behavior": "pv", "timestamp": str(T1)},
        {"user_id": "2", "item_id": "x", "category_id": "5", "behavior": "buy", "timestamp": str(T2 - 1)},
    ]
    lost = rows(storage, f"quarantine/dt=unknown/{report.fingerprint}/part-00000.parquet")
    assert [(row["row"], row["reason"], row["user_id"]) for row in lost] == [
        (4, "timestamp_missing", "4"),
        (5, "timestamp_looks_like_ms", "5"),
        (6, "malformed_row", "oops"),
    ]
    assert report.summary()["first_day"] == str(FIRST)


def test_a_second_landing_is_a_no_op_and_one_elsewhere_gives_the_same_bytes(tmp_path, monkeypatch):
    storage, elsewhere = FolderStorage(tmp_path / "a"), FolderStorage(tmp_path / "b")
    first = land(storage, GENERATED)
    before = content(storage)
    land(elsewhere, GENERATED)
    assert content(elsewhere) == before
    monkeypatch.setattr(landing, "_sort_into_days", lambda *_: pytest.fail("the log was read again"))
    again = land(storage, GENERATED)
    assert again.unchanged
    assert not first.unchanged
    assert (again.rows, again.days) == (first.rows, first.days)
    assert content(storage) == before


def test_a_log_larger_than_the_buffer_loses_nothing_and_keeps_its_order(tmp_path, monkeypatch):
    whole, spilled = FolderStorage(tmp_path / "a"), FolderStorage(tmp_path / "b")
    report = land(whole, GENERATED)
    monkeypatch.setattr(landing, "MAX_BUFFERED_ROWS", 100)
    monkeypatch.setattr("encode.data.generate._ROWS_PER_BATCH", 60)
    assert land(spilled, GENERATED).rows == report.rows
    for day in report.days:
        parts = [key for key in spilled.list(f"raw/dt={day}/") if key.endswith(".parquet")]
        assert len(parts) > 1
        expected = rows(whole, f"raw/dt={day}/part-00000.landed.parquet")
        assert [row for part in parts for row in rows(spilled, part)] == expected


def test_files_that_differ_in_their_types_land_side_by_side(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for i, ids in enumerate([pa.array([1, 2]), pa.array(["3", "x"])]):
        pq.write_table(pa.table({"user_id": ids, "item_id": [1, 2], "timestamp": [T1, T1]}), source / f"{i}.parquet")
    storage = FolderStorage(tmp_path / "store")
    assert land(storage, SourceConfig(path=source)).landed == 4
    assert [rows(storage, f"raw/dt={FIRST}/part-0000{i}.landed.parquet")[1]["user_id"] for i in (0, 1)] == [2, "x"]


def test_a_day_of_another_log_is_named_and_nothing_is_written(tmp_path):
    storage = FolderStorage(tmp_path / "store")
    land(storage, taobao(tmp_path / "one", f"1,11,5,pv,{T2}\n"))
    before = content(storage)
    with pytest.raises(DataError, match=rf"1 day there already.*raw/dt={SECOND} holds 1 row of another log"):
        land(storage, taobao(tmp_path / "two", f"1,11,5,pv,{T1}\n9,11,5,pv,{T2}\n"))
    assert content(storage) == before


def test_a_day_with_files_of_its_owner_is_left_alone(tmp_path):
    storage = FolderStorage(tmp_path / "store")
    storage.put(f"raw/dt={FIRST}/export-7.csv", b"1,2,3,pv,4\n")
    with pytest.raises(DataError, match="holds 1 file not landed from here"):
        land(storage, taobao(tmp_path / "in", f"1,11,5,pv,{T1}\n"))
    assert storage.list("") == [f"raw/dt={FIRST}/export-7.csv"]


def test_the_same_rows_from_another_place_or_a_longer_log_are_no_conflict(tmp_path):
    storage = FolderStorage(tmp_path / "store")
    text = f"1,11,5,pv,{T1}\n"
    first = land(storage, taobao(tmp_path / "one", text))
    assert land(storage, taobao(tmp_path / "two", text)).unchanged
    longer = land(storage, taobao(tmp_path / "three", text + f"1,12,5,pv,{T2}\n"))
    assert longer.fingerprint != first.fingerprint
    assert longer.days == (FIRST, SECOND)


def test_a_day_that_was_removed_comes_back(tmp_path):
    storage = FolderStorage(tmp_path / "store")
    land(storage, GENERATED)
    before = content(storage)
    (tmp_path / "store" / "raw" / "dt=2024-01-03" / "manifest.json").unlink()
    assert not land(storage, GENERATED).unchanged
    assert content(storage) == before


def test_killed_while_writing_it_can_run_again(tmp_path, monkeypatch):
    storage, whole = FolderStorage(tmp_path / "a"), FolderStorage(tmp_path / "b")
    land(whole, GENERATED)
    real = landing.write_output

    def dies(storage, prefix, *args, **settings):
        if prefix.endswith("03"):
            raise ConnectionError
        return real(storage, prefix, *args, **settings)

    monkeypatch.setattr(landing, "write_output", dies)
    with pytest.raises(ConnectionError):
        land(storage, GENERATED)
    monkeypatch.setattr(landing, "write_output", real)
    assert read_manifest(storage, "raw/dt=2024-01-03") is None
    land(storage, GENERATED)
    assert content(storage) == content(whole)


def test_a_log_in_which_no_row_has_a_day_is_refused_with_the_likely_remedy(tmp_path):
    storage = FolderStorage(tmp_path / "store")
    with pytest.raises(DataError, match=r"none of its 2 rows.*timestamp_looks_like_ms 2.*source.time_unit"):
        land(storage, taobao(tmp_path / "in", f"1,11,5,pv,{T1}000\n" * 2))
    assert storage.list("") == []
    assert land(storage, taobao(tmp_path / "in", f"1,11,5,pv,{T1}000\n", time_unit="ms")).days == (FIRST,)


def test_a_log_without_rows_is_refused(tmp_path):
    pq.write_table(
        pa.table({name: pa.array([], pa.int64()) for name in ("user_id", "item_id", "timestamp")}),
        tmp_path / "a.parquet",
    )
    with pytest.raises(DataError, match="no rows"):
        land(FolderStorage(tmp_path / "store"), SourceConfig(path=tmp_path / "a.parquet"))
