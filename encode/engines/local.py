"""The engine of one machine: threads, and a scratch folder for rows on their way to their buckets.

Rows are held in memory only while a piece of a source is split and while a bucket is worked on, and no bucket is begun
that could take more memory than the setting leaves beside the others: one at a time is always worked on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from encode.compiled import compiled
from encode.config import Places, RefreshConfig
from encode.engines import Result, Rows
from encode.errors import ConfigError
from encode.schema import bucket_of

_PROCESS_BYTES = 768 << 20
"""What a process takes before it works on anything: Python, PyTorch, Arrow, the compiled kernels."""
_SOURCE_BYTES = 128 << 20
"""What a source takes while it is read: a file, and a piece of its rows three times."""
_BYTES_PER_ROW = 32
_PREFIX = "encode-rows-"


class LocalEngine:
    """Works on as many buckets at a time as there are cores, fewer where memory allows no more."""

    def __init__(self, config: RefreshConfig, places: Places) -> None:
        self.num_workers = len(os.sched_getaffinity(0))
        self._memory = int(config.memory_gb * 2**30) - _PROCESS_BYTES
        self._scratch = places.scratch

    def shuffle(
        self,
        sources: Sequence[Any],
        read: Callable[[Any], Iterable[Rows]],
        buckets: Sequence[int],
        num_buckets: int,
        work: Callable[[int, Rows], Result],
        memory: Callable[[int, int], int] | None = None,
    ) -> Iterator[Result]:
        if not buckets:
            return
        with self._spill(num_buckets) as spill:
            wanted = np.zeros(num_buckets, bool)
            wanted[list(buckets)] = True

            def move(place: int) -> None:
                for rows in read(sources[place]):
                    spill.add(place, rows, wanted)

            def needed(bucket: int) -> int:
                return memory(bucket, spill.num_rows(bucket)) if memory else 0

            for _ in self._parallel(move, range(len(sources)), lambda _: _SOURCE_BYTES):
                pass
            yield from self._parallel(lambda bucket: work(bucket, spill.take(bucket)), buckets, needed)

    def map(
        self, buckets: Sequence[int], work: Callable[[int], Result], memory: Callable[[int], int] | None = None
    ) -> Iterator[Result]:
        yield from self._parallel(work, buckets, memory or (lambda _: 0))

    def close(self) -> None:
        """Nothing is kept between calls."""

    def _parallel(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], memory: Callable[[Any], int]
    ) -> Iterator[Any]:
        """Yield results as they come; after a failure, or when nobody listens any more, start no further task."""
        left = deque(tasks)
        running: dict[Future[Any], int] = {}
        with ThreadPoolExecutor(self.num_workers) as pool:
            while left or running:
                while left and len(running) < self.num_workers:
                    needed = memory(left[0])
                    if running and sum(running.values()) + needed > self._memory:
                        break
                    running[pool.submit(function, left.popleft())] = needed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    yield future.result()

    @contextmanager
    def _spill(self, num_buckets: int) -> Iterator[_Spill]:
        parent = self._scratch or Path(tempfile.gettempdir())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with _locked(parent):
                _remove_abandoned(parent)
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
                held = os.open(folder, os.O_RDONLY)
                fcntl.flock(held, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"scratch folder {parent}: {error.strerror}; set ENCODE_SCRATCH to another") from None
        try:
            yield _Spill(folder, num_buckets)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(held)


def _remove_abandoned(parent: Path) -> None:
    """Remove the rows of processes that were killed: nobody holds their folders any more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), _locked(folder, wait=False):
            shutil.rmtree(folder, ignore_errors=True)


class _Spill:
    """Rows by bucket in files: appended to by several threads, taken back a bucket at a time.

    Each piece follows a row of its own with its source and its length, so that pieces are given back in the order of
    the sources whichever thread was faster: days come in order, and there is little left to sort.
    """

    def __init__(self, folder: Path, num_buckets: int) -> None:
        self._paths = [folder / f"bucket-{bucket:05d}" for bucket in range(num_buckets)]
        self._locks = [threading.Lock() for _ in self._paths]

    def add(self, source: int, rows: Rows, wanted: npt.NDArray[np.bool_]) -> None:
        """Append rows to the files of their buckets."""
        by_bucket, offsets = split(
            np.ascontiguousarray(rows), bucket_of(rows[:, 0], len(self._paths)), len(self._paths)
        )
        for bucket in np.flatnonzero((np.diff(offsets) > 0) & wanted).tolist():
            piece = by_bucket[offsets[bucket] : offsets[bucket + 1]]
            with self._locks[bucket], self._paths[bucket].open("ab") as file:
                file.write(np.array([source, len(piece), 0, 0]).data)
                file.write(piece.data)

    def num_rows(self, bucket: int) -> int:
        """Return how many rows of a bucket wait, with those that tell of its pieces."""
        path = self._paths[bucket]
        return path.stat().st_size // _BYTES_PER_ROW if path.exists() else 0

    def take(self, bucket: int) -> Rows:
        """Return the rows of a bucket and remove its file."""
        path = self._paths[bucket]
        if not path.exists():
            return np.empty((0, 4), np.int64)
        rows = np.memmap(path, np.int64, "r").reshape(-1, 4)  # not read, so that the one copy is in order already
        path.unlink()
        pieces, place = [], 0
        while place < len(rows):
            source, length = rows[place, :2].tolist()
            pieces.append((source, rows[place + 1 : place + 1 + length]))
            place += 1 + length
        return np.concatenate([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])])


@compiled
def split(rows: Rows, bucket: npt.NDArray[np.int64], num_buckets: int) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Return the rows bucket by bucket, in their order within it, and where each bucket starts, [num_buckets + 1]."""
    offsets = np.zeros(num_buckets + 1, np.int64)
    for i in range(len(bucket)):
        offsets[bucket[i] + 1] += 1
    for b in range(num_buckets):
        offsets[b + 1] += offsets[b]
    place = offsets[:-1].copy()
    out = np.empty_like(rows)
    for i in range(len(bucket)):
        for column in range(4):
            out[place[bucket[i]], column] = rows[i, column]
        place[bucket[i]] += 1
    return out, offsets
