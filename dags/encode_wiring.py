"""What the DAGs share: assets, connections, the days of a run, retries. No DAG is in this file."""

from __future__ import annotations

import os
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
)
from airflow.sdk.exceptions import AirflowNotFoundException

from encode.config import Config, Places, presets

if TYPE_CHECKING:
    from encode.schema import Window

DEFAULT_PRESET = os.environ.get("ENCODE_PRESET", "complete-journey")

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
        "retries": 3,
        "retry_delay": timedelta(seconds=30),
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
        minLength=1,
        title="Preset",
        description="Settings of the log: a preset of the package, or the path of a YAML file on the workers. "
        f"Empty: that of what triggered the run, else {DEFAULT_PRESET} (ENCODE_PRESET).",
        examples=presets(),
    )


def day_param(title: str, description: str) -> Param:
    """Return an optional day of the trigger form."""
    return Param(None, type=["null", "string"], format="date", title=title, description=description)


def schedule(variable: str, *assets: Asset) -> Any:
    """Return the assets as a schedule, joined by the cron expression in an environment variable if it is set."""
    cron = os.environ.get(variable)
    if not cron:
        return list(assets) or None
    timetable = CronDataIntervalTimetable(cron, timezone="UTC")
    return AssetOrTimeSchedule(timetable=timetable, assets=list(assets)) if assets else timetable


def config(context: Any) -> Config:
    """Load the settings of a run: of its preset, else of the preset of what triggered it, else of the default."""
    from encode.steps import load_config

    return load_config(_preset(context) or DEFAULT_PRESET)


def window(context: Any) -> Window:
    """Resolve the days of a run of any type; see `encode.schema.resolve_window`."""
    from encode.schema import resolve_window

    params, run = context["params"], context["dag_run"]
    return resolve_window(
        params.get("start"),
        params.get("end") or params.get("as_of"),
        run.partition_key,
        [event for event in _events(context) if event.get("end")],
        (run.data_interval_start, run.data_interval_end),
    )


def made(context: Any, **facts: str) -> dict[str, str]:
    """Return what an asset event says, so that the runs that it triggers use the same settings."""
    preset = _preset(context)
    return facts | ({"preset": preset} if preset else {})


def _preset(context: Any) -> str | None:
    named = [event["preset"] for event in _events(context) if event.get("preset")]
    return context["params"].get("preset") or next(iter(named), None)


def _events(context: Any) -> list[dict[str, Any]]:
    return [event.extra for events in context["triggering_asset_events"].values() for event in events]


def places() -> Places:
    """Return where to read and write, from the connections encode_{store,mlflow,serving,spark}."""
    store, mlflow, serving = (Connection.get(f"encode_{name}") for name in ("store", "mlflow", "serving"))
    extra = store.extra_dejson
    return Places(
        store="/".join(["s3:/", store.host, *filter(None, [extra.get("prefix")])]),
        endpoint_url=extra.get("endpoint_url"),
        region=extra.get("region", "us-east-1"),
        access_key=store.login,
        secret_key=store.password,
        single_writer=bool(extra.get("single_writer")),
        tracking_uri=mlflow.host,
        serving_url=serving.host,
        serving_key=serving.password,
        spark_master=_spark_master(),
        scratch=os.environ.get("ENCODE_SCRATCH"),
    )


def _spark_master() -> str | None:
    """Return what the connection encode_spark names: `master` in its extra, or its host and port. It may be absent."""
    try:
        spark = Connection.get("encode_spark")
    except AirflowNotFoundException:
        return None
    host = spark.host or ""
    address = f"{'' if '://' in host else 'spark://'}{host}:{spark.port}" if spark.port else host
    return spark.extra_dejson.get("master") or address or None
