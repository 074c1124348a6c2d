import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

TOGETHER = """
import sys
from encode.stack import together
together.PATIENCE = float(sys.argv[1])
sys.exit(together.main(sys.argv[2:]))
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
    """A function that starts programs together, each given as Python code, and leads a session with them."""
    started = []

    def start(patience=10.0, **programs):
        arguments = [f"{name}={shlex.join([sys.executable, '-c', code])}" for name, code in programs.items()]
        command = [sys.executable, "-c", TOGETHER, str(patience), *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with process:
            left = [pid for pid in psutil.pids() if session_of(pid) == process.pid]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        assert left == [], "nothing is left running"


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


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
    psutil.Process(process.pid).children()[2].send_signal(number)
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
