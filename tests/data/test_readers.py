"""Readers on good files and on broken ones."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encode.config import SourceConfig
from encode.data import text_formats
from encode.data.readers import RAW_COLUMNS, path_of, read_object, read_raw
from encode.errors import ConfigError, DataError

TAOBAO = "1,11,5,pv,1511544070\n1,12,5,buy,1511544080\n2,13,6,cart,1511544090\n"


def rows(source, path):
    """All rows as tuples, with the row number of each."""
    found = []
    for raw in read_raw(source, path):
        assert tuple(raw.batch.schema.names) == RAW_COLUMNS
        for i, row in enumerate(raw.batch.to_pylist()):
            malformed = raw.malformed is not None and bool(raw.malformed[i])
            found.append((raw.file, raw.first_row + i, malformed, *row.values()))
    return found


def source(reader, **settings):
    return SourceConfig(reader=reader, **settings)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_taobao_keeps_values_as_text_and_counts_lines_from_1(tmp_path):
    file = write(tmp_path / "UserBehavior.csv", TAOBAO)
    assert rows(source("taobao"), file) == [
        ("UserBehavior.csv", 1, False, "1", "11", "5", "pv", "1511544070"),
        ("UserBehavior.csv", 2, False, "1", "12", "5", "buy", "1511544080"),
        ("UserBehavior.csv", 3, False, "2", "13", "6", "cart", "1511544090"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + TAOBAO.encode(),
        TAOBAO.replace("\n", "\r\n").encode(),
        TAOBAO.rstrip().encode(),
        TAOBAO.encode() + b"\n\r\n\n",
    ],
    ids=["bom", "crlf", "no newline at the end", "blank lines at the end"],
)
def test_spellings_of_the_same_text_give_the_same_rows(tmp_path, text):
    plain = rows(source("taobao"), write(tmp_path / "a.csv", TAOBAO))
    assert [r[1:] for r in rows(source("taobao"), write(tmp_path / "b.csv", text))] == [r[1:] for r in plain]


def test_lines_with_too_few_or_many_fields_go_on_as_malformed_rows(tmp_path):
    file = write(tmp_path / "a.csv", b"1,11,5,pv,15\n1,11,5,pv\n\n1,11,5,pv,15,x\n2,12,6,buy,16\n" + b"\xff,1,2,3,4\n")
    assert [r[1:] for r in rows(source("taobao"), file)] == [
        (1, False, "1", "11", "5", "pv", "15"),
        (2, True, "1,11,5,pv", None, None, None, None),
        (3, True, "", None, None, None, None),
        (4, True, "1,11,5,pv,15,x", None, None, None, None),
        (5, False, "2", "12", "6", "buy", "16"),
        (6, True, "\\xff,1,2,3,4", None, None, None, None),
    ]


@pytest.mark.parametrize("size", [1, 7, 20, 64])
def test_blocks_of_any_size_give_the_same_rows(tmp_path, monkeypatch, size):
    text = "\ufeff" + "".join(f"{i},{i},1,pv,{i}\r\n" + "oops\n" * (i % 7 == 0) for i in range(1, 60)) + "\n\n"
    file = write(tmp_path / "a.csv", text)
    whole = rows(source("taobao"), file)
    monkeypatch.setattr(text_formats, "BLOCK_BYTES", max(size, 4))
    assert rows(source("taobao"), file) == whole
    assert len(whole) == 59 + 8


def test_recbole_finds_columns_by_name_and_fills_in_what_the_log_has_not(tmp_path):
    file = write(
        tmp_path / "ml.inter", "item_id:token\tuser_id:token\trating:float\ttimestamp:float\n7\t1\t3.5\t978300760\n"
    )
    assert rows(source("recbole", default_behavior="rating"), file) == [
        ("ml.inter", 2, False, "1", "7", 0, "rating", "978300760")
    ]


def test_movielens_dat_and_csv_give_the_same_rows(tmp_path):
    dat = write(tmp_path / "ratings.dat", "1::1193::5::978300760\n2::661::3::978302109\n")
    csv = write(
        tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,1193,5.0,978300760\n2,661,3.0,978302109\n"
    )
    settings = source("movielens", default_behavior="rating")
    assert [r[3:] for r in rows(settings, dat)] == [r[3:] for r in rows(settings, csv)]
    assert rows(settings, csv)[0] == ("ratings.csv", 2, False, "1", "1193", 0, "rating", "978300760")


def test_a_folder_is_all_its_files_in_order_and_nothing_else(tmp_path):
    for name in ("b/2.csv", "a.csv", "_temporary/x.csv", ".hidden.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, TAOBAO)
    write(tmp_path / "movies.txt", "not a log")
    assert [(r[0], r[1]) for r in rows(source("taobao"), tmp_path)] == [
        (name, line) for name in ("a.csv", "b/2.csv") for line in (1, 2, 3)
    ]


def test_parquet_keeps_types_and_maps_columns(tmp_path):
    pq.write_table(
        pa.table({"uid": [1, None], "item_id": ["x", "2"], "ts": [1.5, 2.0], "other": [0, 0]}), tmp_path / "a.parquet"
    )
    found = list(read_raw(source("parquet", columns={"user_id": "uid", "timestamp": "ts"}), tmp_path))
    assert [str(t) for t in found[0].batch.schema.types] == ["int64", "string", "int64", "string", "double"]
    assert found[0].batch.to_pylist()[1] == {
        "user_id": None, "item_id": "2", "category_id": 0, "behavior": "view", "timestamp": 2.0
    }  # fmt: skip


def good_parquet(rows=2000):
    sink = pa.BufferOutputStream()
    columns = {name: list(range(rows)) for name in ("user_id", "item_id", "timestamp")}
    pq.write_table(pa.table(columns), sink, compression="none", use_dictionary=False)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("reader", "name", "content", "words"),
    [
        ("parquet", "a.parquet", b"", "empty file"),
        ("parquet", "a.parquet", b"user,item\n1,2\n" * 50, "not a readable Parquet file"),
        ("parquet", "a.parquet", good_parquet()[:-100], "truncated"),
        ("parquet", "a.parquet", good_parquet()[:5000] + good_parquet()[9000:], "truncated"),
        ("taobao", "a.csv", b"", "empty file"),
        ("taobao", "a.csv", b"\n\n", "empty file"),
        ("taobao", "a.csv", b"\x1f\x8b" + b"\0" * 50, "found gzip, expected text"),
        ("taobao", "a.csv", good_parquet(), "found Parquet, expected text"),
        ("taobao", "a.csv", TAOBAO.encode("utf-16"), "UTF-16"),
        ("taobao", "a.csv", b"1::2::3::4\n" * 5, "not the taobao format: found '1::2::3::4', expected 5 fields"),
        ("taobao", "a.csv", b"x" * 3_000_000, "not text"),
        ("recbole", "a.inter", b"user_id:token\ttimestamp:float\n1\t2\n", "no column 'item_id' for item_id; found"),
        ("movielens", "ratings.csv", b"user,movieId,timestamp\n1,2,3\n", "no column 'userId' for user_id"),
        ("recbole", "a.inter", b"user_id:token\tuser_id:token\titem_id:token\ttimestamp:float\n", "occurs 2 times"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_is_refused_by_name(tmp_path, reader, name, content, words):
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=name) as error:
        rows(source(reader), file)
    assert words in str(error.value)


def test_parquet_without_a_column_or_with_one_of_a_wrong_type_is_refused(tmp_path):
    pq.write_table(pa.table({"user": [1], "item_id": [1], "timestamp": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'user_id'.*found user, item_id, timestamp; set source.columns"):
        rows(source("parquet"), tmp_path)
    with pytest.raises(DataError, match="no column 'kind' for behavior"):
        rows(source("parquet", columns={"user_id": "user", "behavior": "kind"}), tmp_path)
    pq.write_table(pa.table({"user_id": [[1]], "item_id": [1], "timestamp": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'user_id' is list<.*expected integers"):
        rows(source("parquet"), tmp_path)


def test_a_missing_log_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        rows(source("taobao"), tmp_path / "nothing")
    write(tmp_path / "a.tsv", "1")
    with pytest.raises(DataError, match=r"no \*.csv below it \(found .tsv\)"):
        rows(source("taobao"), tmp_path)
    with pytest.raises(ConfigError, match=r"source\.path is not set"):
        path_of(source("taobao"))


def test_an_object_in_memory_is_read_like_a_file(tmp_path):
    file = write(tmp_path / "a.csv", TAOBAO)
    (from_file,) = read_raw(source("taobao"), file)
    (from_memory,) = read_object(source("taobao"), "raw/a.csv", file.read_bytes())
    assert from_memory.batch.equals(from_file.batch)
    assert from_memory.file == "raw/a.csv"


def test_memory_holds_a_block_of_a_text_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_formats, "BLOCK_BYTES", 1000)
    file: Path = write(tmp_path / "a.csv", TAOBAO * 1000)
    batches = list(read_raw(source("taobao"), file))
    assert sum(b.batch.num_rows for b in batches) == 3000
    assert max(b.batch.num_rows for b in batches) < 60
