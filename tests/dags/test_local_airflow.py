"""The real thing: the whole local stack is booted and the DAGs run in its scheduler, as from the UI and on day two.

One Airflow for all tests. What takes long is begun together, in the fixture `day_two`, and each test looks at a part.
"""

import contextlib
import os
import signal
import time
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from encode.config import Places
from encode.data.parquet import parquet_bytes
from encode.errors import ConfigError
from encode.outputs import MANIFEST, read_files, read_manifest
from encode.quickstart import quickstart
from encode.schema import SECONDS_PER_DAY, day_of, day_start
from encode.stack import down, load_client_environment, status
from encode.stack.airflow_api import AirflowClient
from encode.stack.home import credentials, read_state
from encode.stack.processes import belonging_to
from encode.storage import open_storage

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "tests" / "samples" / "small.yaml")
SAMPLE = ROOT / "tests" / "samples" / "complete-journey.parquet"
SAMPLE_FIRST = date(2017, 9, 3)
ANY_PORTS = dict.fromkeys(("objectstore", "mlflow", "airflow", "serving"), 0)
OVER = ("success", "failed")

# As in the environment of whoever starts the stack. An interval of ten days keeps the number of runs small.
ENVIRONMENT = {"ENCODE_PRESET": SMALL, "ENCODE_VALIDATE_SCHEDULE": "0 0 1,11,21 * *"}
FIRST, END = date(2016, 9, 1), date(2016, 10, 1)
POSTED = date(2016, 10, 1)
"""A day that is announced by an event."""


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
def dags():
    """The DAGs, in an environment with a schedule."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield ROOT / "dags"


@pytest.fixture(scope="module")
def first(home, dags):
    said = []
    return quickstart(SMALL, home, dags, ANY_PORTS, said.append), said


@pytest.fixture(scope="module")
def airflow(first, home):
    secrets = credentials(home)
    with AirflowClient(first[0]["urls"]["airflow"], secrets.airflow_username, secrets.airflow_password) as client:
        yield client


@pytest.fixture(scope="module")
def storage(first, home):
    return open_storage(Places.from_environment(load_client_environment(home)))


# --- the first day -----------------------------------------------------------------------------------------


def test_all_four_dags_succeed_and_a_real_request_is_scored(first):
    summary, said = first
    assert list(summary["runs"]) == ["encode_validate", "encode_train", "encode_refresh", "encode_release"]
    assert summary["runs"]["encode_validate"]["result"]["accepted"] == 61_460
    score = summary["score"]
    assert all(0 < probability < 1 for probability in score["probabilities"])
    log = pq.read_table(SAMPLE)
    had = set(log.filter(pc.equal(log["user_id"], score["user_id"]))["item_id"].to_pylist())
    assert [item in had for item in score["item_ids"]] == [True] * 5 + [False] * 5
    assert score["bundle"]["id"] == summary["runs"]["encode_release"]["result"]["bundle"]
    assert not any(score["fallbacks"].values())
    text = "\n".join(said)
    for expected in (
        "epoch 1 of 3",
        ", as of 2018-01-01: all days before it",
        "gate passed: auc",
        "  nobody is asked: the preset has no release.approval",
        "champion   version 1",
        "credentials",
        *summary["urls"].values(),
    ):
        assert expected in text


def test_a_run_says_and_keeps_its_days_preset_and_settings(first, airflow):
    summary, said = first
    results = [summary["runs"][f"encode_{name}"]["result"] for name in ("validate", "train", "refresh")]
    assert [(one["start"], one["end"]) for one in results] == [
        ("2017-09-03", "2018-01-01"),
        ("2017-12-31", "2018-01-01"),
        ("2017-09-03", "2018-01-01"),  # of both that triggered it
    ]
    assert {one["preset"] for one in results} == {SMALL}
    assert len({one["settings"] for one in results}) == 1
    assert f"  preset {SMALL}, settings {results[0]['settings'][:12]}, days 2017-09-03 to 2017-12-31 (120 days)" in said
    (event,) = events_of(airflow, "encode_train", summary["runs"]["encode_train"]["run"])
    facts = {name: results[1][name] for name in ("preset", "settings", "start", "end", "version")}
    assert event["extra"] == facts


def test_a_second_time_nothing_is_started_and_nothing_is_run_again(first, home, dags):
    before = {one.name: one.pid for one in status(home)}
    said = []
    again = quickstart(SMALL, home, dags, {}, said.append)
    assert {one.name: one.pid for one in status(home)} == before
    assert again["runs"] == first[0]["runs"]
    assert again["score"] == first[0]["score"]
    assert (first[0]["ran"], again["ran"]) == (list(again["runs"]), [])
    assert any(line.startswith("nothing was left to do") for line in said)


def test_nothing_of_the_stack_listens_but_on_the_loopback(first, home):
    """Also what a component starts itself, and what has run a task."""
    for name, entry in read_state(home).entries.items():
        listening = set()
        for process in belonging_to(entry.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                connections = process.net_connections("inet")
                listening |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}, name


@pytest.mark.parametrize(
    "conf",
    [{"start": "2017-13-01"}, {"preset": "complete-jorney"}, {"preset": ""}, {"dry_run": "yes"}, {"end": 20170901}],
)
def test_a_bad_value_in_the_trigger_form_creates_no_run(airflow, conf):
    before = len(airflow.runs("encode_validate"))
    with pytest.raises(ConfigError, match=str(next(iter(conf.values())) or "preset")):
        airflow.trigger("encode_validate", conf, "bad")
    with pytest.raises(ConfigError, match="refuses the backfill"):
        airflow.backfill("encode_validate", FIRST, FIRST, conf)
    assert len(airflow.runs("encode_validate")) == before


# --- day two -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw_rows(storage):
    """Rows of each landed day: a month of the sample a year earlier, each day with a row that is no behavior."""
    days = [FIRST + timedelta(offset) for offset in range((END - FIRST).days)]
    return {day: put_day(storage, day, SAMPLE_FIRST + timedelta(offset)) for offset, day in enumerate([*days, POSTED])}


@pytest.fixture(scope="module")
def day_two(airflow, storage, raw_rows):
    """All at once: a backfill in which a worker is killed, a run beside it of the same days, a run of each other kind.

    What new behaviors trigger is paused until the end.
    """
    for dag in ("encode_refresh", "encode_release"):
        airflow.pause(dag)
    scheduled = wait_for(lambda: of_type(airflow, "encode_validate", "scheduled"))[0]
    unlanded = finished(airflow, scheduled)
    before = sorted(storage.list(""))
    dry = finished(airflow, airflow.trigger("encode_validate", {"start": str(FIRST), "end": str(END), "dry_run": True}))
    after_dry = sorted(storage.list(""))
    backfill = airflow.backfill("encode_validate", FIRST, END - timedelta(days=1))
    beside = airflow.trigger("encode_validate", logical_date=datetime(2016, 9, 11, 12, tzinfo=UTC))
    lost = airflow.trigger("encode_validate")
    typo = airflow.trigger("encode_validate", {"strat": "2016-09-01", "start": "2016-09-02"})
    filled = of_type(airflow, "encode_validate", "backfill")
    victim = kill_in_the_middle(airflow, storage, filled[1])
    day = date.fromisoformat(scheduled["data_interval_start"][:10])
    raw_rows[day] = put_day(storage, day, SAMPLE_FIRST)
    airflow.clear("encode_validate", scheduled["dag_run_id"])
    asset = airflow.request("GET", "/assets", params={"name_pattern": "encode_raw"}).json()["assets"][0]["id"]
    airflow.request("POST", "/assets/events", json={"asset_id": asset, "extra": {"start": str(POSTED)}})
    return SimpleNamespace(
        before=before,
        after_dry=after_dry,
        dry=dry,
        backfill=backfill["id"],
        filled=[finished(airflow, run) for run in filled],
        beside=finished(airflow, beside),
        lost=finished(airflow, lost),
        typo=finished(airflow, typo),
        killed=victim,
        unlanded=unlanded,
        landed=finished(airflow, scheduled),
        posted=finished(airflow, wait_for(lambda: of_type(airflow, "encode_validate", "asset_triggered"))[0]),
        scheduled_day=day,
    )


def put_day(storage, day, like):
    """Land a day of the sample as another day, as the owner of a log does, and return its number of rows."""
    table = pq.read_table(SAMPLE)
    shifted = pc.add(table["timestamp"], day_start(day) - day_start(like))
    rows = table.set_column(table.schema.get_field_index("timestamp"), "timestamp", shifted)
    rows = rows.filter(pc.equal(pc.divide(shifted, SECONDS_PER_DAY), day_start(day) // SECONDS_PER_DAY))
    users = pa.concat_arrays([pa.array([-1]), rows["user_id"].combine_chunks()[1:]])
    rows = rows.set_column(0, "user_id", users)
    assert {day_of(time) for time in rows["timestamp"].to_pylist()} == {day}
    storage.put(f"raw/dt={day}/part-0.parquet", parquet_bytes(rows))
    return rows.num_rows


def wait_for(get, seconds=300.0):
    """Return what `get` finds as soon as that is something."""
    until = time.monotonic() + seconds
    while not (found := get()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def finished(airflow, run):
    """Return a run when it is over."""
    where = run["dag_id"], run["dag_run_id"]
    return wait_for(lambda: found if (found := airflow.run(*where))["state"] in OVER else None)


def of_type(airflow, dag_id, run_type):
    return [run for run in airflow.runs(dag_id) if run["run_type"] == run_type]


def task_of(airflow, run):
    return airflow.task_instances(run["dag_id"], run["dag_run_id"])[0]


def log_of(airflow, run):
    return airflow.task_log(run["dag_id"], run["dag_run_id"], task_of(airflow, run))


def result_of(airflow, run, key="return_value"):
    path = f"/dags/{run['dag_id']}/dagRuns/{run['dag_run_id']}/taskInstances/validate/xcomEntries/{key}"
    answer = airflow.request("GET", path, params={"deserialize": "false", "stringify": "false"}, accept=(404,))
    return answer.json().get("value")


def events_of(airflow, dag_id, run_id):
    source = {"source_dag_id": dag_id, "source_run_id": run_id}
    events = airflow.request("GET", "/assets/events", params=source).json()["asset_events"]
    assert all(event.items() >= source.items() for event in events)
    return events


def kill_in_the_middle(airflow, storage, run):
    """Kill the process of a task that has published a day but not all of them, and return its state afterwards."""
    start, end = (date.fromisoformat(run[f"data_interval_{edge}"][:10]) for edge in ("start", "end"))
    pid = wait_for(lambda: task_of(airflow, run)["pid"])
    wait_for(lambda: "encode_validate.py" in log_of(airflow, run))  # which can be read while the task runs
    wait_for(lambda: read_manifest(storage, f"behaviors/dt={start}"))
    os.kill(pid, signal.SIGKILL)
    assert read_manifest(storage, f"behaviors/dt={end - timedelta(days=1)}") is None
    return wait_for(lambda: found if (found := task_of(airflow, run))["state"] != "running" else None)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(day_two, airflow):
    assert day_two.dry["state"] == "success"
    assert task_of(airflow, day_two.dry)["state"] == "skipped"
    plan = result_of(airflow, day_two.dry, "plan")
    assert (plan["start"], plan["end"], len(plan["to_validate"])) == (str(FIRST), str(END), 30)
    assert "dry run: would validate 2016-09-01 to 2016-09-30" in log_of(airflow, day_two.dry)
    assert day_two.after_dry == day_two.before
    assert events_of(airflow, "encode_validate", day_two.dry["dag_run_id"]) == []


def test_a_backfill_covers_its_intervals_though_a_worker_is_killed(day_two, airflow):
    assert day_two.killed["state"] == "up_for_retry"
    assert [run["state"] for run in day_two.filled] == ["success"] * 3
    assert [task_of(airflow, run)["try_number"] for run in day_two.filled] == [1, 2, 1]
    results = [result_of(airflow, run) for run in day_two.filled]
    assert [one["window"] for one in results] == [
        "2016-09-01..2016-09-11",
        "2016-09-11..2016-09-21",
        "2016-09-21..2016-10-01",
    ]
    done = airflow.request("GET", f"/backfills/{day_two.backfill}").json()
    assert done["max_active_runs"] == 1
    spans = sorted((run["start_date"], run["end_date"]) for run in day_two.filled)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(spans))


def test_two_runs_of_the_same_days_leave_each_day_once(day_two, airflow):
    pair = day_two.beside, day_two.filled[0]
    one, other = (task_of(airflow, run) for run in pair)
    assert one["start_date"] < other["end_date"]
    assert other["start_date"] < one["end_date"]
    results = [result_of(airflow, run) for run in pair]
    assert [one["days"] for one in results] == [10, 10]
    assert {name: results[0][name] for name in ("window", "rows", "rejected")} == {
        name: results[1][name] for name in ("window", "rows", "rejected")
    }


def test_nothing_is_lost_and_nothing_is_half_written(day_two, raw_rows, storage):
    for day, rows in raw_rows.items():
        kept, rejected = (read_manifest(storage, f"{kind}/dt={day}") for kind in ("behaviors", "quarantine"))
        assert kept.counts["rows"] + rejected.counts["rows"] == rows, day
        assert rejected.details["reasons"]["user_id_not_positive"] == 1
        for kind, manifest in (("behaviors", kept), ("quarantine", rejected)):
            read_files(storage, f"{kind}/dt={day}", manifest)
            there = {key.rpartition("/")[2] for key in storage.list(f"{kind}/dt={day}/")}
            assert there == {MANIFEST, *(part.name for part in manifest.parts)}


def test_a_scheduled_run_whose_days_have_not_come_succeeds_once_they_are_landed_and_it_is_cleared(day_two, airflow):
    assert day_two.unlanded["state"] == "failed"
    assert day_two.landed["state"] == "success"
    assert day_two.landed["run_type"] == "scheduled"
    result = result_of(airflow, day_two.landed)
    assert (result["start"], result["end"]) == tuple(
        day_two.landed[f"data_interval_{edge}"][:10] for edge in ("start", "end")
    )
    assert result["data_docs"].keys() == {str(day_two.scheduled_day)}


@pytest.mark.parametrize(
    ("name", "message"), [("lost", "no days given"), ("typo", "unknown parameters strat; expected some of preset")]
)
def test_a_run_that_is_not_told_what_to_do_fails_once_and_says_why(day_two, airflow, name, message):
    run = getattr(day_two, name)
    assert run["state"] == "failed"
    assert task_of(airflow, run)["try_number"] == 1
    assert message in log_of(airflow, run)


def test_an_event_of_the_raw_log_validates_its_days(day_two, airflow):
    assert day_two.posted["state"] == "success"
    assert day_two.posted["logical_date"] is None
    assert result_of(airflow, day_two.posted)["window"] == "2016-10-01..2016-10-02"


def test_clearing_a_run_changes_nothing_that_is_published(day_two, airflow, storage):
    run = day_two.filled[2]
    objects = {key: storage.get(key) for key in storage.list("behaviors/dt=2016-09-2")}
    airflow.clear("encode_validate", run["dag_run_id"])
    assert finished(airflow, run)["state"] == "success"
    result = result_of(airflow, run)
    assert (result["validated"], result["unchanged"]) == (0, 10)
    assert {key: storage.get(key) for key in storage.list("behaviors/dt=2016-09-2")} == objects


def test_what_came_while_a_consumer_was_paused_is_in_its_next_run(day_two, airflow):
    """After the last test: the event that wakes it is of a run that had nothing to do."""
    before = {run["dag_run_id"] for run in airflow.runs("encode_refresh")}
    airflow.unpause("encode_refresh")
    airflow.clear("encode_validate", day_two.posted["dag_run_id"])
    new = wait_for(lambda: [run for run in airflow.runs("encode_refresh") if run["dag_run_id"] not in before])
    run = finished(airflow, new[0])
    assert run["state"] == "success", log_of(airflow, run)
    result = airflow.task_result("encode_refresh", run["dag_run_id"], "refresh")
    assert result["start"] == str(FIRST)
    assert result["end"] == day_two.landed["data_interval_end"][:10]
    assert result["as_of"] == result["end"]


def test_what_cannot_be_backfilled_says_so(airflow):
    with pytest.raises(ConfigError, match="non-periodic"):
        airflow.backfill("encode_train", FIRST, FIRST)


def test_airflow_is_stopped_with_its_running_tasks_when_a_part_of_it_dies(first, home, airflow):
    """The last but one in this file: what is left of it never looks like a whole."""
    record = read_state(home).entries["airflow"].process
    run = airflow.trigger("encode_validate", {"start": str(FIRST), "end": str(END)})
    task = wait_for(lambda: task_of(airflow, run)["pid"])
    os.kill(task, signal.SIGSTOP)  # so that it is not over before
    everything = [process.pid for process in belonging_to(record)]
    assert task in everything
    next(one for one in psutil.Process(record.pid).children() if "scheduler" in one.cmdline()).kill()
    wait_for(lambda: not runs(record.pid), 60)
    assert [pid for pid in everything if runs(pid)] == []
    assert {one.name: one.state for one in status(home)}["airflow"] == "stopped"
    assert "scheduler ended with status -9" in (home / "logs" / "airflow.log").read_text()


def test_going_down_leaves_no_process(first, home):
    """Last in this file."""
    pids = [one.pid for one in status(home) if one.pid]
    assert all(runs(pid) for pid in pids)
    down(home, say=lambda _: None)
    assert not [pid for pid in pids if runs(pid)]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{first[0]['urls']['serving']}/health")
