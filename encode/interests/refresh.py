"""Refresh: from grouped histories to a published snapshot of every user's interests.

The first snapshot of a space clusters everybody. Each later one clusters the users whose history changed, from their
last centers, and names the files of the others. How far that has drifted from clustering anew is measured on a sample
of those users, and above a threshold everybody is clustered anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial

from encode.config import RefreshConfig
from encode.data.buckets import by_bucket
from encode.data.grouping import FOLDER, Grouped, group_histories, layout, snapshot_name
from encode.engines import Engine, Result
from encode.errors import ArtifactError
from encode.interests.bucket import Base, Job, memory_of, read_space_once, refresh_bucket
from encode.interests.extract import kernel_of, schema_of
from encode.interests.snapshots import folder_of
from encode.outputs import Manifest, Part, complete_output, read_manifest, recipe
from encode.pointers import Pointer, publish, read_base, read_pointer
from encode.storage import Storage

_COUNTS = ("users", "interests", "clustered", "warm_inertia", "cold_inertia")


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
    at_hand = read_pointer(storage, FOLDER)
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
    pointer, manifest = read_base(storage, folder, say)
    base = base_of(storage, pointer, manifest, grouped, config)
    if pointer and base and base.histories.prefix == grouped.prefix:
        say(f"space {space_id}: snapshot {pointer.snapshot} is there already")
        return pointer
    try:
        snapshot, made = _write_snapshot(storage, space_id, grouped, base, config, engine, say)
        reason = _drifted(made, config)
    except ArtifactError as error:
        if base is None:
            raise
        reason = str(error)
    if reason:
        say(f"space {space_id}: {reason}: clustering everybody anew")
        snapshot, made = _write_snapshot(storage, space_id, grouped, None, config, engine, say)
    published = publish(storage, folder, snapshot, made, pointer)
    say(f"space {space_id}: current snapshot is {published.snapshot}")
    return published


def _drifted(manifest: Manifest, config: RefreshConfig) -> str | None:
    drift = manifest.details["drift"]
    return None if drift is None or drift <= config.max_drift else f"drift {drift:.2%} is above {config.max_drift:.2%}"


def base_of(
    storage: Storage, pointer: Pointer | None, manifest: Manifest | None, grouped: Grouped, config: RefreshConfig
) -> Base | None:
    """Return what can be built on, or None if its histories are gone, of a later day, or bucketed otherwise.

    Nor is built on what another kind of k-means has made.

    Args:
        storage: where it is.
        pointer: of the space, from `pointers.read_base`, as the manifest; None where there is none.
        manifest: of the snapshot that the pointer names.
        grouped: the histories that interests are to be made of. Where they are the base's, nothing is to be done.
        config: what clusters.
    """
    if pointer is None or manifest is None:
        return None
    prefix = str(manifest.details.get("histories", ""))
    made = read_manifest(storage, prefix) if prefix else None
    if made is None or pointer.as_of > grouped.as_of or manifest.config.get("kmeans") != config.kmeans:
        return None
    histories = Grouped(prefix.rpartition("/")[2], made)
    if histories.num_buckets != grouped.num_buckets:
        return None
    return Base(f"{folder_of(manifest.details['space'])}/{pointer.snapshot}", manifest, histories)


def _write_snapshot(
    storage: Storage,
    space_id: str,
    grouped: Grouped,
    base: Base | None,
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
    space = read_space_once(storage, space_id)
    job = Job(storage, prefix, space_id, grouped, base, config)
    memory = memory_of(job)

    def start(buckets: Sequence[int]) -> Iterator[Result]:
        return engine.map(buckets, partial(refresh_bucket, job), memory.__getitem__)

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
        columns={field.name: str(field.type) for field in schema_of(space)},
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
