"""What still holds a user who is to be gone: all of the store is looked into, file by file.

Raw days, behaviors and quarantine keep what was logged until their retention removes it; histories and snapshots of
before an erasure until `encode.interests.pruning` does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from encode.config import SourceConfig
from encode.data.buckets import USERS
from encode.data.by_user import Ints
from encode.data.grouping import FOLDER
from encode.data.integers import read_integers
from encode.data.parquet import read_parquet
from encode.data.partitions import days_of
from encode.data.raw_days import find_raw_days, read_raw_day
from encode.outputs import MANIFEST, read_manifest
from encode.storage import ObjectFile, Storage

_NUM_THREADS = 8
_NUMBER = re.compile("[0-9]{1,19}")
_REMEDIES = {
    "raw/": "the owner of the log removes them there",
    "behaviors/": "until the retention of validated days removes them",
    "quarantine/": "until the retention of rejected rows removes them",
    "feedback/": "whoever logs what came of the answers removes them there",
    "histories/": "`encode refresh` makes others without them, `encode prune` removes these once they are old",
    "interests/": "`encode refresh` makes others without them, `encode prune` removes these once they are old",
}


def find_users(storage: Storage, user_ids: Collection[int], source: SourceConfig) -> dict[str, list[int]]:
    """Return who of some users is in which output or partition, by its prefix, in order.

    Takes as long as reading all behaviors and raw days; of snapshots only the ids are fetched. Rows that were rejected
    are looked into as text: any number in their user_id may be the user.

    Args:
        storage: the object store.
        user_ids: whom to look for.
        source: how raw days are read.

    Raises:
        DataError: a raw day cannot be read.
        ArtifactError: a manifest cannot be read.
    """
    wanted = np.array(sorted(user_ids), np.int64)
    found: dict[str, set[int]] = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for prefix, users in pool.map(lambda look: look(), _looks(storage, wanted, source)):
            found.setdefault(prefix, set()).update(users)
    return {prefix: sorted(users) for prefix, users in sorted(found.items()) if users}


def describe(users: Sequence[int], on_list: Sequence[int], found: Mapping[str, list[int]]) -> Iterator[str]:
    """Yield what to tell people of what `find_users` found."""
    if waiting := sorted(set(users) - set(on_list)):
        yield f"not on the list of erased users: {', '.join(map(str, waiting))}"
    for kind, remedy in _REMEDIES.items():
        held = [prefix for prefix in found if prefix.startswith(kind)]
        if held:
            where = held[0] if len(held) == 1 else f"{len(held):,} of {kind}, {held[0]} to {held[-1]}"
            yield f"still in {where}: {remedy}"
    if absent := sorted(set(users).difference(*found.values())):
        yield f"in nothing that the store holds: {', '.join(map(str, absent))}; is the id right?"


def _looks(storage: Storage, wanted: Ints, source: SourceConfig) -> Iterator[partial[tuple[str, set[int]]]]:
    """Yield one look a raw day or file."""
    for day in days_of(storage.list("raw/dt=")):
        yield partial(_in_raw_day, storage, wanted, source, f"raw/dt={day}")
    for folder in ("behaviors", "quarantine", "feedback"):
        for key in storage.list(f"{folder}/"):
            if key.endswith(".parquet"):
                yield partial(_in_parquet, storage, wanted, key)
    for folder in (FOLDER, "interests"):
        keys = storage.list(f"{folder}/")
        sizes = _sizes(storage, keys)
        for key in keys:
            if key.endswith(USERS) or (folder == "interests" and key.endswith(".arrow")):
                yield partial(_in_arrow, storage, wanted, key, sizes.get(key))


def _sizes(storage: Storage, keys: Iterable[str]) -> dict[str, int]:
    """Return the size of each file that a manifest tells."""
    sizes: dict[str, int] = {}
    for key in keys:
        prefix = key.removesuffix(f"/{MANIFEST}")
        if prefix != key and (manifest := read_manifest(storage, prefix)):
            sizes |= {part.key(prefix): part.bytes for part in manifest.parts}
    return sizes


def _in_raw_day(storage: Storage, wanted: Ints, source: SourceConfig, prefix: str) -> tuple[str, set[int]]:
    found: set[int] = set()
    for raw in find_raw_days(storage, days_of([f"{prefix}/"])).values():
        for rows in read_raw_day(storage, raw, source):
            users = rows.batch.column("user_id")
            found |= _ids(wanted, users)
            if rows.malformed is not None:
                found |= _numbers(wanted, users.filter(pa.array(rows.malformed)))
    return prefix, found


def _in_parquet(storage: Storage, wanted: Ints, key: str) -> tuple[str, set[int]]:
    prefix = key.rpartition("/")[0]
    users = read_parquet(storage.get(key), ["user_id"])["user_id"].combine_chunks()
    return prefix, _numbers(wanted, users) if key.startswith("quarantine/") else _ids(wanted, users)


def _in_arrow(storage: Storage, wanted: Ints, key: str, size: int | None) -> tuple[str, set[int]]:
    """Fetch the first column only, where the size of the file is known."""
    file = (
        pa.BufferReader(storage.get(key))
        if size is None
        else pa.PythonFile(ObjectFile(partial(storage.get_range, key), size), mode="r")
    )
    reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[0]))
    found: set[int] = set()
    for place in range(reader.num_record_batches):
        found |= _ids(wanted, reader.get_batch(place).column("user_id"))
    return key.rpartition("/")[0], found


def _ids(wanted: Ints, users: pa.Array) -> set[int]:
    return set(np.intersect1d(wanted, read_integers(users).values).tolist())


def _numbers(wanted: Ints, texts: pa.Array) -> set[int]:
    """Return the users whose number is anywhere in some texts."""
    numbers = {int(number) for text in texts.to_pylist() for number in _NUMBER.findall(text or "")}
    return numbers & set(wanted.tolist())
