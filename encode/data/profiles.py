"""The profile of a day: what later days are compared with, a few kilobytes in place of its rows.

It is kept in the manifest of the day's quarantine, `details.profile`, and depends on nothing but the day's own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encode.data.verdicts import Verdict, count_reasons
from encode.outputs import read_manifest
from encode.schema import SECONDS_PER_DAY, bucket_of
from encode.storage import Storage

Ints = npt.NDArray[np.int64]
NUM_CATEGORIES = 256
"""Categories of a day that are kept, the most frequent."""
NUM_BEHAVIORS = 32
NUM_SAMPLED = 128
"""Users and items of a day that are kept, those with the smallest hashes: on every day the same if they are there."""
_HASHES = 1 << 53
_NUM_THREADS = 8


@dataclass(frozen=True)
class Profile:
    """Counts of one day; all but `raw_rows` and `reasons` are of its accepted rows."""

    raw_rows: int
    reasons: dict[str, int]
    """Rejected rows by reason."""
    rows: int
    users: int
    items: int
    without_category: int
    largest_user: int
    """Rows of the user who has most."""
    behaviors: dict[str, int]
    """Rows by behavior, the most frequent ones."""
    hours: Ints
    """Users who were active in each hour, UTC, [24]: a user's rows come in bursts, so rows would say less."""
    categories: Ints
    """Most frequent first, [C]."""
    category_rows: Ints
    """[C]"""
    sampled_users: Ints
    """Hashes, ascending."""
    sampled_items: Ints

    def to_json(self) -> dict[str, Any]:
        """Return what is kept of it."""
        values = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in vars(self).items()}
        kept = {name: values[name][:NUM_CATEGORIES] for name in ("categories", "category_rows")}
        return values | kept

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Profile:
        """Return a profile that was kept."""
        arrays: dict[str, Any] = {name: np.array(v, np.int64) for name, v in values.items() if isinstance(v, list)}
        return cls(**(values | arrays))


def profile_of(verdicts: Sequence[Verdict]) -> Profile:
    """Sum up a day from the verdicts of all its rows."""
    reason = np.concatenate([v.reason for v in verdicts])
    accepted = reason == 0
    users, items, categories, timestamps = (
        np.concatenate([getattr(v, name) for v in verdicts])[accepted]
        for name in ("user_id", "item_id", "category_id", "timestamp")
    )
    who = pa.array(users).dictionary_encode()
    codes, user_ids = who.indices.to_numpy(), who.dictionary.to_numpy()
    active = np.zeros((len(user_ids), 24), bool)
    active[codes, timestamps % SECONDS_PER_DAY // 3600] = True
    item_ids = pc.unique(pa.array(items)).to_numpy()
    found = pa.array(categories).dictionary_encode()
    ids, counts = found.dictionary.to_numpy(), np.bincount(found.indices.to_numpy(), minlength=len(found.dictionary))
    order = np.lexsort((ids, -counts))
    return Profile(
        raw_rows=len(reason),
        reasons=count_reasons(reason),
        rows=len(users),
        users=len(user_ids),
        items=len(item_ids),
        without_category=int((categories == 0).sum()),
        largest_user=int(np.bincount(codes).max(initial=0)),
        behaviors=_behaviors(verdicts),
        hours=active.sum(axis=0),
        categories=ids[order],
        category_rows=counts[order],
        sampled_users=_sample(user_ids),
        sampled_items=_sample(item_ids),
    )


def _behaviors(verdicts: Sequence[Verdict]) -> dict[str, int]:
    names = pa.chunked_array([v.behavior.filter(pa.array(v.reason == 0)) for v in verdicts], pa.string())
    counts = sorted(((one["counts"], one["values"]) for one in names.value_counts().to_pylist()), key=lambda c: -c[0])
    return {name: count for count, name in sorted(counts, key=lambda c: (-c[0], c[1]))[:NUM_BEHAVIORS]}


def _sample(ids: Ints) -> Ints:
    hashes = bucket_of(ids, _HASHES)
    return np.sort(np.partition(hashes, NUM_SAMPLED)[:NUM_SAMPLED] if len(hashes) > NUM_SAMPLED else hashes)


class Past:
    """The profiles of the validated days of a store, each read once and when it is asked for."""

    def __init__(self, storage: Storage, judged: dict[date, str]) -> None:
        """Remember where each validated day's profile is: day -> prefix of its quarantine."""
        self._storage, self._judged = storage, judged
        self._profiles: dict[date, Profile | None] = {}

    def before(self, day: date, count: int) -> dict[date, Profile]:
        """Return the profiles of the last `count` validated days before `day`, oldest first.

        Days that were validated by a version that kept no profile are left out.
        """
        days = sorted(one for one in self._judged if one < day)[-count:]
        missing = [one for one in days if one not in self._profiles]
        if missing:
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                self._profiles |= zip(missing, pool.map(self._read, missing), strict=True)
        return {one: profile for one in days if (profile := self._profiles[one]) is not None}

    def add(self, day: date, prefix: str, profile: Profile) -> None:
        """Let later days be compared with one that has just been validated."""
        self._judged[day] = prefix
        self._profiles[day] = profile

    def _read(self, day: date) -> Profile | None:
        manifest = read_manifest(self._storage, self._judged[day])
        kept = manifest.details.get("profile") if manifest else None
        return Profile.from_json(kept) if kept else None
