"""Refresh: from grouped histories to a published snapshot of every user's interests.

The first snapshot of a space clusters everybody. Each later one clusters the users whose history changed, from their
last centers, and names the files of the others. How far that has drifted from clustering anew is measured on a sample
of those users, and above a threshold everybody is clustered anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.config import RefreshConfig
from encode.data.buckets import Bucket, by_bucket, dumped, files_of, finish, read_bucket
from encode.data.grouping import FOLDER, Grouped, folds, group_histories, layout, snapshot_name
from encode.data.histories import rows_of
from encode.engines import Engine, Result
from encode.interests.extract import Kernel, extract, kernel_of
from encode.interests.kmeans import Starts, inertia
from encode.interests.snapshots import folder_of, last_centers, read_rows, read_space, snapshot_bytes, snapshot_file
from encode.model.space import Space
from encode.outputs import Manifest, Part, complete_output, read_manifest, recipe, write_part
from encode.pointers import Pointer, publish, read_current
from encode.schema import interests_schema
from encode.storage import Storage

Ints = npt.NDArray[np.int64]
_BEHAVIORS_PER_BATCH = 1 << 17
_COUNTS = ("users", "interests", "clustered", "warm_inertia", "cold_inertia")
_DRIFT_USERS = 256
"""Users on whom drift is measured, over all buckets."""


def refresh_interests(
    storage: Storage,
    space_ids: Sequence[str],
    as_of: date,
    config: RefreshConfig,
    engine: Engine,
    say: Callable[[str], None],
) -> tuple[Grouped, dict[str, Pointer]]:
    """Bring the histories up to `as_of` and refresh the interests in each space.

    An `as_of` before that of the histories at hand is taken as theirs: a day validated late is then in.

    Returns:
        The histories, and the current snapshot of each space.

    Raises:
        ArtifactError: there are no validated behaviors, or something in the store is damaged.
        ConfigError: what is to cluster needs a GPU, and there is none.
    """
    if config.engine == "local":
        kernel_of(config)
    at_hand = read_current(storage, FOLDER)
    if at_hand and at_hand[0].as_of > as_of:
        say(f"histories are as of {at_hand[0].as_of} already: refreshing as of that day, not {as_of}")
        as_of = at_hand[0].as_of
    grouped = group_histories(storage, engine, as_of, config, say)
    return grouped, {
        space_id: _refresh_space(storage, space_id, grouped, config, engine, say) for space_id in space_ids
    }


def _refresh_space(
    storage: Storage,
    space_id: str,
    grouped: Grouped,
    config: RefreshConfig,
    engine: Engine,
    say: Callable[[str], None],
) -> Pointer:
    folder = folder_of(space_id)
    current = read_current(storage, folder)
    if current and current[1].details.get("histories") == grouped.prefix:
        say(f"space {space_id}: snapshot {current[0].snapshot} is there already")
        return current[0]
    base = _base(storage, *current, grouped) if current else None
    snapshot, manifest = _write_snapshot(storage, space_id, grouped, base, config, engine, say)
    drift = manifest.details["drift"]
    if drift is not None and drift > config.max_drift:
        say(f"space {space_id}: drift {drift:.2%} is above {config.max_drift:.2%}: clustering everybody anew")
        snapshot, manifest = _write_snapshot(storage, space_id, grouped, None, config, engine, say)
    pointer = publish(storage, folder, snapshot, manifest, current[0] if current else None)
    say(f"space {space_id}: current snapshot is {pointer.snapshot}")
    return pointer


@dataclass(frozen=True)
class _Base:
    """The snapshot that a refresh starts from, and the histories that it was made of."""

    prefix: str
    manifest: Manifest
    histories: Grouped


def _base(storage: Storage, pointer: Pointer, manifest: Manifest, grouped: Grouped) -> _Base | None:
    """Return what can be built on, or None if its histories are gone, of a later day, or bucketed otherwise."""
    prefix = manifest.details.get("histories", "none")
    made = read_manifest(storage, prefix)
    if made is None or pointer.as_of > grouped.as_of:
        return None
    histories = Grouped(prefix.rpartition("/")[2], made)
    if histories.num_buckets != grouped.num_buckets:
        return None
    return _Base(f"{folder_of(manifest.details['space'])}/{pointer.snapshot}", manifest, histories)


def _write_snapshot(
    storage: Storage,
    space_id: str,
    grouped: Grouped,
    base: _Base | None,
    config: RefreshConfig,
    engine: Engine,
    say: Callable[[str], None],
) -> tuple[str, Manifest]:
    """Write one snapshot, going on where an interrupted run stopped; return its name and its manifest."""
    settings = layout(grouped.num_buckets, grouped.as_of, config) | config.model_dump(include={"kmeans"})
    inputs = {grouped.prefix: grouped.manifest.digest(), f"spaces/{space_id}": space_id}
    inputs |= {base.prefix: base.manifest.digest()} if base else {}
    made = recipe("interests", settings, inputs)
    snapshot = snapshot_name(grouped.as_of, made)
    prefix = f"{folder_of(space_id)}/{snapshot}"
    if (manifest := read_manifest(storage, prefix)) is not None:
        return snapshot, manifest
    space = _space(storage, space_id)
    job = _Job(storage, prefix, space_id, grouped, base, config)

    def start(buckets: Sequence[int]) -> Iterator[Result]:
        return engine.map(buckets, partial(_bucket, job))

    results = by_bucket(storage, prefix, grouped.num_buckets, start, "buckets refreshed", say)
    total = {name: sum(result[name] for result in results) for name in _COUNTS}
    manifest = complete_output(
        storage,
        prefix,
        [Part.model_validate(part) for result in results for part in result["parts"]],
        kind="interests",
        fingerprint=made,
        config=settings,
        inputs=inputs,
        columns={field.name: str(field.type) for field in _schema(space)},
        counts={name: total[name] for name in ("users", "interests", "clustered")}
        | {"behaviors": grouped.manifest.counts["behaviors"]},
        details={
            "as_of": str(grouped.as_of),
            "space": space_id,
            "histories": grouped.prefix,
            "interests": [result["interests"] for result in results],
            "drift": total["warm_inertia"] / total["cold_inertia"] - 1 if total["cold_inertia"] else None,
        },
        seed=space.config.clustering.seed,
    )
    say(f"space {space_id}: clustered {total['clustered']:,} of {total['users']:,} users")
    return snapshot, manifest


# --- one bucket --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What is the same for all buckets. The space is not in it: an executor reads it once, not with every task."""

    storage: Storage
    prefix: str
    space_id: str
    grouped: Grouped
    base: _Base | None
    config: RefreshConfig


_spaces: dict[tuple[str, str], Space] = {}


def _space(storage: Storage, space_id: str) -> Space:
    """Return a space, read once a process."""
    key = (storage.uri, space_id)
    if key not in _spaces:
        _spaces.clear()
        _spaces[key] = read_space(storage, space_id)
    return _spaces[key]


def _bucket(job: _Job, bucket: int) -> Result:
    """Write the interests of a bucket's users: of all, or of those whose history changed since the base."""
    grouped, base, storage = job.grouped, job.base, job.storage
    old = files_of(base.manifest.parts, bucket, base.prefix) if base else []
    index = grouped.index(storage, bucket)
    changed, gone = index.user_ids, np.zeros(0, np.int64)
    if base:
        before = base.histories.index(storage, bucket)
        changed = index.changed_since(before)
        gone = np.setdiff1d(before.user_ids, index.user_ids, assume_unique=True)
    result = {"bucket": bucket, "clustered": len(changed), "warm_inertia": 0.0, "cold_inertia": 0.0}
    result |= {"users": len(index.user_ids), "interests": base.manifest.details["interests"][bucket] if base else 0}
    if base and not len(changed) and not len(gone):
        return result | {"parts": dumped(old)}
    space = _space(storage, job.space_id)
    histories = read_bucket(storage, grouped.prefix, grouped.manifest.parts, bucket, changed if base else None)
    starts = last_centers(storage, old, changed, space.key.shape[1]) if base else None
    kernel = kernel_of(job.config)
    rows = pa.Table.from_batches(_extracted(histories, space, starts, kernel), _schema(space))
    result["interests"] += _num_interests(rows) - (len(starts.centers) if starts else 0)
    if starts is not None:
        share = -(-_DRIFT_USERS // grouped.num_buckets)
        result["warm_inertia"], result["cold_inertia"] = _drift(histories, space, starts, kernel, share)
    parts = old
    if base is None or len(gone) or folds(old, job.config):
        rows, parts = _folded(storage, old, rows, np.concatenate([changed, gone])), []
        result["interests"] = _num_interests(rows)
    parts = [*parts, write_part(storage, job.prefix, snapshot_file(bucket), snapshot_bytes(rows), len(rows))]
    return finish(storage, job.prefix, result | {"parts": dumped(parts)})


def _folded(storage: Storage, files: Sequence[Part], rows: pa.Table, left_out: Ints) -> pa.Table:
    """Return the new rows among those that hold in the files of a bucket, but for some users."""
    kept = read_rows(storage, files, left_out)
    if kept is None:
        return rows
    both = pa.concat_tables([kept, rows])
    return both.take(pa.array(np.argsort(both["user_id"].to_numpy())))


def _num_interests(rows: pa.Table) -> int:
    return sum(len(chunk.flatten()) for chunk in rows["size"].chunks)


def _schema(space: Space) -> pa.Schema:
    return interests_schema(space.key.shape[1], space.embedding.shape[1])


def _extracted(histories: Bucket, space: Space, starts: Starts | None, kernel: Kernel) -> Iterator[pa.RecordBatch]:
    """Yield the interests of the bucket's users, users ascending, in batches of a bounded number of behaviors."""
    first, num_users = 0, len(histories.user_ids)
    while first < num_users:
        bound = histories.offsets[first] + _BEHAVIORS_PER_BATCH
        last = max(first + 1, int(np.searchsorted(histories.offsets, bound, "right")) - 1)
        yield extract(histories.batch(first, last), space, _slice(starts, first, last), kernel)
        first = last


def _slice(starts: Starts | None, first: int, last: int) -> Starts | None:
    if starts is None:
        return None
    begin, end = starts.offsets[first], starts.offsets[last]
    return Starts(starts.centers[begin:end], starts.offsets[first : last + 1] - begin)


def _drift(histories: Bucket, space: Space, starts: Starts, kernel: Kernel, num_users: int) -> tuple[float, float]:
    """Return the inertia of some users when clustered from their last centers, and when clustered anew.

    They are drawn evenly from those who have last centers: the users of a bucket are in no order that matters.
    """
    known = np.flatnonzero(np.diff(starts.offsets))
    users = known[:: max(1, len(known) // num_users)][:num_users]
    rows, offsets = rows_of(histories.offsets[users], histories.offsets[users + 1])
    keys = space.key[space.vocabulary.index(histories.rows[rows, 0], histories.rows[rows, 1])]
    centers, center_offsets = rows_of(starts.offsets[users], starts.offsets[users + 1])
    config = space.config.clustering

    def total(begin: Starts | None) -> float:
        labels = kernel(keys, offsets, histories.user_ids[users], config, begin)
        return float(inertia(keys, offsets, labels, config.num_clusters).sum())

    return total(Starts(starts.centers[centers], center_offsets)), total(None)
