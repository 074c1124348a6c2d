"""One background process and everything it starts: begin it, know it again, end all of it.

A process is known by its id *and* its start time, so that an id which the system has given to
another process since is never signaled. It leads a session of its own (a terminal's Ctrl-C does
not reach it) and carries a marker in its environment. What belongs to it is then: the members of
its session, their descendants, and whatever carries the marker. The last two matter because a
task runner may move its children to other process groups, and outlive its parent.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARKER_VARIABLE = "ENCODE_STACK_MARKER"
KILL_PATIENCE = 5.0
POLL_INTERVAL = 0.05

# Handles of our own children: without them an exited child stays a zombie until we exit.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class ProcessRecord:
    """A process that was started, in a form that can be written down and read back.

    Attributes:
        pid: Process id, which is also its session's and its process group's.
        started: What `start_identity` answered for the process just after its start.
        marker: Value of `MARKER_VARIABLE` in its environment, inherited by its descendants.
        cwd: The folder that it was started in.
    """

    pid: int
    started: str
    marker: str
    cwd: str


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    cwd: Path,
    log: Path,
    marker: str,
) -> ProcessRecord:
    """Start `command` as the leader of a new session, its output going to `log`.

    The log of the start before is kept beside it as ``<name>.previous.log``, so that a log never
    mixes two lives of a process.

    Args:
        command: Program and arguments; no shell is involved.
        environment: The whole environment of the process; nothing else is inherited.
        cwd: Working directory, which must exist.
        log: File for standard output and standard error, readable by its owner only.
        marker: Text unique to this process, by which stray descendants are found.

    Raises:
        OSError: The program cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**environment, MARKER_VARIABLE: marker},
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    _children[child.pid] = child
    started = start_identity(child.pid) or "exited before it was seen"
    return ProcessRecord(pid=child.pid, started=started, marker=marker, cwd=str(cwd))


def start_identity(pid: int) -> str | None:
    """Text that differs for two processes that had the same id; None when there is no process.

    On Linux it is the boot's id and the start time in clock ticks since boot, which no change of
    the wall clock can move. Elsewhere it is the start time. A zombie counts as no process.
    """
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if psutil.LINUX:
            return _linux_identity(pid)
        return f"{process.create_time():.2f}"
    return None


def _linux_identity(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets and may itself hold spaces and brackets.
    ticks = stat.rpartition(")")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{ticks}"


def is_running(record: ProcessRecord) -> bool:
    """Whether the very process of `record` is alive (its id alone proves nothing)."""
    child = _children.get(record.pid)
    if child is not None and child.poll() is not None:
        del _children[record.pid]
    return start_identity(record.pid) == record.started


def belonging_to(record: ProcessRecord) -> list[psutil.Process]:
    """The processes that live because of `record`: session, descendants, bearers of its marker; never this process."""
    session = [process for process in _all_processes() if _session_of(process.pid) == record.pid]
    if not _is_own_session(session, record):
        session = []
    found = {process.pid: process for process in [*session, *_marked(record.marker)]}
    for process in list(found.values()):
        with suppress(psutil.NoSuchProcess):
            found.update((child.pid, child) for child in process.children(recursive=True))
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _is_alive(process)]


def _all_processes() -> Iterator[psutil.Process]:
    # Not psutil.process_iter: it hands out a cached process for an id that was given away since.
    for pid in psutil.pids():
        with suppress(psutil.NoSuchProcess):
            yield psutil.Process(pid)


def _marked(marker: str) -> list[psutil.Process]:
    return [
        process
        for process in _all_processes()
        if process.pid != os.getpid() and _has_marker(process, marker) and _is_alive(process)
    ]


def _is_own_session(session: Sequence[psutil.Process], record: ProcessRecord) -> bool:
    # A session has one origin: if its leader, or any member, is ours, then all of it is.
    if is_running(record):
        return True
    if start_identity(record.pid) is not None:
        return False
    return any(_has_marker(process, record.marker) or _is_in_folder(process, record.cwd) for process in session)


def _has_marker(process: psutil.Process, marker: str) -> bool:
    try:
        return bool(process.environ().get(MARKER_VARIABLE) == marker)
    except (psutil.Error, OSError):
        return False


def _is_in_folder(process: psutil.Process, folder: str) -> bool:
    # A process that rewrites its title overwrites its environment too, but stays in its folder.
    try:
        return bool(process.cwd() == folder)
    except (psutil.Error, OSError):
        return False


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def stop(records: Sequence[ProcessRecord], *, grace: float = 10.0) -> None:
    """End the processes of `records` together, and everything that belongs to them.

    All of it gets SIGTERM, in whatever process group it is; what is left after `grace` seconds gets
    SIGKILL. Returns when all of it is gone, at once when nothing was running.

    Raises:
        TimeoutError: A process outlived SIGKILL (it hangs inside the kernel).
    """
    known = _belonging_to_any(records)
    for process in known:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    wait_gone(known, grace)
    # Those known before too: with its parent gone, a stray descendant cannot be found any more.
    _kill_all(lambda: [*filter(_is_alive, known), *_belonging_to_any(records)])


def _belonging_to_any(records: Sequence[ProcessRecord]) -> list[psutil.Process]:
    return [process for record in records for process in belonging_to(record)]


def stop_marked(marker: str) -> None:
    """Kill whatever carries `marker`: for a start that was cut short before it was recorded."""
    _kill_all(lambda: _marked(marker))


def _kill_all(find: Callable[[], list[psutil.Process]]) -> None:
    # In rounds, because a process may start another one while its turn comes.
    deadline = time.monotonic() + KILL_PATIENCE
    while targets := find():
        if time.monotonic() > deadline:
            left = ", ".join(str(process.pid) for process in targets)
            raise TimeoutError(f"Processes {left} are still there {KILL_PATIENCE} s after SIGKILL.")
        for process in targets:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_gone(targets, 1.0)


def wait_gone(processes: Sequence[psutil.Process], seconds: float) -> bool:
    """Wait until `processes` are gone, `seconds` at most, and tell whether they are. A zombie is gone."""
    deadline = time.monotonic() + seconds
    left = list(processes)
    while True:
        for child in list(_children.values()):
            child.poll()
        left = [process for process in left if _is_alive(process)]
        if not left or time.monotonic() >= deadline:
            return not left
        time.sleep(POLL_INTERVAL)


def last_lines(log: Path, count: int = 20, max_bytes: int = 20_000) -> str:
    """The last `count` lines of `log`, empty when it holds nothing or does not exist."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - max_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-count:])
