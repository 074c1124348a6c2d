"""A real release in a folder, the application on it, and real serving processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import httpx
import pytest
from made import FILES, SPACE, Client, OneVersion, refresh, wait

from encode.config import Places, RegistryConfig, load_config
from encode.interests.snapshots import write_space
from encode.serving.app import create_app
from encode.serving.bundle import load_bundle
from encode.stack.ports import free_port
from encode.storage import open_storage

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "ENCODE_", "MLFLOW_"))}


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """The tiny preset, released."""
    folder = tmp_path_factory.mktemp("released")
    command = [sys.executable, "-m", "encode.cli", "run", "--preset", "tiny", "--workdir", str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def places(workdir):
    return Places.in_folder(workdir)


@pytest.fixture(scope="session")
def released(places, tmp_path_factory):
    """The bundle that serves."""
    app = create_app(places, load_config("tiny").registry, tmp_path_factory.mktemp("snapshots"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow on SQLite warns of what SQLAlchemy deprecates
        app.state.follower.look()
    return app.state.follower.bundle


@pytest.fixture
def make_app(places, released, tmp_path):
    """A function that makes the application with that bundle loaded, or another one."""

    def make(bundle=released, places=places, **options):
        app = create_app(places, load_config("tiny").registry, tmp_path / "cache", seconds=3600, **options)
        app.state.follower.bundle = bundle
        return app

    return make


class _Chunks(httpx.AsyncByteStream):
    """What a client sends, for an application that awaits it."""

    def __init__(self, chunks):
        self._chunks = chunks

    async def __aiter__(self):
        for chunk in self._chunks:
            yield chunk


class _ToApp(httpx.BaseTransport):
    """Hands requests to an application without a socket."""

    def __init__(self, app):
        self._to_app = httpx.ASGITransport(app)

    def handle_request(self, request):
        request.stream = _Chunks(request.stream)

        async def ask():
            answer = await self._to_app.handle_async_request(request)
            return httpx.Response(answer.status_code, headers=answer.headers, content=await answer.aread())

        return asyncio.run(ask())


@pytest.fixture
def make_client(make_app):
    """A function that makes a client of such an application."""

    def make(**options):
        app = make_app(**options)
        client = httpx.Client(transport=_ToApp(app), base_url="http://serving")
        client.app = app
        return client

    return make


class Serving:
    """A serving process."""

    def __init__(self, workdir, folder, *options, **settings):
        self.port = free_port(())
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "encode.cli", "serve", "--preset", "tiny"]
        command += ["--workdir", str(workdir)] if workdir else []
        command += ["--cache", str(folder / "cache"), "--port", str(self.port), *options]
        self._log = (folder / f"{self.port}.log").open("w+")
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT | settings, stderr=self._log, stdout=subprocess.DEVNULL
        )

    def wait_until_ready(self, path="/ready"):
        for _ in range(600):
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}{path}").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(self.log())

    def log(self):
        self._log.seek(0)
        return self._log.read()

    def requests(self):
        """Lines of the log that tell of a request."""
        return [line for line in map(json.loads, self.log().splitlines()) if "route" in line]

    def stop(self, with_signal=signal.SIGTERM):
        """Send a signal and return the exit status."""
        self.process.send_signal(with_signal)
        return self.process.wait(30)

    def end(self):
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture
def start_serving(workdir, tmp_path):
    """A function that starts `encode serve` with options and settings, and waits until it is ready, or alive only."""
    started = []

    def start(*options, workdir=workdir, until="/ready", **settings):
        serving = Serving(workdir, tmp_path, *options, **settings)
        started.append(serving)
        serving.wait_until_ready(until)
        return serving

    yield start
    for serving in started:
        serving.end()


# --- a release made by hand ---------------------------------------------------------------------------------


@pytest.fixture
def own_places(tmp_path):
    return Places(store=str(tmp_path / "store"), tracking_uri="not used")


@pytest.fixture
def storage(own_places):
    storage = open_storage(own_places)
    write_space(storage, SPACE, {})
    refresh(storage)
    return storage


@pytest.fixture
def registry(monkeypatch):
    one = OneVersion()
    monkeypatch.setattr("encode.serving.follower.Registry", lambda _places, _config: one)
    return one


@pytest.fixture
def client(storage, own_places, registry, tmp_path):
    """The application with the first version served; it looks again only when asked."""
    registry.release("1", FILES, SPACE)
    app = create_app(own_places, RegistryConfig(), tmp_path / "cache", seconds=3600)
    with Client(app) as client:
        wait(client, lambda state: state["bundle"])
        yield client


@pytest.fixture
def bundle(storage, tmp_path):
    return load_bundle(storage, FILES, "1", tmp_path / "cache")
