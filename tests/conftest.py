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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from encode.stack import launch, ports, processes
from encode.stack.components import PORTS, Component, Store
from encode.stack.components import mlflow_server as mlflow_component
from encode.stack.components import object_store as weed

# From here on the shapes in signatures are checked at every call; k-means is compiled and cannot be wrapped.
install_import_hook(["encode.model", "encode.interests.extract", "encode.evaluate"], "beartype.beartype")

GUARD = """
import sys
sys.stdin.read()
from encode.stack import processes
for name in ("mlflow", "objectstore"):
    processes.stop_marked(sys.argv[1] + name)
"""


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
    """The address of a real MLflow server that keeps artifacts in `object_store`."""
    return start_server(lambda home: mlflow_component(home / "mlflow", _free_ports("mlflow"), object_store)).url
