"""### Release what passes its gates

Judges the newest candidate by absolute floors and against the champion on the same test days, moves the MLflow alias
`champion`, and waits until the serving process has loaded exactly that model version, space and snapshot.

Runs after interests were refreshed. A candidate that misses a gate fails the run once, is marked as refused, and the
champion goes on serving. Where nothing is to be released, serving is brought up to the newest snapshot.
"""

from __future__ import annotations

from airflow.sdk import dag, task

from encode_wiring import COMMON, INTERESTS, config, places, preset_param


@dag(
    schedule=[INTERESTS],
    params={"preset": preset_param()},
    doc_md=__doc__,
    **COMMON,
)
def encode_release() -> None:
    """Wire the step."""

    @task(doc_md="`encode.steps.release` for the newest candidate.")
    def release(**context):
        from encode import steps

        return steps.release(config(context), places())

    release()


encode_release()
