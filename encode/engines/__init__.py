"""Engines: where the work on buckets runs. Results do not depend on which.

A bucket is a hash of the user id (`schema.bucket_of`), so all of a user's behaviors meet in one. An engine moves rows
to their buckets, and calls a function for each bucket; what is done there is written once, for every engine:

    local   threads of this process, rows spilled to a scratch folder, memory bounded by a setting
    spark   executors of a cluster, Spark's own shuffle; nothing is collected to the driver
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
"""Behaviors as rows of user_id, item_id, category_id and timestamp, [n, 4]."""
Result = dict[str, Any]
"""What a function tells about a bucket: small, and only what JSON can hold."""
_SECONDS_BETWEEN_REPORTS = 2.0


class Engine(Protocol):
    """Calls functions for buckets, several at a time. Functions and sources must survive pickling."""

    def shuffle(
        self,
        sources: Sequence[Any],
        read: Callable[[Any], Iterable[Rows]],
        buckets: Sequence[int],
        num_buckets: int,
        work: Callable[[int, Rows], Result],
        memory: Callable[[int, int], int] | None = None,
    ) -> Iterator[Result]:
        """Bring all rows of all sources to their buckets and yield `work(bucket, rows)` of each, in any order.

        Args:
            sources: what there is to read.
            read: gives the rows of one source, in pieces of any size.
            buckets: those that are wanted; rows of others are dropped. Each is worked on, even without rows.
            num_buckets: how many there are.
            work: is given all rows of a bucket, in any order.
            memory: bytes that `work` takes at most for a bucket with so many rows, these included.
        """
        ...

    def map(
        self, buckets: Sequence[int], work: Callable[[int], Result], memory: Callable[[int], int] | None = None
    ) -> Iterator[Result]:
        """Yield `work(bucket)` of each bucket, in any order; `memory` is the bytes that it takes at most."""
        ...

    def close(self) -> None:
        """Let go of what the engine has started."""
        ...


def counted(results: Iterator[Result], total: int, what: str, say: Callable[[str], None]) -> Iterator[Result]:
    """Pass results on; every now and then, say how many there are and how long the rest will take."""
    started = said = time.monotonic()
    for done, result in enumerate(results, 1):
        now = time.monotonic()
        if done == total:
            say(f"{done} of {total} {what} in {now - started:.1f} s")
        elif now - said > _SECONDS_BETWEEN_REPORTS:
            said = now
            say(f"{done} of {total} {what}, about {(now - started) / done * (total - done):.0f} s left")
        yield result
