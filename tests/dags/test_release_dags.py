"""How the DAGs that decide who serves are wired, and what an answer of a person means to them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DAGS = Path(__file__).parents[2] / "dags"

PARSE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError

bag = DagBag(sys.argv[1])
release, rollback = bag.dags["encode_release"], bag.dags["encode_rollback"]
import encode_release

def takes(name, value):
    try:
        rollback.params.get_param(name).resolve(value)
    except ParamValidationError:
        return False
    return True

def answer(option, reason, user={"id": "7", "name": "Ada"}):
    return {"chosen_options": [option], "params_input": {"reason": reason}, "responded_by_user": user}

approve = release.get_task("approve")
print("FOUND " + json.dumps({
    "errors": bag.import_errors,
    "upstream": {task.task_id: sorted(task.upstream_task_ids) for task in release.tasks},
    "rule": release.get_task("release").trigger_rule.value,
    "options": approve.options,
    "rollback": {task.task_id: sorted(task.upstream_task_ids) for task in rollback.tasks},
    "schedule": rollback.schedule,
    "versions": [takes("version", value) for value in (None, "1", "42", "0", "-1", "two", "1.0", "")],
    "reasons": [takes("reason", value) for value in (None, "slow", "x" * 501)],
    "refusals": [encode_release._refusal(one) for one in (
        None, answer("Approve", "ignored"), answer("Reject", "slow"), answer("Reject", None, None)
    )],
    "asked": [encode_release.why_asked(one) for one in (
        {"approval": True, "outcome": "passed", "version": "2", "subject": "?"},
        {"approval": False, "outcome": "passed", "version": "2", "subject": "?"},
        {"approval": False, "outcome": "nothing to release"},
    )],
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")},
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": str(DAGS),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-c", PARSE, str(DAGS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("FOUND "))


def test_what_was_judged_is_released_after_a_person_was_asked_or_nobody_had_to_be(found):
    assert found["errors"] == {}
    assert found["upstream"] == {
        "judge": [],
        "needs_approval": ["judge"],
        "approve": ["needs_approval"],
        "release": ["approve", "judge"],
    }
    assert found["options"] == ["Approve", "Reject"]
    # A question that is skipped stops nothing; a candidate that misses a gate does.
    assert found["rule"] == "none_failed_min_one_success"


def test_a_question_that_is_skipped_has_a_reason(found):
    assert found["asked"] == [
        "a person is asked about version 2: the preset has release.approval",
        "nobody is asked: the preset has no release.approval",
        "nobody is asked: nothing to release",
    ]


def test_only_a_rejection_refuses_and_says_who_and_why(found):
    approved_or_not_asked, rejected = found["refusals"][:2], found["refusals"][2:]
    assert approved_or_not_asked == [None, None]
    assert rejected == ["rejected by Ada: slow", "rejected by a person: no reason given"]


def test_a_rollback_is_triggered_by_people_with_numbers_of_versions_and_repeats_only_what_was_chosen(found):
    assert found["schedule"] is None
    assert found["rollback"] == {"choose": [], "rollback": ["choose"]}
    assert found["versions"] == [True, True, True, False, False, False, False, False]
    assert found["reasons"] == [True, True, False]
