"""### Release what passes its gates

Judges the newest candidate by absolute limits and against the champion on the same test days, and keeps the report
with its MLflow run. Where the preset says `release.approval`, a person is asked then, with the difference in front of
them (*Required Actions* of the run). Then the MLflow alias `champion` moves to exactly what was judged, and the run
waits until the serving process has loaded that model version, space and snapshot.

Runs after interests were refreshed. A candidate that misses a gate fails the run once, is marked as refused, and the
champion goes on serving; so it does when a person rejects the candidate, which fails no run. If candidate, champion or
snapshot have changed while nobody answered, nothing is released, and the next run judges anew. Where nothing is to be
released, serving is brought up to the newest snapshot.
"""

from __future__ import annotations

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Param, dag, task

from encode_wiring import COMMON, INTERESTS, documented, dry_run_param, places, preset_param, resolved, why_asked

APPROVE, REJECT, NOTED = "Approve", "Reject", "Noted on the version if it is rejected."


@dag(
    schedule=[INTERESTS],
    params={"preset": preset_param(), "dry_run": dry_run_param()},
    **documented(__doc__),
    **COMMON,
)
def encode_release() -> None:
    """Wire the steps."""

    @task(doc_md="`encode.steps.judge` for the newest candidate.")
    def judge(**context):
        from encode import plan, steps

        return resolved(context, days=False).carry_out(steps.judge, plan.release)

    @task.short_circuit(ignore_downstream_trigger_rules=False, doc_md="Skips the question where nobody is to be asked.")
    def needs_approval(judged):
        print(why_asked(judged))
        return judged["approval"]

    # ApprovalOperator would skip the task that notes a rejection.
    approve = HITLOperator(
        task_id="approve",
        subject="{{ ti.xcom_pull(task_ids='judge')['subject'] }}",
        body="{{ ti.xcom_pull(task_ids='judge')['body'] }}",
        options=[APPROVE, REJECT],
        params={"reason": Param(None, type=["null", "string"], maxLength=500, title="Reason", description=NOTED)},
        doc_md="A person looks at the report, then approves or rejects.",
    )

    @task(
        trigger_rule="none_failed_min_one_success",
        doc_md="`encode.steps.release` for exactly what was judged, or for the rejection.",
    )
    def release(judged, answer, **context):
        from encode import steps

        run = resolved(context, days=False)
        approved = judged["version"] if answer and answer["chosen_options"] == [APPROVE] else None
        done = steps.release(run.config, places(), judged=judged, refused=_refusal(answer), approve=approved)
        return done | run.facts

    judged = judge()
    needs_approval(judged) >> approve
    release(judged, approve.output)


def _refusal(answer) -> str | None:
    """Return who rejected and why; None where nobody was asked, or it was approved."""
    if not answer or answer["chosen_options"] == [APPROVE]:
        return None
    who = (answer["responded_by_user"] or {}).get("name", "a person")
    return f"rejected by {who}: {answer['params_input'].get('reason') or 'no reason given'}"


encode_release()
