"""Pointers: which of the finished outputs in a folder is the current one. The only objects that ever change.

histories/current.json            the histories that the next refresh starts from
interests/<space>/current.json    the snapshot that serves
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

from encode.errors import ArtifactError
from encode.outputs import Manifest, read_manifest
from encode.schema import canonical_json
from encode.storage import LostRace, Storage

POINTER = "current.json"
"""Name of a folder's pointer."""
_PUBLISH_TRIES = 20


@dataclass(frozen=True)
class Pointer:
    """What `current.json` says."""

    snapshot: str
    """Name of the output within the folder."""
    as_of: date
    """Nothing at or after the start of this day was used."""
    manifest: str
    """Digest of the output's manifest."""

    def to_bytes(self) -> bytes:
        """Return the one spelling."""
        return canonical_json({"snapshot": self.snapshot, "as_of": str(self.as_of), "manifest": self.manifest})


def read_pointer(storage: Storage, folder: str) -> tuple[Pointer, str] | None:
    """Return the pointer of a folder and its version for `move_pointer`, or None before the first output.

    Raises:
        ArtifactError: the pointer cannot be read.
    """
    key = f"{folder}/{POINTER}"
    found = storage.get_versioned(key)
    if found is None:
        return None
    try:
        values = json.loads(found[0])
        pointer = Pointer(values["snapshot"], date.fromisoformat(values["as_of"]), values["manifest"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{storage.uri}/{key}: not a pointer ({error}); remove it and refresh again") from None
    return pointer, found[1]


def read_current(storage: Storage, folder: str) -> tuple[Pointer, Manifest] | None:
    """Return the pointer of a folder and the manifest of the output that it names, or None before the first.

    Raises:
        ArtifactError: the output is absent, unfinished or not the one that the pointer names.
    """
    found = read_pointer(storage, folder)
    if found is None:
        return None
    pointer, prefix = found[0], f"{folder}/{found[0].snapshot}"
    manifest = read_manifest(storage, prefix)
    if manifest is None or manifest.digest() != pointer.manifest:
        state = "absent or unfinished" if manifest is None else f"has manifest {manifest.digest()[:12]}"
        raise ArtifactError(f"{storage.uri}/{prefix}: {state}, pointer expects {pointer.manifest[:12]}; refresh again")
    return pointer, manifest


def read_base(storage: Storage, folder: str, say: Callable[[str], None]) -> tuple[Pointer | None, Manifest | None]:
    """Return the pointer of a folder, and the manifest of its output if that can be built on; `say` why it cannot.

    Raises:
        ArtifactError: the pointer cannot be read.
    """
    try:
        return read_current(storage, folder) or (None, None)
    except ArtifactError as error:
        found = read_pointer(storage, folder)
        say(f"{error}: not built on")
        return found[0] if found else None, None


def move_pointer(storage: Storage, folder: str, pointer: Pointer, version: str | None) -> None:
    """Point a folder at an output if the pointer is still as read; `version` None if there was none.

    Raises:
        LostRace: somebody moved it in between.
    """
    key = f"{folder}/{POINTER}"
    if version is None:
        storage.create(key, pointer.to_bytes())
    else:
        storage.replace(key, pointer.to_bytes(), version)


def publish(
    storage: Storage, folder: str, snapshot: str, manifest: Manifest, based_on: Pointer | None = None
) -> Pointer:
    """Make a finished output the current one of its folder.

    Left in place is one of a later day, and one of the same day by somebody else: not the one that ours is `based_on`.

    Returns:
        The pointer that now holds: ours, or the one that was left in place.

    Raises:
        ArtifactError: the pointer kept moving under us.
    """
    ours = Pointer(snapshot, date.fromisoformat(manifest.details["as_of"]), manifest.digest())
    for attempt in range(_PUBLISH_TRIES):
        found = read_pointer(storage, folder)
        if found:
            theirs = found[0]
            if theirs == ours or theirs.as_of > ours.as_of or (theirs.as_of == ours.as_of and theirs != based_on):
                return theirs
        try:
            move_pointer(storage, folder, ours, found[1] if found else None)
        except LostRace:
            time.sleep(0.05 * 2 ** min(attempt, 5))
            continue
        return ours
    raise ArtifactError(f"{folder}/current.json: moved by others {_PUBLISH_TRIES} times; too many publishers")
