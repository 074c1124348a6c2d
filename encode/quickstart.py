"""The whole job on the local stack: land a log, run the DAGs through Airflow's API, score a real request.

Everything that stands is reused: a DAG run that succeeded for the same log, settings and package is not triggered
again, and its steps would find their outputs anyway.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from encode import __version__, steps
from encode.config import Config, Places, load_config
from encode.errors import EncodeError
from encode.schema import fingerprint
from encode.stack import Stack, down, status, up
from encode.stack.airflow_api import AirflowClient
from encode.stack.home import credentials

_DAGS = ("encode_validate", "encode_train", "encode_refresh", "encode_release")
_TRIGGER_TIMEOUT = 180.0
Say = Callable[[str], None]


def quickstart(preset: str, home: Path, dags: Path, ports: Mapping[str, int], say: Say) -> dict[str, Any]:
    """Bring the stack up, run all steps through Airflow, and print what a newcomer wants to know.

    After Ctrl-C or an error on the way, what this call started is stopped again.

    Raises:
        EncodeError: a component does not start, or a DAG run fails; the message holds the end of its log.
    """
    config = load_config(preset)
    stood = any(one.pid for one in status(home))
    began = time.monotonic()
    stack = up(home, dags_folder=dags, ports=ports, say=say)
    try:
        places = Places.from_environment(stack.environment())
        say(f"stack is up after {time.monotonic() - began:.0f} s; landing the log of preset {config.name}")
        landed = steps.land(config, places, say)
        runs = _run_dags(preset, config, landed, stack, say)
        answer = _score(places, config, say)
    except BaseException:
        if not stood:
            down(home, say=say)
        raise
    summary = {"land": landed, "runs": runs, "score": answer, "urls": dict(stack.urls)}
    _print_summary(summary, stack, time.monotonic() - began, say)
    return summary


def _run_dags(preset: str, config: Config, landed: Mapping[str, Any], stack: Stack, say: Say) -> dict[str, Any]:
    """Trigger validation and training; refresh and release follow by their assets, and are waited for."""
    first, end = landed["first_day"], str(date.fromisoformat(landed["last_day"]) + timedelta(days=1))
    same = fingerprint({"log": landed["fingerprint"], "config": config.model_dump(mode="json"), "v": __version__})[:12]
    name = preset if preset == config.name else str(Path(preset).absolute())
    secrets = credentials(stack.home)
    runs: dict[str, Any] = {}
    with AirflowClient(stack.urls["airflow"], secrets.airflow_username, secrets.airflow_password) as airflow:
        for dag in _DAGS:
            airflow.wait_for_dag(dag)

        def finish(dag: str, run: Mapping[str, Any]) -> str:
            done = airflow.wait(dag, run["dag_run_id"], say)
            task = dag.removeprefix("encode_")
            result = airflow.task_result(dag, done["dag_run_id"], task)
            runs[dag] = {"run": done["dag_run_id"], "seconds": done["duration"], "result": result}
            return str(done["dag_run_id"])

        airflow.unpause("encode_validate")
        airflow.unpause("encode_rollback")  # runs only when somebody needs it, and then at once
        conf = {"preset": name, "start": first, "end": end}
        finish("encode_validate", _trigger(airflow, "encode_validate", same, conf, say))
        for dag in _DAGS:
            airflow.unpause(dag)
        trained = finish("encode_train", _trigger(airflow, "encode_train", same, {"preset": name, "as_of": end}, say))
        refreshed = finish("encode_refresh", airflow.wait_for_consumer("encode_refresh", trained, _TRIGGER_TIMEOUT))
        finish("encode_release", airflow.wait_for_consumer("encode_release", refreshed, _TRIGGER_TIMEOUT))
    return runs


def _trigger(airflow: AirflowClient, dag: str, same: str, conf: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Start a run, or return the one of the same log and settings unless it failed."""
    for attempt in range(1, 100):
        run_id = f"quickstart-{same}-{attempt}"
        run = airflow.trigger(dag, conf, run_id)
        if run["state"] == "success":
            say(f"{dag}: done before ({run_id})")
        if run["state"] != "failed":
            return run
    raise EncodeError(f"{dag}: 99 runs quickstart-{same}-* failed; see {airflow.url}, then `encode stack clean`")


def _score(places: Places, config: Config, say: Say) -> dict[str, Any]:
    """Score the favorite items of the user with the most behaviors, through serving's HTTP."""
    from encode.registry import CHAMPION, Registry
    from encode.serving.client import interests, score
    from encode.serving.release import loaded

    registry = Registry(places, config.registry)
    champion = registry.by_alias(CHAMPION)
    if champion is None:
        raise EncodeError("quickstart: the DAGs succeeded but no version is champion; see encode_release in Airflow")
    say("scoring a real request")
    with loaded(registry, places, champion) as bundle:
        user = bundle.snapshot.busiest_user()
    liked = interests(places, config.registry, user)["interests"]
    items = [interest["top_items"][0]["item_id"] for interest in liked[:5]]
    answer = score(places, config.registry, user, items)
    return {**answer, "metrics": registry.metrics(champion)}


def _print_summary(summary: Mapping[str, Any], stack: Stack, seconds: float, say: Say) -> None:
    say("")
    say(f"{'step':<10} {'seconds':>7}  what it did")
    for dag, run in summary["runs"].items():
        say(f"{dag.removeprefix('encode_'):<10} {run['seconds'] or 0:>7.1f}  {_told(dag, run['result'])}")
    answer = summary["score"]
    shown = ("auc", "auc_seen_before", "auc_first_time", "gauc", "logloss", "calibration")
    metrics = "  ".join(f"{name} {answer['metrics'][name]:.4f}" for name in shown)
    bundle = answer["bundle"]
    say("")
    say(f"champion   version {bundle['model_version']}  {metrics}")
    say(f"bundle     {bundle['id']}  space {bundle['space']}  snapshot {bundle['snapshot']}")
    pairs = "  ".join(f"{i}: {p:.3f}" for i, p in zip(answer["item_ids"], answer["probabilities"], strict=True))
    say(f"score      user {answer['user_id']}  {pairs}")
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
        return (
            f"{result['rows']:,} rows of {result['days']} days: {result['accepted']:,} behaviors, "
            f"{result['rejected']:,} in quarantine"
        )
    if dag == "encode_train":
        return f"candidate version {result['version']} in space {result['space']}, auc {result['metrics']['auc']:.4f}"
    if dag == "encode_refresh":
        return f"{result['users']:,} users, snapshot {', '.join(result['snapshots'].values())}"
    shown = ("version", "bundle", "served_by", "reason")  # what a person rejected has no bundle
    facts = ", ".join(f"{name.replace('_', ' ')} {result[name]}" for name in shown if name in result)
    return f"{result['outcome']}: {facts}" if facts else str(result["outcome"])
