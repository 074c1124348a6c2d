"""Bring the whole stack up on this machine, look at it, take it down, remove it.

A home remembers its ports and secrets, so that a stack that went down comes up as it was; only a
port that had to be moved goes back to where users expect it, once that is free. `up`
describes what shall be: what runs that way already is left alone, what is dead is started, and
what would run with another configuration (another DAG folder, a moved port) is restarted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from encode.errors import ConfigError
from encode.stack import components as parts
from encode.stack import home as files
from encode.stack import launch, processes
from encode.stack import ports as ports_of
from encode.stack.components import Component
from encode.stack.home import Credentials, Entry, State, load_client_environment
from encode.stack.processes import ProcessRecord

__all__ = ["ComponentStatus", "Stack", "clean", "down", "is_stopped", "load_client_environment", "status", "up"]


@dataclass(frozen=True)
class Stack:
    """A stack that is up.

    Attributes:
        home: The folder that holds all of it.
        urls: Address by component.
        logs: Log file by component.
        credentials_file: JSON with the S3 keys and Airflow's user name and password.
    """

    home: Path
    urls: Mapping[str, str]
    logs: Mapping[str, Path]
    credentials_file: Path

    def environment(self) -> dict[str, str]:
        """What a client needs in its environment to reach the components."""
        return _client_environment(files.credentials(self.home), self.urls)


@dataclass(frozen=True)
class ComponentStatus:
    """How one component is.

    Attributes:
        name: One of `components.NAMES`.
        state: "healthy"; "running" when its process is alive but it is not ready; "stopped".
        pid: Its process while alive.
        url: Where it answers, or would; empty when it was never started.
        log: Its log, which may not exist yet.
        problem: What is missing while "running".
    """

    name: str
    state: str
    pid: int | None
    url: str
    log: Path
    problem: str = ""


def up(
    home: Path,
    *,
    dags_folder: Path,
    ports: Mapping[str, int] | None = None,
    say: Callable[[str], None] = print,
    components: Sequence[str] = parts.NAMES,
) -> Stack:
    """Bring the stack of `home` up, and return when all of it answers.

    Args:
        home: Folder for everything; made when it does not exist.
        dags_folder: Folder of the DAG files.
        ports: Wanted port by component, also of later calls; 0 is any free one. Without a wish it is the
            usual one, or, where that is taken or some of the stack runs, the one of the last time, else a free one.
        say: Receives progress, one line a call.
        components: Which components; the others are left as they are.

    Raises:
        ConfigError: A name is unknown, a wanted port is taken, `home` belongs to something else,
            another `up` or `down` is at work on it, or a program is not installed.
        EncodeError: A component did not start. What this call started is stopped again; so it is
            after an interrupt.
    """
    home, wishes = home.absolute(), dict(ports or {})
    for name in [*components, *wishes]:
        if name not in parts.NAMES:
            raise ConfigError(f"component {name!r}: expected one of {', '.join(parts.NAMES)}")
    if "airflow" in components and not dags_folder.is_dir():
        raise ConfigError(f"{dags_folder}: found no such folder, expected the folder of the DAG files")
    files.make_folder(home)
    with files.locked(home):
        state = files.open_state(home)
        _clear_remains(state, components)
        entries = ports_of.settle(state.entries, wishes)
        wanted = _components(home, entries, dags_folder.absolute(), components)
        return _bring_up(home, replace(state, entries=entries), wanted, say)


def status(home: Path) -> list[ComponentStatus]:
    """How each component of `home` is, in the order of `components.NAMES`. Changes nothing."""
    home = home.absolute()
    state = files.read_state(home)
    if state is None or not state.entries:
        return [ComponentStatus(name, "stopped", None, "", _log(home, name)) for name in parts.NAMES]
    known = [name for name in parts.NAMES if name in state.entries]
    built = {c.name: c for c in _components(home, state.entries, Path(), known)}
    return [_status(home, name, state.entries.get(name), built.get(name)) for name in parts.NAMES]


def is_stopped(home: Path) -> bool:
    """Whether a stack was started in `home`, and its object store, which every client needs, does not run."""
    state = files.read_state(home.absolute())
    if state is None:
        return False
    store = state.entries.get("objectstore")
    return store is None or not store.is_alive()


def down(home: Path, say: Callable[[str], None] = print) -> None:
    """Stop what runs in `home` and wait until it is gone. Data, ports and secrets stay.

    Raises:
        ConfigError: Another process is at work on `home`.
    """
    home = home.absolute()
    if files.read_state(home) is None:
        say(f"{home}: nothing was started there")
        return
    with files.locked(home):
        _down(home, say)


def clean(home: Path, say: Callable[[str], None] = print) -> None:
    """Stop what runs in `home` and remove its data. Files that the stack did not make stay.

    Raises:
        ConfigError: `home` exists but is not the home of a stack, or another process is at work on it.
    """
    home = home.absolute()
    if files.read_state(home) is None:
        if any((home / name).exists() for name in files.FOLDERS):
            raise ConfigError(
                f"{home}: found no state.json of ours, expected the home of a local stack; nothing was removed"
            )
        say(f"{home}: nothing to remove")
        return
    with files.locked(home):
        _down(home, say)
        files.remove(home)
    say(f"{home}: removed")


def _bring_up(home: Path, state: State, wanted: Sequence[Component], say: Callable[[str], None]) -> Stack:
    entries, running = dict(state.entries), {}
    for component in wanted:
        record = entries[component.name].process
        if record is None or not processes.is_running(record):
            continue
        if entries[component.name].fingerprint == component.fingerprint:
            running[component.name] = record
        else:
            say(f"{component.name}: its configuration changed, restarting it")
            processes.stop([record], grace=parts.STOP_GRACE[component.name])
    begun: list[Component] = []

    def begin(component: Component) -> ProcessRecord:
        begun.append(component)
        record = launch.start(component, _log(home, component.name), _marker(state, component.name))
        settled = entries[component.name]
        entries[component.name] = replace(settled, fingerprint=component.fingerprint, process=record)
        files.write_state(home, replace(state, entries=entries))
        return record

    try:
        launch.bring_up(wanted, running=running, begin=begin, log_of=lambda name: _log(home, name), say=say)
    except BaseException:
        with _undisturbed():
            say("stopping what was started")
            _stop(home, replace(state, entries=entries), [component.name for component in begun])
        raise
    urls = {name: entries[name].url for name in parts.NAMES if name in entries and entries[name].process}
    files.write_state(home, replace(state, entries=entries))
    stack = Stack(home, urls, {name: _log(home, name) for name in urls}, home / "credentials.json")
    files.write_client_environment(home, stack.environment())
    return stack


def _clear_remains(state: State, names: Sequence[str]) -> None:
    """End what a dead component left running: it may hold the ports."""
    for name in names:
        entry = state.entries.get(name)
        if entry and entry.process and not entry.is_alive():
            processes.stop([entry.process])


def _down(home: Path, say: Callable[[str], None]) -> None:
    state = files.open_state(home)
    alive = [name for name, entry in state.entries.items() if entry.is_alive()]
    say(f"stopping {', '.join(alive)}" if alive else "nothing was running")
    with _undisturbed():
        _stop(home, state, list(state.entries))
        (home / "client.env").unlink(missing_ok=True)
    if alive:
        say("stopped")


def _stop(home: Path, state: State, names: Sequence[str]) -> None:
    """Stop components and note it. The object store goes last: it waits long for open clients."""
    entries = dict(state.entries)
    for group in ([name for name in names if name != "objectstore"], [n for n in names if n == "objectstore"]):
        records = [record for name in group if (record := entries[name].process) is not None]
        processes.stop(records, grace=max((parts.STOP_GRACE[name] for name in group), default=0.0))
        for name in group:
            # A start that was interrupted may not have come to be recorded.
            processes.stop_marked(_marker(state, name))
            entries[name] = replace(entries[name], process=None)
    files.write_state(home, replace(state, entries=entries))


def _components(home: Path, entries: Mapping[str, Entry], dags_folder: Path, names: Sequence[str]) -> list[Component]:
    credentials = files.credentials(home)
    ports = {name: entry.ports for name, entry in entries.items()}
    urls = {name: entry.url for name, entry in entries.items()}
    store = parts.Store(urls["objectstore"], credentials.access_key, credentials.secret_key)
    role_secrets = credentials.role_secrets
    made: dict[str, Callable[[Path], Component]] = {
        "objectstore": lambda folder: parts.object_store(
            folder, ports["objectstore"], store.access_key, store.secret_key, role_secrets
        ),
        "mlflow": lambda folder: parts.mlflow_server(folder, ports["mlflow"], store.as_role("mlflow", role_secrets)),
        "airflow": lambda folder: parts.airflow(
            folder,
            ports["airflow"],
            dags_folder=dags_folder,
            credentials=credentials,
            store=store,
            mlflow_url=urls["mlflow"],
            serving_url=urls["serving"],
        ),
        "serving": lambda folder: parts.serving(
            folder,
            ports["serving"],
            _client_environment(credentials, urls) | store.as_role("serve", role_secrets).environment(),
        ),
    }
    return [made[name](home / name) for name in parts.NAMES if name in names]


def _client_environment(credentials: Credentials, urls: Mapping[str, str]) -> dict[str, str]:
    environment: dict[str, str] = {}
    if "objectstore" in urls:
        store = parts.Store(urls["objectstore"], credentials.access_key, credentials.secret_key)
        environment |= {**store.environment(), "ENCODE_STORE": f"s3://{store.bucket}"}
    if "mlflow" in urls:
        environment["MLFLOW_TRACKING_URI"] = urls["mlflow"]
    if "serving" in urls:
        environment["ENCODE_SERVING_URL"] = urls["serving"]
    return environment


def _status(home: Path, name: str, entry: Entry | None, component: Component | None) -> ComponentStatus:
    log, url = _log(home, name), entry.url if entry else ""
    if entry is None or component is None or entry.process is None or not entry.is_alive():
        return ComponentStatus(name, "stopped", None, url, log)
    problem = component.problem()
    state = "running" if problem else "healthy"
    return ComponentStatus(name, state, entry.process.pid, url, log, problem or "")


def _log(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"


def _marker(state: State, name: str) -> str:
    return f"{state.home_id}/{name}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C meanwhile: stopping takes bounded time, and half of it would leave processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
