"""The real thing: the whole local stack is booted and the DAGs are triggered over Airflow's API, as its UI does."""

import contextlib
from pathlib import Path

import httpx
import psutil
import pytest

from encode.errors import ConfigError
from encode.quickstart import quickstart
from encode.stack import down, status
from encode.stack.airflow_api import AirflowClient
from encode.stack.home import credentials

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "tests" / "samples" / "small.yaml")
ANY_PORTS = dict.fromkeys(("objectstore", "mlflow", "airflow", "serving"), 0)


def runs(pid):
    """Tell whether a process runs; an ended one stays in the table until its parent, this process, collects it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack") / "home"
    yield folder
    with contextlib.suppress(FileNotFoundError):
        down(folder, say=lambda _: None)


@pytest.fixture(scope="module")
def first(home):
    said = []
    return quickstart(SMALL, home, ROOT / "dags", ANY_PORTS, said.append), said


def test_all_four_dags_succeed_and_a_real_request_is_scored(first):
    summary, said = first
    assert list(summary["runs"]) == ["encode_validate", "encode_train", "encode_refresh", "encode_release"]
    assert summary["runs"]["encode_validate"]["result"]["accepted"] == 61_460
    score = summary["score"]
    assert all(0 < probability < 1 for probability in score["probabilities"])
    assert score["bundle"]["id"] == summary["runs"]["encode_release"]["result"]["bundle"]
    assert not any(score["fallbacks"].values())
    text = "\n".join(said)
    for expected in (
        "epoch 1 of 3",
        "gate passed: auc",
        "champion   version 1",
        "credentials",
        *summary["urls"].values(),
    ):
        assert expected in text


def test_a_second_time_nothing_is_started_and_nothing_is_run_again(first, home):
    before = {one.name: one.pid for one in status(home)}
    said = []
    again = quickstart(SMALL, home, ROOT / "dags", {}, said.append)
    assert {one.name: one.pid for one in status(home)} == before
    assert again["runs"] == first[0]["runs"]
    assert again["score"] == first[0]["score"]


def test_a_bad_value_in_the_trigger_form_creates_no_run(first, home):
    secrets = credentials(home)
    with AirflowClient(first[0]["urls"]["airflow"], secrets.airflow_username, secrets.airflow_password) as airflow:
        before = len(airflow.runs("encode_validate"))
        with pytest.raises(ConfigError, match="2017-13-01"):
            airflow.trigger("encode_validate", {"start": "2017-13-01"}, "bad")
        assert len(airflow.runs("encode_validate")) == before


def test_going_down_leaves_no_process(first, home):
    """Last in this file."""
    pids = [one.pid for one in status(home)]
    assert all(runs(pid) for pid in pids)
    down(home, say=lambda _: None)
    assert not [pid for pid in pids if runs(pid)]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{first[0]['urls']['serving']}/health")
