"""Real servers for the tests, one of each for a whole session.

Tests share them and the bucket: each works under a prefix of its own. The servers end with the
session whatever ends it: the fixtures stop them, and should the session be killed, a guard process
notices that its pipe has closed.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from jaxtyping import install_import_hook
from pydantic import SecretStr

from encode.config import Places
from encode.data.parquet import parquet_bytes
from encode.outputs import Manifest, write_output
from encode.schema import BEHAVIORS, digest
from encode.stack import launch, ports, processes
from encode.stack.components import PORTS, Component, Store
from encode.stack.components import mlflow_server as mlflow_component
from encode.stack.components import object_store as weed
from encode.storage import Storage, open_storage

# From here on the shapes in signatures are checked at every call; k-means is compiled and cannot be wrapped.
install_import_hook(
    ["encode.model", "encode.interests.extract", "encode.evaluate", "encode.quality"], "beartype.beartype"
)

GUARD = """
import sys
sys.stdin.read()
from encode.stack import processes
for name in ("mlflow", "objectstore"):
    processes.stop_marked(sys.argv[1] + name)
"""


# Files that take longest, in that order: processes that share the suite are done at the same time if these come first.
LONGEST = (
    *("test_local_airflow", "test_cli", "test_spark", "test_steps", "test_local_stack", "test_policies", "test_dags"),
    *("test_limits", "test_page", "test_rollout", "test_serve_benchmark", "test_drain"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first; within a file nothing changes."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


class PowerCut(Exception):  # noqa: N818
    """The process died."""


class Dying:
    """A store in front of which the process dies at its last write, just before or just after it took effect."""

    def __init__(self, storage: Storage, last: int, after: bool = False) -> None:
        self._storage, self._left, self._after = storage, last, after
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def _write(self, name: str, *arguments: Any) -> None:
        with self._lock:
            self._left -= 1
            if self._left < 0 or (self._left == 0 and not self._after):
                raise PowerCut
            getattr(self._storage, name)(*arguments)
            if self._left == 0:
                raise PowerCut

    def put(self, *arguments: Any) -> None:
        self._write("put", *arguments)

    def create(self, *arguments: Any) -> None:
        self._write("create", *arguments)

    def replace(self, *arguments: Any) -> None:
        self._write("replace", *arguments)


@pytest.fixture(scope="session")
def dying() -> tuple[type[Dying], type[PowerCut]]:
    """A store that dies at its n-th write, and what is raised then."""
    return Dying, PowerCut


@pytest.fixture(scope="session")
def write_day() -> Callable[[Storage, date, Sequence[Sequence[int]]], Manifest]:
    """A function that publishes rows of user, item, category and timestamp as a validated day."""

    def write(storage: Storage, day: date, rows: Sequence[Sequence[int]]) -> Manifest:
        user, item, category, timestamp = np.array(rows, np.int64).reshape(-1, 4).T
        columns = [user, item, category, pa.array(["pv"] * len(user), pa.string()).dictionary_encode(), timestamp]
        arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, BEHAVIORS, strict=True)]
        half = len(user) // 2
        table = pa.Table.from_arrays(arrays, schema=BEHAVIORS)
        parts = {"part-00000.parquet": table[:half], "part-00001.parquet": table[half:]}
        return write_output(
            storage,
            f"behaviors/dt={day}",
            {name: parquet_bytes(part) for name, part in parts.items()},
            kind="behaviors",
            fingerprint=digest(np.array(rows).tobytes()),
            config={},
            inputs={},
            counts={"rows": len(user)},
        )

    return write


@pytest.fixture(scope="session")
def start_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Callable[[Path], Component]], Component]]:
    """A function that starts the component made for a new folder and waits until it is healthy."""
    home = tmp_path_factory.mktemp("servers")
    markers = f"tests-{secrets.token_hex(8)}/"
    records: list[processes.ProcessRecord] = []
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, markers],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )

    def log_of(name: str) -> Path:
        return home / f"{name}.log"

    def begin(component: Component) -> processes.ProcessRecord:
        records.append(launch.start(component, log_of(component.name), markers + component.name))
        return records[-1]

    def start(make: Callable[[Path], Component]) -> Component:
        component = make(home)
        launch.bring_up([component], running={}, begin=begin, log_of=log_of, say=lambda _: None)
        return component

    try:
        yield start
    finally:
        # The last one first: the object store waits long for clients that are still connected.
        for record in reversed(records):
            processes.stop([record])
        guard.communicate(timeout=60)


def _free_ports(name: str) -> dict[str, int]:
    chosen: dict[str, int] = {}
    for role in PORTS[name]:
        chosen[role] = ports.free_port(chosen.values())
    return chosen


@pytest.fixture(scope="session")
def object_store(start_server: Callable[[Callable[[Path], Component]], Component]) -> Store:
    """A real S3-compatible server; the one at OBJECT_STORE_ENDPOINT_URL when that is set."""
    given = os.environ.get("OBJECT_STORE_ENDPOINT_URL")
    if given:
        return Store(
            given.rstrip("/"),
            os.environ["OBJECT_STORE_ACCESS_KEY"],
            os.environ["OBJECT_STORE_SECRET_KEY"],
            os.environ.get("OBJECT_STORE_BUCKET", "encode"),
        )
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    made = start_server(lambda home: weed(home / "objectstore", _free_ports("objectstore"), access_key, secret_key))
    return Store(made.url, access_key, secret_key)


@pytest.fixture(scope="session")
def mlflow_server(start_server: Callable[[Callable[[Path], Component]], Component], object_store: Store) -> str:
    """The address of a real MLflow server that keeps artifacts in `object_store`, and may call this machine."""
    to_here = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}

    def make(home: Path) -> Component:
        made = mlflow_component(home / "mlflow", _free_ports("mlflow"), object_store)
        return replace(made, settings={**made.settings, **to_here})

    return start_server(make).url


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """A store that is a folder."""
    return open_storage(Places(store=str(tmp_path / "store")))


@pytest.fixture
def s3_places(object_store: Store) -> Places:
    """A place of its own in the real object store."""
    return Places(
        store=f"s3://{object_store.bucket}/test-{secrets.token_hex(8)}",
        endpoint_url=object_store.endpoint_url,
        access_key=object_store.access_key,
        secret_key=SecretStr(object_store.secret_key),
    )


@pytest.fixture
def s3(s3_places: Places) -> Storage:
    """A store in the real object store."""
    return open_storage(s3_places)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """A store, of either kind."""
    made: Storage = request.getfixturevalue(request.param)
    return made
