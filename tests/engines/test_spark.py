"""The Spark engine, on a cluster of two executor processes."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import draw_space

import encode
from encode.config import Places, RefreshConfig
from encode.data.erasures import erase_users
from encode.engines import spark, spark_session
from encode.engines.local import LocalEngine
from encode.engines.spark import SparkEngine
from encode.errors import ArtifactError, ConfigError, DataError, QualityError
from encode.interests.refresh import refresh_interests
from encode.interests.snapshots import write_space
from encode.schema import bucket_of
from encode.storage import open_storage

MASTER = "local-cluster[2,1,2048]"
NUM_BUCKETS = 8
ABSENT = [name for name, found in [("pyspark", find_spec("pyspark")), ("java", shutil.which("java"))] if not found]
needs_spark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {' and '.join(ABSENT)}")
# Ours moves Arrow only; no pandas frame is made.
pytestmark = pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning")


def places(**changes):
    return Places(store="/nowhere", spark_master=MASTER).model_copy(update=changes)


# --- what a session refuses, with or without Spark ----------------------------------------------------------


def test_a_missing_master_is_named(monkeypatch):
    monkeypatch.setattr(spark_session, "require_pyspark", lambda: None)
    monkeypatch.setattr(spark_session, "running", lambda: None)
    with pytest.raises(ConfigError, match=r"ENCODE_SPARK_MASTER is not set.*spark://host:port"):
        SparkEngine(places(spark_master=None))


def test_missing_pyspark_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(ConfigError, match=r"pip install 'encode-interests\[spark\]'"):
        SparkEngine(places())


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ('openjdk version "11.0.22" 2024-01-16', "Java 11 by PATH"),
        ('java version "1.8.0_402"', "Java 8 by PATH"),
        ("exec format error", "'exec format error' by PATH"),
    ],
)
def test_an_old_java_is_named(monkeypatch, tmp_path, told, found):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\necho '{told}' >&2\n")
    java.chmod(0o755)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ConfigError, match=f"found {found}; Spark needs Java 17 or newer"):
        spark_session.require_java()


@pytest.mark.parametrize("told", ['openjdk version "17.0.15" 2025-04-15', 'openjdk version "25" 2025-09-16'])
def test_a_new_java_passes(monkeypatch, tmp_path, told):
    (tmp_path / "bin").mkdir()
    java = tmp_path / "bin" / "java"
    java.write_text(f"#!/bin/sh\necho '{told}' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    spark_session.require_java()


def test_missing_java_is_named(monkeypatch):
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    with pytest.raises(ConfigError, match="no java found by JAVA_HOME=/nowhere; Spark needs Java 17"):
        spark_session.require_java()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"no java found by PATH; Spark needs Java 17 .*openjdk"):
        spark_session.require_java()


# --- packing, without Spark ---------------------------------------------------------------------------------


def rows_of(count, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers([1, 1, 0, 10**9], [40, 2**62, 9, 2 * 10**9], (count, 4))


def as_sets(rows):
    return sorted(map(tuple, rows.tolist()))


@given(sizes=st.lists(st.integers(0, 30), max_size=8), chunk=st.integers(1, 20), wanted=st.sets(st.integers(0, 7)))
@settings(deadline=None, max_examples=50)
def test_what_is_packed_is_unpacked(sizes, chunk, wanted):
    """Whatever the size of pieces and packs: each wanted bucket gets its rows once, others none."""
    pieces = [rows_of(size, seed) for seed, size in enumerate(sizes)]
    buckets = sorted(wanted, reverse=True) or [3]
    slots = np.full(NUM_BUCKETS, -1, np.int16)
    slots[buckets] = np.arange(len(buckets))
    got = {bucket: [] for bucket in buckets}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spark, "_ROWS_PER_PACK", chunk)
        batch = pa.RecordBatch.from_pydict({"id": [0]})
        for packs in spark._scatter(encode.__version__, (pieces,), iter, slots, [batch]):
            packs.validate(full=True)
            assert packs.num_rows <= len(buckets)
            for slot, data in zip(packs["slot"].to_pylist(), packs["rows"].to_pylist(), strict=True):
                got[buckets[slot]] += as_sets(np.frombuffer(data, np.int64).reshape(-1, 4))
    every = np.concatenate([np.empty((0, 4), np.int64), *pieces])
    home = bucket_of(every[:, 0], NUM_BUCKETS)
    assert {bucket: sorted(rows) for bucket, rows in got.items()} == {
        bucket: as_sets(every[home == bucket]) for bucket in buckets
    }


def test_ids_never_pass_through_floats():
    with pytest.raises(TypeError, match="safe"):
        list(spark._in_chunks([rows_of(3).astype(np.float64)]))


# --- on a cluster -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spark_settings(tmp_path_factory):
    """A Spark home of our own, since workers of a local cluster write below it, with a user's settings in it."""
    home, log = tmp_path_factory.mktemp("spark"), tmp_path_factory.mktemp("events")
    installed = Path(find_spec("pyspark").origin).parent
    for name in ("bin", "jars", "python"):
        if (installed / name).exists():
            (home / name).symlink_to(installed / name)
    (home / "conf").mkdir()
    (home / "conf" / "spark-defaults.conf").write_text(
        "spark.eventLog.enabled true\nspark.eventLog.compress false\n"
        f"spark.eventLog.dir {log.as_uri()}\nspark.executorEnv.MKL_NUM_THREADS 2\n"
    )
    shutil.copy(Path(spark.__file__).with_name("log4j2.properties"), home / "conf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_HOME", str(home))
        yield log


@pytest.fixture(scope="module")
def engine(spark_settings):
    from pyspark import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # executors cannot import tests
    engine = SparkEngine(places())
    yield engine
    engine.close()


@pytest.fixture
def store(request, tmp_path, object_store):
    """The places of a folder that executors share, or of a prefix in the object store."""
    if request.param == "folder":
        return places(store=str(tmp_path))
    return places(
        store=f"s3://{object_store.bucket}/spark-{secrets.token_hex(4)}",
        endpoint_url=object_store.endpoint_url,
        access_key=object_store.access_key,
        secret_key=Places(store="-", secret_key=object_store.secret_key).secret_key,
    )


def read_seed(seed):
    """Some pieces, one of them empty."""
    yield from np.array_split(rows_of(1000, seed), 3)
    yield np.empty((0, 4), np.int64)


def summary(bucket, rows):
    """What depends on every value, and on no order."""
    return {
        "bucket": bucket,
        "shape": list(rows.shape),
        "dtype": str(rows.dtype),
        "rows": as_sets(rows),
        "pid": os.getpid(),
        "threads": [os.environ.get(f"{name}_NUM_THREADS") for name in ("OMP", "NUMBA", "MKL")],
    }


@needs_spark
def test_every_bucket_gets_its_rows_once(engine):
    seeds = [5, 6, 7]
    results = list(engine.shuffle(seeds, read_seed, [6, 1, 0, 3], NUM_BUCKETS, summary))
    every = np.concatenate([rows_of(1000, seed) for seed in seeds])
    home = bucket_of(every[:, 0], NUM_BUCKETS)
    assert [result["bucket"] for result in results] == [0, 1, 3, 6]
    for result in results:
        expected = as_sets(every[home == result["bucket"]])
        assert expected
        assert result["rows"] == json.loads(json.dumps(expected))
        assert result["shape"] == [len(expected), 4]
        assert result["dtype"] == "int64"
        assert result["threads"] == ["1", "1", "2"]  # the last as spark-defaults.conf says
    pids = {result["pid"] for result in results}
    assert os.getpid() not in pids
    assert len(pids) == 2


@needs_spark
def test_buckets_without_rows_are_worked_on(engine):
    def one_user(source):
        yield np.array([[source, 2, 3, 4]])

    def shape(bucket, rows):
        return {"bucket": bucket, "shape": list(rows.shape), "dtype": str(rows.dtype)}

    home = int(bucket_of(np.array([11]), NUM_BUCKETS)[0])
    assert list(engine.shuffle([11, 11], one_user, range(NUM_BUCKETS), NUM_BUCKETS, shape)) == [
        {"bucket": bucket, "shape": [2 if bucket == home else 0, 4], "dtype": "int64"} for bucket in range(NUM_BUCKETS)
    ]
    assert list(engine.shuffle([], one_user, [4], NUM_BUCKETS, shape)) == [
        {"bucket": 4, "shape": [0, 4], "dtype": "int64"}
    ]
    assert list(engine.shuffle([11], one_user, [], NUM_BUCKETS, shape)) == []


@needs_spark
def test_map(engine):
    factor = np.arange(10)
    assert list(engine.map([4, 2], lambda bucket: {"bucket": bucket, "value": int(factor[bucket])})) == [
        {"bucket": 2, "value": 2},
        {"bucket": 4, "value": 4},
    ]
    assert list(engine.map([], lambda bucket: {})) == []


class OwnError(DataError):
    """Known to this file only."""

    def __init__(self, where, what):
        super().__init__(f"{where}: {what}")


@needs_spark
def test_errors_arrive_as_they_were_raised(engine):
    def work(bucket):
        if bucket > 1:
            raise QualityError(f"bucket {bucket} misses")
        return {}

    with pytest.raises(QualityError, match=r"^bucket 2 misses$"):
        list(engine.map([7, 1, 2, 0], work))

    def own(bucket):
        raise OwnError("here", bucket)

    with pytest.raises(DataError, match=r"^here: 3$"):
        list(engine.map([3], own))


@needs_spark
def test_no_bucket_is_worked_on_when_a_source_cannot_be_read(engine, tmp_path):
    def read(source):
        yield rows_of(100)
        if source != "good":
            raise ArtifactError(f"{source}: not found")

    def work(bucket, rows):
        (tmp_path / str(bucket)).touch()
        return {}

    with pytest.raises(ArtifactError, match=r"^bad: not found$"):
        list(engine.shuffle(["good", "bad", "worse"], read, range(NUM_BUCKETS), NUM_BUCKETS, work))
    assert list(tmp_path.iterdir()) == []


@needs_spark
def test_other_errors_fail_the_job_after_some_tries(engine, tmp_path):
    from pyspark.errors import PythonException

    def work(bucket):
        tries = len(list(tmp_path.iterdir()))
        (tmp_path / str(tries)).touch()
        if tries < 2 or bucket == 1:
            raise ConnectionError("connection reset")
        return {"tries": tries}

    assert list(engine.map([0], work)) == [{"tries": 2}]
    with pytest.raises(PythonException, match="ConnectionError: connection reset"):
        list(engine.map([1], work))


@needs_spark
def test_executors_without_the_package_or_with_another_version(engine, monkeypatch):
    def work(bucket):
        import encode.of_a_later_version  # noqa: F401

    with pytest.raises(
        ConfigError, match=rf"No module named 'encode.of_.*install encode-interests {encode.__version__}"
    ):
        list(engine.map([0], work))
    ours = encode.__version__
    monkeypatch.setattr(encode, "__version__", "99.0")
    with pytest.raises(ConfigError, match=rf"executors have encode-interests {ours}, the driver has 99.0"):
        list(engine.map([0], lambda bucket: {}))
    with pytest.raises(ConfigError, match=rf"executors have encode-interests {ours}, the driver has 99.0"):
        list(engine.shuffle([1], read_seed, [0], NUM_BUCKETS, summary))


def read_object(storage, key):
    yield np.frombuffer(storage.get(key), np.int64).reshape(-1, 4)


def write_object(storage, bucket, rows):
    storage.put(f"out/{bucket}", rows[np.lexsort(rows.T)].tobytes())
    return {"bucket": bucket, "rows": len(rows)}


@needs_spark
@pytest.mark.parametrize("store", ["folder", "s3"], indirect=True)
def test_executors_read_and_write_the_store(engine, spark_settings, store):
    storage = open_storage(store)
    every = [rows_of(2000, seed) for seed in range(4)]
    for index, rows in enumerate(every):
        storage.put(f"in/{index}", rows.tobytes())
    keys = storage.list("in/")
    results = list(
        engine.shuffle(keys, partial(read_object, storage), [0, 5], NUM_BUCKETS, partial(write_object, storage))
    )
    rows = np.concatenate(every)
    home = bucket_of(rows[:, 0], NUM_BUCKETS)
    assert results == [{"bucket": bucket, "rows": int((home == bucket).sum())} for bucket in (0, 5)]
    for bucket in (0, 5):
        expected = rows[home == bucket]
        assert storage.get(f"out/{bucket}") == expected[np.lexsort(expected.T)].tobytes()
    if store.secret_key:  # Spark's log of events holds all settings and all plans
        told = [path.read_text(errors="replace") for path in spark_settings.rglob("*") if path.is_file()]
        assert any("SparkListenerJobStart" in text for text in told)
        assert not any(store.secret_key.get_secret_value() in text for text in told)


@needs_spark
def test_a_running_session_is_used_and_left_running(engine):
    list(engine.map([0], lambda bucket: {}))
    from pyspark.sql import SparkSession

    session = SparkSession.builder.getOrCreate()
    before = session.conf.get("spark.sql.adaptive.enabled")
    other = SparkEngine(places(spark_master=None))
    assert list(other.map([3], lambda bucket: {"bucket": bucket})) == [{"bucket": 3}]
    other.close()
    assert list(engine.map([3], lambda bucket: {"bucket": bucket})) == [{"bucket": 3}]
    assert session.conf.get("spark.sql.adaptive.enabled") == before == "true"
    settings = dict(session.sparkContext.getConf().getAll())
    assert settings["spark.app.name"] == "encode"
    assert settings["spark.driver.host"] == settings["spark.driver.bindAddress"] == "127.0.0.1"
    assert settings["spark.ui.enabled"] == "false"


QUIET = """
import sys
from encode.config import Places
from encode.engines.spark import SparkEngine
engine = SparkEngine(Places(store="/nowhere", spark_master="local[2]"))
print(list(engine.map([1, 2], lambda bucket: {"bucket": bucket})))
engine.close()
"""


@needs_spark
def test_a_session_of_its_own_starts_and_stops_quietly():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK", "PYSPARK"))}
    done = subprocess.run(
        [sys.executable, "-c", QUIET], capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    assert done.stdout == "[{'bucket': 1}, {'bucket': 2}]\n"
    lines = [line for line in done.stderr.splitlines() if "incubator modules" not in line]  # the JVM's own
    assert lines == []


# --- the refresh --------------------------------------------------------------------------------------------


@needs_spark
@pytest.mark.parametrize("store", ["folder", "s3"], indirect=True)
def test_a_refresh_on_spark_writes_the_bytes_of_the_local_engine(engine, store, write_day, tmp_path_factory):
    """Everybody on the first day, then a day on top, one user erased: histories, interests, manifests and pointers."""
    space = draw_space(1_000, 8, 5, 12, 6)
    config = RefreshConfig(min_buckets=NUM_BUCKETS)
    local = places(store=str(tmp_path_factory.mktemp("local")), scratch=tmp_path_factory.mktemp("scratch"))
    stores = [open_storage(one) for one in (local, store)]
    for storage, one in zip(stores, (LocalEngine(config, local), engine), strict=True):
        write_space(storage, space, {})
        for number, rows in enumerate((rows_of(4000), rows_of(60, 1))):
            write_day(storage, date(2024, 3, 1 + number), rows)
            if number:
                erase_users(storage, [7])
            refresh_interests(storage, [space.id], date(2024, 3, 2 + number), config, one, lambda _: None)
    keys = stores[0].list("")
    assert sum(key.startswith("interests/") for key in keys) > 2 * NUM_BUCKETS
    assert stores[1].list("") == keys
    assert [key for key in keys if stores[0].get(key) != stores[1].get(key)] == []
