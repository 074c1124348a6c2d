import os
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

TOGETHER = """
import sys
from encode.stack import together
together.PATIENCE = float(sys.argv[1])
exec(sys.argv[2])
sys.exit(together.main(sys.argv[3:]))
"""
SLEEP = "import time; print('begun', flush=True); time.sleep(300)"
PATIENT = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
ENDING = f"""
import signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(3))
{SLEEP}
"""
SLOW = """
import signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
print('begun', flush=True)
while not signals:
    time.sleep(0.02)
time.sleep(0.2)
print(len(signals), 'signals', flush=True)
"""


@pytest.fixture
def start():
    """A function that starts programs together, each given as Python code, and leads a session with them.

    `before` is code that is run before them, to make a signal come at a moment.
    """
    started = []

    def start(patience=10.0, stdout=subprocess.PIPE, before="", **programs):
        arguments = [f"{name}={shlex.join([sys.executable, '-c', code])}" for name, code in programs.items()]
        command = [sys.executable, "-c", TOGETHER, str(patience), before, *arguments]
        started.append(subprocess.Popen(command, stdout=stdout, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with process:
            left = [pid for pid in psutil.pids() if session_of(pid) == process.pid and is_alive(pid)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        assert left == [], "nothing is left running"


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def child_of(process, code):
    """The program that runs `code`."""
    return next(child for child in psutil.Process(process.pid).children() if child.cmdline()[-1] == code)


def lines_until(process, count, text="begun"):
    """Read the lines of a process up to the one in which `text` comes for the n-th time."""
    lines = []
    while sum(text in line for line in lines) < count:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return lines


def test_the_first_program_is_over_before_the_others_begin_and_lines_have_names(start):
    process = start(first="import time; time.sleep(0.3); print('prepared'); print('done')", one=SLEEP, two=SLEEP)
    lines = lines_until(process, 2)
    assert lines[:2] == ["first | prepared\n", "first | done\n"]
    assert sorted(lines[2:]) == ["one | begun\n", "two | begun\n"]
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0


def test_the_others_do_not_begin_when_the_first_fails(start):
    process = start(first="raise SystemExit('no database')", one=SLEEP)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert output == "first | no database\nfirst ended with status 1, so everything did\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 0), (signal.SIGUSR2, 3), (signal.SIGKILL, -9)])
def test_the_others_are_told_to_stop_when_one_ends_however_it_does(start, number, status):
    process = start(first="", one=SLOW, two=SLOW, three=ENDING)
    lines_until(process, 3)
    child_of(process, ENDING).send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    *told, last = output.splitlines()
    assert sorted(told) == ["one | 1 signals", "two | 1 signals"]
    assert last == f"three ended with status {status}, so everything did"


def test_programs_that_are_told_to_stop_with_us_are_told_once_and_waited_for(start):
    process = start(first="", one=SLOW, two=SLOW)
    lines_until(process, 2)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["one | 1 signals", "two | 1 signals"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_programs_that_nobody_told_to_stop_with_us_are_told_after_a_while(start, number):
    process = start(0.3, first="", one=SLOW, two=PATIENT)
    lines_until(process, 2)
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert time.monotonic() - began > 0.3


def test_a_first_program_ends_too_when_it_is_told(start):
    process = start(0.1, first=SLEEP, one=SLEEP)
    lines_until(process, 1)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "")


@pytest.mark.parametrize(
    ("apart", "victim"),
    [
        ("process_group=0", "parent"),
        ("start_new_session=True", "parent"),
        ("start_new_session=True, env={}", "other"),
        ("process_group=0", "nobody"),
    ],
)
def test_what_a_program_started_ends_with_it_wherever_it_moved(start, apart, victim):
    """As a task of Airflow, when the scheduler dies or another part does, or all are told to stop."""
    parent = (
        f"import subprocess, sys; task = subprocess.Popen([sys.executable, '-c', {PATIENT!r}], {apart}); "
        f"print('task', task.pid, flush=True); {SLEEP}"
    )
    process = start(0.3, first="", one=parent, two=SLEEP)
    lines = lines_until(process, 3)
    task = int(next(line for line in lines if "task" in line).split()[-1])
    assert is_alive(task)
    if victim == "nobody":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        child_of(process, parent if victim == "parent" else SLEEP).kill()
    try:
        assert process.wait(20) == (0 if victim == "nobody" else 1)
        assert not is_alive(task)
    finally:
        if is_alive(task):
            os.kill(task, signal.SIGKILL)


def test_a_full_disk_stops_no_program(start):
    talk = "print(100_000 * 'one line\\n', flush=True)"  # more than a pipe holds
    with Path("/dev/full").open("w") as full:
        process = start(stdout=full, first=talk, one=f"{talk}; raise SystemExit(3)")
        assert process.wait(20) == 1


def test_a_line_is_passed_on_before_it_ends_and_is_named_once(start):
    process = start(first="import time; print(3 * 65_536 * 'x', end='', flush=True); time.sleep(300)")
    expected = "first | " + 3 * 65_536 * "x"
    assert select.select([process.stdout], [], [], 5)[0], "the first part of it"
    assert process.stdout.read(len(expected)) == expected
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "\n"


def test_a_program_that_was_told_to_stop_before_us_has_not_ended_by_itself(start):
    poll = """
import os, signal, subprocess, time
class Popen(subprocess.Popen):
    def poll(self):
        if self.args[-1] != '' and self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            os.kill(os.getpid(), signal.SIGTERM)
        return super().poll()
subprocess.Popen = Popen
"""
    process = start(before=poll, first="", one=SLEEP)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output.replace("one | begun\n", "")) == (0, "")


def test_no_program_is_begun_after_the_order_to_stop(start):
    order = """
import os, signal, subprocess
class Popen(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__(command, **options)
        if 'one' in command[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
"""
    process = start(before=order, first="", one="print('one')", two="print('two')")
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "one | one\n")


def test_an_order_to_stop_is_heard_whatever_we_are_at(start):
    """A handler that takes a lock would wait for the one that the main thread holds."""
    orders = """
import os, signal, sys, threading
def trace(frame, event, _):
    if frame.f_code.co_filename == threading.__file__ or frame.f_code.co_name == '_run':
        if event == 'line' and callable(signal.getsignal(signal.SIGTERM)):
            os.kill(os.getpid(), signal.SIGTERM)
        return trace
sys.settrace(trace)
"""
    process = start(before=orders, first=SLEEP)
    assert process.wait(10) == 0
