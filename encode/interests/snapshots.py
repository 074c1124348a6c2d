"""Spaces in the store, and snapshots: the interests of all users of a space as of a day.

interests/<space>/<snapshot>/part-NNN.arrow    Arrow IPC, users ascending; NNN is a hash of the user id
interests/<space>/<snapshot>/manifest.json     last; names files of earlier snapshots too
interests/<space>/current.json                 which snapshot serves, moved by a conditional put

A bucket is a base and the files of later days on top of it, and what a later file says of a user holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.data.buckets import bucket_name
from encode.errors import ArtifactError
from encode.interests.kmeans import Starts
from encode.model.space import SPACE_FILES, Space, load_space
from encode.outputs import Part, read_files, read_manifest, read_part, write_output
from encode.storage import ObjectFile, Storage

Ints = npt.NDArray[np.int64]
_USERS_PER_BATCH = 1024


def write_space(storage: Storage, space: Space, inputs: Mapping[str, str]) -> str:
    """Store a space under its id and return its prefix; storing it again changes nothing."""
    prefix = f"spaces/{space.id}"
    config = json.loads(space.files["space.json"])
    counts = {"items": len(space.vocabulary.item_ids), "categories": len(space.vocabulary.category_ids)}
    if read_manifest(storage, prefix) is None:
        write_output(
            storage,
            prefix,
            space.files,
            kind="space",
            fingerprint=space.id,
            config=config,
            inputs=inputs,
            counts=counts,
        )
    return prefix


def read_space(storage: Storage, space_id: str) -> Space:
    """Read a space and check that it is the one asked for.

    Raises:
        ArtifactError: it is absent, unfinished, damaged, or its content has another id.
    """
    prefix = f"spaces/{space_id}"
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        raise ArtifactError(f"{storage.uri}/{prefix}: no such space; train a model first")
    space = load_space(read_files(storage, prefix, manifest), f"{storage.uri}/{prefix}")
    return check_space(space, space_id, f"{storage.uri}/{prefix}")


def check_space(space: Space, expected: str, where: str) -> Space:
    """Return `space` if its content has the `expected` id.

    Raises:
        ArtifactError: it has another, so interests made in one mean nothing in the other.
    """
    if space.id != expected:
        raise ArtifactError(f"{where}: content of {', '.join(SPACE_FILES)} is space {space.id}, expected {expected}")
    return space


def folder_of(space_id: str) -> str:
    """Return the folder of a space's snapshots."""
    return f"interests/{space_id}"


def snapshot_file(bucket: int) -> str:
    """Return the name of a bucket's file."""
    return f"{bucket_name(bucket)}.arrow"


def snapshot_bytes(rows: pa.Table) -> bytes:
    """Return rows of `schema.interests_schema`, users ascending, as one file; readers map it batch by batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        for batch in rows.combine_chunks().to_batches(max_chunksize=_USERS_PER_BATCH):
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def read_rows(storage: Storage, files: Sequence[Part], left_out: Ints) -> pa.Table | None:
    """Return the rows that hold in the files of a bucket, oldest first, but for some users; None without any file.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    tables = [pa.ipc.open_file(pa.BufferReader(read_part(storage, "", part))).read_all() for part in files]
    if not tables:
        return None
    rows = pa.concat_tables(tables)
    newest = _newest(rows["user_id"].to_numpy())
    users = rows["user_id"].to_numpy()[newest]
    return rows.take(pa.array(newest[~np.isin(users, left_out)]))


def last_centers(storage: Storage, files: Sequence[Part], users: Ints, projected_dim: int) -> Starts:
    """Return the centers that each of some users, ascending, has in the files of a bucket; none for a new user.

    Only ids and centers are fetched, not the whole files.
    """
    options = pa.ipc.IpcReadOptions(included_fields=[0, 2])
    batches = []
    for part in files:
        file = pa.PythonFile(ObjectFile(storage, part.key(""), part.bytes), mode="r")
        reader = pa.ipc.open_file(file, options=options)
        for batch in map(reader.get_batch, range(reader.num_record_batches)):
            kept = np.flatnonzero(np.isin(batch.column("user_id").to_numpy(), users, assume_unique=True))
            batches.append(batch.take(pa.array(kept)))
    rows = pa.Table.from_batches(batches) if batches else None
    if rows is None or not len(rows):
        return Starts(np.zeros((0, projected_dim), np.float32), np.zeros(len(users) + 1, np.int64))
    rows = rows.take(pa.array(_newest(rows["user_id"].to_numpy()))).combine_chunks()
    lists = rows["center"].combine_chunks()
    counts = np.zeros(len(users), np.int64)
    counts[np.searchsorted(users, rows["user_id"].to_numpy())] = lists.value_lengths().to_numpy()
    centers = lists.flatten().flatten().to_numpy().reshape(-1, projected_dim)
    return Starts(centers, np.append(0, np.cumsum(counts)))


def _newest(user_ids: Ints) -> Ints:
    """Return the last place of each user, users ascending."""
    _, place = np.unique(user_ids[::-1], return_index=True)
    return len(user_ids) - 1 - place
