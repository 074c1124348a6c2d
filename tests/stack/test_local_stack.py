import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from encode.errors import ArtifactError, ConfigError
from encode.serving.local_snapshot import claimed
from encode.stack import components, health, home, local, policies

SMALL = ("objectstore", "mlflow")


def quiet(line: str) -> None:
    """Nobody reads the progress."""


def running_in(folder: Path) -> list[str]:
    """Command lines of the processes that name `folder` or live in it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            if alive and (str(folder) in line or str(folder) in process.cwd()):
                found.append(line)
    return found


def stack_problem(stack: local.Stack) -> str | None:
    """What its object store still misses, as its administrator sees it."""
    given = stack.environment()
    return health.object_store_problem(
        stack.urls["objectstore"], "encode", given["AWS_ACCESS_KEY_ID"], given["AWS_SECRET_ACCESS_KEY"]
    )


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Object store and MLflow, started while the usual port of the store is taken."""
    folder = tmp_path_factory.mktemp("stack") / "home"
    with ExitStack() as closing:
        taken = closing.enter_context(socket.socket())
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            taken.bind(("127.0.0.1", components.DEFAULT_PORTS["objectstore"]))
            taken.listen()
        try:
            yield local.up(folder, dags_folder=folder, say=quiet, components=SMALL)
        finally:
            local.down(folder, say=quiet)


def client(stack, secret=None):
    environment = stack.environment()
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret or environment["AWS_SECRET_ACCESS_KEY"],
    )


def test_up_is_healthy_and_a_second_up_changes_nothing(stack):
    before = {found.name: found for found in local.status(stack.home)}
    assert [before[name].state for name in components.NAMES] == ["healthy", "healthy", "stopped", "stopped"]
    again = local.up(stack.home, dags_folder=stack.home, say=quiet, components=SMALL)
    assert again == stack
    assert {found.name: found for found in local.status(stack.home)} == before


def test_a_taken_port_is_avoided(stack):
    assert not stack.urls["objectstore"].endswith(f":{components.DEFAULT_PORTS['objectstore']}")


def test_a_wanted_port_that_is_taken_is_an_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"objectstore: port {port} is taken"):
            local.up(
                tmp_path / "home",
                dags_folder=tmp_path,
                ports={"objectstore": port},
                say=quiet,
                components=("objectstore",),
            )
    assert running_in(tmp_path) == []


def test_a_signed_request_succeeds_and_a_wrong_secret_does_not(stack):
    client(stack).put_object(Bucket="encode", Key="test_local_stack/one", Body=b"1")
    listed = client(stack).list_objects_v2(Bucket="encode", Prefix="test_local_stack/")
    assert [found["Key"] for found in listed["Contents"]] == ["test_local_stack/one"]
    with pytest.raises(ClientError) as caught:
        client(stack, secret="wrong").list_objects_v2(Bucket="encode")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    key = stack.environment()["AWS_ACCESS_KEY_ID"]
    assert health.object_store_problem(stack.urls["objectstore"], "encode", key, "wrong").startswith("HTTP 403")


def test_a_store_is_ready_when_its_first_object_can_be_read(stack):
    """It must be read under its own name, whatever characters that has."""
    key = " a+b %2F ü&/one"
    for body in (b"", b"several bytes"):
        client(stack).put_object(Bucket="encode", Key=key, Body=body)
        assert client(stack).list_objects_v2(Bucket="encode", MaxKeys=1)["Contents"][0]["Key"] == key
        assert stack_problem(stack) is None
    client(stack).delete_object(Bucket="encode", Key=key)
    assert stack_problem(stack) is None


@pytest.mark.parametrize(
    ("listing", "problem"),
    [
        (b"<R xmlns='s3'><Contents><Key>a+b%2Bc</Key></Contents></R>", "HTTP 500 no volume yet"),
        (b"<R xmlns='s3'></R>", None),
        (b"<html>another<br></html>", "another program answers on its port"),
    ],
)
def test_a_listing_alone_does_not_make_a_store_ready(listing, problem):
    class Index(http.server.BaseHTTPRequestHandler):
        """Lists, but has no objects: what a store answers before its volumes have reported."""

        def do_GET(self):
            listed = self.path.startswith("/encode?")
            assert listed or self.path == "/encode/a%20b%2Bc"
            self.send_response(200 if listed else 500)
            self.end_headers()
            self.wfile.write(listing if listed else b"no volume yet")

        def log_message(self, *_):
            """Nobody reads the requests."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert health.object_store_problem(url, "encode", "key", "secret") == problem
        finally:
            server.shutdown()


def test_a_bucket_that_is_not_there_is_not_made_by_a_typo(stack):
    with pytest.raises(ClientError, match="NoSuchBucket"):
        client(stack).put_object(Bucket="encoed", Key="k", Body=b"")


def test_mlflow_keeps_artifacts_in_the_object_store(stack):
    url = f"{stack.urls['mlflow']}/api/2.0/mlflow-artifacts/artifacts/test_local_stack/note.txt"
    with urllib.request.urlopen(urllib.request.Request(url, data=b"kept", method="PUT"), timeout=30) as answer:
        assert answer.status == 200
    stored = client(stack).get_object(Bucket="encode", Key="mlflow/test_local_stack/note.txt")
    assert stored["Body"].read() == b"kept"


def test_mlflow_refuses_a_host_name_that_is_not_its_own(stack):
    url = f"{stack.urls['mlflow']}/api/2.0/mlflow/experiments/search?max_results=1"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, headers={"host": "evil.example"}), timeout=30)
    with caught.value as answer:
        assert answer.code == 403


def test_secrets_are_for_the_owner_only_and_clients_are_told_all(stack):
    assert mode(stack.home) == 0o700
    for name in ("credentials.json", "client.env", "state.json", "objectstore/s3.json", "logs/mlflow.log"):
        assert mode(stack.home / name) == 0o600, name
    environment = local.load_client_environment(stack.home)
    assert environment == stack.environment()
    assert environment["ENCODE_STORE"] == "s3://encode"
    assert environment["MLFLOW_TRACKING_URI"] == stack.urls["mlflow"]
    made = home.credentials(stack.home)
    secrets = {made.secret_key, made.airflow_password, made.fernet_key, *made.role_secrets.values()}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            assert not [secret for secret in secrets if secret in line], "a command line is public"


def test_nothing_listens_but_on_the_loopback(stack):
    """Also what a component starts itself, and ports that nobody asked for."""
    listening = set()
    for found in local.status(stack.home):
        if found.pid:
            first = psutil.Process(found.pid)
            for process in (first, *first.children(recursive=True)):
                listening |= {
                    (found.name, socket.laddr.ip, socket.laddr.port)
                    for socket in process.net_connections("inet")
                    if socket.status == psutil.CONN_LISTEN
                }
    entries = home.read_state(stack.home).entries
    assert {ip for _, ip, _ in listening} == {"127.0.0.1"}
    assert {port for name, _, port in listening if name == "objectstore"} <= set(entries["objectstore"].ports.values())
    assert {port for name, _, port in listening if name == "mlflow"} == {entries["mlflow"].ports["main"]}


def test_components_have_the_keys_of_their_roles_and_only_people_have_the_administrators(stack):
    made = home.credentials(stack.home)
    entries = home.read_state(stack.home).entries
    built = {one.name: one.settings for one in local._components(stack.home, entries, Path(), components.NAMES)}
    for name, role in {"mlflow": "mlflow", "serving": "serve"}.items():
        assert built[name]["AWS_ACCESS_KEY_ID"] == f"encode-{role}"
        assert built[name]["AWS_SECRET_ACCESS_KEY"] == made.role_secrets[role]
    for name in ("mlflow", "airflow", "serving"):
        assert made.secret_key not in json.dumps(dict(built[name]))
    assert json.loads(built["airflow"]["AIRFLOW_CONN_ENCODE_TRAIN_STORE"])["login"] == "encode-train"
    assert json.loads(built["airflow"]["AIRFLOW_CONN_ENCODE_STORE"])["login"] == "encode-publish"
    assert stack.environment()["AWS_SECRET_ACCESS_KEY"] == made.secret_key


def test_a_home_of_before_there_were_roles_gets_their_keys_and_keeps_its_own(tmp_path):
    made = home.credentials(tmp_path)
    before = {name: value for name, value in asdict(made).items() if name != "role_secrets"}
    (tmp_path / "credentials.json").write_text(json.dumps(before))
    again = home.credentials(tmp_path)
    assert {name: value for name, value in asdict(again).items() if name != "role_secrets"} == before
    assert set(again.role_secrets) == set(policies.ROLES)
    assert again.role_secrets != made.role_secrets
    assert home.credentials(tmp_path) == again


def test_two_at_work_on_one_home_is_an_error(stack):
    with home.locked(stack.home), pytest.raises(ConfigError, match=rf"process {os.getpid()}\) is at work"):
        local.up(stack.home, dags_folder=stack.home, say=quiet, components=SMALL)


def test_a_dead_component_comes_back_on_its_port_and_its_neighbor_is_left_alone(stack):
    before = {found.name: found for found in local.status(stack.home)}
    killed = psutil.Process(before["objectstore"].pid)
    killed.kill()
    killed.wait(20)  # its port is free only when its last thread has ended
    local.up(stack.home, dags_folder=stack.home, say=quiet, components=SMALL)
    after = {found.name: found for found in local.status(stack.home)}
    assert after["objectstore"].state == "healthy"
    assert after["objectstore"].pid != before["objectstore"].pid
    assert after["objectstore"].url == before["objectstore"].url
    assert after["mlflow"] == before["mlflow"]


def test_down_leaves_no_process_up_finds_the_data_and_clean_removes_it(tmp_path):
    folder = tmp_path / "home"
    for value in (b"kept", None):
        stack = local.up(folder, dags_folder=tmp_path, ports={"objectstore": 0}, say=quiet, components=("objectstore",))
        if value:
            client(stack).put_object(Bucket="encode", Key="k", Body=value)
            assert running_in(folder) != []
            local.down(folder, say=quiet)
            assert running_in(folder) == []
            assert local.load_client_environment(folder) == {}
            url = stack.urls["objectstore"]
    assert stack.urls["objectstore"] == url
    assert client(stack).get_object(Bucket="encode", Key="k")["Body"].read() == b"kept"
    (folder / "notes.txt").write_text("mine")
    (folder / "docs").mkdir()  # `encode docs` writes there
    local.clean(folder, say=quiet)
    assert running_in(folder) == []
    assert [found.name for found in folder.iterdir()] == ["notes.txt"]


def test_clean_leaves_a_server_that_was_started_by_hand_its_snapshots(tmp_path):
    folder = tmp_path / "home"
    with claimed(folder / "snapshots"):
        assert mode(folder) == 0o700, "also when the server makes the home"
        home.make_folder(folder)
        home.open_state(folder)
        (folder / "logs").mkdir()
        with pytest.raises(ConfigError, match="serves from it, nothing was removed; stop it"):
            local.clean(folder, say=quiet)
        assert sorted(found.name for found in folder.iterdir()) == ["lock", "logs", "snapshots", "state.json"]
    local.clean(folder, say=quiet)
    assert not folder.exists()


def test_a_folder_without_a_stack_has_nothing_to_remove(tmp_path):
    (tmp_path / "docs").mkdir()
    said = []
    local.clean(tmp_path, say=said.append)
    assert said == [f"{tmp_path}: nothing to remove"]
    assert (tmp_path / "docs").is_dir()


def test_a_folder_of_somebody_else_is_neither_used_nor_removed(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(ConfigError, match=r"found logs there but no state\.json"):
        local.up(tmp_path, dags_folder=tmp_path, say=quiet)
    with pytest.raises(ConfigError, match="nothing was removed"):
        local.clean(tmp_path, say=quiet)
    (tmp_path / "state.json").write_text('{"made_by": "terraform"}')
    with pytest.raises(ArtifactError, match="terraform"):
        local.clean(tmp_path, say=quiet)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["logs", "state.json"]


def test_nothing_was_started(tmp_path):
    said: list[str] = []
    local.down(tmp_path / "none", say=said.append)
    local.clean(tmp_path / "none", say=said.append)
    assert said == [f"{tmp_path}/none: nothing was started there", f"{tmp_path}/none: nothing to remove"]
    assert {found.state for found in local.status(tmp_path / "none")} == {"stopped"}
    assert not (tmp_path / "none").exists()


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'minio': expected one of objectstore, mlflow"):
        local.up(tmp_path / "home", dags_folder=tmp_path, say=quiet, components=("minio",))
    with pytest.raises(ConfigError, match="expected the folder of the DAG files"):
        local.up(tmp_path / "home", dags_folder=tmp_path / "none", say=quiet)


def test_settings_of_another_platform_are_not_inherited(monkeypatch, tmp_path):
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://production/airflow")
    monkeypatch.setenv("AWS_PROFILE", "production")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "production")
    secret = home.Credentials(*["x"] * 7, role_secrets=dict.fromkeys(policies.ROLES, "secret"))
    store = components.Store("http://127.0.0.1:1", "key", "secret")
    made = components.airflow(
        tmp_path, {"main": 1}, dags_folder=tmp_path, credentials=secret, store=store, mlflow_url="m", serving_url="s"
    )
    environment = made.environment()
    assert [name for name in environment if name.startswith("AWS_")] == []
    assert environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == f"sqlite:///{tmp_path}/airflow.db"
    assert json.loads(environment["AIRFLOW_CONN_ENCODE_STORE"])["extra"]["endpoint_url"] == store.endpoint_url


INTERRUPTED = """
import sys
from pathlib import Path
from encode.stack import local
folder = Path(sys.argv[1])
local.up(folder / "home", dags_folder=folder, ports={"objectstore": 0, "airflow": 0},
         say=lambda line: print(line, flush=True), components=("objectstore", "airflow"))
"""


def test_an_interrupt_in_the_middle_of_up_leaves_nothing_running(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with child:
        for line in child.stdout:
            if re.match("objectstore: healthy", line):
                break
        time.sleep(2)
        assert len(running_in(tmp_path / "home")) >= 2
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        output = child.stdout.read()
    assert "KeyboardInterrupt" in output
    assert "stopping what was started" in output
    assert running_in(tmp_path / "home") == []
    assert {found.state for found in local.status(tmp_path / "home")} == {"stopped"}
    for entry in home.read_state(tmp_path / "home").entries.values():
        assert entry.process is None


def test_the_shared_servers_answer(object_store, mlflow_server):
    problem = health.object_store_problem(
        object_store.endpoint_url, object_store.bucket, object_store.access_key, object_store.secret_key
    )
    assert problem is None
    assert health.mlflow_problem(mlflow_server) is None


KILLED = """
import os, signal
def test(object_store):
    print(object_store.endpoint_url, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_test_session_leaves_no_server(tmp_path):
    (tmp_path / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text())
    (tmp_path / "test_killed.py").write_text(KILLED)
    environment = {name: value for name, value in os.environ.items() if name != "OBJECT_STORE_ENDPOINT_URL"}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-q", f"--basetemp={tmp_path / 'servers'}", str(tmp_path)],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert "http://127.0.0.1:" in ended.stdout
    deadline = time.monotonic() + 10
    while running_in(tmp_path / "servers") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running_in(tmp_path / "servers") == []
