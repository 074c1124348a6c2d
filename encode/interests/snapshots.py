"""Spaces in the store, and snapshots: the interests of all users of a space as of a day.

interests/<space>/<snapshot>/part-NNN.arrow    Arrow IPC, users ascending; NNN is a hash of the user id
interests/<space>/<snapshot>/manifest.json     last; names files of earlier snapshots too
interests/<space>/current.json                 which snapshot serves, moved by a conditional put

A bucket is a base and the files of later days on top of it, and what a later file says of a user holds.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.data.buckets import bucket_name
from encode.errors import ArtifactError
from encode.interests.kmeans import Starts
from encode.model.space import SPACE_FILES, Space, load_space
from encode.outputs import Part, damaged, read_files, read_manifest, read_range, read_referenced, write_output
from encode.storage import ObjectFile, Storage

Ints = npt.NDArray[np.int64]
_USERS_PER_BATCH = 1024
_CHECKSUM = b"checksum"


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


def snapshot_bytes(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> bytes:
    """Return rows of `schema.interests_schema`, users ascending, as one file; readers map it batch by batch.

    Rows are not held beside the file: it may fill most of the memory that a bucket may take.
    """
    sink = io.BytesIO()  # grows in place, and gives its bytes away without a copy
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in _of_equal_size(batches):
            writer.write_batch(batch, custom_metadata={_CHECKSUM: _checksum(batch)})
    return sink.getvalue()


def _of_equal_size(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Cut and join batches to `_USERS_PER_BATCH` users each."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        for first in range(0, len(batch), _USERS_PER_BATCH):
            held.append(batch.slice(first, _USERS_PER_BATCH))
            count = sum(map(len, held))
            if count >= _USERS_PER_BATCH:
                joined = pa.concat_batches(held)
                yield joined[:_USERS_PER_BATCH]
                held = [joined[_USERS_PER_BATCH:]]
    if sum(map(len, held)):
        yield pa.concat_batches(held)


def _checksum(batch: pa.RecordBatch) -> bytes:
    """Return the checksum of ids and centers, which are read without the rest of the file that its digest is of."""
    centers = batch.column("center")
    checksum = 0
    for values in (batch.column("user_id"), centers.value_lengths(), centers.flatten().flatten()):
        checksum = zlib.crc32(values.to_numpy(), checksum)
    return b"%08x" % checksum


def read_rows(storage: Storage, files: Sequence[Part], left_out: Ints) -> list[Iterator[pa.RecordBatch]]:
    """Return the rows that hold in each file of a bucket, the newest file first, but for some users.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    sources = []
    for part in reversed(files):
        reader = pa.ipc.open_file(pa.BufferReader(read_referenced(storage, part)))
        batches = [reader.get_batch(place) for place in range(reader.num_record_batches)]
        sources.append(_without(batches, left_out))
        left_out = np.concatenate([left_out, *(batch.column("user_id").to_numpy() for batch in batches)])
    return sources


def _without(batches: Sequence[pa.RecordBatch], left_out: Ints) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch.filter(pa.array(~np.isin(batch.column("user_id").to_numpy(), left_out)))


def merged(sources: Sequence[Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """Merge sources of rows, each with its users ascending and no user in two; a batch of each is held at a time."""
    filled = [filter(len, source) for source in sources]
    heads = [next(source, None) for source in filled]
    while batches := [head for head in heads if head is not None]:
        bound = min(head.column("user_id")[-1].as_py() for head in batches)
        ready = []
        for place, head in enumerate(heads):
            if head is None:
                continue
            count = int(np.searchsorted(head.column("user_id").to_numpy(), bound, "right"))
            ready.append(head[:count])
            heads[place] = head[count:] if count < len(head) else next(filled[place], None)
        if len(ready) == 1:
            yield ready[0]
        else:
            rows = pa.concat_batches(ready)
            yield rows.take(pa.array(np.argsort(rows.column("user_id").to_numpy())))


def last_centers(storage: Storage, files: Sequence[Part], users: Ints, projected_dim: int) -> Starts:
    """Return the centers that each of some users, ascending, has in the files of a bucket; none for a new user.

    Only ids and centers are fetched, not the whole files.

    Raises:
        ArtifactError: a file is missing, or ids and centers are not those that were written.
    """
    batches = [batch for part in files for batch in _centers_of(storage, part, users)]
    rows = pa.Table.from_batches(batches) if batches else None
    if rows is None or not len(rows):
        return Starts(np.zeros((0, projected_dim), np.float32), np.zeros(len(users) + 1, np.int64))
    rows = rows.take(pa.array(_newest(rows["user_id"].to_numpy()))).combine_chunks()
    lists = rows["center"].combine_chunks()
    counts = np.zeros(len(users), np.int64)
    counts[np.searchsorted(users, rows["user_id"].to_numpy())] = lists.value_lengths().to_numpy()
    centers = lists.flatten().flatten().to_numpy().reshape(-1, projected_dim)
    return Starts(centers, np.append(0, np.cumsum(counts)))


def _centers_of(storage: Storage, part: Part, users: Ints) -> Iterator[pa.RecordBatch]:
    """Yield the ids and centers of some users in one file."""
    try:
        file = pa.PythonFile(ObjectFile(partial(read_range, storage, part), part.bytes), mode="r")
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[0, 2]))
        for place in range(reader.num_record_batches):
            batch, written = reader.get_batch_with_custom_metadata(place)
            batch.validate(full=True)
            if written is None or written[_CHECKSUM] != _checksum(batch):
                raise damaged(storage, str(part.at), part, f"ids or centers of batch {place} are not those written")
            yield batch.filter(pa.array(np.isin(batch.column("user_id").to_numpy(), users, assume_unique=True)))
    except (pa.ArrowException, OSError, KeyError) as error:
        if getattr(error, "errno", None) is not None:  # of the store; what Arrow cannot read has no number
            raise
        raise damaged(storage, str(part.at), part, f"not an Arrow IPC file ({error})") from None


def _newest(user_ids: Ints) -> Ints:
    """Return the last place of each user, users ascending."""
    _, place = np.unique(user_ids[::-1], return_index=True)
    return len(user_ids) - 1 - place
