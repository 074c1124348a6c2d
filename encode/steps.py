"""The steps, in the order the data move. DAG tasks, the command line and the tests call these and nothing else.

    land       raw log                         -> raw/dt=D
    validate   raw/dt=D                        -> behaviors/dt=D, quarantine/dt=D
    replay     quarantine/dt=D                 -> behaviors/dt=D/replay-N, quarantine/dt=D/replay-N
    docs       quarantine                      -> a local folder, for people to read
    train      behaviors                       -> spaces/<space>, models/<model>, a candidate version in MLflow
    refresh    behaviors                       -> histories/<snapshot>, current.json moved
               histories x space               -> interests/<space>/<snapshot>, current.json moved
    judge      candidate                       -> release/report.html of its MLflow run, refused or not
    release    candidate                       -> judged, alias champion, serving has loaded exactly that bundle
    refuse     version                         -> marked, will never serve
    rollback   a champion before               -> alias champion
    erase      user ids                        -> erasures.json, obeyed by every later step and by serving
    remains    user ids                        -> where they still are
    prune      old histories and snapshots     -> removed, unless something reaches them

Each takes the settings (what), the places (where) and the days, and returns a summary of strings and numbers: URIs,
digests, counts. Each is idempotent: finished outputs are found by their manifests and left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

from encode.config import Config, Places, RefreshConfig, load_config
from encode.engines import Engine
from encode.outputs import read_files, read_manifest, write_output
from encode.schema import Window, number_of
from encode.storage import open_log

Say = Callable[[str], None]
Summary = dict[str, Any]

__all__ = [
    "docs",
    "erase",
    "judge",
    "land",
    "load_config",
    "prune",
    "refresh",
    "refuse",
    "release",
    "remains",
    "replay",
    "rollback",
    "train",
    "validate",
]


def land(config: Config, places: Places, say: Say = print, cache: Path | None = None) -> Summary:
    """Split the preset's raw log into daily partitions.

    Raises:
        DataError: the log cannot be read, or a day was landed from another log.
    """
    from encode.data.landing import land as land_log
    from encode.data.sources import require_log

    require_log(config.source)
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


def replay(config: Config, places: Places, window: Window, say: Say = print) -> Summary:
    """Judge anew what the window's days have in quarantine, and add to each what is good by now.

    Raises:
        DataError: there is no raw partition in the window, or rows that were published are no longer in it.
        QualityError: a day misses its expectations; what was published before stays.
    """
    from encode.data.validation import replay_window

    return replay_window(open_log(places, config.name), window, config, say)


def docs(
    config: Config, places: Places, to: Path, day: date | None = None, window: Window | None = None, say: Say = print
) -> Summary:
    """Write an index over the validated days to a local folder, and all that is known about one of them.

    Raises:
        ArtifactError: nothing was validated, or not that day.
    """
    from encode.data.docs import write_docs

    return write_docs(open_log(places, config.name), to, day, window, say)


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
    from encode.registry import CANDIDATE, Registry
    from encode.train import package, recipe_of
    from encode.train import train as fit

    started = time.time()
    storage = open_log(places, config.name)
    with joined(), reproducible(config.training.num_threads):
        first = place()[0] == 0
        say = say if first else quiet
        histories, inputs = read_histories(storage, as_of, say=say)
        settings, made = recipe_of(config, as_of, inputs)
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
    registry = Registry(places, config.registry)
    version = registry.register(config, card, files, inputs, prefix, started if manifest is None else None)
    candidate = registry.by_alias(CANDIDATE)
    if candidate is None or candidate.number == version.number:
        say(f"candidate: {config.registry.model_name} version {version.number}, space {card.space}")
    else:
        say(
            f"{config.registry.model_name} version {version.number} was registered before, so the candidate is still "
            f"version {candidate.number}; let the alias `{CANDIDATE}` name it in MLflow if it is to be judged"
        )
    return {
        "model": prefix,
        "version": version.number,
        "space": card.space,
        "as_of": str(as_of),
        "metrics": card.metrics,
    }


def refresh(config: Config, places: Places, as_of: date, say: Say = print) -> Summary:
    """Refresh every user's interests, as of a day, in each space that a champion or candidate needs.

    Beside each snapshot lies a page for people, `report.html`. Without any model yet there is nothing to refresh, and
    the summary says so.

    Raises:
        ArtifactError: there are no validated behaviors, or a space is damaged.
        ConfigError: the engine is not installed, or it is not said where it runs.
    """
    from encode.interests.refresh import refresh_interests
    from encode.interests.snapshots import folder_of
    from encode.monitoring.report import write_report
    from encode.pointers import read_pointer
    from encode.registry import Registry

    spaces = Registry(places, config.registry).spaces_in_use()
    if not spaces:
        say("no model is registered yet: no space to refresh interests in")
        return {"as_of": str(as_of), "snapshots": {}, "reports": {}, "users": 0}
    storage = open_log(places, config.name)
    with closing(_engine(config.refresh, places)) as engine:
        before = {space: read_pointer(storage, folder_of(space)) for space in spaces}
        grouped, pointers = refresh_interests(storage, spaces, as_of, config.refresh, engine, say)
    reports = {
        space: write_report(storage, space, pointer, found[0] if (found := before[space]) else None, say)
        for space, pointer in pointers.items()
    }
    return {
        "as_of": str(grouped.as_of),
        "snapshots": {space: pointer.snapshot for space, pointer in pointers.items()},
        "reports": {space: f"{storage.uri}/{key}" for space, key in reports.items() if key},
        "users": grouped.manifest.counts["users"],
    }


def _engine(config: RefreshConfig, places: Places) -> Engine:
    if config.engine == "spark":
        from encode.engines.spark import SparkEngine

        return SparkEngine(places)
    from encode.engines.local import LocalEngine

    return LocalEngine(config, places)


def judge(config: Config, places: Places, say: Say = print) -> Summary:
    """Hold the candidate against its gates and log the report, but release nothing.

    Returns:
        What `release` is given then, as `judged`; `approval` says whether a person has to be asked first.

    Raises:
        QualityError: the candidate misses a gate; the champion still serves.
        ArtifactError: the bundle cannot be loaded.
    """
    from encode.promotion import PASSED, contest
    from encode.promotion import judge as judge_candidate
    from encode.registry import Registry
    from encode.serving.release import loaded

    registry = Registry(places, config.registry)
    found = contest(registry, say)
    if found.outcome != PASSED or found.chosen is None:
        return found.summary()
    with loaded(registry, places, found.chosen) as bundle:
        return judge_candidate(config, places, registry, found, bundle, say)


def release(
    config: Config,
    places: Places,
    say: Say = print,
    *,
    judged: Summary | None = None,
    refused: str | None = None,
    approve: str | None = None,
) -> Summary:
    """Let the candidate serve if it passes its gates, and see that serving has loaded exactly that bundle.

    Where the candidate is the champion already, only serving is brought up to the current snapshot. A candidate that
    was refused once is not tried again; train another.

    Args:
        config: its `release` section has the limits.
        places: where everything is.
        say: told about progress.
        judged: what `judge` returned: exactly this is released. None judges here and now.
        refused: why a person refuses what was judged; None does not.
        approve: the version that a person approves. Where approval is asked for nothing is released without it.

    Raises:
        QualityError: the candidate misses a gate, or is not what was judged or approved; the champion still serves.
        ArtifactError: the bundle cannot be loaded; the alias has not moved.
        TimeoutError: the alias has moved, but serving has not followed yet.
    """
    from encode.errors import QualityError
    from encode.promotion import WAITING, approved, contest, publish
    from encode.promotion import judge as judge_candidate
    from encode.registry import Registry
    from encode.serving.release import loaded

    registry = Registry(places, config.registry)
    if judged is not None:
        if refused:
            return refuse(config, places, judged["version"], refused, say)
        if "version" not in judged:
            return judged  # there was nothing to release
        if judged["approval"] and approve != judged["version"]:
            raise QualityError(
                f"version {judged['version']}: judged, but approved by nobody; nothing was released. Approve it in a "
                "new run"
            )
        with loaded(registry, places, registry.by_number(judged["version"])) as bundle:
            return publish(places, registry, judged, bundle, say)
    found = contest(registry, say)
    if found.chosen is None:
        return found.summary()
    with loaded(registry, places, found.chosen) as bundle:
        judged = judge_candidate(config, places, registry, found, bundle, say)
        if not approved(config, judged, approve, say):
            return judged | {"outcome": WAITING}
        return publish(places, registry, judged, bundle, say)


def refuse(config: Config, places: Places, version: str, reason: str, say: Say = print) -> Summary:
    """Let a version never serve: a person has decided so.

    Raises:
        ArtifactError: there is no such version.
        ConfigError: it serves.
    """
    from encode.promotion import refuse as refuse_version
    from encode.registry import Registry

    return refuse_version(Registry(places, config.registry), version, reason, say)


def rollback(
    config: Config,
    places: Places,
    say: Say = print,
    to: str | None = None,
    reason: str | None = None,
    leaving: str | None = None,
) -> Summary:
    """Make the champion before this one, or another one before it, the champion again.

    With `leaving`, the champion that is to be left, it may be tried again.

    Raises:
        QualityError: there is none, or the version was never champion, or another one than `leaving` serves.
        ArtifactError: there is no such version.
        TimeoutError: the alias has moved, but serving has not followed yet; do not repeat it without `leaving`.
    """
    from encode.promotion import roll_back
    from encode.registry import Registry

    return roll_back(places, Registry(places, config.registry), to, reason, say, leaving)


def erase(config: Config, places: Places, user_ids: Sequence[int], say: Say = print) -> Summary:
    """Put users on the list of those who must not be in anything made from now on, and say where they still are.

    Serving answers them as unknown from its next look on, the next refresh publishes histories and interests without
    them, and the next training knows nothing of them. What was made before is left as it is.

    Raises:
        ConfigError: an id is not a user's.
        DataError: a raw day cannot be looked into; the users are on the list all the same.
    """
    from encode.data.erasures import erase_users

    total = erase_users(open_log(places, config.name), user_ids)
    say(
        f"on the list: {number_of(total, 'user')}; nothing that is made from now on holds any of them, and serving "
        "answers them as unknown"
    )
    return {"erased": total} | remains(config, places, user_ids, say)


def remains(config: Config, places: Places, user_ids: Sequence[int], say: Say = print) -> Summary:
    """Look for users in all that the store holds; it takes as long as reading all behaviors and raw days.

    Raises:
        ConfigError: an id is not a user's.
        DataError: a raw day cannot be looked into.
    """
    from encode.data.erasures import check_users, erased_users
    from encode.interests.remains import describe, find_users

    storage, users = open_log(places, config.name), check_users(user_ids)
    on_list = sorted(set(erased_users(storage).tolist()) & set(users))
    found = find_users(storage, users, config.source)
    for line in describe(users, on_list, found):
        say(line)
    return {"on_list": on_list, "held": found}


def prune(config: Config, places: Places, keep: int, days: int, dry_run: bool = False, say: Say = print) -> Summary:
    """Remove old histories and snapshots that no pointer, alias or kept snapshot reaches, also in retired spaces.

    Args:
        config: names the log.
        places: where.
        keep: snapshots of each space that are kept at least.
        days: by which they must be older than the current one.
        dry_run: say what would be removed, and remove nothing.
        say: told what is removed.

    Raises:
        ConfigError: fewer than three are to be kept, or they need not be older by a day.
        ArtifactError: a pointer or a manifest cannot be read, so what it reaches is not known.
    """
    from encode.interests.pruning import find_garbage, remove_garbage
    from encode.registry import Registry

    storage = open_log(places, config.name)
    garbage = find_garbage(storage, Registry(places, config.registry).spaces_at_hand(), keep, days)
    for prefix in garbage.outputs:
        say(f"{'would remove' if dry_run else 'removing'} {prefix}")
    if not dry_run:
        remove_garbage(storage, garbage)
    found = f"{number_of(len(garbage.keys), 'file')} of {number_of(len(garbage.outputs), 'output')}"
    say(f"{'would remove' if dry_run else 'removed'} {found}")
    return {"outputs": list(garbage.outputs), "files": len(garbage.keys), "removed": not dry_run}
