"""Raw partitions in the store: those landed from here, and those that the owner of a log puts there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date

from encode.config import SourceConfig
from encode.data.landing import LANDED_SUFFIX
from encode.data.partitions import days_of
from encode.data.readers import RawBatch, read_object
from encode.errors import DataError
from encode.outputs import MANIFEST, Manifest, read_manifest
from encode.schema import digest, number_of
from encode.storage import Storage

_NUM_THREADS = 8


@dataclass(frozen=True)
class RawDay:
    """The raw files of one day."""

    day: date
    digests: dict[str, str]
    """SHA-256 of each file, by its key."""
    landed: bool
    """Landed from here: Parquet under the names of the contract. Otherwise in the format of the preset."""


def find_raw_days(storage: Storage, days: Iterable[date]) -> dict[date, RawDay]:
    """Return those of `days` that have raw data, oldest first.

    What is landed from here counts once its manifest is there; its digests are read from it. The files of others are
    read to be digested. Files whose name begins with `.` or `_` are bookkeeping and left out.

    Raises:
        DataError: a partition holds only the remains of a landing that was killed, or files of two owners.
    """
    wanted = sorted(set(days))
    listed = storage.list("raw/dt=") if len(wanted) > 1 else storage.list(f"raw/dt={wanted[0]}/") if wanted else []
    keys = days_of(listed)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = pool.map(lambda day: _find(storage, day, keys[day]), [day for day in wanted if day in keys])
        return {raw.day: raw for raw in found if raw is not None}


def read_raw_day(storage: Storage, raw: RawDay, source: SourceConfig) -> Iterator[RawBatch]:
    """Yield the rows of a day, file by file in the order of their keys.

    Raises:
        DataError: a file changed since it was found, is damaged, or is not in the format of `source`.
    """
    plain = source.model_copy(update={"reader": "parquet", "columns": {}})
    for key, expected in raw.digests.items():
        data = storage.get(key)
        if digest(data) != expected:
            raise DataError(
                f"{storage.uri}/{key}: found digest {digest(data)[:12]}, expected {expected[:12]}: the file is "
                "damaged or was changed while it was read; put it there again"
            )
        parquet = key.endswith((".parquet", ".pq")) or source.reader in ("complete-journey", "generated")
        reader = plain if raw.landed else source.model_copy(update={"reader": "parquet"}) if parquet else source
        yield from read_object(reader, key, data)


def _find(storage: Storage, day: date, keys: list[str]) -> RawDay | None:
    prefix = f"raw/dt={day}"
    manifest = read_manifest(storage, prefix) if f"{prefix}/{MANIFEST}" in keys else None
    names = [key.removeprefix(f"{prefix}/") for key in keys if key != f"{prefix}/{MANIFEST}"]
    others = [n for n in names if not n.endswith(LANDED_SUFFIX) and not any(p[0] in "._" for p in n.split("/"))]
    if manifest is not None:
        return _landed(storage, day, manifest, others)
    if names and not others:
        return None if all(not n.endswith(LANDED_SUFFIX) for n in names) else _unfinished(storage, day)
    if not others:
        return None
    return RawDay(day, {f"{prefix}/{n}": digest(storage.get(f"{prefix}/{n}")) for n in others}, landed=False)


def _landed(storage: Storage, day: date, manifest: Manifest, others: list[str]) -> RawDay:
    if others:
        raise DataError(
            f"{storage.uri}/raw/dt={day}: found {number_of(len(others), 'file')} beside those of its manifest (first: "
            f"{others[0]}); a landed day is complete: put them elsewhere"
        )
    return RawDay(day, {f"raw/dt={day}/{part.name}": part.sha256 for part in manifest.parts}, landed=True)


def _unfinished(storage: Storage, day: date) -> RawDay:
    raise DataError(f"{storage.uri}/raw/dt={day}: a landing was stopped half-way, its manifest is missing; land again")
