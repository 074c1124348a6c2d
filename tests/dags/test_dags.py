"""The DAGs as files, and in one process without a scheduler."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from encode import steps
from encode.config import Places, load_config, presets
from encode.stack.components import REGION

ROOT = Path(__file__).parents[2]
DAGS = ROOT / "dags"
SMALL = ROOT / "tests" / "samples" / "small.yaml"
NAMES = ["encode_refresh", "encode_release", "encode_rollback", "encode_train", "encode_validate"]

PARSE = """
import json, sys, time
from airflow.dag_processing.dagbag import DagBag
began = time.monotonic()
bag = DagBag(sys.argv[1])
seconds = time.monotonic() - began
heavy = [name for name in ("torch", "mlflow", "great_expectations", "pandas", "numba", "boto3") if name in sys.modules]


def shown(param):
    return {"title": param.schema["title"], "description": param.description, "examples": param.schema.get("examples")}


dags = {
    name: {
        "docs": bool(dag.doc_md) and all(task.doc_md for task in dag.tasks),
        "params": {key: shown(dag.params.get_param(key)) for key in dag.params},
        "retry": [type(task.retry_policy).__name__ for task in dag.tasks],
        "outlets": sorted(asset.name for task in dag.tasks for asset in task.outlets),
    }
    for name, dag in bag.dags.items()
}
print("PARSED " + json.dumps({"errors": bag.import_errors, "seconds": seconds, "heavy": heavy, "dags": dags}))
"""


@pytest.fixture(scope="module")
def airflow_environment(tmp_path_factory):
    """A migrated Airflow home."""
    home = tmp_path_factory.mktemp("airflow")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "AIRFLOW_", "MLFLOW_"))},
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": str(DAGS),  # as Airflow's own processes have it
        "PYTHONWARNINGS": "ignore",
    }
    airflow = [sys.executable, "-m", "airflow", "db", "migrate"]
    subprocess.run(airflow, env=environment, check=True, capture_output=True, timeout=300)
    return environment


def in_airflow(environment, *command, marker):
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(marker)]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix(marker))


@pytest.fixture(scope="module")
def parsed(airflow_environment):
    return in_airflow(airflow_environment, "-c", PARSE, str(DAGS), marker="PARSED ")


def test_parsing_is_quick_and_imports_nothing_heavy(parsed):
    assert parsed["errors"] == {}
    assert sorted(parsed["dags"]) == NAMES
    assert parsed["heavy"] == []
    assert parsed["seconds"] < 10  # of the 30 s that Airflow allows


def test_every_dag_explains_itself_in_the_ui(parsed):
    for dag in parsed["dags"].values():
        assert dag["docs"]
        assert dag["params"]["preset"]["examples"] == presets()
        assert all(param["title"] and param["description"] for param in dag["params"].values())


def test_errors_of_ours_are_not_retried(parsed):
    assert {policy for dag in parsed["dags"].values() for policy in dag["retry"]} == {"ExceptionRetryPolicy"}


def test_assets_join_the_dags(parsed):
    outlets = {name: dag["outlets"] for name, dag in parsed["dags"].items()}
    assert outlets == {
        "encode_validate": ["encode_behaviors"],
        "encode_train": ["encode_candidate"],
        "encode_refresh": ["encode_interests"],
        "encode_release": [],
        "encode_rollback": [],
    }


def test_dags_are_thin():
    lines = {name: len((DAGS / f"{name}.py").read_text().splitlines()) for name in NAMES}
    assert max(lines.values()) < 80, lines


SPARK_MASTER = """
import json, os, sys
import encode_wiring

found = []
for connection in json.loads(sys.argv[1]):
    os.environ.pop("AIRFLOW_CONN_ENCODE_SPARK", None)
    if connection:
        os.environ["AIRFLOW_CONN_ENCODE_SPARK"] = connection
    found.append(encode_wiring._spark_master())
print("FOUND " + json.dumps(found))
"""


def test_the_connection_to_spark_is_optional(airflow_environment):
    masters = {
        None: None,
        "spark://head:7077": "spark://head:7077",
        '{"conn_type": "spark", "host": "k8s://https://head", "port": 6443}': "k8s://https://head:6443",
        '{"conn_type": "spark", "host": "yarn"}': "yarn",
        '{"conn_type": "spark", "host": "head", "extra": {"master": "local[2]"}}': "local[2]",
        '{"conn_type": "spark"}': None,
    }
    found = in_airflow(airflow_environment, "-c", SPARK_MASTER, json.dumps(list(masters)), marker="FOUND ")
    assert found == list(masters.values())


EVENTS = """
import contextlib, io, json, os
from types import SimpleNamespace
import encode_wiring

def resolve(*extras):
    context = {
        "params": {},
        "dag_run": SimpleNamespace(partition_key=None, data_interval_start=None, data_interval_end=None),
        "triggering_asset_events": {"raw": [SimpleNamespace(extra=extra) for extra in extras]},
    }
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            days = str(encode_wiring.window(context))
        except Exception as error:
            days = str(error)
    try:
        preset = encode_wiring._preset(context)
    except Exception as error:
        preset = str(error)
    return [days, preset, said.getvalue()]

def single_writer(text):
    os.environ["AIRFLOW_CONN_ENCODE_STORE"] = f"generic://key:secret@encode?single_writer={text}"
    for name in ("MLFLOW", "SERVING"):
        os.environ[f"AIRFLOW_CONN_ENCODE_{name}"] = "http://127.0.0.1"
    encode_wiring.get_current_context = lambda: {"dag": SimpleNamespace(dag_id="encode_none")}
    return encode_wiring.places().single_writer

day, other = {"start": "2024-01-01", "end": "2024-01-02"}, {"start": "2024-01-05"}
print("FOUND " + json.dumps({
    "both": resolve(day, other),
    "bad": resolve(day, {"start": "2024-13-01"}, {"day": "2024-01-09"}, None),
    "none": resolve({"start": "soon"}),
    "presets": resolve(day | {"preset": "one"}, day | {"preset": "two"}),
    "single_writer": [single_writer(text) for text in ("true", "1", "false", "0", "")],
}))
"""


def test_an_event_that_says_no_days_does_not_sink_the_others(airflow_environment):
    found = in_airflow(airflow_environment, "-c", EVENTS, marker="FOUND ")
    assert found["both"] == ["2024-01-01..2024-01-06", "complete-journey", ""]
    days, _, said = found["bad"]
    assert days == "2024-01-01..2024-01-02"
    assert [line.partition(":")[0] for line in said.splitlines()] == [
        "left out an event that says {'start'",
        "left out an event that says {'day'",
        "left out an event that says nothing",
    ]
    assert found["none"][0].startswith("window: no days given")
    assert found["presets"][1] == "events of several presets triggered this run: one, two; trigger one run for each"
    assert found["single_writer"] == [True, True, False, False, False]


def test_the_dags_run_the_whole_path_with_connections_only(airflow_environment, object_store, mlflow_server):
    prefix = f"dags-{secrets.token_hex(4)}"
    places = Places(
        store=f"s3://{object_store.bucket}/{prefix}",
        endpoint_url=object_store.endpoint_url,
        access_key=object_store.access_key,
        secret_key=object_store.secret_key,
        tracking_uri=mlflow_server,
    )
    steps.land(load_config(str(SMALL)), places, lambda _: None)
    extra = {"endpoint_url": object_store.endpoint_url, "region": REGION, "prefix": prefix}
    connections = {
        "STORE": {
            "conn_type": "generic",
            "host": object_store.bucket,
            "login": object_store.access_key,
            "password": object_store.secret_key,
            "extra": extra,
        },
        "MLFLOW": {"conn_type": "http", "host": mlflow_server},
        "SERVING": {"conn_type": "http", "host": ""},
    }
    environment = airflow_environment | {
        f"AIRFLOW_CONN_ENCODE_{name}": json.dumps(value) for name, value in connections.items()
    }
    script = Path(__file__).parent / "run_dags.py"
    results = in_airflow(environment, str(script), str(DAGS), str(SMALL), marker="RESULTS ")
    runs = [(run["dag"], run["state"]) for run in results["runs"]]
    assert runs == [
        ("encode_validate", "success"),
        ("encode_validate", "failed"),
        ("encode_validate", "success"),
        *[("encode_train", "success")] * 3,
        *[("encode_refresh", "success")] * 3,
        *[("encode_release", "success")] * 3,
        ("encode_rollback", "failed"),
        ("encode_validate", "success"),
        ("encode_train", "failed"),
    ], results
    validated, _, waits, *planned, _, replayed, _ = (run["value"] for run in results["runs"])
    # Dry runs are skipped, and a replay of what the histories hold: a task that is emits no event of its asset.
    states = [run["task"] for run in results["runs"]]
    assert states[2:12] == ["success", *["skipped", "success", "skipped"] * 3]
    assert (waits["waiting"], replayed["waiting"], states[13]) == (["behaviors/dt=2017-09-03"], [], "skipped")
    train_plan, trained, trained_plan, refresh_plan, refreshed, refreshed_plan, judging, released, again = planned
    assert validated["rows"] == 61_461
    assert (replayed["unchanged"], replayed["replayed"]) == (1, 0)
    assert train_plan["writes"] == [trained["model"], "spaces"]
    assert (train_plan["rows"], trained_plan["done"], trained_plan["writes"]) == (61_460, True, [])
    assert refresh_plan["writes"] == ["histories", f"interests/{trained['space']}"]
    assert list(refreshed["snapshots"]) == [trained["space"]]
    assert (refreshed_plan["spaces"], refreshed_plan["writes"]) == (refreshed["snapshots"], [])
    assert (judging["outcome"], judging["version"], judging["champion"]) == ("to be judged", trained["version"], None)
    assert judging["snapshot"] == refreshed["snapshots"][trained["space"]]
    assert released["outcome"] == "released"
    assert (again["outcome"], again["version"]) == ("serving brought up to date", trained["version"])
    assert released["preset"] == str(SMALL)
    assert released["version"] == trained["version"]
    assert object_store.secret_key not in json.dumps(results)
