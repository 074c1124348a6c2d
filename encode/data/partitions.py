"""Daily partitions `<kind>/dt=YYYY-MM-DD/...` in a store, found by listing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta

from encode.errors import ArtifactError, ConfigError
from encode.outputs import MANIFEST, Manifest, read_manifest
from encode.pointers import read_current
from encode.schema import Window
from encode.storage import Storage

REPLAY = "replay-"
"""Begins the name of what a replay adds to a day, below the day's partition."""
_NUM_THREADS = 8
_LONGEST_PAUSE = timedelta(days=366)
"""Between the newest validated day and what is made of it."""
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


def published_days(storage: Storage) -> dict[date, list[str]]:
    """Return the prefixes of what is published of each validated day: its partition, then what replays added, in order.

    Without the first there is no day: what a replay added to it counts no more.
    """
    found: dict[date, list[str]] = {}
    for day, keys in days_of(storage.list("behaviors/dt=")).items():
        complete = [key.removesuffix(f"/{MANIFEST}") for key in keys if key.endswith(f"/{MANIFEST}")]
        first = f"behaviors/dt={day}"
        if first in complete:
            found[day] = [first, *(prefix for prefix in complete if prefix.startswith(f"{first}/{REPLAY}"))]
    return found


def waiting_days(storage: Storage, window: Window) -> list[str]:
    """Return the prefixes of the window's validated days that the current histories do not hold as they are now.

    Raises:
        ArtifactError: no day of the window is validated.
    """
    found = validated_days(storage, window.end, window.start)
    try:
        current = read_current(storage, "histories")
    except ArtifactError:  # damaged: a refresh makes them anew
        current = None
    held = current[1].inputs if current else {}
    return [prefix for prefix, manifest in found.items() if held.get(prefix) != manifest.digest()]


def validated_days(storage: Storage, end: date, start: date | None = None) -> dict[str, Manifest]:
    """Return the manifests of the validated days before `end`, and from `start` on if it is given, by prefix, in order.

    A partition without a manifest is unfinished and counts as absent. A replay that added no rows is left out.

    Raises:
        ArtifactError: there is none, or a replay added to another partition than the one that is there.
        ConfigError: without `start`, `end` is more than a year after the newest of them: what is published as of a day
            that is mistyped so would stay the newest for as long.
    """
    days = {day: p for day, p in published_days(storage).items() if day < end and (start is None or day >= start)}
    prefixes = [prefix for day in days.values() for prefix in day]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        manifests = pool.map(lambda prefix: read_manifest(storage, prefix), prefixes)
        found = {prefix: manifest for prefix, manifest in zip(prefixes, manifests, strict=True) if manifest is not None}
    if not found:
        raise ArtifactError(
            f"{storage.uri}/behaviors: no validated day {f'from {start} ' if start else ''}before {end}; "
            "validate the window first"
        )
    if start is None and end - max(days) > _LONGEST_PAUSE:
        raise ConfigError(
            f"as of {end}: the newest validated day is {max(days)}, more than a year before; is the year mistyped?"
        )
    for prefix, manifest in found.items():
        base = manifest.details.get("adds_to")
        if base and (base not in found or manifest.inputs[base] != found[base].digest()):
            raise ArtifactError(
                f"{storage.uri}/{prefix}: adds to another {base} than the one that is there, its rows may be in both; "
                f"remove {prefix.rpartition('/')[0]} and its quarantine, validate the day again, then replay it"
            )
    return {prefix: made for prefix, made in found.items() if made.counts["rows"] or "adds_to" not in made.details}
