"""What the DAGs share: assets, connections, the days of a run, retries. No DAG is in this file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import (
    Asset,
    AssetOrTimeSchedule,
    Connection,
    CronDataIntervalTimetable,
    ExceptionRetryPolicy,
    Param,
    RetryAction,
    RetryRule,
    get_current_context,
)
from airflow.sdk.exceptions import AirflowNotFoundException, AirflowSkipException

from encode.config import Config, Places, presets

if TYPE_CHECKING:
    from encode.schema import Window

DEFAULT_PRESET = os.environ.get("ENCODE_PRESET") or "complete-journey"

RAW = Asset("encode_raw")
BEHAVIORS = Asset("encode_behaviors")
CANDIDATE = Asset("encode_candidate")
INTERESTS = Asset("encode_interests")

COMMON: dict[str, Any] = {
    "start_date": datetime(
        2000, 1, 1, tzinfo=UTC
    ),  # Airflow skips the tasks of a run before it, and calls that success
    "catchup": False,
    "max_active_runs": 1,
    "tags": ["encode"],
    "default_args": {
        "retries": 5,
        "retry_delay": timedelta(seconds=10),
        "retry_exponential_backoff": True,
        # What the library raises on purpose cannot be cured by trying again; the network and the store can.
        "retry_policy": ExceptionRetryPolicy([RetryRule("encode.errors.EncodeError", RetryAction.FAIL)]),
    },
}
"""What every DAG is given."""


def preset_param() -> Param:
    """Return the field of the trigger form that names the settings."""
    return Param(
        None,
        type=["null", "string"],
        pattern=rf"^({'|'.join(map(re.escape, presets()))}|.+\.ya?ml)$",
        title="Preset",
        description="Settings of the log: a preset of the package, or the path of a YAML file on the workers. "
        f"Empty: that of what triggered the run, else {DEFAULT_PRESET} (ENCODE_PRESET).",
        examples=presets(),
    )


def day_param(title: str, description: str) -> Param:
    """Return an optional day of the trigger form."""
    return Param(None, type=["null", "string"], format="date", title=title, description=description)


def dry_run_param() -> Param:
    """Return the switch of the trigger form that makes a run say what it would do."""
    return Param(
        False,
        type="boolean",
        title="Dry run",
        description="Only say in the log of the task what would be done: nothing is written, nothing is triggered.",
    )


def schedule(variable: str, *assets: Asset) -> Any:
    """Return the assets as a schedule, joined by the cron expression in an environment variable if it is set."""
    cron = os.environ.get(variable)
    if not cron:
        return list(assets) or None
    timetable = CronDataIntervalTimetable(cron, timezone="UTC")
    return AssetOrTimeSchedule(timetable=timetable, assets=list(assets)) if assets else timetable


@dataclass(frozen=True)
class Run:
    """What a run was asked for, resolved."""

    preset: str
    config: Config
    days: Window | None
    """None where the DAG is not about days."""
    dry_run: bool

    @property
    def facts(self) -> dict[str, str]:
        """Return what summary and asset events of the run say of it; the runs that these trigger take its preset."""
        from encode.schema import fingerprint

        facts = {"preset": self.preset, "settings": fingerprint(self.config.model_dump(mode="json"))}
        return facts | ({"start": str(self.days.start), "end": str(self.days.end)} if self.days else {})

    def carry_out(
        self, step: Callable[..., Any], plan: Callable[..., Any], *arguments: Any, **named: Any
    ) -> dict[str, Any]:
        """Return the summary of a step; of a dry run call its plan, keep what that returns as XCom `plan`, and skip."""
        if not self.dry_run:
            return step(self.config, places(), *arguments, **named) | self.facts
        get_current_context()["ti"].xcom_push("plan", plan(self.config, places(), *arguments, **named) | self.facts)
        raise AirflowSkipException("dry run: nothing was done")


def skip_where_nothing_is_new(summary: dict[str, Any], replay: bool) -> None:
    """Skip the task of a replay whose days are all in the histories already, so that it triggers nothing.

    What an earlier run added before it failed, or was killed, still waits for a refresh. The summary is kept as XCom.
    """
    if replay and not summary["waiting"]:
        get_current_context()["ti"].xcom_push("return_value", summary)
        raise AirflowSkipException("the histories hold all behaviors of these days: nothing is triggered")


def documented(doc: str) -> dict[str, str]:
    """Return what the UI says of a DAG: in the list the title of its page, and the page."""
    return {"description": doc.partition("\n")[0].lstrip("# "), "doc_md": doc}


def why_asked(judged: Any) -> str:
    """Return for people whether `approve` is skipped, and why."""
    if judged["approval"]:
        return f"a person is asked about version {judged['version']}: the preset has release.approval"
    passed = "subject" in judged  # what was judged
    return "nobody is asked: " + ("the preset has no release.approval" if passed else judged["outcome"])


def resolved(context: Any, *, days: bool = True, as_of: bool = False) -> Run:
    """Resolve what a run was asked for, and say it.

    Args:
        context: of the task.
        days: whether the DAG is about days.
        as_of: it is about all before the end of these days.

    Raises:
        ConfigError: a parameter or a setting is unknown, or nothing says which days are meant.
    """
    from encode.errors import ConfigError

    params, known = context["params"], context["dag"].params
    # Airflow takes names that are not in the form, and would do something else than was asked for.
    if unknown := sorted((context["dag_run"].conf or {}).keys() - known.keys()):
        raise ConfigError(f"trigger: unknown parameters {', '.join(unknown)}; expected some of {', '.join(known)}")
    preset = _preset(context)
    run = Run(preset, config(context), window(context) if days else None, bool(params.get("dry_run")))
    told = f"preset {preset}, settings {run.facts['settings'][:12]}"
    if run.days:
        told += f", as of {run.days.end}: all days before it" if as_of else f", days {run.days.in_words()}"
    print(told)
    return run


def config(context: Any) -> Config:
    """Load the settings of a run: of its preset, else of the preset of what triggered it, else of the default."""
    from encode.steps import load_config

    return load_config(_preset(context))


def window(context: Any) -> Window:
    """Resolve the days of a run of any type; see `encode.schema.resolve_window`."""
    from encode.schema import resolve_window

    params, run = context["params"], context["dag_run"]
    return resolve_window(
        params.get("start"),
        params.get("end") or params.get("as_of"),
        run.partition_key,
        _with_days(_events(context)),
        (run.data_interval_start, run.data_interval_end),
    )


def _preset(context: Any) -> str:
    from encode.errors import ConfigError

    if chosen := context["params"].get("preset"):
        return chosen
    named = sorted({event["preset"] for event in _events(context) if "preset" in event})
    if len(named) > 1:
        raise ConfigError(f"events of several presets triggered this run: {', '.join(named)}; trigger one run for each")
    return named[0] if named else DEFAULT_PRESET


def _with_days(events: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the events that say which days; of others the log says why they are left out."""
    from encode.errors import ConfigError
    from encode.schema import resolve_window

    found = []
    for event in events:
        try:
            resolve_window(event.get("start"), event.get("end"))
        except ConfigError as error:
            print(f"left out an event that says {event or 'nothing'}: {error}")
        else:
            found.append(event)
    return found


def _events(context: Any) -> list[dict[str, str]]:
    """Return what the asset events that triggered a run say, as text; people post them, too."""
    extras = [event.extra or {} for events in context["triggering_asset_events"].values() for event in events]
    return [{name: str(value) for name, value in extra.items() if value} for extra in extras]


def places() -> Places:
    """Return where to read and write, from the connections encode_{store,mlflow,serving,spark}.

    Where there is a connection `DAG_store`, as encode_train_store, that DAG uses it instead of encode_store: with a key
    that may do no more than the DAG needs.
    """
    store = _connection(f"{get_current_context()['dag'].dag_id}_store") or Connection.get("encode_store")
    mlflow, serving = (Connection.get(f"encode_{name}") for name in ("mlflow", "serving"))
    extra = store.extra_dejson
    return Places(
        store="/".join(["s3:/", store.host, *filter(None, [extra.get("prefix")])]),
        endpoint_url=extra.get("endpoint_url"),
        region=extra.get("region", "us-east-1"),
        access_key=store.login,
        secret_key=store.password,
        single_writer=str(extra.get("single_writer")).lower() in ("true", "1"),  # a connection as URI has texts only
        tracking_uri=mlflow.host,
        serving_url=serving.host,
        serving_key=serving.password,
        spark_master=_spark_master(),
        scratch=os.environ.get("ENCODE_SCRATCH"),
    )


def _spark_master() -> str | None:
    """Return what the connection encode_spark names: `master` in its extra, or its host and port. It may be absent."""
    spark = _connection("encode_spark")
    if spark is None:
        return None
    host = spark.host or ""
    address = f"{'' if '://' in host else 'spark://'}{host}:{spark.port}" if spark.port else host
    return spark.extra_dejson.get("master") or address or None


def _connection(name: str) -> Connection | None:
    """Return a connection, or None where there is none of that name."""
    try:
        return Connection.get(name)
    except AirflowNotFoundException:
        return None
