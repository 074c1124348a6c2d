import json
from pathlib import Path

import pytest

from encode import cli
from encode.quickstart import _print_summary, _told, _worked_seconds
from encode.stack import ComponentStatus, Stack, home
from encode.stack.processes import ProcessRecord

DAGS = ("encode_validate", "encode_train", "encode_refresh", "encode_release")
RESULTS = {
    "encode_validate": {"rows": 1, "days": 1, "accepted": 1, "rejected": 0, "unchanged": 0},
    "encode_train": {"version": "1", "space": "space-one", "metrics": {"auc": 0.8}},
    "encode_refresh": {"users": 1, "snapshots": {"space-one": "snapshot-one"}},
    "encode_release": {"outcome": "released", "version": "1", "bundle": "bundle-one", "served_by": "http://old"},
}
METRICS = dict.fromkeys(("auc", "auc_seen_before", "auc_first_time", "gauc", "logloss", "calibration"), 0.5)


def printed(ran, resumed=()):
    """What is printed where version 2 serves at another address than version 1 did."""
    summary = {
        "runs": {
            dag: {"run": "r", "seconds": 12.34, "resumed": dag in resumed, "result": RESULTS[dag]} for dag in DAGS
        },
        "ran": ran,
        "score": {
            "user_id": 7,
            "item_ids": [10, 20],
            "probabilities": [0.00012, 0.99996],
            "had": [20],
            "names": {20: "milk"},
            "users": 2469,
            "metrics": METRICS,
            "bundle": {"id": "bundle-two", "model_version": "2", "space": "space-two", "snapshot": "snapshot-two"},
        },
    }
    said: list[str] = []
    stack = Stack(Path("home"), {"serving": "http://new"}, {"serving": Path("log")}, Path("credentials.json"))
    _print_summary(summary, stack, 1.0, said.append)
    return "\n".join(said)


def test_where_nothing_was_left_to_do_only_what_is_released_now_is_shown():
    text = printed([])
    assert "nothing was left to do" in text
    assert "bundle     bundle-two  space space-two  snapshot snapshot-two of 2,469 users" in text
    assert "served by  http://new" in text
    for past in ("bundle-one", "snapshot-one", "http://old", "12.3"):
        assert past not in text


def test_only_a_run_that_ended_in_this_call_is_told_of():
    lines = printed(["encode_train"]).splitlines()
    assert "train         12.3  candidate version 1 in space space-one, auc 0.8000" in lines
    assert [line.split()[0] for line in lines if line.endswith("done before")] == ["validate", "refresh", "release"]
    assert "nothing was left" not in "\n".join(lines)


def test_seconds_of_a_resumed_run_are_said_to_be_of_its_last_try():
    lines = printed(["encode_train", "encode_refresh"], ["encode_train", "encode_validate"]).splitlines()
    assert [line.split()[0] for line in lines if "resumed: seconds of the last try" in line] == ["train"]


def test_what_the_measures_of_first_and_later_times_mean_is_said_below_them():
    lines = printed([]).splitlines()
    (place,) = (place for place, line in enumerate(lines) if line.startswith("champion   version 2  auc"))
    assert [line.split()[0] for line in lines[place + 1 : place + 3]] == ["auc_seen_before:", "auc_first_time:"]


def test_scores_are_ranked_and_none_is_told_as_certain():
    lines = printed([]).splitlines()
    first = lines.index("score      user 7") + 1
    assert [line.strip() for line in lines[first : first + 2]] == [
        "> 0.9999  had before      milk (20)",
        "0.0001  others like it  item (10)",
    ]


@pytest.mark.parametrize(
    ("dag", "change", "told"),
    [
        ("encode_validate", {}, "1 row of 1 day: 1 behavior, 0 in quarantine"),
        (
            "encode_validate",
            {"rows": 3000, "days": 2, "accepted": 2999, "rejected": 1},
            "3,000 rows of 2 days: 2,999 behaviors, 1 in quarantine",
        ),
        (
            "encode_validate",
            {"rows": 3000, "days": 2, "accepted": 2999, "rejected": 1, "unchanged": 1},
            "3,000 rows of 2 days: 2,999 behaviors, 1 in quarantine; 1 day validated before",
        ),
        ("encode_refresh", {}, "1 user, snapshot snapshot-one"),
        ("encode_refresh", {"users": 0}, "0 users, snapshot snapshot-one"),
    ],
)
def test_one_of_a_thing_is_not_many(dag, change, told):
    assert _told(dag, RESULTS[dag] | change) == told


def test_neither_a_stopped_airflow_nor_a_person_who_thinks_counts_as_work():
    tasks = [
        {"operator": "_PythonDecoratedOperator", "duration": 3.5},
        {"operator": "HITLOperator", "duration": 3600.0},
        {"operator": "_PythonDecoratedOperator", "duration": 2.0},
        {"operator": "_PythonDecoratedOperator", "duration": None},
    ]
    assert _worked_seconds(tasks) == 5.5


@pytest.fixture
def no_places(monkeypatch, tmp_path):
    """An empty folder as home, and no places in the environment."""
    monkeypatch.setattr(cli, "HOME", tmp_path / "home")
    monkeypatch.delenv("ENCODE_STORE", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize("arguments", [["score", "--user", "1", "--items", "2"], ["explain", "1"], ["serve"]])
@pytest.mark.parametrize("crashed", [False, True])
def test_a_stopped_stack_is_named_with_what_starts_it(no_places, capsys, arguments, crashed):
    home.make_folder(no_places)
    gone = ProcessRecord(2**22 + 1, "of another boot", "marker", "/") if crashed else None
    store = home.Entry({"main": 1}, "http://127.0.0.1:1", "", gone)
    home.write_state(no_places, home.State("id", {"objectstore": store}))
    if crashed:
        home.write_client_environment(no_places, {"ENCODE_STORE": "s3://encode"})
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert f"the object store of the local stack in {no_places} is stopped: `encode stack up` starts what is" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve", "--host", "0.0.0.0"], "keys"),
        (["webhook", "--url", "http://127.0.0.1:1"], "ENCODE_WEBHOOK_SECRET is not set"),
    ],
)
def test_a_folder_needs_no_stack(no_places, monkeypatch, tmp_path, capsys, arguments, told):
    home.make_folder(no_places)
    home.write_state(no_places, home.State("id", {}))
    monkeypatch.delenv("ENCODE_WEBHOOK_SECRET", raising=False)
    (tmp_path / "work" / "store").mkdir(parents=True)
    assert cli.main([*arguments, "--workdir", str(tmp_path / "work")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "stopped" not in error


def test_without_any_stack_it_is_said_what_to_set(no_places, capsys):
    assert cli.main(["score", "--user", "1", "--items", "2"]) == 2
    assert "ENCODE_STORE is not set; expected s3://bucket[/prefix] or a folder" in capsys.readouterr().err


def test_a_store_of_the_environment_needs_no_stack(no_places, monkeypatch, tmp_path, capsys):
    home.make_folder(no_places)
    home.write_state(no_places, home.State("id", {}))
    monkeypatch.setenv("ENCODE_STORE", str(tmp_path / "store"))
    assert cli.main(["erase", "1", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["on_list"] == []


def test_status_says_by_its_exit_whether_all_is_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "HOME", tmp_path)
    assert cli.main(["stack", "status"]) == 1
    told = capsys.readouterr()
    assert [line.split()[1] for line in told.out.splitlines()] == ["stopped"] * 4
    assert "error: not healthy: objectstore, mlflow, airflow, serving; `encode stack up` starts" in told.err
    well = [ComponentStatus(one, "healthy", 1, "http://x", tmp_path) for one in ("objectstore", "mlflow")]
    monkeypatch.setattr("encode.stack.status", lambda _home: well)
    assert cli.main(["stack", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mlflow"]["state"] == "healthy"
