"""Old histories and snapshots that nothing reaches any more, and their removal.

Of each folder with a current output are kept: that one and later ones, the newest few, all that are not old, and for
histories those that a kept snapshot was made of. Of the others, every file stays that one of the kept names as its own.
What an alias in the registry reaches is reached by the current output of its space, so it is kept.

A manifest goes before the notes that an interrupted run would go on from, and both before the files: whatever is left
when the process dies is complete, or absent and made anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from encode.data.grouping import FOLDER
from encode.errors import ConfigError
from encode.outputs import MANIFEST, Manifest, read_manifest
from encode.pointers import Pointer, read_pointer
from encode.storage import Storage

LEAST_KEPT = 3
"""Snapshots of each space that are kept at least."""
_NOTE = ".result.json"
"""Ending of what an interrupted run goes on from, see `encode.data.buckets`."""
_NUM_THREADS = 8


@dataclass(frozen=True)
class _Output:
    """A folder of files, with a manifest or not yet."""

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
    """In the order in which they may be removed: manifests, notes, files."""


def find_garbage(storage: Storage, keep: int, days: int) -> Garbage:
    """Find what can be removed.

    Args:
        storage: the object store.
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
    kept: list[_Output] = []
    old: list[_Output] = []
    for folder, outputs in _folders(storage, storage.list("interests/")).items():
        _split(outputs, read_pointer(storage, folder), keep, days, frozenset(), kept, old)
    made_of = frozenset(str(one.manifest.details.get("histories")) for one in kept if one.manifest)
    for folder, outputs in _folders(storage, storage.list(f"{FOLDER}/")).items():
        _split(outputs, read_pointer(storage, folder), keep, days, made_of, kept, old)
    used = {part.key(one.prefix) for one in kept if one.manifest for part in one.manifest.parts}
    keys = [key for one in old for key in one.keys if key not in used]
    left = {key.rpartition("/")[0] for key in keys}
    return Garbage(tuple(one.prefix for one in old if one.prefix in left), tuple(sorted(keys, key=_phase)))


def remove_garbage(storage: Storage, garbage: Garbage) -> None:
    """Remove it; killed in between, the next time goes on."""
    phases: list[list[str]] = [[], [], []]
    for key in garbage.keys:
        phases[_phase(key)].append(key)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for keys in phases:
            list(pool.map(storage.remove, keys))


def _phase(key: str) -> int:
    return 0 if key.endswith(f"/{MANIFEST}") else 1 if key.endswith(_NOTE) else 2


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


def _split(
    outputs: Sequence[_Output],
    current: tuple[Pointer, str] | None,
    keep: int,
    days: int,
    made_of: frozenset[str],
    kept: list[_Output],
    old: list[_Output],
) -> None:
    """Add each output of a folder to what is kept or to what is old; without a current one, all are kept."""
    finished = sorted((one for one in outputs if one.manifest), key=lambda one: (one.as_of, one.prefix))
    newest = {one.prefix for one in finished[-keep:]}
    for one in outputs:
        is_old = (
            current is not None
            and one.as_of <= current[0].as_of - timedelta(days=days)
            and one.prefix.rpartition("/")[2] != current[0].snapshot
            and one.prefix not in newest | made_of
        )
        (old if is_old else kept).append(one)
