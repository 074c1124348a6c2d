"""Spark as an engine, for logs that outgrow one machine.

Spark moves the rows and places the tasks. Everything else is ours, on the executors: a task reads its source, and works
on its bucket, through our own `Storage`, so no Hadoop connector is needed, and nothing but small results reaches the
driver.

    source ──read──> rows, packed by bucket ──Spark's shuffle──> rows of one bucket ──work──> one result

`encode` must be installed on the executors, in the version of the driver: functions and sources travel pickled, and
what they refer to is imported there. Credentials travel inside the same pickle, never in Spark's settings. A task that
failed, or whose executor was lost, is tried again: `work` must write the same bytes each time, as a refresh does with
the compiled kernel, and with PyTorch where executors are of one kind. `memory` is not looked at: it is for whoever
sizes the executors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import encode
from encode import errors
from encode.config import Places
from encode.engines import Result, Rows, spark_session
from encode.errors import ConfigError, EncodeError
from encode.schema import bucket_of

_ROWS_PER_PACK = 1 << 19
"""Rows that a task packs at a time: 16 MB, and as much again while they are sorted."""

_QUERY_SETTINGS = {
    # A bucket is a task. Adaptive execution may join small partitions, and so take buckets from idle cores.
    "spark.sql.adaptive.enabled": "false",
    # A row is a pack of up to _ROWS_PER_PACK behaviors: Spark's 10,000 of them would be a batch of gigabytes.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "64",
    "spark.sql.execution.arrow.maxBytesPerBatch": str(1 << 24),
}

_PACKS = pa.schema([("slot", pa.int32()), ("source", pa.int32()), ("rows", pa.binary()), ("error", pa.string())])
_ANSWERS = pa.schema([("bucket", pa.int64()), ("source", pa.int32()), ("result", pa.string()), ("error", pa.string())])


class SparkEngine:
    """Executors of a Spark cluster. The session starts with the first call and lasts until `close`.

    A session that the process already has is used, and left running. The executors' Python is PYSPARK_PYTHON
    (`spark.pyspark.python`); give each of them about 1 GiB a core outside the JVM (`spark.executor.memoryOverhead`).
    """

    def __init__(self, places: Places) -> None:
        """Check that Spark could start.

        Raises:
            ConfigError: no master is set, or pyspark or Java is missing.
        """
        self._master = places.spark_master
        self._session: Any = None
        self._is_ours = False
        spark_session.require_pyspark()
        if spark_session.running() is None:
            if not self._master:
                raise ConfigError(
                    "ENCODE_SPARK_MASTER is not set, and `refresh.engine` is spark; expected spark://host:port, yarn, "
                    "k8s://https://host:port, or local[*] to try it (in Airflow: the connection encode_spark)"
                )
            spark_session.require_java()

    def shuffle(
        self,
        sources: Sequence[Any],
        read: Callable[[Any], Iterable[Rows]],
        buckets: Sequence[int],
        num_buckets: int,
        work: Callable[[int, Rows], Result],
        memory: Callable[[int, int], int] | None = None,
    ) -> Iterator[Result]:
        """See `Engine.shuffle`. A source is a task, then a bucket is one, with all its rows in memory.

        Raises:
            ConfigError: the executors have no `encode`, or another version of it.
        """
        if not buckets:
            return
        slots = np.full(num_buckets, -1, np.int16 if len(buckets) < 1 << 15 else np.int32)  # 16 bits sort faster
        slots[list(buckets)] = np.arange(len(buckets))
        scatter = partial(_scatter, encode.__version__, tuple(sources), read, slots)
        gather = partial(_gather, tuple(buckets), work)
        session = self._query()
        packs = _numbers(session, len(sources)).mapInArrow(scatter, _spark_schema(_PACKS))
        # An empty pack for each bucket, so that those without rows are worked on too.
        empty = _numbers(session, len(buckets), 1).selectExpr(
            "int(id) slot", "int(null) source", "binary(null) rows", "string(null) error"
        )
        # Not groupBy: it hashes buckets to partitions, several to some and none to others, and sorts the rows there.
        frame = packs.union(empty).repartitionById(len(buckets), "slot").mapInArrow(gather, _spark_schema(_ANSWERS))
        yield from _results(frame)

    def map(
        self, buckets: Sequence[int], work: Callable[[int], Result], memory: Callable[[int], int] | None = None
    ) -> Iterator[Result]:
        """See `Engine.map`. A bucket is a task.

        Raises:
            ConfigError: the executors have no `encode`, or another version of it.
        """
        if buckets:
            call = partial(_map, encode.__version__, tuple(buckets), work)
            frame = _numbers(self._query(), len(buckets)).mapInArrow(call, _spark_schema(_ANSWERS))
            yield from _results(frame)

    def close(self) -> None:
        """Stop the session, and the Java process of its driver, if this engine started them."""
        if self._is_ours:
            spark_session.stop(self._session)
        self._session, self._is_ours = None, False

    def _query(self) -> Any:
        """Return a session with our settings for queries; one that others use keeps theirs."""
        if self._session is None:
            self._is_ours = spark_session.running() is None
            self._session = spark_session.start(str(self._master)) if self._is_ours else spark_session.running()
        session = self._session.newSession()
        for key, value in _QUERY_SETTINGS.items():
            session.conf.set(key, value)
        return session


# --- jobs, on the driver ------------------------------------------------------------------------------------


def _numbers(session: Any, count: int, num_partitions: int | None = None) -> Any:
    """Return a frame of the numbers below `count`, each in a partition of its own unless told otherwise."""
    return session.range(0, count, 1, numPartitions=num_partitions or max(count, 1))


def _spark_schema(schema: pa.Schema) -> Any:
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


def _results(frame: Any) -> Iterator[Result]:
    """Run the job; yield results by bucket, or raise what failed first: the first source, else the first bucket."""
    from pyspark.errors import PythonException

    try:
        rows = frame.collect()
    except PythonException as error:
        if missing := re.search(r"No module named '[\w.]+'", str(error)):
            raise ConfigError(
                f"Spark's executors: {missing[0]}; install encode-interests {encode.__version__} there, or set "
                "PYSPARK_PYTHON to a Python of theirs that has it"
            ) from None
        raise
    failed = [row for row in rows if row.error]
    if failed:
        first = min(failed, key=lambda row: (row.source is None, row.source, row.bucket))
        told = json.loads(first.error)
        raise getattr(errors, told["class"])(told["message"])
    for row in sorted(rows, key=lambda row: row.bucket):
        yield json.loads(row.result)


# --- tasks, on the executors -------------------------------------------------------------------------------


def _scatter(
    version: str,
    sources: Sequence[Any],
    read: Callable[[Any], Iterable[Rows]],
    slots: npt.NDArray[Any],
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Read sources, and pack their rows by the slot of their bucket; -1 drops them."""
    for source in _positions(batches):
        try:
            _require_version(version)
            for rows in _in_chunks(read(sources[source])):
                yield _packed(rows, slots, source)
        except EncodeError as error:
            # To every bucket: none may be worked on without the rows of this source.
            num_slots = int(slots.max()) + 1
            told = [_told(error)] * num_slots
            columns = [range(num_slots), [source] * num_slots, [None] * num_slots, told]
            yield pa.RecordBatch.from_arrays(
                [pa.array(column, field.type) for column, field in zip(columns, _PACKS, strict=True)], schema=_PACKS
            )


def _gather(
    buckets: Sequence[int], work: Callable[[int, Rows], Result], batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Put the packs of one bucket together, and work on it, unless a source could not be read."""
    slots: set[int] = set()
    packs = [np.empty((0, 4), np.int64)]
    failed: list[tuple[int, str]] = []
    for batch in batches:
        slot, source, rows, error = batch.columns
        slots.update(slot.to_pylist())
        packs += [np.frombuffer(pack.as_buffer(), np.int64).reshape(-1, 4) for pack in rows if pack.is_valid]
        failed += [pair for pair in zip(source.to_pylist(), error.to_pylist(), strict=True) if pair[1]]
    if not slots:
        return
    (bucket,) = (buckets[slot] for slot in slots)  # exactly one: Spark was told which partition a slot is
    if failed:
        yield _answer(bucket, *min(failed))
    else:
        yield _attempt(bucket, lambda: work(bucket, _together(packs)))


def _map(
    version: str, buckets: Sequence[int], work: Callable[[int], Result], batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    def call(bucket: int) -> Result:
        _require_version(version)
        return work(bucket)

    for position in _positions(batches):
        yield _attempt(buckets[position], partial(call, buckets[position]))


def _positions(batches: Iterable[pa.RecordBatch]) -> Iterator[int]:
    for batch in batches:
        yield from batch.column(0).to_pylist()


def _require_version(version: str) -> None:
    if version != encode.__version__:
        raise ConfigError(
            f"Spark's executors have encode-interests {encode.__version__}, the driver has {version}; "
            "install the same version there, or results could differ"
        )


def _in_chunks(pieces: Iterable[Rows]) -> Iterator[Rows]:
    """Cut and join pieces of any size to chunks of `_ROWS_PER_PACK` rows, or up to twice that."""
    held: list[Rows] = []
    count = 0
    for piece in pieces:
        for start in range(0, len(piece), _ROWS_PER_PACK):
            held.append(piece[start : start + _ROWS_PER_PACK])
            count += len(held[-1])
            if count >= _ROWS_PER_PACK:
                yield _together(held)
                count = 0
    if held:
        yield _together(held)


def _together(rows: list[Rows]) -> Rows:
    """Join and forget the pieces."""
    joined = np.concatenate(rows, dtype=np.int64, casting="safe")
    rows.clear()
    return joined


def _packed(rows: Rows, slots: npt.NDArray[Any], source: int) -> pa.RecordBatch:
    """Return one record a bucket, its rows as bytes: a tenth of the work for Spark of one record a row.

    The bytes of all records are one sorted copy of the rows, which Arrow cuts by offsets.
    """
    slot = slots[bucket_of(rows[:, 0], len(slots))]
    order = np.argsort(slot, kind="stable")
    ends = np.searchsorted(slot[order], np.arange(slots.max() + 2))
    used = np.flatnonzero(np.diff(ends))
    sorted_rows = rows[order[ends[0] :]]
    offsets = (np.append(ends[used], len(rows)) - ends[0]) * sorted_rows.itemsize * 4
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(sorted_rows)]
    return pa.RecordBatch.from_arrays(
        [
            pa.array(used, pa.int32()),
            pa.array(np.full(len(used), source), pa.int32()),
            pa.BinaryArray.from_buffers(pa.binary(), len(used), buffers),
            pa.nulls(len(used), pa.string()),
        ],
        schema=_PACKS,
    )


def _attempt(bucket: int, call: Callable[[], Result]) -> pa.RecordBatch:
    """Return the result, or the error if a retry cannot cure it; others fail the task, and Spark tries it again."""
    try:
        result = json.dumps(call())
    except EncodeError as error:
        return _answer(bucket, None, _told(error))
    return _answer(bucket, None, None, result)


def _answer(bucket: int, source: int | None, error: str | None, result: str | None = None) -> pa.RecordBatch:
    answer = {"bucket": bucket, "source": source, "result": result, "error": error}
    return pa.RecordBatch.from_pylist([answer], _ANSWERS)


def _told(error: EncodeError) -> str:
    """Return class and message: an exception itself may hold what cannot be pickled."""
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return json.dumps({"class": known.__name__, "message": str(error)})
