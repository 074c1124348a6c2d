"""### Train the reducer and the CTR model

Trains on all behaviors before a day, stores the space (embeddings, metric-learned reducer, relevance) and the model,
and registers a candidate version in MLflow with its metrics, dataset, lineage and plots. Nothing serves it yet: its
interests are refreshed next, then it is judged by its gates.

**Which day.** *As of* of the form; else the end of the data interval of a schedule (`ENCODE_TRAIN_SCHEDULE`) or a
backfill. A run that is told no day fails, and does nothing.

**When it fails.** *No validated day*: run `encode_validate` first. *Not enough*: validate more days, or lower
`training.train_days` and its like. Killed, perhaps for want of memory: the next try begins anew; nothing half-written
is ever read. After any repair clear the task: a model that is finished is not trained twice.

A *dry run* says how many behaviors there are, and whether that model is there already.
"""

from __future__ import annotations

from airflow.sdk import dag, task

from encode_wiring import CANDIDATE, COMMON, day_param, documented, dry_run_param, preset_param, resolved, schedule


@dag(
    schedule=schedule("ENCODE_TRAIN_SCHEDULE"),
    params={
        "preset": preset_param(),
        "as_of": day_param("As of", "Behaviors before this day are used. Empty: the end of the scheduled interval."),
        "dry_run": dry_run_param(),
    },
    **documented(__doc__),
    **COMMON,
)
def encode_train() -> None:
    """Wire the step."""

    @task(
        outlets=[CANDIDATE],
        doc_md="`encode.steps.train` as of the end of the run's days. Its XCom has version, space and metrics.",
    )
    def train(*, outlet_events=None, **context):
        from encode import plan, steps

        run = resolved(context, as_of=True)
        summary = run.carry_out(steps.train, plan.train, run.days.end)
        outlet_events[CANDIDATE].extra = run.facts | {"version": summary["version"]}
        return summary

    train()


encode_train()
