"""### Go back to a champion before

Moves the MLflow alias `champion` back and waits until the serving process has loaded that bundle: seconds, for serving
keeps the bundle before in memory. The version that is left is marked as refused, with the reason. Runs when a person
triggers it.

Interests of the version that comes back are those of its last refresh; `encode_refresh` brings them up to date.
"""

from __future__ import annotations

from airflow.sdk import Param, dag, task

from encode_wiring import COMMON, documented, dry_run_param, places, preset_param, resolved


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
    **documented(__doc__),
    **COMMON,
)
def encode_rollback() -> None:
    """Wire the step."""

    @task(doc_md="`encode.plan.rollback`: which version is left, for which. A dry run ends here.")
    def choose(**context):
        from encode import plan

        run, params = resolved(context, days=False), context["params"]
        return run.carry_out(plan.rollback, plan.rollback, to=params["version"], reason=params["reason"])

    @task(doc_md="`encode.steps.rollback` of exactly what was chosen, so that it may be cleared and tried again.")
    def rollback(chosen, **context):
        from encode import steps

        run, reason = resolved(context, days=False), context["params"]["reason"]
        done = steps.rollback(run.config, places(), to=chosen["version"], reason=reason, leaving=chosen["from"])
        return done | run.facts

    rollback(choose())


encode_rollback()
