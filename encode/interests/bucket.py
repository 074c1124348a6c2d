"""The refresh of one bucket: what an engine calls, several at a time.

U users   N behaviors of all users
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.config import RefreshConfig
from encode.data.buckets import ROWS, dumped, files_of, finish, read_bucket, sizes
from encode.data.by_user import Bucket
from encode.data.grouping import Grouped, folds
from encode.data.histories import rows_of
from encode.engines import Result
from encode.interests.extract import Kernel, extract, kernel_of, schema_of
from encode.interests.kmeans import Starts, inertia
from encode.interests.snapshots import last_centers, merged, read_rows, read_space, snapshot_bytes, snapshot_file
from encode.model.space import Space
from encode.outputs import Manifest, write_part
from encode.storage import Storage

Ints = npt.NDArray[np.int64]
_BEHAVIORS_PER_BATCH = 1 << 17
_DRIFT_USERS = 256
"""Users on whom drift is measured, over all buckets."""
LONG_HISTORY = 4
"""A history of so many behaviors a cluster is clustered from its last centers."""
_BYTES_PER_BEHAVIOR, _BYTES_PER_USER, _BYTES_PER_EXTRACTED = 48, 120, 300
"""Memory of a behavior and a user in a bucket, and of a behavior while it is clustered and pooled, without results."""


@dataclass(frozen=True)
class Base:
    """The snapshot that a refresh starts from, and the histories that it was made of."""

    prefix: str
    manifest: Manifest
    histories: Grouped


@dataclass(frozen=True)
class Job:
    """What is the same for all buckets. The space is not in it: an executor reads it once, not with every task."""

    storage: Storage
    prefix: str
    space_id: str
    grouped: Grouped
    base: Base | None
    config: RefreshConfig


_spaces: dict[tuple[str, str], Space] = {}


def read_space_once(storage: Storage, space_id: str) -> Space:
    """Return a space, read once a process."""
    key = (storage.uri, space_id)
    if key not in _spaces:
        _spaces.clear()
        _spaces[key] = read_space(storage, space_id)
    return _spaces[key]


def memory_of(job: Job) -> list[int]:
    """Return the bytes that each bucket takes at most, whatever the lengths of its histories.

    These are histories and indexes, the old files and the new one, and the batch that is being extracted. Interests
    are most where each user has one behavior, a batch is largest where one user has all that the others leave.
    """
    num_buckets, base = job.grouped.num_buckets, job.base
    space = read_space_once(job.storage, job.space_id)
    N, _ = sizes(job.grouped.manifest.parts, num_buckets, ROWS)
    U = np.array(job.grouped.manifest.details["users"], np.int64)
    _, old = sizes(base.manifest.parts if base else (), num_buckets)
    batch = np.minimum(N, np.maximum(_BEHAVIORS_PER_BATCH, N - U + 1))
    rows = _BYTES_PER_BEHAVIOR * N + _BYTES_PER_USER * U + _BYTES_PER_EXTRACTED * batch
    total = rows + old + _file_bytes(U, N, space) * 9 // 8 + _file_bytes(np.minimum(U, batch), batch, space)
    return [int(need) for need in total]


def _file_bytes(U: Ints, N: Ints, space: Space) -> Ints:
    """Return how long a file of U users with N behaviors is at most."""
    K, recent = space.config.clustering.num_clusters, space.config.recent_length
    interests = np.minimum(N, K * U)
    vectors = 4 * (2 * space.key.shape[1] + space.embedding.shape[1])
    lists: Ints = (vectors + 20) * interests + 8 * np.minimum(N, 5 * interests) + 24 * np.minimum(N, recent * U)
    lists += 6 * np.minimum(N, space.config.num_remembered * U)
    return lists + 56 * U


def refresh_bucket(job: Job, bucket: int) -> Result:
    """Write the interests of a bucket's users: of all, or of those whose history changed since the base."""
    grouped, base, storage = job.grouped, job.base, job.storage
    old = files_of(base.manifest.parts, bucket, base.prefix) if base else []
    index = grouped.index(storage, bucket)
    changed, gone = index.user_ids, np.zeros(0, np.int64)
    if base:
        before = base.histories.index(storage, bucket)
        changed = index.changed_since(before)
        gone = np.setdiff1d(before.user_ids, index.user_ids, assume_unique=True)
    result = {"bucket": bucket, "clustered": len(changed), "warm_inertia": 0.0, "cold_inertia": 0.0}
    result |= {"users": len(index.user_ids), "interests": base.manifest.details["interests"][bucket] if base else 0}
    if base and not len(changed) and not len(gone):
        return result | {"parts": dumped(old)}
    space, kernel = read_space_once(storage, job.space_id), kernel_of(job.config)
    histories = read_bucket(storage, grouped.prefix, grouped.manifest.parts, bucket, changed if base else None)
    starts = None
    if base:
        last = last_centers(storage, old, changed, space.key.shape[1])
        result["interests"] -= len(last.centers)
        starts = _of_long_histories(last, histories, space)
        share = -(-_DRIFT_USERS // grouped.num_buckets)
        result["warm_inertia"], result["cold_inertia"] = _drift(histories, space, starts, kernel, share)
    sources, parts = [_extracted(histories, space, starts, kernel)], old
    if base is None or len(gone) or folds(old, job.config):
        sources += read_rows(storage, old, np.concatenate([changed, gone]))
        parts, result["interests"] = [], 0
    written = Counter[str]()
    data = snapshot_bytes(schema_of(space), _counted(merged(sources), written))
    result["interests"] += written["interests"]
    parts = [*parts, write_part(storage, job.prefix, snapshot_file(bucket), data, written["users"])]
    return finish(storage, job.prefix, result | {"parts": dumped(parts)})


def _counted(batches: Iterator[pa.RecordBatch], counts: Counter[str]) -> Iterator[pa.RecordBatch]:
    """Pass batches on, and count the users and the interests in them."""
    for batch in batches:
        counts["users"] += len(batch)
        counts["interests"] += len(batch.column("size").flatten())
        yield batch


def _of_long_histories(starts: Starts, histories: Bucket, space: Space) -> Starts:
    """Return the centers of users whose history is long beside K.

    A short one is clustered anew, which costs next to nothing: where almost each behavior is a cluster of its own, last
    centers leave none for a new kind of behavior.
    """
    is_long = np.diff(histories.offsets) >= LONG_HISTORY * space.config.clustering.num_clusters
    counts = np.diff(starts.offsets)
    return Starts(starts.centers[np.repeat(is_long, counts)], np.append(0, np.cumsum(counts * is_long)))


def _extracted(histories: Bucket, space: Space, starts: Starts | None, kernel: Kernel) -> Iterator[pa.RecordBatch]:
    """Yield the interests of the bucket's users, users ascending, in batches of a bounded number of behaviors."""
    first, num_users = 0, len(histories.user_ids)
    while first < num_users:
        bound = histories.offsets[first] + _BEHAVIORS_PER_BATCH
        last = max(first + 1, int(np.searchsorted(histories.offsets, bound, "right")) - 1)
        yield extract(histories.batch(first, last), space, _slice(starts, first, last), kernel)
        first = last


def _slice(starts: Starts | None, first: int, last: int) -> Starts | None:
    if starts is None:
        return None
    begin, end = starts.offsets[first], starts.offsets[last]
    return Starts(starts.centers[begin:end], starts.offsets[first : last + 1] - begin)


def _drift(histories: Bucket, space: Space, starts: Starts, kernel: Kernel, num_users: int) -> tuple[float, float]:
    """Return the inertia of some users when clustered from their last centers, and when clustered anew.

    They are drawn evenly from those who have last centers: the users of a bucket are in no order that matters.
    """
    known = np.flatnonzero(np.diff(starts.offsets))
    users = known[:: max(1, len(known) // num_users)][:num_users]
    rows, offsets = rows_of(histories.offsets[users], histories.offsets[users + 1])
    keys = space.key[space.vocabulary.index(histories.rows[rows, 0], histories.rows[rows, 1])]
    centers, center_offsets = rows_of(starts.offsets[users], starts.offsets[users + 1])
    config = space.config.clustering

    def total(begin: Starts | None) -> float:
        labels = kernel(keys, offsets, histories.user_ids[users], config, begin)
        return float(inertia(keys, offsets, labels, config.num_clusters).sum())

    return total(Starts(starts.centers[centers], center_offsets)), total(None)
