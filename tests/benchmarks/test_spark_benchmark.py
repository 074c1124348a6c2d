"""The benchmark of Spark's shuffle, with an engine that only calls."""

from __future__ import annotations

import sys

from benchmarks import spark


class Calling:
    """Stands for the Spark engine."""

    def __init__(self, places):
        pass

    def map(self, buckets, work):
        return map(work, buckets)

    def shuffle(self, sources, read, buckets, num_buckets, work):
        return [work(0, rows) for source in sources for rows in read(source)]

    def close(self):
        pass


def test_it_leaves_nothing_and_draws_users_up_to_the_id(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(spark, "SparkEngine", Calling)
    monkeypatch.setattr(spark, "ROWS_PER_SOURCE", 1000)
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "")
    monkeypatch.setattr(sys, "argv", ["spark", "--rows", "3000", "--max-user-id", "7"])
    spark.main()
    assert "3,000 rows, 3 sources" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    (rows,) = spark.read(7, 1)
    assert set(rows[:, 0].tolist()) == {1, 2, 3, 4, 5, 6, 7}
