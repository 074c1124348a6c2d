"""All behaviors of all users, per user and oldest first: what training and refreshing read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encode.data.erasures import ERASURES, erased_users
from encode.data.parquet import read_parquet
from encode.data.partitions import quiet, validated_days
from encode.outputs import Manifest, read_part
from encode.schema import BEHAVIORS, HISTORIES, digest, number_of
from encode.storage import Storage

Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
_NUM_THREADS = 8


@dataclass(frozen=True)
class Histories:
    """The histories of U users, N behaviors in all, as ragged arrays.

    User `u` is `user_ids[u]`, and its behaviors are the rows `offsets[u]` to `offsets[u + 1]`, sorted by timestamp,
    then item, then category; rows equal in all three keep the order of their partition.
    """

    user_ids: Ints
    """Ascending, [U]."""
    offsets: Ints
    """[U + 1], from 0 to N."""
    item_ids: Ints
    """[N]"""
    category_ids: Ints
    """0 for none, [N]."""
    timestamps: Ints
    """UTC seconds, [N]."""
    behaviors: Codes
    """Places in `behavior_names`, [N]."""
    behavior_names: tuple[str, ...]
    """Ascending."""

    def __len__(self) -> int:
        """Return U, the number of users."""
        return len(self.user_ids)

    @cached_property
    def user_of(self) -> Ints:
        """Place in `user_ids` of each behavior's user, [N]."""
        return np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))

    def before(self, timestamp: int) -> Histories:
        """Return the behaviors strictly before `timestamp`; users who have none are left out."""
        return self.keep(self.timestamps < timestamp)

    def keep(self, kept: npt.NDArray[np.bool_]) -> Histories:
        """Return some of the behaviors, [N]; users who have none left are left out."""
        counts = np.bincount(self.user_of[kept], minlength=len(self))
        return Histories(
            self.user_ids[counts > 0],
            np.append(0, np.cumsum(counts[counts > 0])),
            self.item_ids[kept],
            self.category_ids[kept],
            self.timestamps[kept],
            self.behaviors[kept],
            self.behavior_names,
        )

    def rows_before(self, user: Ints, timestamp: Ints) -> Ints:
        """Return the row after the last behavior of each user, by place, strictly before each timestamp."""
        start = min(self.timestamps.min(initial=0), timestamp.min(initial=0))
        span = max(self.timestamps.max(initial=0), timestamp.max(initial=0)) - start + 1
        place = self.user_of * span + (self.timestamps - start)
        rows: Ints = np.searchsorted(place, user * span + (timestamp - start))
        return rows


def rows_of(begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Return all rows of the ranges [begin, end), one range after the other, and where each of them starts."""
    lengths = end - begin
    offsets = np.append(0, np.cumsum(lengths))
    return np.repeat(begin - offsets[:-1], lengths) + np.arange(offsets[-1]), offsets


def history_batch(histories: Histories, users: Ints) -> pa.RecordBatch:
    """Return the histories of some users, given by position, as rows of `schema.HISTORIES`."""
    place, offsets = rows_of(histories.offsets[users], histories.offsets[users + 1])
    columns = (histories.item_ids, histories.category_ids, histories.timestamps)
    return to_batch(histories.user_ids[users], offsets, [column[place] for column in columns])


def to_batch(user_ids: Ints, offsets: Ints, columns: Sequence[Ints]) -> pa.RecordBatch:
    """Return item ids, category ids and timestamps, cut by `offsets` from 0 on, as rows of `schema.HISTORIES`."""
    lists = [pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(column)) for column in columns]
    return pa.RecordBatch.from_arrays([pa.array(user_ids), *lists], schema=HISTORIES)


def to_histories(table: pa.Table) -> Histories:
    """Group rows of `schema.BEHAVIORS`, in any order, into histories."""
    behavior = table["behavior"].unify_dictionaries().combine_chunks()
    if isinstance(behavior, pa.ChunkedArray):
        behavior = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), pa.array([], pa.string()))
    names = behavior.dictionary.to_pylist()
    ranked = sorted(set(names))
    codes = np.array([ranked.index(name) for name in names], np.int32)[behavior.indices.to_numpy()]
    users, items, categories, timestamps = (
        table[name].to_numpy() for name in ("user_id", "item_id", "category_id", "timestamp")
    )
    order = np.lexsort((categories, items, timestamps, users))
    users = users[order]
    starts = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]])) if len(users) else np.zeros(0, np.int64)
    return Histories(
        users[starts],
        np.append(starts, len(users)).astype(np.int64),
        items[order],
        categories[order],
        timestamps[order],
        codes[order],
        tuple(ranked),
    )


def read_histories(
    storage: Storage, end: date, start: date | None = None, say: Callable[[str], None] = quiet
) -> tuple[Histories, dict[str, str]]:
    """Read all validated behaviors of the days before `end`, and from `start` on if it is given.

    Returns:
        The histories without erased users, and the inputs: partition -> digest of its manifest, sorted.

    Raises:
        ArtifactError: there is no validated day in the range, or a file is damaged.
    """
    found = validated_days(storage, end, start)
    rows = sum(int(manifest.counts["rows"]) for manifest in found.values())
    erased = erased_users(storage)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        days = sorted({prefix.removeprefix("behaviors/dt=")[:10] for prefix in found})
        say(f"reading {number_of(rows, 'behavior')} of {number_of(len(found), 'partition')}, {days[0]} to {days[-1]}")
        tables = pool.map(lambda item: _read_day(storage, *item), found.items())
        table = pa.concat_tables([table for day in tables for table in day])
    if len(erased):
        table = table.filter(pc.invert(pc.is_in(table["user_id"], pa.array(erased))))
    return to_histories(table), inputs_of(found, erased)


def inputs_of(found: Mapping[str, Manifest], erased: Ints) -> dict[str, str]:
    """Return what histories of some validated days without erased users are made from: name -> digest, sorted."""
    inputs = {prefix: manifest.digest() for prefix, manifest in sorted(found.items())}
    return inputs | ({ERASURES: digest(erased.tobytes())} if len(erased) else {})


def _read_day(storage: Storage, prefix: str, manifest: Manifest) -> Sequence[pa.Table]:
    return [read_parquet(read_part(storage, prefix, part)).cast(BEHAVIORS) for part in manifest.parts]
