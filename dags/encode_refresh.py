"""### Refresh every user's interests

Clusters every user's whole history in each space that a champion or candidate needs, writes a snapshot to
`interests/<space>/<snapshot>` and moves the space's pointer to it by one conditional put. A snapshot of the same inputs
is not made twice, and the pointer never goes back to an earlier day.

Runs after new behaviors were validated, and after a candidate was trained; what comes while it runs is answered by one
run. What comes while the DAG is paused is part of the run that the first event after that triggers.

**Which day.** *As of* of the form; else the latest end of what triggered the run. If the histories in the store are of
a later day already, it is that day: days that were validated late are then in. A run that is told no day fails.

**When it fails.** Clear the task: it goes on where it stopped. *Damaged*: the message says what to remove first; it is
made again. *Memory*: lower `refresh.memory_gb`. The snapshot before serves meanwhile.

A *dry run* says which days are new, and in which spaces a snapshot would be written.
"""

from __future__ import annotations

from airflow.sdk import dag, task

from encode_wiring import (
    BEHAVIORS,
    CANDIDATE,
    COMMON,
    INTERESTS,
    day_param,
    documented,
    dry_run_param,
    preset_param,
    resolved,
)


@dag(
    schedule=(BEHAVIORS | CANDIDATE),
    params={
        "preset": preset_param(),
        "as_of": day_param("As of", "Behaviors before this day are used. Empty: the end of what triggered the run."),
        "dry_run": dry_run_param(),
    },
    **documented(__doc__),
    **COMMON,
)
def encode_refresh() -> None:
    """Wire the step."""

    @task(
        outlets=[INTERESTS],
        doc_md="`encode.steps.refresh` as of the end of the run's days. Its XCom has the snapshot of each space.",
    )
    def refresh(*, outlet_events=None, **context):
        from encode import plan, steps

        run = resolved(context, as_of=True)
        summary = run.carry_out(steps.refresh, plan.refresh, run.days.end)
        outlet_events[INTERESTS].extra = run.facts
        return summary

    refresh()


encode_refresh()
