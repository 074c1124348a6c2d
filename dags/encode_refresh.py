"""### Refresh every user's interests

Clusters every user's whole history in each space that a champion or candidate needs, writes a snapshot to
`interests/<space>/<snapshot>` and moves the space's pointer to it by one conditional put.

Runs after new behaviors were validated, and after a candidate was trained. A snapshot of the same inputs is not
made twice, and the pointer never goes back to an earlier day.
"""

from __future__ import annotations

from airflow.sdk import dag, task

from encode_wiring import (
    BEHAVIORS,
    CANDIDATE,
    COMMON,
    INTERESTS,
    config,
    day_param,
    made,
    places,
    preset_param,
    window,
)


@dag(
    schedule=(BEHAVIORS | CANDIDATE),
    params={
        "preset": preset_param(),
        "as_of": day_param("As of", "Behaviors before this day are used. Empty: the end of what triggered the run."),
    },
    doc_md=__doc__,
    **COMMON,
)
def encode_refresh() -> None:
    """Wire the step."""

    @task(outlets=[INTERESTS], doc_md="`encode.steps.refresh` as of the end of the run's days.")
    def refresh(*, outlet_events=None, **context):
        from encode import steps

        days = window(context)
        summary = steps.refresh(config(context), places(), days.end)
        outlet_events[INTERESTS].extra = made(context, end=str(days.end))
        return summary

    refresh()


encode_refresh()
