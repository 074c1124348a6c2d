"""The steps, in the order the data move. DAG tasks, the command line and the tests call these and nothing else.

    land       raw log                         -> raw/dt=D
    validate   raw/dt=D                        -> behaviors/dt=D, quarantine/dt=D
    train      behaviors                       -> spaces/<space>, models/<model>, a candidate version in MLflow
    refresh    behaviors                       -> histories/<snapshot>, current.json moved
               histories x space               -> interests/<space>/<snapshot>, current.json moved
    release    candidate                       -> alias champion, serving has loaded exactly that bundle
    rollback   the champion before             -> alias champion
    erase      user ids                        -> erasures.json, obeyed by every later step

Each takes the settings (what), the places (where) and the days, and returns a summary of strings and numbers: URIs,
digests, counts. Each is idempotent: finished outputs are found by their manifests and left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

from encode.config import Config, Places, RefreshConfig, load_config
from encode.engines import Engine
from encode.errors import QualityError
from encode.outputs import read_files, read_manifest, recipe, write_output
from encode.schema import Window
from encode.storage import open_log

Say = Callable[[str], None]
Summary = dict[str, Any]

__all__ = ["erase", "land", "load_config", "refresh", "release", "rollback", "train", "validate"]


def land(config: Config, places: Places, say: Say = print, cache: Path | None = None) -> Summary:
    """Split the preset's raw log into daily partitions.

    Raises:
        DataError: the log cannot be read, or a day was landed from another log.
    """
    from encode.data.landing import land as land_log

    report = land_log(open_log(places, config.name), config.source, cache=cache, say=say)
    return report.summary()


def validate(config: Config, places: Places, window: Window, say: Say = print) -> Summary:
    """Turn the window's raw partitions into behaviors, with what is rejected in quarantine.

    Raises:
        DataError: there is no raw partition in the window, or one changed after it was validated.
        QualityError: a day misses its expectations; its rows are in quarantine, its behaviors are not published.
    """
    from encode.data.validation import validate_window

    return validate_window(open_log(places, config.name), window, config, say)


def train(config: Config, places: Places, as_of: date, say: Say = print) -> Summary:
    """Train on all behaviors before `as_of`, store space and model, register the model as candidate.

    Raises:
        ArtifactError: there are no validated behaviors.
        DataError: there are not enough of them.
    """
    from encode.data.histories import read_histories
    from encode.data.partitions import quiet
    from encode.distributed import joined, place
    from encode.interests.snapshots import write_space
    from encode.model.files import load_model
    from encode.model.reproducible import reproducible
    from encode.registry import Registry
    from encode.train import package
    from encode.train import train as fit

    storage = open_log(places, config.name)
    with joined(), reproducible(config.training.num_threads):
        first = place()[0] == 0
        say = say if first else quiet
        histories, inputs = read_histories(storage, as_of, say=say)
        settings = config.model_dump(mode="json", include={"model", "clustering", "training"}) | {"as_of": str(as_of)}
        made = recipe("model", settings, inputs, config.training.seed)
        prefix = f"models/{made[:16]}"
        manifest = read_manifest(storage, prefix)
        if manifest is None:
            trained = fit(histories, as_of, config, say)
            card, files = package(trained, histories, as_of, config)
    if not first:
        return {"model": prefix}  # the first process writes and registers
    if manifest is None:
        write_space(storage, trained.space, inputs)
        write_output(
            storage,
            prefix,
            files,
            kind="model",
            fingerprint=made,
            config=settings,
            inputs=inputs,
            counts=card.metrics,
            details={"space": trained.space.id},
            seed=config.training.seed,
        )
    else:
        say(f"model {made[:16]} is there already")
        files = read_files(storage, prefix, manifest)
        card, _ = load_model(files, f"{storage.uri}/{prefix}")
    version = Registry(places, config.registry).register(config, card, files, inputs, prefix)
    say(f"candidate: {config.registry.model_name} version {version.number}, space {card.space}")
    return {
        "model": prefix,
        "version": version.number,
        "space": card.space,
        "as_of": str(as_of),
        "metrics": card.metrics,
    }


def refresh(config: Config, places: Places, as_of: date, say: Say = print) -> Summary:
    """Refresh every user's interests, as of a day, in each space that a champion or candidate needs.

    Without any model yet there is nothing to refresh, and the summary says so.

    Raises:
        ArtifactError: there are no validated behaviors, or a space is damaged.
        ConfigError: the engine is not installed, or it is not said where it runs.
    """
    from encode.interests.refresh import refresh_interests
    from encode.registry import CANDIDATE, CHAMPION, Registry

    registry = Registry(places, config.registry)
    versions = [version for alias in (CHAMPION, CANDIDATE) if (version := registry.by_alias(alias))]
    spaces = sorted({version.space for version in versions})
    if not spaces:
        say("no model is registered yet: no space to refresh interests in")
        return {"as_of": str(as_of), "snapshots": {}, "users": 0}
    storage = open_log(places, config.name)
    with closing(_engine(config.refresh, places)) as engine:
        grouped, pointers = refresh_interests(storage, spaces, as_of, config.refresh, engine, say)
    return {
        "as_of": str(grouped.as_of),
        "snapshots": {space: pointer.snapshot for space, pointer in pointers.items()},
        "users": grouped.manifest.counts["users"],
    }


def _engine(config: RefreshConfig, places: Places) -> Engine:
    if config.engine == "spark":
        from encode.engines.spark import SparkEngine

        return SparkEngine(places)
    from encode.engines.local import LocalEngine

    return LocalEngine(config, places)


def release(config: Config, places: Places, say: Say = print) -> Summary:
    """Let the candidate serve if it passes its gates, and see that serving has loaded exactly that bundle.

    Where the candidate is the champion already, only serving is brought up to the current snapshot. A candidate that
    was refused once is not tried again; train another.

    Raises:
        QualityError: the candidate misses a gate; the champion still serves.
        ArtifactError: the bundle cannot be loaded; the alias has not moved.
        TimeoutError: the alias has moved, but serving has not followed yet.
    """
    from encode.gates import pass_gates
    from encode.registry import CANDIDATE, CHAMPION, PREVIOUS, REFUSED, Registry
    from encode.serving.release import loaded, see_served

    registry = Registry(places, config.registry)
    champion, candidate = registry.by_alias(CHAMPION), registry.by_alias(CANDIDATE)
    if candidate is None:
        say("no candidate is registered yet: nothing to release")
        return {"outcome": "nothing to release"}
    chosen, outcome, gates = candidate, "released", {}
    if champion is not None and (champion.number == candidate.number or REFUSED in candidate.tags):
        chosen, outcome = champion, "serving brought up to date"
        if champion.number != candidate.number:
            say(f"candidate version {candidate.number} was refused before: {candidate.tags[REFUSED]}")
    with loaded(registry, places, chosen) as bundle:
        if outcome == "released":
            gates = pass_gates(config, places, registry, candidate, champion, bundle, say)
            if champion is not None:
                registry.tag(candidate, PREVIOUS, champion.number)
            registry.point(CHAMPION, candidate)
        served = see_served(places, bundle, say)
    say(f"{outcome}: version {chosen.number}, bundle {bundle.id}, snapshot {bundle.pointer.snapshot}")
    return {"outcome": outcome, "version": chosen.number, "bundle": bundle.id, "served_by": served, "gates": gates}


def rollback(config: Config, places: Places, say: Say = print) -> Summary:
    """Make the champion before this one the champion again.

    Raises:
        QualityError: there is none.
        TimeoutError: the alias has moved, but serving has not followed yet; do not repeat it.
    """
    from encode.registry import CHAMPION, PREVIOUS, REFUSED, Registry
    from encode.serving.release import loaded, see_served

    registry = Registry(places, config.registry)
    champion = registry.by_alias(CHAMPION)
    previous = champion.tags.get(PREVIOUS) if champion else None
    if champion is None or previous is None:
        now = f"version {champion.number} is the first champion" if champion else "there is no champion"
        raise QualityError(f"rollback: {now}; nothing to go back to")
    version = registry.by_number(previous)
    with loaded(registry, places, version) as bundle:
        registry.tag(champion, REFUSED, f"rolled back to version {previous}")
        registry.point(CHAMPION, version)
        served = see_served(places, bundle, say)
    say(f"rolled back from version {champion.number} to {previous}, bundle {bundle.id}")
    return {"outcome": "rolled back", "version": previous, "bundle": bundle.id, "served_by": served}


def erase(config: Config, places: Places, user_ids: Sequence[int], say: Say = print) -> Summary:
    """Put users on the list of those who must not be in anything that is made from now on.

    The next refresh publishes histories and interests without them, and the next training knows nothing of them. What
    was made before, raw partitions and behaviors are left as they are: retention removes them.

    Raises:
        ConfigError: an id is not a user's.
    """
    from encode.data.erasures import erase_users

    total = erase_users(open_log(places, config.name), user_ids)
    say(f"{total:,} users are on the list; a refresh makes interests without them, a release serves those")
    return {"erased": total}
