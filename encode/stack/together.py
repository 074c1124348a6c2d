"""Several programs as one process, for a server that comes as several: Airflow.

    python -m encode.stack.together NAME=COMMAND NAME=COMMAND ...

The first command prepares and must succeed before the others begin. Those run until one of them ends, however it does:
then all of them are ended, with everything that they started, so that half a server never looks like a whole one. What
they write is passed on, each line behind the name of its program.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from encode.stack.processes import MARKER_VARIABLE, ProcessRecord, belonging_to, start_identity, stop, wait_gone

PATIENCE = 10.0
POLL_INTERVAL = 0.1
PIECE = 65_536
"""Bytes of a line that are held at most."""


def main(arguments: Sequence[str]) -> int:
    """Run `arguments`, each NAME=COMMAND, the command quoted as for a shell.

    Returns:
        0 after SIGTERM or SIGINT, 1 after a program ended by itself.
    """
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # Nothing but a note: a lock that is taken here may be the one that the main thread holds.
        signal.signal(number, lambda number, _: told.append(number))
    os.environ.setdefault(MARKER_VARIABLE, f"{os.getpid()} at {time.time_ns()}")
    commands = {name: shlex.split(command) for name, _, command in (one.partition("=") for one in arguments)}
    first = next(iter(commands))
    ended = _run({first: commands.pop(first)}, told)
    if ended is not None and ended[1] == 0:
        ended = _run(commands, told)
    if ended is None:
        return 0
    _write(b"%s ended with status %d, so everything did\n" % (ended[0].encode(), ended[1]))
    return 1


def _run(commands: Mapping[str, Sequence[str]], told: Sequence[int]) -> tuple[str, int] | None:
    """Run until one program ends, and return its name and status, or until `told`. None is left running."""
    children: dict[str, subprocess.Popen[bytes]] = {}
    readers = []
    try:
        for name, command in commands.items():
            if told:
                return None
            children[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            readers.append(threading.Thread(target=_pass_on, args=(name, children[name].stdout), daemon=True))
            readers[-1].start()
        while not told:
            for name, child in children.items():
                if child.poll() is not None:
                    # It may have ended because it was told to, as we were.
                    return None if told else (name, child.returncode)
            time.sleep(POLL_INTERVAL)
        return None
    finally:
        _end(bool(told))
        for child in children.values():
            child.wait()
        for reader in readers:
            reader.join(1.0)  # what hid from us, in a session and an environment of its own, may keep a pipe open


def _pass_on(name: str, output: IO[bytes]) -> None:
    prefix = name.encode() + b" | "
    begins = True
    for piece in iter(lambda: output.readline(PIECE), b""):
        _write(prefix * begins + piece)
        begins = piece.endswith(b"\n")
    if not begins:
        _write(b"\n")


def _write(data: bytes) -> None:
    # On a full disk lines are lost. A program whose pipe nobody reads would stand still.
    with suppress(OSError):
        os.write(sys.stdout.fileno(), data)


def _end(told: bool) -> None:
    """End what still runs and everything that it started: by SIGTERM, then by SIGKILL.

    Raises:
        TimeoutError: A process outlived SIGKILL (it hangs inside the kernel).
    """
    pid = os.getpid()
    ourselves = ProcessRecord(pid, start_identity(pid) or "", os.environ[MARKER_VARIABLE], str(Path.cwd()))
    # Whoever stops us signals our whole session, and Airflow takes a second SIGTERM for an order to give up at once.
    if told:
        wait_gone(belonging_to(ourselves), PATIENCE)
    stop([ourselves], grace=PATIENCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
