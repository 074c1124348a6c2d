"""The load generator, against real servers that are slow, refuse or hang up."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from benchmarks import load
from benchmarks.load import as_request, ask_in_turn, highest_rate, offer, poisson

REQUEST = as_request("/v1/score", "application/json", b"{}")


@contextmanager
def server(seconds=0.0, status=lambda number: 200):
    """A server that answers one request after the other; a status of None hangs up."""
    at_work, numbers = threading.Lock(), iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet, or the second waits for an acknowledgement

        def do_POST(self):
            assert self.rfile.read(int(self.headers["Content-Length"])) == b"{}"
            with at_work:
                time.sleep(seconds)
                found = status(next(numbers))
            if found is None:
                self.close_connection = True
                return
            self.send_response(found)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"a\r\n")

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield running.server_address[1]
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


@pytest.mark.parametrize("connections", [1, 64])
def test_a_request_that_waits_for_a_stalled_server_is_charged_with_its_wait(monkeypatch, connections):
    """Due every 10 ms and answered every 20: the k-th takes 20 + 10 k ms, even where one connection sends it late."""
    monkeypatch.setattr(load, "CONNECTIONS", connections)
    with server(0.02) as port:
        trial = offer(port, [REQUEST], np.arange(30) / 100)
        alone = ask_in_turn(port, [REQUEST], 0.2)
    assert trial.failed == 0
    assert trial.ms[-1] > 300
    assert 150 < trial.quantile(0.5) < trial.quantile(0.99)
    assert np.median(trial.late_ms) < 20 < alone.quantile(0.5) < 60


def test_answers_that_are_refusals_are_failures():
    with server(status=lambda number: 503 if number % 3 == 2 else 200) as port:
        trial = offer(port, [REQUEST], np.arange(30) / 1000)
    assert trial.failed == 10
    assert trial.quantile(0.5) < np.inf
    assert trial.quantile(0.99) == np.inf


def test_a_server_that_hangs_up_fails_that_request_only():
    with server(status=lambda number: None if number == 4 else 200) as port:
        assert offer(port, [REQUEST], np.arange(20) / 200).failed == 1


def test_it_gives_up_on_a_rate_that_is_lost():
    with server(0.02) as port:
        trial = offer(port, [REQUEST], np.arange(1_000) / 100, give_up_ms=30)
    assert trial.seconds < 5
    assert trial.failed > 500


def test_clients_work_side_by_side():
    with server(0.02) as port:
        trial = ask_in_turn(port, [REQUEST], 0.4, clients=4)
    assert trial.failed == 0
    assert 60 < trial.quantile(0.5) < 160


def test_arrivals_have_the_rate_that_is_asked_for():
    arrivals = poisson(200, 20)
    assert len(arrivals) == 4_000
    assert arrivals[-1] == pytest.approx(20, rel=0.1)
    assert np.diff(arrivals).std() == pytest.approx(1 / 200, rel=0.1)
    assert len(poisson(1, 2, least=100)) == 100


@pytest.mark.parametrize("first", [3.0, 50.0, 80.0, 400.0])
def test_the_highest_rate_is_found_from_below_and_from_above(first):
    tried = []
    found = highest_rate(lambda rate: tried.append(rate) or rate <= 70, first, 4)
    assert 70 / 2 ** (1 / 16) <= found <= 70
    assert len(tried) <= 10
    assert len(set(tried)) == len(tried)


def test_a_server_that_sustains_nothing_has_no_highest_rate():
    assert highest_rate(lambda _: False, 100, 4) == 0
