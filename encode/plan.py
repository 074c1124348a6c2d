"""Dry runs: what a step would do, read from manifests and pointers. Nothing is written anywhere.

One function a step, with its arguments. Each says days, inputs found, what is done already and what would be written,
returns the same as a summary, and raises what the step would raise before it begins to work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date
from typing import Any

from encode.config import Config, Places
from encode.data.daily import changes, report_of
from encode.data.erasures import erased_users
from encode.data.grouping import FOLDER, Grouped, obsolete, wanted_histories
from encode.data.histories import inputs_of
from encode.data.partitions import published_days, validated_days
from encode.data.raw_days import find_raw_days
from encode.errors import DataError
from encode.outputs import read_manifest
from encode.pointers import read_base, read_pointer
from encode.schema import Window, days_in_words, number_of
from encode.storage import Storage, open_log

Say = Callable[[str], None]
Summary = dict[str, Any]


def validate(config: Config, places: Places, window: Window, say: Say = print) -> Summary:
    """Say what `steps.validate` would do.

    Returns:
        `window`, the days `to_validate`, how many are `unchanged`, `missing_days` without raw data, and what it
        `writes`.

    Raises:
        DataError: there is no raw partition in the window, or one changed after it was validated.
    """
    return _days_to_do(config, places, window, say, replaying=False)


def replay(config: Config, places: Places, window: Window, say: Say = print) -> Summary:
    """Say what `steps.replay` would do.

    Returns:
        As `validate`, and `to_replay`: days whose quarantine would be judged anew; how many of its rows are good by
        now, only judging them can tell.

    Raises:
        DataError: there is no raw partition in the window.
    """
    return _days_to_do(config, places, window, say, replaying=True)


def _days_to_do(config: Config, places: Places, window: Window, say: Say, *, replaying: bool) -> Summary:
    storage = open_log(places, config.name, writing=False)
    raw_days = find_raw_days(storage, window.days())
    published = published_days(storage)
    new = [day for day in raw_days if day not in published]
    missing = [day for day in window.days() if day not in raw_days]
    say(
        f"dry run: {'replay' if replaying else 'validate'} {window.in_words()}: raw data of "
        f"{number_of(len(raw_days), 'day')}, "
        f"{len(raw_days) - len(new)} of them validated before; no raw data: {days_in_words(missing)}"
    )
    if not raw_days:
        raise DataError(
            f"{storage.uri}/raw: no raw data for any day of {window.in_words()}; land the log, or choose other days"
        )
    done = {day: read_manifest(storage, published[day][-1]) for day in raw_days if day in published}
    stale = [day for day, last in done.items() if last and changes(raw_days[day], config, last)]
    for day in stale:
        if not replaying and (last := done[day]):
            report_of(storage, raw_days[day], config, last)  # raises what the run would
    if new:
        say(f"dry run: would validate {days_in_words(new)} and write behaviors/dt=DAY and quarantine/dt=DAY")
    if stale:
        say(f"dry run: data or settings changed since: would judge the quarantine of {days_in_words(stale)} anew")
    if not new and not stale:
        say("dry run: nothing to do")
    prefixes = [f"dt={day}" for day in new] + [f"dt={day}/replay-{len(published[day]):03}" for day in stale]
    return {
        "window": str(window),
        "to_validate": [str(day) for day in new],
        "to_replay": [str(day) for day in stale],
        "unchanged": len(raw_days) - len(new) - len(stale),
        "missing_days": [str(day) for day in missing],
        "writes": [f"{kind}/{prefix}" for prefix in prefixes for kind in ("behaviors", "quarantine")],
    }


def train(config: Config, places: Places, as_of: date, say: Say = print) -> Summary:
    """Say what `steps.train` would do.

    Returns:
        `as_of`, `days` and `rows` of behaviors found, whether the model is `done` already, and what it `writes`.

    Raises:
        ArtifactError: there are no validated behaviors.
    """
    from encode.train import recipe_of

    storage = open_log(places, config.name, writing=False)
    found = validated_days(storage, as_of)
    erased = erased_users(storage)
    prefix = f"models/{recipe_of(config, as_of, inputs_of(found, erased))[1][:16]}"
    done = read_manifest(storage, prefix)
    rows, days = sum(int(manifest.counts["rows"]) for manifest in found.values()), _days(found)
    say(
        f"dry run: train as of {as_of}: {number_of(rows, 'behavior')} of {number_of(len(days), 'validated day')}, "
        f"{days[0]} to {days[-1]}" + (f", but for those of {len(erased):,} erased users" if len(erased) else "")
    )
    if done is None:
        say(f"dry run: would train and write {prefix}, its space, and a candidate of {config.registry.model_name}")
    else:
        say(f"dry run: {prefix} is there already: would only see that it is the candidate")
    return {
        "as_of": str(as_of),
        "days": len(days),
        "rows": rows,
        "done": done is not None,
        "writes": [] if done else [prefix, "spaces"],
    }


def refresh(config: Config, places: Places, as_of: date, say: Say = print) -> Summary:
    """Say what `steps.refresh` would do.

    Returns:
        `as_of`, `new_days` that are not in the histories yet, `spaces` with the snapshot that serves in each, and what
        it `writes`.

    Raises:
        ArtifactError: there are no validated behaviors.
        ConfigError: what is to cluster needs a GPU, and there is none.
    """
    from encode.interests.extract import kernel_of
    from encode.interests.refresh import base_of
    from encode.interests.snapshots import folder_of
    from encode.registry import Registry

    spaces = Registry(places, config.registry).spaces_in_use()
    if not spaces:
        say("dry run: no model is registered yet: no space to refresh interests in")
        return {"as_of": str(as_of), "new_days": [], "spaces": {}, "writes": []}
    storage = open_log(places, config.name, writing=False)
    if config.refresh.engine == "local":
        kernel_of(config.refresh)
    if (at_hand := read_pointer(storage, FOLDER)) and at_hand[0].as_of > as_of:
        say(f"dry run: histories are as of {at_hand[0].as_of} already: would refresh as of that day, not {as_of}")
        as_of = at_hand[0].as_of
    wanted = wanted_histories(storage, as_of)
    pointer, manifest = read_base(storage, FOLDER, say)
    base = Grouped(pointer.snapshot, manifest) if pointer and manifest else None
    known = base.days if base else {}
    new = [prefix for prefix in wanted.days if prefix not in known]
    reason = obsolete(base, wanted, config.refresh) if base else None
    there = base is not None and reason is None and base.manifest.details.items() >= wanted.details().items()
    grouped = base if there else None
    say(
        f"dry run: refresh as of {as_of}: {len(wanted.days)} validated days, not in the histories yet: "
        f"{days_in_words(_days(new))}" + (f"; {reason}: would group all behaviors anew" if reason else "")
    )
    current: dict[str, str | None] = {}
    to_do = []
    for space in spaces:
        pointer, manifest = read_base(storage, folder_of(space), say)
        found = base_of(storage, pointer, manifest, grouped, config.refresh) if grouped else None
        current[space] = pointer.snapshot if pointer else None
        doing = "nothing to do"
        if grouped is None or found is None or found.histories.prefix != grouped.prefix:
            to_do.append(space)
            doing = "would write a snapshot and move the pointer to it"
        say(f"dry run: space {space}: current snapshot {current[space] or 'none'}, {doing}")
    return {
        "as_of": str(as_of),
        "new_days": [str(day) for day in _days(new)],
        "spaces": current,
        "writes": ([] if grouped else [FOLDER]) + [folder_of(space) for space in to_do],
    }


def release(config: Config, places: Places, say: Say = print) -> Summary:
    """Say what `steps.judge` and `steps.release` would do; which gates a candidate passes, only judging it can tell.

    Returns:
        `outcome`: whether a candidate is to be judged, serving to be brought up to date, or nothing to be done;
        `version` and the `snapshot` it would serve with, the `champion`, and whether a person is asked (`approval`).
    """
    from encode.promotion import PASSED, contest
    from encode.registry import Registry

    found = contest(Registry(places, config.registry), say)
    champion = found.champion.number if found.champion else None
    if found.chosen is None:
        say("dry run: nothing to do")
        return {"outcome": found.outcome, "version": None, "snapshot": None, "champion": champion, "approval": False}
    judging = found.outcome == PASSED
    snapshot = _snapshot(open_log(places, config.name, writing=False), found.chosen.space, say)
    name = f"version {found.chosen.number} with snapshot {snapshot or 'none'} of space {found.chosen.space}"
    if judging:
        against = f"against version {champion}" if champion else "alone, for there is no champion"
        then = "ask for approval" if config.release.approval else "let it serve"
        say(f"dry run: would judge {name}, {against}, and, if it passes its gates, {then}")
    else:
        say(f"dry run: nothing to judge: would see that serving has {name}")
    return {
        "outcome": "to be judged" if judging else found.outcome,
        "version": found.chosen.number,
        "snapshot": snapshot,
        "champion": champion,
        "approval": judging and config.release.approval,
    }


def rollback(
    config: Config, places: Places, say: Say = print, to: str | None = None, reason: str | None = None
) -> Summary:
    """Say what `steps.rollback` would do.

    Returns:
        `from` and to which `version`, the `snapshot` that one would serve with, and the `note` left on the other.

    Raises:
        QualityError: there is nothing to go back to, or not to that version.
        ArtifactError: there is no such version.
    """
    from encode.promotion import note_of_rollback, rollback_pair
    from encode.registry import Registry

    champion, version = rollback_pair(Registry(places, config.registry), to)
    snapshot = _snapshot(open_log(places, config.name, writing=False), version.space, say)
    note = note_of_rollback(version, reason)
    say(
        f"would let version {version.number} serve with snapshot {snapshot or 'none'} of space {version.space}, and "
        f"mark version {champion.number} as refused: {note}"
    )
    return {"from": champion.number, "version": version.number, "snapshot": snapshot, "note": note}


def _snapshot(storage: Storage, space: str, say: Say) -> str | None:
    """Return the current snapshot of a space."""
    from encode.interests.snapshots import folder_of

    pointer, _ = read_base(storage, folder_of(space), say)
    return pointer.snapshot if pointer else None


def _days(prefixes: Iterable[str]) -> list[date]:
    """Return the days of partitions `behaviors/dt=DAY...`, each once, in order."""
    return sorted({date.fromisoformat(prefix.removeprefix("behaviors/dt=")[:10]) for prefix in prefixes})
