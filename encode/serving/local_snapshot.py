"""A snapshot on local disk: fetched once, verified, then mapped into memory and never copied."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.errors import ArtifactError
from encode.schema import bucket_of, digest
from encode.storage import Manifest, Part, Storage, read_part


class LocalSnapshot:
    """Interests by user id, read from mapped Arrow IPC files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Map the files of a snapshot that `fetch_snapshot` has put into `folder`."""
        self.num_users = int(manifest.counts["users"])
        self._parts = [_MappedPart(folder / part.name) for part in manifest.parts]

    def find(self, user_id: int) -> dict[str, Any] | None:
        """Return the user's row as Arrow scalars by column name, or None for a user without a row."""
        part = self._parts[int(bucket_of(np.array([user_id]), len(self._parts))[0])]
        return part.find(user_id)

    def busiest_user(self) -> int:
        """Return the user with the most behaviors, the smallest id among equals: somebody worth looking at.

        Raises:
            ArtifactError: the snapshot holds nobody.
        """
        if not self.num_users:
            raise ArtifactError("snapshot without users; refresh the space")
        return min((part.busiest() for part in self._parts if len(part.user_ids)), key=lambda one: (-one[0], one[1]))[1]

    def user_ids(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the ids of all users, a part at a time, ascending within it."""
        for part in self._parts:
            yield part.user_ids


class _MappedPart:
    """One file, users ascending, in batches."""

    def __init__(self, path: Path) -> None:
        self.user_ids: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._batches: list[pa.RecordBatch] = []
        if path.stat().st_size == 0:
            return
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [reader.get_batch(place) for place in range(reader.num_record_batches)]
        except pa.ArrowInvalid as error:
            raise ArtifactError(f"{path}: not an Arrow IPC file ({error}); refresh the snapshot") from None
        self.user_ids = np.concatenate([batch.column("user_id").to_numpy() for batch in self._batches])
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    def busiest(self) -> tuple[int, int]:
        """Return the most behaviors of a user in this part, and the user."""
        counts = np.concatenate([batch.column("num_behaviors").to_numpy() for batch in self._batches])
        place = int(np.argmax(counts))
        return int(counts[place]), int(self.user_ids[place])

    def find(self, user_id: int) -> dict[str, Any] | None:
        row = int(np.searchsorted(self.user_ids, user_id))
        if row == len(self.user_ids) or self.user_ids[row] != user_id:
            return None
        place = int(np.searchsorted(self._starts, row, "right")) - 1
        batch = self._batches[place]
        return {name: batch.column(name)[row - int(self._starts[place])] for name in batch.schema.names}


def remove_snapshots(cache: Path, kept: set[str]) -> None:
    """Remove all fetched snapshots but those in use; what is mapped stays readable until it is let go."""
    for folder in cache.glob("interests/*/*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def fetch_snapshot(storage: Storage, prefix: str, manifest: Manifest, cache: Path) -> LocalSnapshot:
    """Bring a snapshot to local disk, verify every file against the manifest, and map it.

    Files already there are verified, not fetched. A damaged one is fetched again.

    Raises:
        ArtifactError: a file in the store is missing or damaged.
    """
    folder = cache / prefix
    folder.mkdir(parents=True, exist_ok=True)

    def bring(part: Part) -> None:
        path = folder / part.name
        if path.is_file() and digest(path.read_bytes()) == part.sha256:
            return
        data = read_part(storage, prefix, part)
        descriptor, aside = tempfile.mkstemp(dir=folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(aside).replace(path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bring, manifest.parts))
    return LocalSnapshot(folder, manifest)
