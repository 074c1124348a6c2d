"""Old histories and snapshots that nothing reaches any more, and their removal.

Of each folder with a current output are kept: that one and later ones, the newest few, all that are not old, and for
histories those that a kept snapshot was made of. Of the others, every file stays that one of the kept names as its own.
What an alias in the registry reaches is reached by the current output of its space, so it is kept.

A space that no alias leads to is not refreshed any more. Once its current output is old by the histories' day, nothing
old in it is kept, and its pointer goes first: else its users, erased ones too, would be in the store forever.

A manifest goes before the notes that an interrupted run would go on from, and both before the files: whatever is left
when the process dies is complete, or absent and made anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from encode.data.grouping import FOLDER
from encode.errors import ConfigError
from encode.interests.snapshots import folder_of
from encode.outputs import MANIFEST, Manifest, read_manifest
from encode.pointers import POINTER, Pointer, read_pointer
from encode.storage import Storage

LEAST_KEPT = 3
"""Snapshots of each space that are kept at least."""
_NOTE = ".result.json"
"""Ending of what an interrupted run goes on from, see `encode.data.buckets`."""
_NUM_THREADS = 8


@dataclass(frozen=True, eq=False)
class _Output:
    """A folder of files, with a manifest or not yet; each is itself only."""

    prefix: str
    as_of: date
    manifest: Manifest | None
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Garbage:
    """What nothing reaches."""

    outputs: tuple[str, ...]
    """Prefixes; a file in one of them may still be in use, and stays."""
    keys: tuple[str, ...]
    """In the order in which they may be removed: pointers, manifests, notes, files."""


def find_garbage(storage: Storage, spaces: Collection[str], keep: int, days: int) -> Garbage:
    """Find what can be removed.

    Args:
        storage: the object store.
        spaces: that serve, or may again; none at all says nothing about any, and all are kept.
        keep: outputs of each folder that are kept at least.
        days: by which an output must be older than the current one of its folder. Nothing that is being written is.

    Raises:
        ConfigError: `keep` is below 3, or `days` below 1.
        ArtifactError: a pointer or a manifest cannot be read, so what it reaches is not known.
    """
    if keep < LEAST_KEPT or days < 1:
        raise ConfigError(
            f"prune: keep {keep} snapshots, older than {days} days: expected at least {LEAST_KEPT} snapshots and 1 day"
        )
    histories, pointers = read_pointer(storage, FOLDER), []
    newest = histories[0].as_of if histories and spaces else None
    at_hand = {folder_of(space) for space in spaces}
    old: set[_Output] = set()
    snapshots = _folders(storage, storage.list("interests/"))
    for folder, outputs in snapshots.items():
        current = read_pointer(storage, folder)
        if newest and folder not in at_hand and (current is None or _is_old(current[0].as_of, newest, days)):
            pointers += [f"{folder}/{POINTER}"] if current else []
            old |= {one for one in outputs if _is_old(one.as_of, newest, days)}
        else:
            old |= _unreached(outputs, current, keep, days, set())
    kept = {one for outputs in snapshots.values() for one in outputs} - old
    made_of = {str(one.manifest.details.get("histories")) for one in kept if one.manifest}
    for outputs in _folders(storage, storage.list(f"{FOLDER}/")).values():
        old |= (gone := _unreached(outputs, histories, keep, days, made_of))
        kept |= set(outputs) - gone
    used = {part.key(one.prefix) for one in kept if one.manifest for part in one.manifest.parts}
    keys = pointers + [key for one in old for key in one.keys if key not in used]
    left = {key.rpartition("/")[0] for key in keys}
    outputs_left = sorted(one.prefix for one in old if one.prefix in left)
    return Garbage(tuple(outputs_left), tuple(sorted(keys, key=lambda key: (_phase(key), key))))


def remove_garbage(storage: Storage, garbage: Garbage) -> None:
    """Remove it; killed in between, the next time goes on."""
    phases: list[list[str]] = [[], [], [], []]
    for key in garbage.keys:
        phases[_phase(key)].append(key)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for keys in phases:
            list(pool.map(storage.remove, keys))


def _phase(key: str) -> int:
    if key.endswith(f"/{POINTER}"):
        return 0
    return 1 if key.endswith(f"/{MANIFEST}") else 2 if key.endswith(_NOTE) else 3


def _folders(storage: Storage, keys: Iterable[str]) -> dict[str, list[_Output]]:
    """Return the outputs of each folder; what has another name than an output is left out, and so left alone."""
    by_prefix: dict[str, list[str]] = {}
    for key in keys:
        by_prefix.setdefault(key.rpartition("/")[0], []).append(key)
    folders: dict[str, list[_Output]] = {}
    for prefix, own in by_prefix.items():
        folder, _, name = prefix.rpartition("/")
        if folder and (as_of := _day_of(name)):
            manifest = read_manifest(storage, prefix) if f"{prefix}/{MANIFEST}" in own else None
            folders.setdefault(folder, []).append(_Output(prefix, as_of, manifest, tuple(own)))
    return folders


def _day_of(name: str) -> date | None:
    """Return the day that the name of an output begins with."""
    try:
        return datetime.strptime(name.partition("-")[0], "%Y%m%d").date()
    except ValueError:
        return None


def _unreached(
    outputs: Sequence[_Output], current: tuple[Pointer, str] | None, keep: int, days: int, made_of: Set[str]
) -> set[_Output]:
    """Return the outputs of a folder that are old and nothing keeps; without a current one, all are kept."""
    if current is None:
        return set()
    finished = sorted((one for one in outputs if one.manifest), key=lambda one: (one.as_of, one.prefix))
    reached = {one.prefix for one in finished[-keep:]} | made_of | {f"{_folder(outputs)}/{current[0].snapshot}"}
    return {one for one in outputs if one.prefix not in reached and _is_old(one.as_of, current[0].as_of, days)}


def _folder(outputs: Sequence[_Output]) -> str:
    return outputs[0].prefix.rpartition("/")[0]


def _is_old(as_of: date, newest: date, days: int) -> bool:
    return as_of <= newest - timedelta(days=days)
