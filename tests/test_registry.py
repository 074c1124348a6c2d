"""How the registry is asked."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow.exceptions import MlflowException

from encode.config import Places, RegistryConfig
from encode.registry import Registry


@pytest.fixture
def busy():
    """Address of a server that is always too busy, and the paths that it was asked for."""
    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_told):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("wished", "expected"), [(None, 4), ("1", 2)])
def test_a_server_that_does_not_answer_is_asked_a_few_times(busy, monkeypatch, wished, expected):
    url, asked = busy
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    if wished:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", wished)
    for name in ("FACTOR", "JITTER"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_BACKOFF_{name}", "0")
    with pytest.raises(MlflowException, match="503"):
        Registry(Places(store="x", tracking_uri=url), RegistryConfig()).by_alias("champion")
    assert len(asked) == expected
