"""Secrets are in the environment and in connections, and shown nowhere. What a whole job leaves: test_policies.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback

import psutil
import pytest
from botocore.exceptions import ClientError

from encode.cli import main
from encode.config import Places
from encode.errors import ConfigError
from encode.outputs import Part
from encode.stack.ports import free_port
from encode.storage import S3Storage

SECRET = "0f3c5a-a-known-secret-5e1b"


@pytest.fixture
def places():
    return Places(
        store="s3://encode/prefix",
        endpoint_url="http://127.0.0.1:1",
        access_key="key",
        secret_key=SECRET,
        serving_key=SECRET,
    )


def test_places_and_stores_do_not_print_their_keys(places):
    storage = S3Storage(places)
    for text in (repr(places), str(places), places.model_dump_json(), repr(storage), storage.uri, str(vars(places))):
        assert SECRET not in text


@pytest.mark.parametrize("field", ["endpoint_url", "tracking_uri", "serving_url"])
def test_an_address_with_a_password_is_refused_without_showing_it(field):
    """Addresses are logged, in the summaries of steps, and registered with the model."""
    with pytest.raises(ConfigError, match=r"address of mlflow\.example: holds a user name or a password") as caught:
        Places(store="s3://encode", **{field: f"https://somebody:{SECRET}@mlflow.example"})
    assert SECRET not in str(caught.value)


def test_the_command_line_says_so_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ENCODE_HOME", str(tmp_path))
    monkeypatch.setenv("ENCODE_STORE", "s3://encode")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:{SECRET}@mlflow.example")
    assert main(["refresh", "--preset", "tiny", "--as-of", "2024-01-01"]) == 2
    told = capsys.readouterr()
    assert "MLFLOW_TRACKING_PASSWORD" in told.err
    assert SECRET not in told.out + told.err


def test_a_store_that_refuses_the_key_is_told_without_the_key(s3_places, monkeypatch, capsys):
    for name, value in {
        "ENCODE_STORE": s3_places.store,
        "AWS_ENDPOINT_URL": s3_places.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_places.access_key,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }.items():
        monkeypatch.setenv(name, value)
    command = ["validate", "--preset", "tiny", "--start", "2024-01-01"]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "SignatureDoesNotMatch" in told.err
    assert SECRET not in told.out + told.err
    monkeypatch.setenv("ENCODE_DEBUG", "1")
    with pytest.raises(ClientError) as caught:
        main(command)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_serving_process_shows_its_keys_neither_in_the_list_of_processes_nor_in_its_log(tmp_path):
    environment = {**os.environ, "ENCODE_WEBHOOK_SECRET": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET}
    port = free_port(())
    (tmp_path / "work" / "store").mkdir(parents=True)
    command = [sys.executable, "-m", "encode.cli", "serve", "--preset", "tiny", "--workdir", str(tmp_path / "work")]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=output, stderr=output)
    try:
        first = psutil.Process(process.pid)
        until = time.monotonic() + 60
        while "Uvicorn running" not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        lines = [" ".join(one.cmdline()) for one in (first, *first.children(recursive=True))]
        listening = {one.laddr.ip for one in first.net_connections("inet") if one.status == psutil.CONN_LISTEN}
    finally:
        process.terminate()
        process.wait(30)
    assert not [line for line in lines if SECRET in line]
    assert listening == {"127.0.0.1"}, "other machines reach it only when somebody says so"
    assert SECRET not in log.read_text()


@pytest.mark.parametrize(
    ("name", "at"), [("../../x", None), ("part-000.arrow", "/etc"), ("part", "interests/../.."), ("a b", None)]
)
def test_a_manifest_cannot_lead_out_of_the_folder_of_snapshots(name, at):
    part = Part(name=name, bytes=1, sha256="0" * 64, at=at)
    with pytest.raises(ConfigError, match=r"is not 1 to 255 of"):
        part.key("interests/space/snapshot")
