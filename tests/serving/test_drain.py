"""On SIGTERM a serving process is not ready at once, finishes what is under way, and ends with status 0."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

import httpx
import pytest

from encode.cli import main

BODY = b'{"user_id": 1, "item_ids": [10, 11]}'
HEAD = b"POST /v1/score HTTP/1.1\r\nHost: serving\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def begin(serving):
    """Begin a request: all but the end of its body."""
    connection = socket.create_connection(("127.0.0.1", serving.port), timeout=30)
    connection.sendall(HEAD % len(BODY) + BODY[:-5])
    return connection


def under_way(serving, count):
    """Begin requests and wait until the process has what was sent of all of them."""
    begun = [begin(serving) for _ in range(count)]
    while f"encode_arriving_bytes {count * len(BODY[:-5])}.0" not in httpx.get(f"{serving.url}/metrics").text:
        time.sleep(0.02)
    return begun


def finish(connection):
    """Send the rest and return the whole answer, up to the end of the connection."""
    with connection:
        connection.sendall(BODY[-5:])
        answer = b""
        while more := connection.recv(65_536):
            answer += more
        return answer


def test_it_is_not_ready_at_once_and_still_answers_for_a_while(start_serving):
    serving = start_serving("--drain-delay", "2", "--receive-timeout", "60")
    with httpx.Client(base_url=serving.url) as client:
        serving.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while client.get("/ready").status_code == 200:
            assert time.monotonic() - began < 1
        for path in ("/ready", "/ping", "/v2/health/ready", "/v2/models/encode-ctr/ready"):
            assert client.get(path).status_code == 503
        assert client.get("/ready").json() == {"detail": "not ready: draining"}
        assert "encode_ready 0.0" in client.get("/metrics").text
        assert client.get("/health").status_code == 200
    assert httpx.post(f"{serving.url}/v1/score", content=BODY, headers={"Content-Type": "application/json"}).is_success
    assert serving.process.wait(30) == 0
    assert time.monotonic() - began > 2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{serving.url}/health")


def test_requests_under_way_are_finished(start_serving):
    serving = start_serving("--drain-delay", "0", "--receive-timeout", "60", "--drain-timeout", "60")
    begun = under_way(serving, 5)
    serving.process.send_signal(signal.SIGTERM)
    until = time.monotonic() + 20
    while True:
        try:
            httpx.get(f"{serving.url}/health")
        except httpx.TransportError:
            break
        assert time.monotonic() < until, "still listening"
    with pytest.raises(subprocess.TimeoutExpired):
        serving.process.wait(1)
    for connection in begun:
        answer = finish(connection)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b'"probabilities":[0.' in answer
    assert serving.process.wait(30) == 0
    assert [one["status"] for one in serving.requests() if one["route"] == "/v1/score"] == [200] * 5


def test_what_does_not_finish_is_cut_off_in_time(start_serving):
    serving = start_serving("--drain-delay", "0", "--receive-timeout", "60", "--drain-timeout", "1")
    begun = under_way(serving, 2)
    began = time.monotonic()
    assert serving.stop() == 0
    assert 1 <= time.monotonic() - began < 10
    for connection in begun:
        connection.close()


def test_a_second_signal_ends_the_wait_for_load_balancers(start_serving):
    serving = start_serving("--drain-delay", "600")
    serving.process.send_signal(signal.SIGTERM)
    while httpx.get(f"{serving.url}/ready").status_code == 200:
        time.sleep(0.02)
    assert serving.stop() == 0


def test_ctrl_c_does_not_wait(start_serving):
    serving = start_serving("--drain-delay", "600")
    assert serving.stop(signal.SIGINT) == 130


def test_a_store_that_hangs_does_not_hold_it_up(start_serving, workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    for part in (copy / "store" / "interests").rglob("*.arrow"):
        part.unlink()
        os.mkfifo(part)  # whoever opens it waits for somebody to write
    serving = start_serving("--drain-delay", "0", workdir=copy, until="/health")
    writing, patience = None, time.monotonic() + 60
    while writing is None:
        assert time.monotonic() < patience
        with contextlib.suppress(OSError):  # as long as nobody reads
            writing = os.open(part, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.1)
    began = time.monotonic()
    assert serving.stop() == 0
    assert time.monotonic() - began < 10
    os.close(writing)


def test_a_folder_of_snapshots_is_of_one_process_until_it_ends(start_serving, workdir, tmp_path, capsys):
    serving = start_serving()
    command = ["serve", "--preset", "tiny", "--workdir", str(workdir), "--cache", str(tmp_path / "cache")]
    assert main(command) == 2
    assert "another process serves from it; give each one a --cache of its own" in capsys.readouterr().err
    serving.end()
    start_serving()


def test_answers_close_their_connection_while_it_drains(start_serving):
    """A client that kept it would send its next request into a connection that is closed at that moment."""
    serving = start_serving("--drain-delay", "600")
    asked = {"content": BODY, "headers": {"Content-Type": "application/json"}}
    with httpx.Client(base_url=serving.url) as client:
        assert "Connection" not in client.post("/v1/score", **asked).headers
        serving.process.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code == 200:
            time.sleep(0.02)
        answers = [client.post("/v1/score", **asked) for _ in range(3)]
    assert [(answer.status_code, answer.headers["Connection"]) for answer in answers] == [(200, "close")] * 3
    assert serving.stop() == 0
