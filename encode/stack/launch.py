"""Several components at once, each as soon as what it needs is ready.

One thread looks at all of them in turn, so an interrupt has one place to arrive at and leaves
nothing behind that nobody waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from encode.errors import EncodeError
from encode.stack import home, processes
from encode.stack.components import STOP_GRACE, Component
from encode.stack.processes import ProcessRecord

LOOK_INTERVAL = 0.2
PROGRESS_INTERVAL = 15.0

# A component found alive but not ready may be busy or still starting; after this it is restarted.
ADOPTION_LIMIT = 60.0


@dataclass
class _Attempt:
    component: Component
    record: ProcessRecord
    began: float
    adopted: bool
    said: float
    problem: str = ""


def start(component: Component, log: Path, marker: str) -> ProcessRecord:
    """Write the files of `component` and start its process. It is not ready yet."""
    component.folder.mkdir(parents=True, exist_ok=True)
    for path, text in component.files.items():
        home.write_private(path, text)
    if component.name == "objectstore":
        (component.folder / "data").mkdir(exist_ok=True)
    return processes.start(
        component.command,
        environment=component.environment(),
        cwd=component.folder,
        log=log,
        marker=marker,
    )


def bring_up(
    components: Sequence[Component],
    *,
    running: Mapping[str, ProcessRecord],
    begin: Callable[[Component], ProcessRecord],
    log_of: Callable[[str], Path],
    say: Callable[[str], None],
) -> None:
    """Start what is not in `running` and return when every component is ready.

    Args:
        components: What is wanted.
        running: Processes of components that are alive already; they are only waited for, and
            restarted when they exit or do not get ready within `ADOPTION_LIMIT`.
        begin: Starts the process of a component and remembers it.
        log_of: The log of a component by name.
        say: Receives the lines for the person who waits.

    Raises:
        EncodeError: A process exited, or was not ready in time. What was started is left to the caller.
    """
    names = {component.name for component in components}
    ready: set[str] = set()
    waiting = list(components)
    attempts: list[_Attempt] = []
    while len(ready) < len(names):
        for component in [c for c in waiting if ready.issuperset(names.intersection(c.needs))]:
            waiting.remove(component)
            attempts.append(_attempt(component, running.get(component.name), begin, say))
        for attempt in list(attempts):
            if _is_ready(attempt, begin, log_of, say):
                attempts.remove(attempt)
                ready.add(attempt.component.name)
        if attempts:
            time.sleep(LOOK_INTERVAL)


def _attempt(
    component: Component,
    record: ProcessRecord | None,
    begin: Callable[[Component], ProcessRecord],
    say: Callable[[str], None],
) -> _Attempt:
    now = time.monotonic()
    if record is not None:
        return _Attempt(component, record, now, adopted=True, said=now)
    say(f"{component.name}: starting on {component.url}")
    return _Attempt(component, begin(component), now, adopted=False, said=now)


def _is_ready(
    attempt: _Attempt,
    begin: Callable[[Component], ProcessRecord],
    log_of: Callable[[str], Path],
    say: Callable[[str], None],
) -> bool:
    component = attempt.component
    # In this order: a process that exits while its port answers (another program's) is not ready.
    problem = component.problem()
    is_running = processes.is_running(attempt.record)
    seconds = time.monotonic() - attempt.began
    if is_running and problem is None:
        how = "already healthy" if attempt.adopted else f"healthy after {seconds:.1f} s"
        say(f"{component.name}: {how}, {component.url}")
        return True
    if attempt.adopted and (not is_running or seconds > ADOPTION_LIMIT):
        found = f"alive but not healthy for {seconds:.0f} s ({problem})" if is_running else "exited meanwhile"
        say(f"{component.name}: {found}, restarting it")
        processes.stop([attempt.record], grace=STOP_GRACE[component.name])
        attempt.record, attempt.adopted, attempt.began = begin(component), False, time.monotonic()
    elif not is_running:
        raise EncodeError(_report(f"{component.name}: its process exited while starting", log_of(component.name)))
    elif seconds > component.start_limit:
        found = f"{component.name}: not healthy after {seconds:.0f} s ({problem})"
        raise EncodeError(_report(found, log_of(component.name)))
    elif time.monotonic() - attempt.said > PROGRESS_INTERVAL:
        attempt.said = time.monotonic()
        say(f"{component.name}: still starting after {seconds:.0f} s, {problem}")
    return False


def _report(what: str, log: Path) -> str:
    lines = processes.last_lines(log)
    shown = "\n".join(f"    {line}" for line in lines.splitlines()) or "    (nothing was written to it)"
    return f"{what}. The end of its log, {log}:\n{shown}"
