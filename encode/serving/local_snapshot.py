"""A snapshot on local disk: fetched once, verified, then mapped into memory and never copied."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.errors import ArtifactError, ConfigError
from encode.interests.snapshots import snapshot_file
from encode.interests.user_rows import UserRow, UserRows
from encode.outputs import Manifest, Part, read_part
from encode.schema import bucket_of, digest
from encode.serving.shard import ALL_USERS, Shard
from encode.storage import Storage


@contextmanager
def claimed(cache: Path) -> Iterator[None]:
    """Keep a folder of snapshots for this process alone: another one would remove what this one has mapped.

    Raises:
        ConfigError: another process has it.
    """
    for folder in (cache.parent, cache):  # the home of a stack is its owner's, also when it is made here
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{cache}: another process serves from it; give each one a --cache of its own") from None
        yield


class LocalSnapshot:
    """Interests by user id, read from mapped Arrow IPC files."""

    def __init__(self, cache: Path, prefix: str, manifest: Manifest, shard: Shard = ALL_USERS) -> None:
        """Map the files of the snapshot at `prefix` that `fetch_snapshot` has put into `cache`.

        Raises:
            ArtifactError: a file is not what it should be, or the snapshot is laid out as by an earlier version.
        """
        self.num_users = int(manifest.counts["users"])
        """Of all shards."""
        self.shard = shard
        self.erased: Set[int] = frozenset()
        """Users who are not found whatever the files hold; replaced as a whole while requests are answered."""
        self._num_buckets = num_buckets_of(manifest, prefix)
        # Files of a bucket are listed oldest first; what the newest says of a user holds.
        parts = parts_of(manifest, prefix, shard)
        self.keys = {part.key(prefix) for part in parts}
        """Of the files that it consists of, some of them of earlier snapshots."""
        self._buckets: dict[str, list[_MappedPart]] = {}
        for part in reversed(parts):
            self._buckets.setdefault(part.name, []).append(_MappedPart(cache / part.key(prefix)))

    def shard_of(self, user_id: int) -> Shard:
        """Return the shard that holds a user, one of as many as there are."""
        if self.shard == ALL_USERS:
            return ALL_USERS
        return Shard(self._bucket(user_id) % self.shard.count, self.shard.count)

    def find(self, user_id: int) -> UserRow | None:
        """Return the user's row, or None for a user without a row in this shard."""
        if user_id in self.erased:
            return None
        found = (part.find(user_id) for part in self._buckets.get(snapshot_file(self._bucket(user_id)), ()))
        return next((row for row in found if row is not None), None)

    def _bucket(self, user_id: int) -> int:
        return int(bucket_of(np.array([user_id]), self._num_buckets)[0])

    def busiest_user(self) -> int:
        """Return the user with the most behaviors, the smallest id among equals: somebody worth looking at, not erased.

        Raises:
            ArtifactError: the snapshot holds nobody.
        """
        parts = [part for parts in self._buckets.values() for part in parts if len(part.user_ids)]
        found = [one for part in parts if (one := part.busiest(self.erased))[0] >= 0]
        if not found:
            raise ArtifactError("snapshot without users; refresh the space")
        return min(found, key=lambda one: (-one[0], one[1]))[1]

    def user_ids(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the ids of all users, a bucket at a time, ascending within it."""
        for parts in self._buckets.values():
            yield np.unique(np.concatenate([part.user_ids for part in parts]))


class _MappedPart:
    """One file, users ascending, in batches."""

    def __init__(self, path: Path) -> None:
        self.user_ids: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(place) for place in range(reader.num_record_batches)]
        except pa.ArrowInvalid as error:
            raise ArtifactError(f"{path}: not an Arrow IPC file ({error}); refresh the snapshot") from None
        if batches:
            self.user_ids = np.concatenate([batch.column("user_id").to_numpy() for batch in batches])
        self._num_behaviors = [batch.column("num_behaviors").to_numpy() for batch in batches]
        self._rows = [UserRows(batch) for batch in batches]
        self._starts = np.cumsum([0, *map(len, self._rows)])

    def busiest(self, left_out: Set[int]) -> tuple[int, int]:
        """Return the most behaviors of a user in this part, -1 where all are left out, and the user."""
        counts = np.concatenate(self._num_behaviors)
        counts[np.isin(self.user_ids, list(left_out))] = -1
        place = int(np.argmax(counts))
        return int(counts[place]), int(self.user_ids[place])

    def find(self, user_id: int) -> UserRow | None:
        row = int(np.searchsorted(self.user_ids, user_id))
        if row == len(self.user_ids) or self.user_ids[row] != user_id:
            return None
        place = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._rows[place][row - int(self._starts[place])]


def remove_files(cache: Path, kept: set[str]) -> None:
    """Remove all fetched files but those of the given keys; what is mapped stays readable until it is let go."""
    for folder in cache.glob("interests/*/*"):
        for path in folder.iterdir():
            if path.relative_to(cache).as_posix() not in kept:
                path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def num_buckets_of(manifest: Manifest, prefix: str) -> int:
    """Return how many buckets the users of a snapshot are in.

    Raises:
        ArtifactError: it is laid out as by an earlier version.
    """
    if "num_buckets" not in manifest.config:
        raise ArtifactError(f"{prefix}: made by version {manifest.version} in another layout; refresh the space")
    return int(manifest.config["num_buckets"])


def parts_of(manifest: Manifest, prefix: str, shard: Shard) -> list[Part]:
    """Return the files of a snapshot that hold the users of a shard, oldest first.

    Raises:
        ArtifactError: there are more shards than buckets, so that some would hold nobody.
    """
    num_buckets = num_buckets_of(manifest, prefix)
    if shard.count > num_buckets:
        raise ArtifactError(f"{prefix}: {num_buckets} buckets cannot make {shard.count} shards; refresh with more")
    held = {snapshot_file(bucket) for bucket in range(shard.place, num_buckets, shard.count)}
    return [part for part in manifest.parts if part.name in held]


def fetch_snapshot(
    storage: Storage, prefix: str, manifest: Manifest, cache: Path, shard: Shard = ALL_USERS
) -> LocalSnapshot:
    """Bring a snapshot, or a shard of it, to local disk, verify every file against the manifest, and map it.

    Files already there are verified, not fetched. A damaged one is fetched again.

    Raises:
        ArtifactError: a file in the store is missing or damaged, or there are more shards than buckets.
    """

    def bring(part: Part) -> None:
        path = cache / part.key(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and digest(path.read_bytes()) == part.sha256:
            return
        data = read_part(storage, prefix, part)
        descriptor, aside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(aside).replace(path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bring, parts_of(manifest, prefix, shard)))
    return LocalSnapshot(cache, prefix, manifest, shard)
