"""Runs in a process of its own: `dag.test()` on each DAG, with connections and a home from the environment.

Prints one JSON object: for each run its state, and what the task returned that is called as the DAG.
"""

import json
import sys
from datetime import UTC, datetime

from airflow.dag_processing.dagbag import DagBag


def main(folder, preset):
    bag = DagBag(folder)
    results = {"import_errors": bag.import_errors, "runs": []}

    def run(dag_id, **options):
        conf = {"preset": preset, **options.pop("conf", {})}
        # Read anew: a test run leaves its conf in the params of its DAG object.
        done = DagBag(folder).dags[dag_id].test(run_conf=conf, **options)
        dry = {"encode_release": "judge", "encode_rollback": "choose"} if conf.get("dry_run") else {}
        named = dry.get(dag_id, dag_id.removeprefix("encode_"))
        task = next(task for task in done.get_task_instances() if task.task_id == named)
        key = "plan" if conf.get("dry_run") else "return_value"
        value = task.xcom_pull(task_ids=task.task_id, key=key) if task.state in ("success", "skipped") else None
        states = {"state": done.state, "task": task.state}
        results["runs"].append({"dag": dag_id, **states, "value": value, "tries": task.try_number})

    # A manual run with days, a run with neither days nor a date, and runs that name the end only.
    run("encode_validate", conf={"start": "2017-09-03", "end": "2018-01-01"})
    run("encode_validate")
    run("encode_validate", conf={"start": "2017-09-03", "replay": True})  # no histories yet: it waits for a refresh
    # Dry runs before and after the real ones.
    for dag_id in ("encode_train", "encode_refresh"):
        for dry_run in (True, False, True):
            run(dag_id, conf={"as_of": "2018-01-01", "dry_run": dry_run})
    for dry_run in (True, False, True):
        run("encode_release", conf={"dry_run": dry_run})
    run("encode_rollback", conf={"dry_run": True})
    run("encode_validate", conf={"start": "2017-09-03", "replay": True})
    # A run with a date has an interval of zero length here, which is not a window.
    run("encode_train", logical_date=datetime(2018, 1, 1, tzinfo=UTC))
    print("RESULTS " + json.dumps(results, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
