"""Several programs as one process, for a server that comes as several: Airflow.

    python -m encode.stack.together NAME=COMMAND NAME=COMMAND ...

The first command prepares and must succeed before the others begin. Those run until one of them ends, however it does:
then all of them are ended, so that half a server never looks like a whole one. What they write is passed on, each line
behind the name of its program.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import IO

PATIENCE = 10.0
POLL_INTERVAL = 0.1


def main(arguments: Sequence[str]) -> int:
    """Run `arguments`, each NAME=COMMAND, the command quoted as for a shell.

    Returns:
        0 after SIGTERM or SIGINT, 1 after a program ended by itself.
    """
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    commands = {name: shlex.split(command) for name, _, command in (one.partition("=") for one in arguments)}
    first = next(iter(commands))
    ended = _run({first: commands.pop(first)}, told)
    if ended is not None and ended[1] == 0:
        ended = _run(commands, told)
    if ended is None:
        return 0
    print(f"{ended[0]} ended with status {ended[1]}, so everything did", flush=True)
    return 1


def _run(commands: Mapping[str, Sequence[str]], told: threading.Event) -> tuple[str, int] | None:
    """Run until one program ends, and return its name and status, or until `told`. None is left running."""
    children: dict[str, subprocess.Popen[bytes]] = {}
    readers = []
    try:
        for name, command in commands.items():
            children[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            readers.append(threading.Thread(target=_pass_on, args=(name, children[name].stdout), daemon=True))
            readers[-1].start()
        while not told.wait(POLL_INTERVAL):
            for name, child in children.items():
                if child.poll() is not None:
                    return name, child.returncode
        return None
    finally:
        _end(children.values(), told.is_set())
        for reader in readers:
            reader.join(1.0)  # what a program started itself may keep its pipe open


def _pass_on(name: str, output: IO[bytes]) -> None:
    for line in output:
        os.write(sys.stdout.fileno(), b"%s | %s\n" % (name.encode(), line.rstrip(b"\n")))


def _end(children: Collection[subprocess.Popen[bytes]], told: bool) -> None:
    """End what still runs: by SIGTERM, then by SIGKILL."""
    # Whoever stops us signals our whole session, and Airflow takes a second SIGTERM for an order to give up at once.
    if told and _are_gone(children):
        return
    for child in children:
        child.terminate()
    if not _are_gone(children):
        for child in children:
            child.kill()
            child.wait()


def _are_gone(children: Collection[subprocess.Popen[bytes]]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while any(child.poll() is None for child in children):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
