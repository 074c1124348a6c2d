import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest

from encode.errors import EncodeError
from encode.stack import launch, processes
from encode.stack.components import Component

SLEEP = "import time; time.sleep(300)"


@pytest.fixture
def run(tmp_path):
    """Start Python code as a background process; whatever is left of it ends with the test."""
    records = []

    def run(code: str, *, until: str = "ready") -> processes.ProcessRecord:
        log = tmp_path / f"{len(records)}.log"
        cwd = tmp_path / f"{len(records)}"
        cwd.mkdir()
        record = processes.start(
            [sys.executable, "-u", "-c", code],
            environment=dict(os.environ),
            cwd=cwd,
            log=log,
            marker=f"{tmp_path}/{len(records)}",
        )
        records.append(record)
        wait_for(lambda: until in log.read_text())
        return record

    yield run
    processes.stop(records, grace=0)


@pytest.fixture
def foreign():
    """A process that is none of ours, leading a session as ours do."""
    process = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def pids_in(log) -> list[int]:
    return [int(word) for word in log.read_text().split() if word.isdigit()]


def test_stop_is_gentle_first(run, tmp_path):
    record = run(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('goodbye'), sys.exit()))\n"
        "print('ready'); time.sleep(300)"
    )
    assert processes.is_running(record)
    processes.stop([record])
    assert not processes.is_running(record)
    assert "goodbye" in (tmp_path / "0.log").read_text()


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(run):
    record = run(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); {SLEEP}")
    began = time.monotonic()
    processes.stop([record], grace=0.5)
    assert 0.5 <= time.monotonic() - began < 4
    assert not is_alive(record.pid)


@pytest.mark.parametrize(
    "apart", ["", ", start_new_session=True", ", process_group=0", ", start_new_session=True, env={}"]
)
def test_grandchildren_end_with_it_wherever_they_moved(run, tmp_path, apart):
    record = run(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]{apart})\n"
        "print(child.pid, 'ready'); time.sleep(300)"
    )
    [grandchild] = pids_in(tmp_path / "0.log")
    assert is_alive(grandchild)
    processes.stop([record], grace=0.5)
    assert not is_alive(record.pid)
    assert not is_alive(grandchild)


def test_an_orphan_ends_although_its_parent_is_gone_and_its_environment_too(run, tmp_path):
    record = run(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], env={{}})\n"
        "print(child.pid, 'ready')"
    )
    [orphan] = pids_in(tmp_path / "0.log")
    wait_for(lambda: not processes.is_running(record))
    assert is_alive(orphan)
    processes.stop([record], grace=0.5)
    assert not is_alive(orphan)


def test_a_process_that_got_a_recycled_id_is_left_alone(run, foreign):
    time.sleep(0.05)  # start times are told apart in steps of 10 ms, an id cannot come back that soon
    ours = run(f"print('ready'); {SLEEP}")
    recycled = replace(ours, pid=foreign.pid)
    assert not processes.is_running(recycled)
    processes.stop([replace(recycled, marker="none of these")], grace=0.1)
    assert foreign.poll() is None


def test_a_foreign_session_whose_leader_is_gone_is_left_alone(run, tmp_path):
    ours = run(f"print('ready'); {SLEEP}")
    leader = run(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "print(child.pid, 'ready')"
    )
    [member] = pids_in(tmp_path / "1.log")
    wait_for(lambda: not is_alive(leader.pid))
    processes.stop([replace(ours, pid=leader.pid)], grace=0.1)
    assert is_alive(member)
    assert not is_alive(ours.pid), "what carries our marker is ours under any id"


def test_a_cut_off_start_is_found_by_its_marker(run, foreign):
    record = run(f"print('ready'); {SLEEP}")
    processes.stop_marked(record.marker)
    assert not is_alive(record.pid)
    assert foreign.poll() is None


def test_the_log_before_is_kept_and_not_mixed_in(tmp_path):
    for text in ("first", "second"):
        record = processes.start(
            [sys.executable, "-c", f"print({text!r})"],
            environment={},
            cwd=tmp_path,
            log=tmp_path / "name.log",
            marker="log",
        )
        wait_for(lambda record=record: not processes.is_running(record))
    assert (tmp_path / "name.log").read_text() == "second\n"
    assert (tmp_path / "name.previous.log").read_text() == "first\n"
    assert (tmp_path / "name.log").stat().st_mode & 0o777 == 0o600


def test_last_lines_reads_only_the_end(tmp_path):
    log = tmp_path / "long.log"
    log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert processes.last_lines(log, count=2) == "line 99998\nline 99999"
    assert processes.last_lines(tmp_path / "none.log") == ""


def component(tmp_path, code: str, problem, **fields) -> Component:
    return Component(
        name="mlflow",
        folder=tmp_path / "mlflow",
        ports={"main": 1},
        command=(sys.executable, "-u", "-c", code),
        settings={},
        problem=problem,
        **fields,
    )


def bring_up(made: Component, tmp_path) -> list[str]:
    said, records = [], []
    log = tmp_path / "mlflow.log"

    def begin(made):
        records.append(launch.start(made, log, f"{tmp_path}"))
        return records[-1]

    try:
        launch.bring_up([made], running={}, begin=begin, log_of=lambda _: log, say=said.append)
    finally:
        processes.stop(records, grace=0)
    return said


@pytest.mark.parametrize("problem", [lambda: "no answer yet", lambda: time.sleep(1.0)])
def test_a_component_that_exits_at_once_is_an_error_with_the_end_of_its_log(tmp_path, problem):
    """Even when its port answers, which then is another program's."""
    made = component(tmp_path, "print('no such option: --prot'); raise SystemExit(3)", problem)
    with pytest.raises(EncodeError, match="exited while starting") as caught:
        bring_up(made, tmp_path)
    assert "no such option: --prot" in str(caught.value)
    assert str(tmp_path / "mlflow.log") in str(caught.value)


def test_a_component_that_never_gets_ready_is_an_error_that_says_what_is_missing(tmp_path):
    made = component(tmp_path, SLEEP, lambda: "waiting for scheduler", start_limit=0.3)
    with pytest.raises(EncodeError, match=r"not healthy after 0 s \(waiting for scheduler\)"):
        bring_up(made, tmp_path)


def test_a_ready_component_is_said(tmp_path):
    assert bring_up(component(tmp_path, SLEEP, lambda: None), tmp_path)[-1].startswith("mlflow: healthy after")


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_component_found_dead_or_stuck_is_restarted(tmp_path, monkeypatch, is_dead):
    monkeypatch.setattr(launch, "ADOPTION_LIMIT", 0.3)
    said, records = [], []
    log = tmp_path / "mlflow.log"

    def begin(made):
        records.append(launch.start(made, log, f"{tmp_path}"))
        return records[-1]

    made = component(tmp_path, SLEEP, lambda: None if len(records) > 1 else "stuck")
    try:
        found = begin(made)
        if is_dead:
            psutil.Process(found.pid).kill()
        launch.bring_up([made], running={"mlflow": found}, begin=begin, log_of=lambda _: log, say=said.append)
        assert not is_alive(found.pid)
        assert is_alive(records[1].pid)
        assert said[0].endswith("restarting it")
    finally:
        processes.stop(records, grace=0)
