"""### Go back to a champion before

Moves the MLflow alias `champion` back and waits until the serving process has loaded that bundle: seconds, for serving
keeps the bundle before in memory. The version that is left is marked as refused, with the reason. Runs when a person
triggers it.

Interests of the version that comes back are those of its last refresh; `encode_refresh` brings them up to date.
"""

from __future__ import annotations

from airflow.sdk import Param, dag, task

from encode_wiring import COMMON, dry_run_param, preset_param, resolved


@dag(
    schedule=None,
    params={
        "preset": preset_param(),
        "version": Param(
            None,
            type=["null", "string"],
            pattern="^[1-9][0-9]*$",
            title="Version",
            description="Number of a model version that was champion once. Empty: the one before the champion.",
        ),
        "reason": Param(
            None,
            type=["null", "string"],
            maxLength=500,
            title="Reason",
            description="Noted on the version that is left.",
        ),
        "dry_run": dry_run_param(),
    },
    doc_md=__doc__,
    **COMMON,
)
def encode_rollback() -> None:
    """Wire the step."""

    # Not tried again: a second try would go back one version more.
    @task(retries=0, doc_md="`encode.steps.rollback`.")
    def rollback(**context):
        from encode import plan, steps

        run, params = resolved(context, days=False), context["params"]
        return run.carry_out(steps.rollback, plan.rollback, to=params["version"], reason=params["reason"])

    rollback()


encode_rollback()
