"""The files of a home: what was started there, with which ports and secrets, and who is at work.

state.json         our mark on the folder: its id; ports, process and configuration of components
credentials.json   generated once, kept until the home is cleaned
client.env         what clients need while the stack is up, as KEY=VALUE lines
lock               held by the one `up`, `down` or `clean` at work
logs/              one file a component
objectstore/ mlflow/ airflow/ serving/   the data of each
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from encode.errors import ArtifactError, ConfigError
from encode.stack.policies import ROLES
from encode.stack.processes import ProcessRecord, is_running

MADE_BY = "encode.stack"
FOLDERS = ("objectstore", "mlflow", "airflow", "serving", "logs")
COMMANDS_FOLDERS = ("docs", "snapshots")
"""Written by commands beside the stack, and removed with it."""
FILES = ("client.env", "credentials.json", "lock", "state.json")


@dataclass(frozen=True)
class Credentials:
    """The secrets of a home, all generated."""

    access_key: str
    secret_key: str
    airflow_username: str
    airflow_password: str
    fernet_key: str
    jwt_secret: str
    session_secret: str
    role_secrets: Mapping[str, str] = field(default_factory=dict)
    """Secret key by role of `policies.ROLES`."""


@dataclass(frozen=True)
class Entry:
    """What `state.json` says of a component.

    Attributes:
        ports: Its ports by role; "main" is the one in its url. Kept over a stop.
        url: Where it answers.
        fingerprint: Digest of its command and environment when it was started.
        process: The process while it is meant to run, else None.
        wanted: The main port that it gets whenever that is free: the usual one, or what was asked for; 0 is the one it
            has, also where an earlier version did not note it.
    """

    ports: Mapping[str, int]
    url: str
    fingerprint: str
    process: ProcessRecord | None
    wanted: int = 0

    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and is_running(self.process)


@dataclass(frozen=True)
class State:
    """All of `state.json`: the id of the home and an entry for each component ever started in it."""

    home_id: str
    entries: Mapping[str, Entry]


def make_folder(home: Path) -> None:
    """Make the folder `home` for its owner only (mode 0700).

    Raises:
        ConfigError: Something else lives there under the names that we would use.
    """
    taken = [name for name in FOLDERS if (home / name).exists()]
    if taken and not (home / "state.json").exists():
        raise ConfigError(
            f"{home}: found {', '.join(taken)} there but no state.json of ours, expected a new folder or one "
            "that `encode stack up` made; choose another folder (ENCODE_HOME)"
        )
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)


def open_state(home: Path) -> State:
    """Read the state of `home`, or mark the folder as ours. The caller holds the lock."""
    state = read_state(home)
    if state is None:
        state = State(home_id=secrets.token_hex(8), entries={})
        write_state(home, state)
    return state


def read_state(home: Path) -> State | None:
    """The state of `home`; None when nothing was ever started there.

    Raises:
        ArtifactError: The file is not one that we wrote.
    """
    path = home / "state.json"
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        raw = json.loads(text)
        if raw["made_by"] != MADE_BY:
            raise ValueError(raw["made_by"])
        return State(raw["id"], {name: _entry(fields) for name, fields in raw["components"].items()})
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: found {error!r}, expected the state of a local stack; if the folder is not ours choose another "
            "one, else stop its processes by hand and remove it"
        ) from error


def _entry(fields: dict[str, Any]) -> Entry:
    process = fields.pop("process")
    return Entry(**fields, process=None if process is None else ProcessRecord(**process))


def write_state(home: Path, state: State) -> None:
    """Replace `state.json` in one step."""
    entries = {name: asdict(entry) for name, entry in state.entries.items()}
    raw = {"made_by": MADE_BY, "id": state.home_id, "components": entries}
    write_private(home / "state.json", json.dumps(raw, indent=2) + "\n")


def credentials(home: Path) -> Credentials:
    """The secrets of `home`, generated on the first call; those of roles also where an earlier version made the home.

    Raises:
        ArtifactError: `credentials.json` cannot be read.
    """
    path = home / "credentials.json"
    found = _read_credentials(path) if path.exists() else None
    made = found or Credentials(
        access_key=secrets.token_hex(10).upper(),
        secret_key=secrets.token_hex(20),
        airflow_username="admin",
        airflow_password=secrets.token_urlsafe(15),
        fernet_key=base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        jwt_secret=secrets.token_hex(32),
        session_secret=secrets.token_hex(32),
    )
    made = replace(made, role_secrets={role: secrets.token_hex(20) for role in ROLES} | dict(made.role_secrets))
    if made != found:
        write_private(path, json.dumps(asdict(made), indent=2) + "\n")
    return made


def _read_credentials(path: Path) -> Credentials:
    try:
        return Credentials(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path}: found {error}, expected the secrets of a local stack; `encode stack clean` makes a new start"
        ) from error


def write_private(path: Path, text: str) -> None:
    """Replace the file `path` in one step; only its owner can read it, at no moment anybody else."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    aside.replace(path)


def write_client_environment(home: Path, environment: Mapping[str, str]) -> None:
    """Write `client.env`, sorted by name."""
    lines = [f"{name}={value}\n" for name, value in sorted(environment.items())]
    write_private(home / "client.env", "".join(lines))


def load_client_environment(home: Path) -> dict[str, str]:
    """What a client of the running stack puts into its environment; empty when the stack is down."""
    try:
        lines = (home / "client.env").read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the lock of `home`, which must exist.

    Raises:
        ConfigError: Another process holds it.
    """
    descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode().strip() or "unknown"
            raise ConfigError(
                f"{home}: another `encode stack up`, `down` or `clean` (process {holder}) is at work there; wait for it"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def remove(home: Path) -> None:
    """Remove what the stack made in `home`, and `home` itself when nothing else is left in it.

    Raises:
        ConfigError: A server that was started by hand has its snapshots there; nothing was removed.
    """
    with _unserved(home / "snapshots"):
        for name in (*FOLDERS, *COMMANDS_FOLDERS):
            with suppress(FileNotFoundError):
                shutil.rmtree(home / name)
    for name in FILES:
        (home / name).unlink(missing_ok=True)
    with suppress(OSError):
        home.rmdir()


@contextmanager
def _unserved(cache: Path) -> Iterator[None]:
    """Hold the lock that `encode serve` holds on its folder of snapshots."""
    cache.mkdir(exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{cache}: an `encode serve` that was started by hand serves from it, nothing was removed; stop it"
            ) from None
        yield
