"""The whole job on the local stack: land a log, run the DAGs through Airflow's API, score a real request.

Everything that stands is reused: a DAG run that succeeded for the same log, settings and package is not triggered
again, and its steps would find their outputs anyway. What is told of a run is told only by the call that it ended in;
what is released, and where it serves, is asked anew each time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, timedelta
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from encode import __version__, steps
from encode.config import Config, Places, load_config
from encode.data.sources import require_log
from encode.errors import EncodeError
from encode.schema import fingerprint, number_of, probability_in_digits
from encode.stack import Stack, down, status, up
from encode.stack.airflow_api import AirflowClient
from encode.stack.home import credentials

if TYPE_CHECKING:
    from encode.serving.bundle import Bundle

_DAGS = ("encode_validate", "encode_train", "encode_refresh", "encode_release")
_ASKS = "HITLOperator"
"""Waits for a person."""
_TRIGGER_TIMEOUT = 180.0
_NUM_SCORED = 5
"""Items that the user had, and as many that others like."""
_NUM_OTHERS = 1000
"""Users among whom items are looked for that the user does not have."""
Say = Callable[[str], None]


def quickstart(preset: str, home: Path, dags: Path, ports: Mapping[str, int], say: Say) -> dict[str, Any]:
    """Bring the stack up, run all steps through Airflow, and print what a newcomer wants to know.

    After Ctrl-C or an error on the way, what this call started is stopped again.

    Returns:
        "land" what the step returned; "runs" id, seconds, whether it was "resumed" after an interrupted try, and
        result by DAG, also of runs that were over before; "ran" the DAGs whose runs were not; "score" the answer of
        serving, with those items that the user "had", "names" of items, "users" of its snapshot and "metrics" of its
        version; "urls" by component.

    Raises:
        EncodeError: a component does not start, or a DAG run fails; the message holds the end of its log.
    """
    config = load_config(preset)
    require_log(config.source)
    stood = any(one.pid for one in status(home))
    began, since = time.monotonic(), time.time()
    stack = up(home, dags_folder=dags, ports=ports, say=say)
    try:
        places = Places.from_environment(stack.environment())
        say(f"stack is up after {time.monotonic() - began:.0f} s; landing the log of preset {config.name}")
        landed = steps.land(config, places, say)
        runs, ran = _run_dags(preset, config, landed, stack, since, say)
        answer = _score(places, config, say)
    except BaseException as error:
        if not stood:
            down(home, say=say)
        if isinstance(error, KeyboardInterrupt):
            say("the same command goes on where this one stopped")
        raise
    summary = {"land": landed, "runs": runs, "ran": ran, "score": answer, "urls": dict(stack.urls)}
    _print_summary(summary, stack, time.monotonic() - began, say)
    return summary


def _run_dags(
    preset: str, config: Config, landed: Mapping[str, Any], stack: Stack, since: float, say: Say
) -> tuple[dict[str, Any], list[str]]:
    """Trigger validation and training; refresh and release follow by their assets, and are waited for.

    Returns:
        Each DAG's run, and the DAGs whose runs ended after `since`, in seconds of the epoch.
    """
    first, end = landed["first_day"], str(date.fromisoformat(landed["last_day"]) + timedelta(days=1))
    same = fingerprint({"log": landed["fingerprint"], "config": config.model_dump(mode="json"), "v": __version__})[:12]
    name = preset if preset == config.name else str(Path(preset).absolute())
    secrets = credentials(stack.home)
    runs: dict[str, Any] = {}
    ran: list[str] = []
    with AirflowClient(stack.urls["airflow"], secrets.airflow_username, secrets.airflow_password) as airflow:
        for dag in _DAGS:
            airflow.wait_for_dag(dag)

        def finish(dag: str, run: Mapping[str, Any]) -> str:
            run_id = str(run["dag_run_id"])
            if run["state"] == "success" and datetime.fromisoformat(run["end_date"]).timestamp() < since:
                say(f"{dag}: done before ({run_id}, over at {run['end_date'][:16].replace('T', ' ')} UTC)")
            else:
                airflow.wait(dag, run_id, say)
                ran.append(dag)
            result = airflow.task_result(dag, run_id, dag.removeprefix("encode_"))
            tasks = airflow.task_instances(dag, run_id)
            resumed = any(task["try_number"] > 1 for task in tasks)
            runs[dag] = {"run": run_id, "seconds": _worked_seconds(tasks), "resumed": resumed, "result": result}
            return run_id

        def follow(dag: str, source: str, run_id: str) -> str:
            return finish(dag, airflow.wait_for_consumer(dag, source, run_id, _TRIGGER_TIMEOUT))

        airflow.unpause("encode_validate")
        airflow.unpause("encode_rollback")  # runs only when somebody needs it, and then at once
        conf = {"preset": name, "start": first, "end": end}
        finish("encode_validate", _trigger(airflow, "encode_validate", same, conf, say))
        for dag in _DAGS:
            airflow.unpause(dag)
        trained = finish("encode_train", _trigger(airflow, "encode_train", same, {"preset": name, "as_of": end}, say))
        refreshed = follow("encode_refresh", "encode_train", trained)
        follow("encode_release", "encode_refresh", refreshed)
    return runs, ran


def _worked_seconds(tasks: Iterable[Mapping[str, Any]]) -> float:
    """Return how long the last tries of tasks worked.

    The duration of the run itself also counts while Airflow was stopped, or nobody answered.
    """
    return sum(task["duration"] or 0.0 for task in tasks if task["operator"] != _ASKS)


def _trigger(airflow: AirflowClient, dag: str, same: str, conf: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Start a run, or return the one of the same log and settings unless it failed."""
    for attempt in range(1, 100):
        run_id = f"quickstart-{same}-{attempt}"
        run = airflow.trigger(dag, conf, run_id)
        if run["state"] != "failed":
            return run
    raise EncodeError(f"{dag}: 99 runs quickstart-{same}-* failed; see {airflow.url}, then `encode stack clean`")


def _score(places: Places, config: Config, say: Say) -> dict[str, Any]:
    """Score items through serving's HTTP for the user with the most behaviors, once it serves the champion."""
    from encode.registry import CHAMPION, Registry
    from encode.serving.client import score
    from encode.serving.release import loaded, see_served

    registry = Registry(places, config.registry)
    champion = registry.by_alias(CHAMPION)
    if champion is None:
        raise EncodeError("quickstart: the DAGs succeeded but no version is champion; see encode_release in Airflow")
    say("scoring a real request")
    with loaded(registry, places, champion) as bundle:
        log = "`encode stack status` shows the log of serving, `GET /v1/release` what it serves"
        see_served(places, bundle, say, remedy=log)
        user, users = bundle.snapshot.busiest_user(), bundle.snapshot.num_users
        had, new = _had_by(bundle, user), _new_to(bundle, user)
        items = [*had, *new]
        names = {item: bundle.names[item] for item in items if item in bundle.names}
    answer = score(places, config.registry, user, items)
    return {**answer, "had": had, "names": names, "users": users, "metrics": registry.metrics(champion)}


def _had_by(bundle: Bundle, user: int) -> list[int]:
    """Return items that a user had, spread over the interests from the largest to the smallest.

    Of each interest it is the least frequent one that the snapshot names: the favorites of a busy user all score 1.
    """
    found = _top_items(bundle, user, -1)
    count = min(len(found), _NUM_SCORED)
    return [found[place * len(found) // count] for place in range(count)]


def _new_to(bundle: Bundle, user: int) -> list[int]:
    """Return favorites of other users that the snapshot does not hold of this one."""
    from encode.serving.bundle import Asked

    held = {item["item_id"] for interest in bundle.interests(user) or [] for item in interest["top_items"]}
    others = islice(chain.from_iterable(bundle.snapshot.user_ids()), _NUM_OTHERS)
    liked = dict.fromkeys(item for other in others for item in _top_items(bundle, int(other), 0)[:1])
    unheld = [item for item in liked if item not in held]
    # What the user has had attends to itself.
    _, itself = bundle.attention(Asked(user, np.array(unheld, np.int64)))
    return [item for item, weight in zip(unheld, itself.tolist(), strict=True) if not weight][:_NUM_SCORED]


def _top_items(bundle: Bundle, user: int, place: int) -> list[int]:
    """Return the top item at a place of each interest, largest interest first, where the model knows it."""
    found = (interest["top_items"] for interest in bundle.interests(user) or [])
    items = dict.fromkeys(top[place]["item_id"] for top in found if top)
    return [item for item in items if bundle.knows(item)]


def _print_summary(summary: Mapping[str, Any], stack: Stack, seconds: float, say: Say) -> None:
    say("")
    if summary["ran"]:
        say(f"{'step':<10} {'seconds':>7}  what it did")
        for dag, run in summary["runs"].items():
            worked, told = f"{run['seconds']:.1f}", _told(dag, run["result"])
            if run["resumed"]:
                told += "; resumed: seconds of the last try"
            if dag not in summary["ran"]:
                worked, told = "-", "done before"
            say(f"{dag.removeprefix('encode_'):<10} {worked:>7}  {told}")
    else:
        say("nothing was left to do: the runs of this log with these settings were over before")
    answer = summary["score"]
    shown = ("auc", "auc_seen_before", "auc_first_time", "gauc", "logloss", "calibration")
    metrics = "  ".join(f"{name} {answer['metrics'][name]:.4f}" for name in shown)
    bundle = answer["bundle"]
    say("")
    say("now released and served:")
    say(f"champion   version {bundle['model_version']}  {metrics}")
    say("           auc_seen_before: AUC of ranking by whether the user had the item before, without any model")
    say("           auc_first_time: AUC of the model among items that the user never had before")
    users = number_of(answer["users"], "user")
    say(f"bundle     {bundle['id']}  space {bundle['space']}  snapshot {bundle['snapshot']} of {users}")
    say(f"served by  {stack.urls['serving']}")
    say(f"score      user {answer['user_id']}")
    pairs = zip(answer["item_ids"], answer["probabilities"], strict=True)
    for item, probability in sorted(pairs, key=lambda pair: -pair[1]):
        how = "had before" if item in answer["had"] else "others like it"
        told = probability_in_digits(probability)
        say(f"           {told:>8}  {how:<14}  {answer['names'].get(item) or 'item'} ({item})")
    say("")
    for name, url in stack.urls.items():
        say(f"{name:<12} {url:<24} log {stack.logs[name]}")
    say(f"{'credentials':<12} {stack.credentials_file} (Airflow user and password, S3 keys)")
    say("")
    items = ",".join(map(str, answer["item_ids"]))
    encode = os.path.relpath(sys.argv[0]) if sys.argv[0].endswith("encode") else "encode"
    user = answer["user_id"]
    say(f"next: {encode} explain {user}  |  {encode} score --user {user} --items {items}")
    say(f"all done after {seconds:.0f} s; `make down` stops the stack")


def _told(dag: str, result: Mapping[str, Any]) -> str:
    """Say in one line what a step returned."""
    if dag == "encode_validate":
        told = (
            f"{number_of(result['rows'], 'row')} of {number_of(result['days'], 'day')}: "
            f"{number_of(result['accepted'], 'behavior')}, {result['rejected']:,} in quarantine"
        )
        before = result["unchanged"]
        return told + (f"; {number_of(before, 'day')} validated before" if before else "")
    if dag == "encode_train":
        return f"candidate version {result['version']} in space {result['space']}, auc {result['metrics']['auc']:.4f}"
    if dag == "encode_refresh":
        return f"{number_of(result['users'], 'user')}, snapshot {', '.join(result['snapshots'].values())}"
    shown = ("version", "bundle", "served_by", "reason")  # what a person rejected has no bundle
    facts = ", ".join(f"{name.replace('_', ' ')} {result[name]}" for name in shown if name in result)
    return f"{result['outcome']}: {facts}" if facts else str(result["outcome"])
