"""A sample of a snapshot's users: all that are in its first buckets.

A user's bucket is a hash of the id, so that a bucket is a fair sample, the same one in the next snapshot, and what it
costs to read does not grow with the number of users: a bucket holds `refresh.rows_per_bucket` behaviors on average.

    U users of the sample
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.data.buckets import files_of
from encode.data.histories import rows_of
from encode.interests.snapshots import read_rows
from encode.outputs import Manifest
from encode.schema import bucket_of
from encode.storage import Storage

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ENOUGH_USERS = 2_000
"""Buckets are read until the sample has so many users; one always is."""
NUM_ROWS = 256
"""Users whose whole rows are kept."""
_HASHES = 2**62


@dataclass(frozen=True)
class Sample:
    """What is drawn of a snapshot."""

    user_ids: Ints
    """Ascending, [U]."""
    num_behaviors: Ints
    """[U]"""
    num_interests: Ints
    """[U]"""
    sizes: Ints
    """Behaviors in each interest, user after user, largest first."""
    newest: Ints
    """Time of each user's newest behavior, UTC seconds; 0 for none, [U]."""
    rows: pa.Table
    """Whole rows of some of the users, those whose ids have the lowest hashes, ascending by id."""
    num_buckets: int
    """Buckets that were read."""

    @cached_property
    def largest_share(self) -> Floats:
        """Share of the behaviors of each user with interests that is in the largest one."""
        starts = np.cumsum(self.num_interests) - self.num_interests
        have = self.num_interests > 0
        shares: Floats = self.sizes[starts[have]] / self.num_behaviors[have]
        return shares

    def mass_by_rank(self) -> Floats:
        """Return the mean share of a user's behaviors in the largest interest, the second, and so on."""
        users = np.repeat(np.arange(len(self.user_ids)), self.num_interests)
        starts = np.cumsum(self.num_interests) - self.num_interests
        rank = np.arange(len(self.sizes)) - starts[users]
        total = np.bincount(rank, self.sizes / self.num_behaviors[users])
        return total / max(int((self.num_interests > 0).sum()), 1)


def read_sample(storage: Storage, prefix: str, manifest: Manifest, enough: int = ENOUGH_USERS) -> Sample:
    """Read the first buckets of the snapshot at `prefix`, checked by their digests, until there are enough users.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    columns = [(np.zeros(0, np.int64),) * 5]
    kept: list[pa.Table] = []
    for bucket in range(int(manifest.config["num_buckets"])):
        for batch in _rows(storage, prefix, manifest, bucket):
            columns.append(_columns(batch))
            kept = [_lowest(pa.concat_tables([*kept, pa.table(batch)]))]
        if sum(len(column[0]) for column in columns) >= enough:
            break
    ids, behaviors, interests, sizes, newest = map(np.concatenate, zip(*columns, strict=True))
    order = np.argsort(ids, kind="stable")
    starts = np.cumsum(interests) - interests
    place, _ = rows_of(starts[order], starts[order] + interests[order])
    rows = kept[0].sort_by("user_id") if kept else pa.table({"user_id": pa.array([], pa.int64())})
    return Sample(
        ids[order], behaviors[order], interests[order], sizes[place], newest[order], rows, num_buckets=bucket + 1
    )


def _rows(storage: Storage, prefix: str, manifest: Manifest, bucket: int) -> Iterator[pa.RecordBatch]:
    nobody = np.zeros(0, np.int64)
    for source in read_rows(storage, files_of(manifest.parts, bucket, prefix), nobody):
        yield from filter(len, source)


def _columns(batch: pa.RecordBatch) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    sizes, newest = batch.column("size"), batch.column("newest")
    counts = sizes.value_lengths().to_numpy().astype(np.int64)
    latest = np.zeros(len(batch), np.int64)
    np.maximum.at(latest, np.repeat(np.arange(len(batch)), counts), newest.flatten().to_numpy())
    ids, behaviors = (batch.column(name).to_numpy() for name in ("user_id", "num_behaviors"))
    return ids, behaviors, counts, sizes.flatten().to_numpy(), latest


def _lowest(rows: pa.Table) -> pa.Table:
    hashes = bucket_of(rows["user_id"].to_numpy(), _HASHES)
    return rows.take(pa.array(np.argsort(hashes, kind="stable")[:NUM_ROWS])).combine_chunks()
