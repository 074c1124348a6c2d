"""### Train the reducer and the CTR model

Trains on all behaviors before a day, stores the space (embeddings, metric-learned reducer, relevance) and the model,
and registers a candidate version in MLflow with its metrics, dataset, lineage and plots.

Nothing serves it yet: its interests are refreshed next, then it is judged by its gates.
"""

from __future__ import annotations

from airflow.sdk import dag, task

from encode_wiring import CANDIDATE, COMMON, config, day_param, made, places, preset_param, schedule, window


@dag(
    schedule=schedule("ENCODE_TRAIN_SCHEDULE"),
    params={
        "preset": preset_param(),
        "as_of": day_param("As of", "Behaviors before this day are used. Empty: the end of the scheduled interval."),
    },
    doc_md=__doc__,
    **COMMON,
)
def encode_train() -> None:
    """Wire the step."""

    @task(outlets=[CANDIDATE], doc_md="`encode.steps.train` as of the end of the run's days.")
    def train(*, outlet_events=None, **context):
        from encode import steps

        days = window(context)
        summary = steps.train(config(context), places(), days.end)
        outlet_events[CANDIDATE].extra = made(context, end=str(days.end), version=summary["version"])
        return summary

    train()


encode_train()
