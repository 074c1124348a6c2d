"""Limits hold before anything is parsed, and whoever watches the process is always answered."""

import asyncio
import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest

from encode.serving.bundle import Asked, Bundle
from encode.serving.limits import Limits

GOOD = {"user_id": 1, "item_ids": [10, 11]}
ROWS = {"inputs": {"user_id": [1, 1], "item_id": [10, 11]}}
"""For `/invocations`, which has a thread of its own: what waits there does not hold the event loop."""
BODY = json.dumps(GOOD).encode()
LENGTH = len(BODY)
JSON = {"Content-Type": "application/json"}
PROBES = ("/health", "/ready", "/ping", "/metrics", "/v2/health/live", "/v2/health/ready")


@pytest.fixture
def go_on(monkeypatch):
    """An event without which nothing is scored."""
    event, plain = threading.Event(), Bundle.score

    def slow(bundle, *arguments):
        assert event.wait(30)
        return plain(bundle, *arguments)

    monkeypatch.setattr(Bundle, "score", slow)
    return event


def chunks(size, count):
    for _ in range(count):
        yield b" " * size


def begin(serving, sent=BODY[:5], declared=LENGTH):
    """Connect, send the headers of a request and some of its body."""
    connection = socket.create_connection(("127.0.0.1", serving.port), timeout=30)
    head = f"POST /v1/score HTTP/1.1\r\nHost: serving\r\nContent-Type: application/json\r\nContent-Length: {declared}"
    connection.sendall(head.encode() + b"\r\n\r\n" + sent)
    return connection


def answer_of(connection):
    """Read status and body of the answer, up to the end of the connection or of the body."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += connection.recv(65_536)
    head, _, body = found.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)
    return int(head.split()[1]), json.loads(body)


# --- size --------------------------------------------------------------------------------------------------


def test_a_body_may_be_as_large_as_allowed_and_no_larger(make_client):
    client = make_client(limits=Limits(max_body_bytes=len(BODY)))
    assert client.post("/v1/score", content=BODY, headers=JSON).status_code == 200
    assert client.post("/v1/score", content=iter([BODY]), headers=JSON).status_code == 200
    for content in (BODY + b" ", iter([BODY, b" "])):
        answer = client.post("/v1/score", content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json() == {"detail": f"body of more than {len(BODY)} bytes, which is the most"}
        assert answer.headers["Connection"] == "close"
    assert client.post("/v2/models/m/infer", content=BODY * 2).json()["error"].startswith("body of more than")


def test_a_large_body_is_refused_while_it_is_sent(start_serving):
    serving = start_serving()
    with httpx.Client(base_url=serving.url) as client:
        for content in (b" " * 50_000_000, chunks(100_000, 500)):
            assert client.post("/v1/score", content=content).status_code == 413
        assert client.post("/v1/score", json=GOOD).status_code == 200


def test_the_largest_request_that_is_allowed_fits_into_the_default(make_client):
    most = 2**63 - 1
    recent = [{"item_id": most, "category_id": most, "timestamp": most}] * 1_000
    body = {"user_id": most, "item_ids": [most] * 5_000, "category_ids": [most] * 5_000, "recent": recent}
    assert make_client().post("/v1/score", content=json.dumps(body, indent=1), headers=JSON).status_code == 200


# --- arrival -----------------------------------------------------------------------------------------------


def test_a_slow_client_is_told_so_and_disconnected(start_serving):
    serving = start_serving("--receive-timeout", "0.5")
    began = time.monotonic()
    with begin(serving) as silent:
        assert answer_of(silent) == (408, {"detail": "5 bytes in 0.5 s, but not the whole body"})
        assert 0.4 < time.monotonic() - began < 5
        assert silent.recv(1) == b"", "the connection is closed"
    with begin(serving) as dripping, pytest.raises(OSError):  # noqa: PT012
        for byte in BODY[5:]:
            time.sleep(0.1)
            dripping.sendall(bytes([byte]))
    assert [one["status"] for one in serving.requests() if one["route"] == "unrouted"] == [408, 408]


def test_a_client_that_leaves_gives_its_place_back(start_serving):
    serving = start_serving("--max-requests", "1")
    begin(serving).close()
    for _ in range(100):
        if httpx.post(f"{serving.url}/v1/score", json=GOOD).status_code == 200:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("its place is still taken")
    assert 499 in [one["status"] for one in serving.requests()]


# --- requests at work --------------------------------------------------------------------------------------


def test_more_requests_than_places_are_told_to_come_back(make_app, go_on):
    app = make_app(limits=Limits(max_requests=2, deadline_seconds=60))

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://serving") as client:
            two = [asyncio.create_task(client.post("/invocations", json=ROWS)) for _ in range(2)]
            while app.state.work.count < 2:
                await asyncio.sleep(0.01)
            for _ in range(3):
                refused = await client.post("/invocations", json=ROWS)
                assert refused.status_code == 503
                assert refused.headers["Retry-After"] == "1"
                assert refused.json() == {"detail": "2 requests at work, which is the most; try again"}
            assert [(await client.get(path)).status_code for path in PROBES] == [200] * len(PROBES)
            told = (await client.get("/metrics")).text
            assert "encode_requests_at_work 2.0" in told
            assert "encode_shed_requests_total 3.0" in told
            go_on.set()
            assert [(await one).status_code for one in two] == [200, 200]
            assert (await client.post("/invocations", json=ROWS)).status_code == 200
            assert "encode_requests_at_work 0.0" in (await client.get("/metrics")).text

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_bodies_that_are_still_arriving_take_nobodys_place_but_no_more_memory_than_agreed(start_serving):
    serving = start_serving("--max-requests", "2", "--max-body", "100", "--receive-timeout", "60")
    slow = [begin(serving) for _ in range(30)]  # 150 of 200 bytes
    for _ in range(3):
        assert httpx.post(f"{serving.url}/v1/score", json=GOOD).status_code == 200
    with begin(serving, sent=b" " * 60, declared=90) as one_too_many:
        refused = {"detail": "more than 200 bytes of bodies are arriving, which is the most; try again"}
        assert answer_of(one_too_many) == (503, refused)
        assert one_too_many.recv(1) == b"", "the connection is closed"
    for connection in slow:
        connection.sendall(BODY[5:])
        assert answer_of(connection)[0] == 200
        connection.close()
    assert "encode_shed_requests_total 1.0" in httpx.get(f"{serving.url}/metrics").text


@pytest.mark.parametrize("status", [413, 422, 404, 200])
def test_every_answer_gives_its_place_back(make_client, status):
    client = make_client(limits=Limits(max_body_bytes=100, max_requests=1))
    path, body = {413: ("/v1/score", b" " * 101), 422: ("/v1/score", b"{}"), 404: ("/x", b"")}.get(
        status, ("/v1/score", BODY)
    )
    for _ in range(3):
        assert client.post(path, content=body, headers=JSON).status_code == status
    assert client.app.state.work.count == 0


def test_a_fault_gives_its_place_back_and_is_answered(make_client, monkeypatch):
    def fault(*_arguments):
        raise RuntimeError("user 1 and key ek_secret")

    monkeypatch.setattr(Bundle, "score", fault)
    client = make_client(limits=Limits(max_requests=1))
    for _ in range(2):
        answer = client.post("/v1/score", json=GOOD)
        assert answer.status_code == 500
        assert answer.json()["detail"] == f"fault of the server, trace {answer.headers['traceparent'][3:35]} in its log"
    assert client.app.state.work.count == 0


# --- deadline ----------------------------------------------------------------------------------------------


def test_a_request_over_its_deadline_is_answered_but_keeps_its_place_while_it_is_worked_on(make_app, go_on):
    app = make_app(limits=Limits(deadline_seconds=0.2, max_requests=1))

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://serving") as client:
            late = await client.post("/invocations", json=ROWS)
            assert (late.status_code, late.json()) == (503, {"detail": "not answered in 0.2 s"})
            assert late.headers["Retry-After"] == "1"
            assert (await client.post("/invocations", json=ROWS)).json()["detail"].startswith("1 requests at work")
            assert (await client.get("/health")).status_code == 200
            go_on.set()
            while app.state.work.count:
                await asyncio.sleep(0.01)
            app.state.follower.bundle.score(Asked(1, np.array([10])))
            assert (await client.post("/invocations", json=ROWS)).status_code == 200

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_a_client_that_does_not_read_its_answer_gives_its_place_back(make_app):
    """What an application sends waits for as long as nothing more fits into the buffers of the connection."""
    app, sent = make_app(limits=Limits(deadline_seconds=0.2)), []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "query_string": b"", "headers": headers}

    async def receive():
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message):
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def ask():
        await asyncio.wait_for(app(scope, receive, send), 20)
        await asyncio.sleep(0)  # the cancelled task ends
        assert app.state.work.count == 0

    asyncio.run(ask())
    assert sent == ["http.response.start", "http.response.body"]
