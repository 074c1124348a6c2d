"""Daily partitions `<kind>/dt=YYYY-MM-DD/...` in a store, found by listing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date

from encode.errors import ArtifactError
from encode.outputs import Manifest, read_manifest
from encode.storage import Storage

_NUM_THREADS = 8
_DAY = re.compile(r"^[^/]+/dt=(\d{4}-\d{2}-\d{2})/")


def quiet(_line: str) -> None:
    """Say nothing: the default where a function can report its progress."""


def days_of(keys: Iterable[str]) -> dict[date, list[str]]:
    """Group keys by the day of their partition, both in order; keys outside any day are left out."""
    days: dict[date, list[str]] = {}
    for key in sorted(keys):
        if found := _DAY.match(key):
            try:
                day = date.fromisoformat(found[1])
            except ValueError:
                continue  # 2024-13-01 is a folder of somebody else
            days.setdefault(day, []).append(key)
    return days


def validated_days(storage: Storage, end: date, start: date | None = None) -> dict[str, Manifest]:
    """Return the manifest of each validated day before `end`, and from `start` on if it is given, by prefix, in order.

    A partition without a manifest is unfinished and counts as absent.

    Raises:
        ArtifactError: there is none.
    """
    days = days_of(storage.list("behaviors/dt="))
    prefixes = [f"behaviors/dt={day}" for day in days if day < end and (start is None or day >= start)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        manifests = pool.map(lambda prefix: read_manifest(storage, prefix), prefixes)
        found = {prefix: manifest for prefix, manifest in zip(prefixes, manifests, strict=True) if manifest is not None}
    if not found:
        raise ArtifactError(
            f"{storage.uri}/behaviors: no validated day {f'from {start} ' if start else ''}before {end}; "
            "validate the window first"
        )
    return found
