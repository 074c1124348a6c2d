"""### Validate behavior logs

Turns the raw partitions of some days, `raw/dt=D`, into behaviors, `behaviors/dt=D`. Rows that break the contract go to
`quarantine/dt=D` with a reason each; Great Expectations judges each day, and its Data Docs page lies beside it.
Days that are validated already are left alone, unless *Replay* is on and what is wrong with them was mended. A replay
of days that the histories hold already, as it is by then, is skipped, and triggers no refresh.

**Which days.** *First day* and *End* of the form; else those of the `encode_raw` events that triggered the run; else
the data interval: of a schedule (`ENCODE_VALIDATE_SCHEDULE`), of a backfill, or, with a schedule, the last one before
the logical date of a manual run. A run that is told no days fails, and does nothing.

**When it fails.** The end of the task's log says what, where, and the remedy. *No raw data*: land the days, then clear
the task. *Day refused*: it misses its expectations, and the log names its page and its rejected rows; the other days
are published. Correct the data or `validation` in the preset, then clear the task: only what is missing is done. Such
errors are not retried. Those of the network and the store are, five times, as is a task whose process was killed.

A *dry run* says which days have raw data, which are done, and what would be written.
"""

from __future__ import annotations

from airflow.sdk import Param, dag, task

from encode_wiring import (
    BEHAVIORS,
    COMMON,
    RAW,
    day_param,
    documented,
    dry_run_param,
    preset_param,
    resolved,
    schedule,
    skip_where_nothing_is_new,
)


@dag(
    schedule=schedule("ENCODE_VALIDATE_SCHEDULE", RAW),
    params={
        "preset": preset_param(),
        "start": day_param("First day", "Empty: the day before the end, or the days that triggered the run."),
        "end": day_param("End", "The first day that is not validated. Empty: the day after the first day."),
        "replay": Param(
            False,
            type="boolean",
            title="Replay",
            description="Also judge anew what days that are validated have in quarantine, where their raw data or the "
            "settings changed since, and add what is good by now.",
        ),
        "dry_run": dry_run_param(),
    },
    **documented(__doc__),
    **COMMON,
)
def encode_validate() -> None:
    """Wire the step."""

    @task(
        outlets=[BEHAVIORS],
        doc_md="`encode.steps.validate`, or `replay`, for the days of the run. Its XCom has the counts and the address "
        "of each day's page. To run it again, clear it: what is published stays and is not done twice.",
    )
    def validate(*, outlet_events=None, **context):
        from encode import plan, steps

        run = resolved(context)
        step, dry = (steps.replay, plan.replay) if context["params"]["replay"] else (steps.validate, plan.validate)
        summary = run.carry_out(step, dry, run.days)
        skip_where_nothing_is_new(summary, context["params"]["replay"])
        outlet_events[BEHAVIORS].extra = run.facts
        return summary

    validate()


encode_validate()
