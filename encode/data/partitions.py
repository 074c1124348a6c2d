"""Daily partitions `<kind>/dt=YYYY-MM-DD/...` in a store, found by listing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date

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
