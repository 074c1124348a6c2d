"""The hammer sees what must not be: faults, silence, closed connections, refusals of another form, growing memory."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import pytest

from benchmarks import hammer
from benchmarks.hammer import MOST, Sender, broken, growth
from benchmarks.strange import Strange, damaged, drawn, strange_requests

ANSWERS = {
    "/v1/score": (200, b"{}"),
    "/fault": (500, b'{"detail": "fault"}'),
    "/busy": (503, b'{"detail": "busy"}'),
    "/told": (404, b'{"detail": "Not Found"}'),
    "/text": (404, b"Not Found"),
    "/more": (422, b'{"detail": "no", "more": 1}'),
}


@contextmanager
def server():
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if self.path == "/silent":
                done.wait(20)
            if self.path not in ANSWERS:
                self.close_connection = True
                return
            status, body = ANSWERS[self.path]
            head = f"HTTP/1.1 {status} x\r\ntraceparent: 00\r\nContent-Length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield running.server_address[1]
    finally:
        done.set()
        running.shutdown()
        thread.join()
        running.server_close()


def test_faults_silence_closed_connections_and_other_forms_are_told_apart(monkeypatch):
    monkeypatch.setattr(hammer, "PATIENCE_SECONDS", 2)
    paths = [*ANSWERS, *ANSWERS, "/silent", "/closed", "/closed"]
    with server() as port:
        sender = Sender(port, ["/v1/score"], lambda: 1.0, every=4)
        asyncio.run(sender.send([Strange("GET", path, (), b"") for path in paths]))
    found = sender.storm
    assert (found.faults, found.hung, found.closed, found.misshapen) == (2, 1, 2, 4)
    assert found.statuses["/v1/score", 200] == 2
    assert found.statuses["other", 503] == 2
    assert found.memory == [(4, 1.0), (8, 1.0), (12, 1.0)]
    assert len(found.examples) == 9


def test_growth_is_the_slope_after_the_warm_up():
    memory = [(1_000 * place, 100 + min(place, 20) * 50 + 0.1 * place) for place in range(1, 101)]
    assert growth(memory) == pytest.approx(1.0)
    assert growth(memory[:30]) is None


def test_what_does_not_hold_is_named():
    assert broken(MOST | {"growth_mb_per_10_000": None}) == []
    assert broken(MOST | {"hung": 1, "growth_mb_per_10_000": float("nan")}) == ["hung", "growth_mb_per_10_000"]


def test_requests_are_the_same_for_a_seed_and_differ_from_their_damaged_copies():
    one, other = (drawn(strange_requests("m"), 50, 7) for _ in range(2))
    assert one == other
    random = Random(0)
    assert sum(damaged(request, random) != request for request in one) > 40
    assert all(b"\r\nContent-Length: %d\r\n\r\n" % len(request.body) in request.wire() for request in one)
