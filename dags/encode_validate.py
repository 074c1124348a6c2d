"""### Validate behavior logs

Turns the raw partitions of some days, `raw/dt=D`, into behaviors, `behaviors/dt=D`. Rows that break the contract go to
`quarantine/dt=D` with a reason each; Great Expectations judges each day, and its Data Docs page lies beside it.

A day that misses its expectations fails the run, is not retried, and publishes nothing. Days that are validated
already are left alone. Owners of a log trigger this DAG by an event of the asset `encode_raw` with `start` and `end`.
"""

from __future__ import annotations

from airflow.sdk import dag, task

from encode_wiring import BEHAVIORS, COMMON, RAW, config, day_param, made, places, preset_param, schedule, window


@dag(
    schedule=schedule("ENCODE_VALIDATE_SCHEDULE", RAW),
    params={
        "preset": preset_param(),
        "start": day_param("First day", "Empty: the day before the end, or the days that triggered the run."),
        "end": day_param("End", "The first day that is not validated. Empty: the day after the first day."),
    },
    doc_md=__doc__,
    **COMMON,
)
def encode_validate() -> None:
    """Wire the step."""

    @task(outlets=[BEHAVIORS], doc_md="`encode.steps.validate` for the days of the run.")
    def validate(*, outlet_events=None, **context):
        from encode import steps

        days = window(context)
        summary = steps.validate(config(context), places(), days)
        outlet_events[BEHAVIORS].extra = made(context, start=str(days.start), end=str(days.end))
        return summary

    validate()


encode_validate()
