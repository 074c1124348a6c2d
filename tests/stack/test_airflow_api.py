import json

import httpx
import pytest

from encode.errors import ConfigError, EncodeError
from encode.stack import airflow_api
from encode.stack.airflow_api import AirflowClient

URL = "http://127.0.0.1:8080"


class Airflow:
    """Answers as Airflow does; the real one is met where the DAGs are tested."""

    def __init__(self):
        self.tokens = 0
        self.requests = []
        self.answers = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        # The path as it was sent: a run id holds characters that must be encoded.
        path = request.url.raw_path.decode().partition("?")[0]
        self.requests.append((request.method, path))
        if path == "/auth/token":
            if json.loads(request.content)["password"] != "right":
                return httpx.Response(401, json={"detail": "Invalid credentials"})
            self.tokens += 1
            return httpx.Response(201, json={"access_token": f"token{self.tokens}"})
        if request.headers["authorization"] != f"Bearer token{self.tokens}":
            return httpx.Response(401, json={"detail": "Invalid JWT token"})
        answers = self.answers[request.method, path.removeprefix("/api/v2")]
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        return httpx.Response(status, json=body)


@pytest.fixture
def airflow(monkeypatch):
    monkeypatch.setattr(airflow_api, "POLL_INTERVAL", 0)
    return Airflow()


@pytest.fixture
def client(airflow):
    with AirflowClient(URL, "admin", "right", transport=httpx.MockTransport(airflow)) as client:
        yield client


def task(state, **fields):
    return {
        "task_id": "train",
        "map_index": -1,
        "try_number": 1,
        "state": state,
        "start_date": "2026-01-01T00:00:00Z",
        "end_date": None,
        "duration": None,
        **fields,
    }


def test_an_expired_token_is_renewed(airflow, client):
    airflow.answers["GET", "/dags/d/dagRuns/r"] = [(200, {"state": "queued"})]
    assert client.run("d", "r") == {"state": "queued"}
    assert client.run("d", "r") == {"state": "queued"}
    assert airflow.tokens == 1
    airflow.tokens = 7
    assert client.run("d", "r") == {"state": "queued"}
    assert airflow.tokens == 8


def test_a_wrong_password_is_an_error_of_the_configuration(airflow):
    wrong = AirflowClient(URL, "admin", "wrong", transport=httpx.MockTransport(airflow))
    with wrong, pytest.raises(ConfigError, match=r"refuses user 'admin'.*credentials\.json"):
        wrong.run("d", "r")


def test_a_run_id_that_is_taken_gives_the_run_that_has_it(airflow, client):
    airflow.answers["POST", "/dags/d/dagRuns"] = [(409, {"detail": "already exists"})]
    airflow.answers["GET", "/dags/d/dagRuns/day%3A1%2B0"] = [(200, {"state": "success"})]
    assert client.trigger("d", run_id="day:1+0") == {"state": "success"}


def test_parameters_that_airflow_refuses_are_an_error_of_the_configuration(airflow, client):
    airflow.answers["POST", "/dags/d/dagRuns"] = [(400, {"detail": "'day' is not a date"})]
    with pytest.raises(ConfigError, match="'day' is not a date"):
        client.trigger("d", {"day": "x"})


def test_other_answers_pass_through_with_the_explanation(airflow, client):
    airflow.answers["GET", "/dags/d/dagRuns/r"] = [(500, {"detail": "database is locked"})]
    with pytest.raises(httpx.HTTPStatusError, match="HTTP 500, database is locked"):
        client.run("d", "r")


def test_what_changes_nothing_the_second_time_is_asked_again_where_the_database_was_busy(airflow, client):
    busy = 500, {"detail": "database is locked"}
    airflow.answers["PATCH", "/dags/d"] = [busy, busy, (200, {})]
    client.unpause("d")
    assert [method for method, path in airflow.requests if path.endswith("/dags/d")] == ["PATCH"] * 3
    airflow.answers["POST", "/dags/d/dagRuns"] = [busy, (200, {})]
    with pytest.raises(httpx.HTTPStatusError, match="HTTP 500"):
        client.trigger("d")


def test_wait_says_each_change_and_each_printed_line_once_and_returns_the_run(airflow, client):
    airflow.answers["GET", "/dags/d/dagRuns/r"] = [(200, {"state": "running"})] * 5 + [(200, {"state": "success"})]
    airflow.answers["GET", "/dags/d/dagRuns/r/taskInstances"] = [
        (200, {"task_instances": [found], "total_entries": 1})
        for found in (
            task(None, start_date=None),
            # Its process died with Airflow; it was not at work since.
            task("up_for_retry", end_date="2026-01-01T01:00:00Z", duration=3600.0),
            task("running", duration=0.1),
            task("running", duration=0.2),
            task("success", end_date="2026-01-01T00:00:02Z", duration=2.04),
        )
    ]
    first = {"event": "epoch 1", "logger": "task.stdout"}
    noise = {"event": "Pushing xcom", "logger": "task"}
    second = {"event": "epoch 2", "logger": "task.stdout"}
    airflow.answers["GET", "/dags/d/dagRuns/r/taskInstances/train/logs/1"] = [
        (404, {"detail": "no log yet"}),
        (200, {"content": [first, noise]}),
        (200, {"content": [first, noise, second]}),
    ]
    said = []
    assert client.wait("d", "r", say=said.append)["state"] == "success"
    assert said == [
        "d.train: up_for_retry",
        "d.train: running",
        "  epoch 1",
        "  epoch 2",
        "d.train: success after 2.0 s",
    ]


def test_a_run_that_was_over_before_is_not_told_again(airflow, client):
    airflow.answers["GET", "/dags/d/dagRuns/r"] = [(200, {"state": "success"})]
    done = task("success", end_date="2026-01-01T00:00:02Z", duration=2.04)
    airflow.answers["GET", "/dags/d/dagRuns/r/taskInstances"] = [(200, {"task_instances": [done], "total_entries": 1})]
    said = []
    client.wait("d", "r", say=said.append)
    assert said == ["d.train: success after 2.0 s"]


def test_the_run_that_an_asset_event_triggered_is_found(airflow, client):
    runs = [{"dag_run_id": "old", "start_date": "2026-01-01"}, {"dag_run_id": "new", "start_date": "2026-01-02"}]
    queued = [{**runs[1], "start_date": None}, runs[0]]
    airflow.answers["GET", "/dags/d/dagRuns"] = [(200, {"dag_runs": queued}), (200, {"dag_runs": runs[::-1]})]
    for run, source in (("old", "validate"), ("new", "train")):
        events = [{"source_dag_id": source, "source_run_id": "day 1"}]
        airflow.answers["GET", f"/dags/d/dagRuns/{run}/upstreamAssetEvents"] = [(200, {"asset_events": events})]
    assert client.wait_for_consumer("d", "train", "day 1", timeout=60)["dag_run_id"] == "new"
    assert client.wait_for_consumer("d", "validate", "day 1", timeout=60)["dag_run_id"] == "old"
    with pytest.raises(EncodeError, match="no run was triggered by train day 2"):
        client.wait_for_consumer("d", "train", "day 2", timeout=0.1)


def test_a_failed_run_is_an_error_with_the_log_and_the_address(airflow, client):
    airflow.answers["GET", "/dags/d/dagRuns/r"] = [(200, {"state": "failed"})]
    tasks = [
        task("failed", map_index=2, try_number=3, end_date="2026-01-01T00:00:02Z", duration=2.0),
        task("upstream_failed", task_id="publish", start_date=None),
    ]
    airflow.answers["GET", "/dags/d/dagRuns/r/taskInstances"] = [(200, {"task_instances": tasks, "total_entries": 2})]
    frame = {"filename": "encode/steps.py", "lineno": 7, "name": "train"}
    content = [
        "::group::noise",
        {"event": "12 users"},
        {"event": "Task failed", "error_detail": [{"exc_type": "DataError", "exc_value": "empty", "frames": [frame]}]},
    ]
    airflow.answers["GET", "/dags/d/dagRuns/r/taskInstances/train/logs/3"] = [(200, {"content": content})]
    with pytest.raises(EncodeError) as caught:
        client.wait("d", "r", say=lambda _: None)
    assert str(caught.value).splitlines() == [
        f"d run r failed, {URL}/dags/d/runs/r",
        f"task train[2] failed, {URL}/dags/d/runs/r/tasks/train/mapped/2; the end of its log:",
        "    12 users",
        "    Task failed",
        "    DataError: empty",
        "      at encode/steps.py:7 in train",
    ]


def test_a_run_that_takes_too_long_is_an_error_with_the_states(airflow, client):
    airflow.answers["GET", "/dags/d/dagRuns/r"] = [(200, {"state": "running"})]
    airflow.answers["GET", "/dags/d/dagRuns/r/taskInstances"] = [
        (200, {"task_instances": [task("queued")], "total_entries": 1})
    ]
    with pytest.raises(EncodeError, match=r"running after 0 s, expected it to be over \(train queued\)"):
        client.wait("d", "r", say=lambda _: None, timeout=0)


def test_all_pages_of_tasks_are_read(airflow, client):
    airflow.answers["GET", "/dags/d/dagRuns/r/taskInstances"] = [
        (200, {"task_instances": [task("success", map_index=page)], "total_entries": 2}) for page in range(2)
    ]
    assert [found["map_index"] for found in client.task_instances("d", "r")] == [0, 1]


def test_a_dag_is_waited_for(airflow, client):
    airflow.answers["GET", "/dags/encode_train"] = [(404, {}), (200, {"is_paused": True})]
    airflow.answers["GET", "/importErrors"] = [(200, {"import_errors": []})]
    assert client.wait_for_dag("encode_train") == {"is_paused": True}


def test_a_dag_whose_file_is_broken_is_an_error_with_the_traceback(airflow, client, monkeypatch):
    monkeypatch.setattr(airflow_api, "IMPORT_ERROR_PATIENCE", 0)
    airflow.answers["GET", "/dags/encode_train"] = [(404, {})]
    broken = {"filename": "encode_train.py", "stack_trace": "NameError: name 'dag' is not defined"}
    airflow.answers["GET", "/importErrors"] = [(200, {"import_errors": [broken]})]
    with pytest.raises(EncodeError, match=r"DAG encode_train is not there.*\nNameError: name 'dag'"):
        client.wait_for_dag("encode_train")


def test_a_dag_that_does_not_exist_is_an_error_after_the_time(airflow, client):
    airflow.answers["GET", "/dags/encode_none"] = [(404, {})]
    airflow.answers["GET", "/importErrors"] = [(200, {"import_errors": []})]
    with pytest.raises(EncodeError, match="none; is its file in the folder"):
        client.wait_for_dag("encode_none", timeout=0)
