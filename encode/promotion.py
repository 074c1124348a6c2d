"""From candidate to champion and back: a candidate is judged, may be approved by a person, and serves or is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from encode.config import Config, Places
from encode.data.erasures import erased_users
from encode.data.histories import read_histories
from encode.errors import ConfigError, QualityError
from encode.gates import gates_of, measure, share_held
from encode.registry import CANDIDATE, CHAMPION, PREVIOUS, REFUSED, RELEASED, Registry, Version
from encode.release_report import Side, to_html, to_markdown
from encode.schema import Window
from encode.serving.bundle import Bundle
from encode.serving.release import loaded, see_served
from encode.storage import open_storage

Say = Callable[[str], None]
Summary = dict[str, Any]
NOTHING, UP_TO_DATE, PASSED = "nothing to release", "serving brought up to date", "passed"
WAITING, RELEASE, REFUSAL, ROLLBACK = "waits for approval", "released", "refused", "rolled back"
"""Outcomes."""
_BY_GATES = "misses its gates: "
"""How the mark of a version begins that no person has refused."""


@dataclass(frozen=True)
class Contest:
    """Who is to serve after a release."""

    chosen: Version | None
    """The candidate, or the champion where there is no other candidate that may serve."""
    champion: Version | None
    outcome: str
    """What a release has to do: nothing, bring serving up to date, or judge and release the candidate."""

    def summary(self) -> Summary:
        """Return what `judge` returns where there is no candidate to judge."""
        return {"outcome": self.outcome, "approval": False} | ({"version": self.chosen.number} if self.chosen else {})


def contest(registry: Registry, say: Say) -> Contest:
    """Look at who is candidate and champion."""
    champion, candidate = registry.by_alias(CHAMPION), registry.by_alias(CANDIDATE)
    if candidate is None:
        say("no candidate is registered yet: nothing to release")
        return Contest(None, champion, NOTHING)
    if champion is not None and champion.number == candidate.number:
        return Contest(champion, champion, UP_TO_DATE)
    if (why := candidate.tags.get(REFUSED)) and (champion is not None or not why.startswith(_BY_GATES)):
        say(f"candidate version {candidate.number} was refused before: {why}")
        return Contest(champion, champion, UP_TO_DATE if champion else NOTHING)
    return Contest(candidate, champion, PASSED)


def judge(config: Config, places: Places, registry: Registry, found: Contest, bundle: Bundle, say: Say) -> Summary:
    """Hold the candidate against its gates, if there is one, and log the report with it.

    Champion and candidate are both measured anew on the candidate's test days, on the same impressions. A refusal is
    noted on the version, so that it is not tried again; where there is no champion it is, for the limits may have
    changed, and a note of earlier gates is removed.

    Args:
        config: training says how impressions are sampled, release has the limits.
        places: where everything is.
        registry: of the versions.
        found: whom to judge.
        bundle: of the one who is chosen.
        say: told of each gate.

    Returns:
        What `publish` needs to release exactly this: outcome, version, champion, bundle, snapshot; the gates' values,
        the address of the report, and the difference for people, in Markdown.

    Raises:
        QualityError: a gate is missed.
    """
    if found.outcome != PASSED or found.chosen is None:
        return found.summary()
    candidate, champion, name = found.chosen, found.champion, config.registry.model_name
    storage, card = open_storage(places), bundle.card
    test = Window(card.as_of - timedelta(days=card.test_days), card.as_of)
    histories, _ = read_histories(storage, card.as_of, say=say)

    def side(version: Version, bundle: Bundle) -> Side:
        measured = measure(bundle, histories, test, config.training)
        return Side(version, bundle, measured, registry.settings(version))

    new, old, shared = side(candidate, bundle), None, None
    with ExitStack() as held:
        if champion is not None:
            old = side(champion, held.enter_context(loaded(registry, places, champion)))
            users = np.setdiff1d(np.concatenate([*old.bundle.snapshot.user_ids()]), erased_users(storage))
            shared = share_held(users, bundle.snapshot)
        gates = gates_of(new.measured, old.measured if old else None, shared, config.release)
        for gate in gates:
            say(f"gate {'passed' if gate.passed else 'MISSED'}: {gate}")
        report = registry.log_report(candidate, to_html(name, gates, new, old, registry.links(candidate)))
        markdown = to_markdown(gates, new, old, report)
    say(f"report: {report}")
    missed = [str(gate) for gate in gates if not gate.passed]
    if missed:
        registry.tag(candidate, REFUSED, _BY_GATES + "; ".join(missed))
        serves = "the champion still serves" if champion is not None else "there is no champion yet, nothing serves"
        raise QualityError(
            f"version {candidate.number} misses its gates: {'; '.join(missed)}; {serves}. Report: {report}. "
            "Train another candidate, or change the release section of the preset if the gate is wrong"
        )
    registry.untag(candidate, REFUSED)
    return {
        "outcome": PASSED,
        "version": candidate.number,
        "bundle": bundle.id,
        "snapshot": bundle.pointer.snapshot,
        "champion": champion.number if champion else None,
        "gates": {gate.name: gate.value for gate in gates},
        "report": report,
        "approval": config.release.approval,
        "subject": f"Let {name} version {candidate.number} serve?",
        "body": markdown,
    }


def approved(config: Config, judged: Summary, approve: str | None, say: Say) -> bool:
    """Tell whether what was judged may be released now: what a person has approved, or nobody has to.

    Raises:
        QualityError: a person has approved another version.
    """
    number = judged["version"]
    if approve is not None and approve != number:
        raise QualityError(
            f"release: version {approve} is approved, version {number} was judged; nothing was released. "
            f"Look at {judged.get('report', 'its report')} and approve that"
        )
    if judged["outcome"] != PASSED or not config.release.approval or approve is not None:
        return True
    say(f"version {number} passed its gates and waits for approval: look at the report, then")
    say(f"  encode release --approve {number}        or        encode release --refuse {number} --reason TEXT")
    return False


def publish(places: Places, registry: Registry, judged: Summary, bundle: Bundle, say: Say) -> Summary:
    """Move the alias to what was judged, and see that serving has loaded exactly that bundle.

    Where the alias has moved already, as in a second try, only serving is seen to. Where there was only that to do and
    the champion has changed meanwhile, whoever changed it sees to serving.

    Raises:
        QualityError: candidate, champion or snapshot are not those that were judged; nothing was released.
        TimeoutError: the alias has moved, but serving has not followed yet.
    """
    outcome, champion = judged["outcome"], registry.by_alias(CHAMPION)
    serves = champion is not None and champion.number == judged["version"]
    if outcome == UP_TO_DATE and not serves:
        say(f"version {judged['version']} is not the champion any more: nothing to do")
        return judged | {"outcome": NOTHING}
    if outcome == PASSED:
        outcome, version = RELEASE, registry.by_number(judged["version"])
        if not serves:
            _check_unchanged(judged, registry.by_alias(CANDIDATE), champion, bundle)
            registry.point(CHAMPION, version)
        # Only once it serves, for by these it may be rolled back to; also where a first try died before it noted them.
        if not serves or RELEASED not in version.tags:
            if judged["champion"] is not None:
                registry.tag(version, PREVIOUS, judged["champion"])
            registry.tag(version, RELEASED, bundle.id)
    served = see_served(places, bundle, say, again=outcome == RELEASE)
    say(f"{outcome}: version {bundle.model_version}, bundle {bundle.id}, snapshot {bundle.pointer.snapshot}")
    summary = {"outcome": outcome, "version": bundle.model_version, "bundle": bundle.id, "served_by": served}
    return summary | {"gates": judged.get("gates", {}), "report": judged.get("report")}


def _check_unchanged(
    judged: Mapping[str, Any], candidate: Version | None, champion: Version | None, bundle: Bundle
) -> None:
    found = {
        "candidate": candidate.number if candidate else None,
        "champion": champion.number if champion else None,
        "snapshot": bundle.pointer.snapshot,
        "bundle": bundle.id,
    }
    expected = {**judged, "candidate": judged["version"]}
    changed = [f"{name} was {expected[name]}, is {now}" for name, now in found.items() if now != expected[name]]
    if candidate is not None and REFUSED in candidate.tags:
        changed.append(f"version {candidate.number} was refused: {candidate.tags[REFUSED]}")
    if changed:
        raise QualityError(
            f"version {judged['version']}: not what was judged any more: {'; '.join(changed)}; nothing was released, "
            "what served before still serves. Release again: what there is now will be judged"
        )


def refuse(registry: Registry, number: str, reason: str, say: Say) -> Summary:
    """Note on a version that it must not serve.

    Raises:
        ArtifactError: there is no such version.
        ConfigError: it serves.
    """
    version, champion = registry.by_number(number), registry.by_alias(CHAMPION)
    if champion is not None and champion.number == version.number:
        raise ConfigError(f"version {number} is the champion: it serves; roll back instead of refusing it")
    registry.tag(version, REFUSED, reason)
    say(f"refused: version {number}: {reason}")
    return {"outcome": REFUSAL, "version": number, "reason": reason}


def roll_back(
    places: Places,
    registry: Registry,
    number: str | None,
    reason: str | None,
    say: Say,
    leaving: str | None = None,
) -> Summary:
    """Make a version that was champion before the champion again, and see that serving has followed.

    The one that served is marked as refused; the mark of the one that comes back is removed. With `leaving` it may be
    tried again: where that one was left for `number` already, only serving is seen to.

    Args:
        places: where everything is.
        registry: of the versions.
        number: which version; None takes the champion before this one.
        reason: noted on the version that is left.
        say: told what happens.
        leaving: which version is to be left; None leaves whichever is the champion.

    Raises:
        QualityError: there is nothing to go back to, or the version was never champion, or is it now, or another one
            than `leaving` serves, or becomes champion meanwhile; nothing has changed.
        ArtifactError: there is no such version, or its bundle cannot be loaded; nothing has changed.
        TimeoutError: the alias has moved, but serving has not followed yet; do not repeat it without `leaving`.
    """
    began = time.monotonic()
    if leaving is not None and number is not None and number != leaving and _champion(registry) == number:
        champion, version = registry.by_number(leaving), registry.by_number(number)
    else:
        champion, version = rollback_pair(registry, number)
        _check_champion(registry, leaving or champion.number)
    why = note_of_rollback(version, reason)
    with loaded(registry, places, version) as bundle:
        if _champion(registry) != version.number:
            _check_champion(registry, champion.number)  # loading takes its time
            registry.tag(champion, REFUSED, why)
            if int(version.number) > int(champion.number):  # forward again: the one before it is the one that is left
                registry.tag(version, PREVIOUS, champion.number)
            registry.untag(version, REFUSED)
            registry.point(CHAMPION, version)
        served = see_served(places, bundle, say, again=True)
    seconds = round(time.monotonic() - began, 3)
    say(
        f"{why}; from version {champion.number}, bundle {bundle.id}, interests as of {bundle.pointer.as_of}, "
        f"in {seconds:.1f} s"
    )
    return {
        "outcome": ROLLBACK,
        "version": version.number,
        "from": champion.number,
        "bundle": bundle.id,
        "served_by": served,
        "reason": reason,
        "seconds": seconds,
    }


def rollback_pair(registry: Registry, number: str | None) -> tuple[Version, Version]:
    """Return the champion, and the version that a rollback would put in its place: `number`, else the one before.

    Raises:
        QualityError: there is nothing to go back to, or the version was never champion, or is it now.
        ArtifactError: there is no such version.
    """
    champion = registry.by_alias(CHAMPION)
    if champion is None:
        raise QualityError("rollback: there is no champion; nothing to go back to")
    number = number or champion.tags.get(PREVIOUS)
    if number is None:
        raise QualityError(f"rollback: version {champion.number} is the first champion; nothing to go back to")
    version = registry.by_number(number)
    if version.number == champion.number:
        raise QualityError(f"rollback: version {number} is the champion; it serves already")
    if not version.was_champion:
        raise QualityError(
            f"rollback: version {number} was never champion, so nobody knows how it serves; have "
            f"{', '.join(registry.released()) or 'none'}; a candidate goes through its gates: `encode release`"
        )
    return champion, version


def _champion(registry: Registry) -> str | None:
    found = registry.by_alias(CHAMPION)
    return found.number if found else None


def _check_champion(registry: Registry, expected: str) -> None:
    if (found := _champion(registry)) != expected:
        raise QualityError(
            f"rollback: version {expected} was to be left, but {f'version {found}' if found else 'none'} is the "
            "champion now; nothing has changed. Look at what serves, and roll back that, if it has to be"
        )


def note_of_rollback(version: Version, reason: str | None) -> str:
    """Return what is noted on the version that is left."""
    return f"rolled back to version {version.number}" + (f": {reason}" if reason else "")
