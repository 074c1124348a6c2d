"""Snapshots: the interests of all users as of a day, and the one pointer that says which snapshot serves.

interests/<space>/<snapshot>/part-NNN.arrow    Arrow IPC, users ascending; a user's part is a hash of the id
interests/<space>/<snapshot>/manifest.json     last
interests/<space>/current.json                 moved by a conditional put
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np
import pyarrow as pa

from encode.data.histories import Histories, rows_of
from encode.errors import ArtifactError
from encode.interests.extract import extract
from encode.model.space import SPACE_FILES, Space, load_space
from encode.schema import HISTORIES, bucket_of, canonical_json
from encode.storage import LostRace, Manifest, Storage, read_files, read_manifest, recipe, write_output

_USERS_PER_BATCH = 1024
_PUBLISH_TRIES = 20


@dataclass(frozen=True)
class Pointer:
    """What `current.json` says."""

    snapshot: str
    as_of: date
    """Nothing at or after the start of this day was used."""
    manifest: str
    """Digest of the snapshot's manifest."""

    def to_bytes(self) -> bytes:
        """Return the one spelling."""
        return canonical_json({"snapshot": self.snapshot, "as_of": str(self.as_of), "manifest": self.manifest})


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


def write_snapshot(
    storage: Storage,
    space: Space,
    histories: Histories,
    as_of: date,
    inputs: Mapping[str, str],
    num_parts: int,
    say: Callable[[str], None],
) -> tuple[str, Manifest]:
    """Extract every user's interests and store them; a finished snapshot of the same inputs is left as it is.

    Args:
        storage: the object store.
        space: in which to extract.
        histories: all behaviors before `as_of`.
        as_of: the first day that is not used.
        inputs: digest of each behaviors partition that `histories` was read from.
        num_parts: files.
        say: told about progress.

    Returns:
        The snapshot's id, which is its day and the start of its recipe's digest, and its manifest.
    """
    config = {"num_parts": num_parts, "as_of": str(as_of)}
    sources = {**inputs, f"spaces/{space.id}": space.id}
    made = recipe("interests", config, sources)
    snapshot = f"{as_of:%Y%m%d}-{made[:12]}"
    prefix = f"interests/{space.id}/{snapshot}"
    if (manifest := read_manifest(storage, prefix)) is not None:
        say(f"snapshot {snapshot} is there already")
        return snapshot, manifest
    buckets = bucket_of(histories.user_ids, num_parts)
    parts: dict[str, bytes] = {}
    rows: dict[str, int] = {}
    schema = None
    num_interests = 0
    started, done = time.monotonic(), 0
    for part in range(num_parts):
        users = np.flatnonzero(buckets == part)
        sink = io.BytesIO()
        writer = None
        for chosen in np.split(users, range(_USERS_PER_BATCH, len(users), _USERS_PER_BATCH)):
            batch = extract(history_batch(histories, chosen), space)
            num_interests += len(batch.column("size").flatten())
            if writer is None:
                schema = batch.schema
                writer = pa.ipc.new_file(sink, schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()
        name = f"part-{part:03d}.arrow"
        parts[name], rows[name] = sink.getvalue(), len(users)
        done += len(users)
        left = (time.monotonic() - started) / max(done, 1) * (len(histories.user_ids) - done)
        say(f"extracted {done:,} of {len(histories.user_ids):,} users, about {left:.0f} s left")
    manifest = write_output(
        storage,
        prefix,
        parts,
        kind="interests",
        fingerprint=made,
        config=config,
        inputs=sources,
        rows=rows,
        columns={field.name: str(field.type) for field in schema} if schema else {},
        counts={
            "users": len(histories.user_ids),
            "behaviors": int(histories.offsets[-1]),
            "interests": num_interests,
        },
        details={"as_of": str(as_of), "space": space.id},
        seed=space.config.clustering.seed,
    )
    return snapshot, manifest


def history_batch(histories: Histories, users: np.ndarray) -> pa.RecordBatch:
    """Return the histories of some users, given by position, as rows of `schema.HISTORIES`."""
    place, offsets = rows_of(histories.offsets[users], histories.offsets[users + 1])
    lists = [
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(column[place]))
        for column in (histories.item_ids, histories.category_ids, histories.timestamps)
    ]
    return pa.RecordBatch.from_arrays([pa.array(histories.user_ids[users]), *lists], schema=HISTORIES)


def read_pointer(storage: Storage, space_id: str) -> tuple[Pointer, str] | None:
    """Return the pointer of a space and its version for `move_pointer`, or None before the first snapshot.

    Raises:
        ArtifactError: the pointer cannot be read.
    """
    key = f"interests/{space_id}/current.json"
    found = storage.get_versioned(key)
    if found is None:
        return None
    try:
        values = json.loads(found[0])
        pointer = Pointer(values["snapshot"], date.fromisoformat(values["as_of"]), values["manifest"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{storage.uri}/{key}: not a pointer ({error}); publish a snapshot again") from None
    return pointer, found[1]


def move_pointer(storage: Storage, space_id: str, pointer: Pointer, version: str | None) -> None:
    """Point a space at a snapshot if the pointer is still as read; `version` None if there was none.

    Raises:
        LostRace: somebody moved it in between.
    """
    key = f"interests/{space_id}/current.json"
    if version is None:
        storage.create(key, pointer.to_bytes())
    else:
        storage.replace(key, pointer.to_bytes(), version)


def publish(storage: Storage, space_id: str, snapshot: str, manifest: Manifest) -> Pointer:
    """Make a finished snapshot the current one of its space, unless a later day's already is.

    Returns:
        The pointer that now holds: this snapshot, or the later one that was left in place.

    Raises:
        ArtifactError: the pointer kept moving under us.
    """
    ours = Pointer(snapshot, date.fromisoformat(manifest.details["as_of"]), manifest.digest())
    for attempt in range(_PUBLISH_TRIES):
        found = read_pointer(storage, space_id)
        if found and (found[0] == ours or found[0].as_of > ours.as_of):
            return found[0]
        try:
            move_pointer(storage, space_id, ours, found[1] if found else None)
        except LostRace:
            time.sleep(0.05 * 2 ** min(attempt, 5))
            continue
        return ours
    raise ArtifactError(
        f"interests/{space_id}/current.json: moved by others {_PUBLISH_TRIES} times; too many publishers"
    )
