"""What the DAGs share: assets, connections, the days of a run, retries. No DAG is in this file."""

from __future__ import annotations

import os
from datetime import timedelta
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

from encode.config import Places, presets

if TYPE_CHECKING:
    from encode.schema import Window

RAW = Asset("encode_raw")
BEHAVIORS = Asset("encode_behaviors")
CANDIDATE = Asset("encode_candidate")
INTERESTS = Asset("encode_interests")

DEFAULTS: dict[str, Any] = {
    "retries": 3,
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": True,
    # What the library raises on purpose cannot be cured by trying again; the network and the store can.
    "retry_policy": ExceptionRetryPolicy([RetryRule("encode.errors.EncodeError", RetryAction.FAIL)]),
}


def preset_param() -> Param:
    """Return the field of the trigger form that names the settings."""
    return Param(
        os.environ.get("ENCODE_PRESET", "complete-journey"),
        type="string",
        minLength=1,
        title="Preset",
        description="Settings of the log: a preset of the package, or the path of a YAML file on the workers.",
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


def window(context: Any) -> Window:
    """Resolve the days of a run of any type; see `encode.schema.resolve_window`."""
    from encode.schema import resolve_window

    params, run = context["params"], context["dag_run"]
    events = [event.extra for events in context["triggering_asset_events"].values() for event in events]
    return resolve_window(
        params.get("start"),
        params.get("end") or params.get("as_of"),
        run.partition_key,
        [event for event in events if event.get("end")],
        (run.data_interval_start, run.data_interval_end),
    )


def places() -> Places:
    """Return where to read and write, from the connections encode_store, encode_mlflow and encode_serving."""
    store, mlflow, serving = (Connection.get(f"encode_{name}") for name in ("store", "mlflow", "serving"))
    extra = store.extra_dejson
    return Places(
        store="/".join(["s3:/", store.host, *filter(None, [extra.get("prefix")])]),
        endpoint_url=extra.get("endpoint_url"),
        region=extra.get("region", "us-east-1"),
        access_key=store.login,
        secret_key=store.password,
        tracking_uri=mlflow.host,
        serving_url=serving.host,
    )
