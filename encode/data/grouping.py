"""Validated days into histories by bucket, and each later day on top: what a refresh reads.

histories/<snapshot>/part-NNN.{users.arrow,rows.npy}    see `encode.data.buckets`; NNN is a hash of the user id
histories/<snapshot>/manifest.json                      last; names files of earlier snapshots too
histories/current.json                                  what the next day is added to

A new day adds a small file to each bucket that it touches; earlier files are named, not copied. Where those files have
become many or large, or hold a user who was erased, the bucket is folded into one base. A day that was validated again
or removed, and a log that has outgrown its number of buckets, group everything anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encode.config import RefreshConfig
from encode.data.buckets import (
    ROWS,
    USERS,
    Index,
    bucket_files,
    bucket_name,
    by_bucket,
    dumped,
    files_of,
    finish,
    read_bucket,
    read_index,
    sizes,
)
from encode.data.by_user import Ints, group
from encode.data.erasures import ERASURES, erased_users
from encode.data.partitions import validated_days
from encode.engines import Engine, Result, Rows
from encode.errors import ArtifactError
from encode.outputs import Manifest, Part, complete_output, read_manifest, read_part, recipe, write_part
from encode.pointers import publish, read_base
from encode.schema import digest, number_of
from encode.storage import Storage

FOLDER = "histories"
_COLUMNS = ["user_id", "item_id", "category_id", "timestamp"]
_ROWS_PER_PIECE = 1 << 18
_BYTES_PER_ROW = 240
"""Memory in which a row is grouped, if each is of another user: rows and their copies, a hash table, the files."""


@dataclass(frozen=True)
class Grouped:
    """The histories of all users as of a day, in files."""

    snapshot: str
    manifest: Manifest

    @property
    def prefix(self) -> str:
        """Where they are in the store."""
        return f"{FOLDER}/{self.snapshot}"

    @property
    def as_of(self) -> date:
        """Nothing at or after the start of this day is in them."""
        return date.fromisoformat(self.manifest.details["as_of"])

    @property
    def num_buckets(self) -> int:
        """Number of buckets, a power of two."""
        return int(self.manifest.config["num_buckets"])

    @property
    def days(self) -> dict[str, str]:
        """The validated days in them, and the digest of each one's manifest."""
        return dict(self.manifest.details["days"])

    def index(self, storage: Storage, bucket: int) -> Index:
        """Return who is in a bucket."""
        return read_index(storage, self.prefix, self.manifest.parts, bucket)


@dataclass(frozen=True)
class Wanted:
    """What is to be in the histories: all of some validated days but for erased users."""

    as_of: date
    found: Mapping[str, Manifest]
    erased: Ints

    @cached_property
    def days(self) -> dict[str, str]:
        return {prefix: manifest.digest() for prefix, manifest in self.found.items()}

    @cached_property
    def erasures(self) -> str | None:
        return digest(self.erased.tobytes()) if len(self.erased) else None

    @cached_property
    def behaviors(self) -> int:
        return sum(int(manifest.counts["rows"]) for manifest in self.found.values())

    def details(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {"as_of": str(self.as_of), "days": self.days, "erasures": self.erasures}


def wanted_histories(storage: Storage, as_of: date) -> Wanted:
    """Look up what is to be in the histories as of a day.

    Raises:
        ArtifactError: there are no validated behaviors.
    """
    return Wanted(as_of, validated_days(storage, as_of), erased_users(storage))


def group_histories(
    storage: Storage, engine: Engine, as_of: date, config: RefreshConfig, say: Callable[[str], None]
) -> Grouped:
    """Bring the histories up to `as_of`: all days before it, grouped by user.

    What cannot be added to the current histories, because they are damaged or of other days, is grouped anew.

    Raises:
        ArtifactError: there are no validated behaviors, or a file of theirs is damaged.
    """
    wanted = wanted_histories(storage, as_of)
    pointer, manifest = read_base(storage, FOLDER, say)
    base = Grouped(pointer.snapshot, manifest) if pointer and manifest else None
    if base is not None and (reason := obsolete(base, wanted, config)):
        say(f"histories: {reason}; grouping all behaviors anew")
        base = None
    if base is not None and base.manifest.details.items() >= wanted.details().items():
        say(f"histories {base.snapshot} are there already")
        return base
    try:
        grouped = _group(storage, engine, wanted, base, config, say)
    except ArtifactError as error:
        if base is None:
            raise
        say(f"histories: {error}; grouping all behaviors anew")
        grouped = _group(storage, engine, wanted, None, config, say)
    publish(storage, FOLDER, grouped.snapshot, grouped.manifest, pointer)
    return grouped


def _group(
    storage: Storage,
    engine: Engine,
    wanted: Wanted,
    base: Grouped | None,
    config: RefreshConfig,
    say: Callable[[str], None],
) -> Grouped:
    """Write the histories, going on where an interrupted run stopped."""
    num_buckets = base.num_buckets if base else _num_buckets(wanted.behaviors, config)
    inputs = wanted.days | ({base.prefix: base.manifest.digest()} if base else {})
    inputs |= {ERASURES: wanted.erasures} if wanted.erasures else {}
    settings = layout(num_buckets, wanted.as_of, config)
    made = recipe(FOLDER, settings, inputs)
    snapshot = snapshot_name(wanted.as_of, made)
    prefix = f"{FOLDER}/{snapshot}"
    if (manifest := read_manifest(storage, prefix)) is not None:
        return Grouped(snapshot, manifest)
    job = _Job(storage, prefix, base, wanted.erased, wanted.erasures, config)
    results = _run(job, engine, wanted.found, num_buckets, say)
    parts = [Part.model_validate(part) for result in results for part in result["parts"]]
    users = [result["users"] for result in results]
    manifest = complete_output(
        storage,
        prefix,
        parts,
        kind=FOLDER,
        fingerprint=made,
        config=settings,
        inputs=inputs,
        counts={"users": sum(users), "behaviors": int(sizes(parts, num_buckets, ROWS)[0].sum())},
        details=wanted.details() | {"users": users},
    )
    return Grouped(snapshot, manifest)


def layout(num_buckets: int, as_of: date, config: RefreshConfig) -> dict[str, Any]:
    """Return the settings that decide about the files of an output by bucket."""
    return {"num_buckets": num_buckets, "as_of": str(as_of)} | config.model_dump(
        include={"max_deltas", "max_delta_share"}
    )


def snapshot_name(as_of: date, recipe: str) -> str:
    """Return the name of an output: its day and the start of its recipe's digest."""
    return f"{as_of:%Y%m%d}-{recipe[:12]}"


def folds(files: Sequence[Part], config: RefreshConfig) -> bool:
    """Tell whether the files of a bucket, base first, are to be folded into one before anything is added."""
    return len(files) > config.max_deltas or sum(p.bytes for p in files[1:]) > config.max_delta_share * files[0].bytes


def obsolete(base: Grouped, wanted: Wanted, config: RefreshConfig) -> str | None:
    """Return why nothing can be added to `base`, or None."""
    if base.as_of > wanted.as_of:
        return f"those at hand are of {base.as_of}, a later day"
    days = wanted.days
    if changed := sorted(prefix for prefix, made in base.days.items() if days.get(prefix) != made):
        return f"{changed[0]} was {'validated again' if changed[0] in days else 'removed'}"
    if base.num_buckets < _num_buckets(wanted.behaviors, config):
        return f"{wanted.behaviors:,} behaviors need more than {base.num_buckets} buckets"
    return None


def _num_buckets(behaviors: int, config: RefreshConfig) -> int:
    num_buckets: int = 1
    while num_buckets < config.min_buckets or num_buckets * config.rows_per_bucket < behaviors:
        num_buckets *= 2
    return num_buckets


# --- one bucket --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What is the same for all buckets."""

    storage: Storage
    prefix: str
    base: Grouped | None
    erased: Ints
    erasures: str | None
    config: RefreshConfig


def _run(
    job: _Job, engine: Engine, found: Mapping[str, Manifest], num_buckets: int, say: Callable[[str], None]
) -> list[Result]:
    """Return what was made of each bucket, in order."""
    base = job.base
    new = {prefix: manifest for prefix, manifest in found.items() if not base or prefix not in base.days}
    sources = [(prefix, part) for prefix, manifest in new.items() for part in manifest.parts]
    rows = sum(int(manifest.counts["rows"]) for manifest in new.values())
    added = f"on top of {base.snapshot}" if base else f"into {number_of(num_buckets, 'bucket')}"
    say(f"grouping {number_of(rows, 'behavior')} of {number_of(len(new), 'partition')} {added}")
    known = sizes(base.manifest.parts if base else (), num_buckets, ROWS)[0].tolist()

    def start(buckets: Sequence[int]) -> Iterator[Result]:
        return engine.shuffle(
            sources,
            partial(_read, job),
            buckets,
            num_buckets,
            partial(_bucket, job),
            lambda bucket, rows: _BYTES_PER_ROW * (rows + known[bucket]),
        )

    return by_bucket(job.storage, job.prefix, num_buckets, start, "buckets grouped", say)


def _read(job: _Job, source: tuple[str, Part]) -> Iterator[Rows]:
    """Yield the rows of one file of a validated day."""
    with pq.ParquetFile(pa.BufferReader(read_part(job.storage, *source))) as file:
        for batch in file.iter_batches(_ROWS_PER_PIECE, columns=_COLUMNS, use_threads=False):
            rows = np.column_stack([batch.column(name).to_numpy() for name in _COLUMNS])
            yield rows[~np.isin(rows[:, 0], job.erased)] if len(job.erased) else rows


def _bucket(job: _Job, bucket: int, rows: Rows) -> Result:
    """Add the new rows to a bucket as files of their own, or fold them and all earlier ones into one base."""
    old: list[Part] = []
    before = np.zeros(0, np.int64)
    fold = job.base is None
    if job.base is not None:
        old = files_of(job.base.manifest.parts, bucket, job.base.prefix)
        erasing = job.erasures != job.base.manifest.details["erasures"]
        if not len(rows) and not erasing:
            return {"bucket": bucket, "users": job.base.manifest.details["users"][bucket], "parts": dumped(old)}
        before = job.base.index(job.storage, bucket).user_ids
        erased = before[np.isin(before, job.erased, assume_unique=True)]
        fold = folds([part for part in old if part.name.endswith(ROWS)], job.config) or len(erased) > 0
        if fold:
            kept = np.setdiff1d(before, erased, assume_unique=True)
            rows = np.concatenate([read_bucket(job.storage, job.prefix, old, bucket, kept).behaviors(), rows])
    if not len(rows) and not fold:
        return {"bucket": bucket, "users": len(before), "parts": dumped(old)}
    added = group(rows)
    parts = [] if fold else old
    for ending, data, count in zip(
        (USERS, ROWS), bucket_files(added), (len(added.user_ids), len(added.rows)), strict=True
    ):
        parts = [*parts, write_part(job.storage, job.prefix, bucket_name(bucket) + ending, data, count)]
    users = len(added.user_ids) if fold else len(np.union1d(before, added.user_ids))
    return finish(job.storage, job.prefix, {"bucket": bucket, "users": users, "parts": dumped(parts)})
