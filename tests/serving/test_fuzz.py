"""No request gets a fault, however strange: a short run of what `python -m benchmarks.hammer` does at length."""

import asyncio
import gc
import json
import math
import tracemalloc
from random import Random
from urllib.parse import unquote

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.strange import ARROW, JSON, Strange, arrow_streams, damaged, good_bodies, json_texts, strange_requests
from encode.config import load_config

MODEL = load_config("tiny").registry.model_name
GOOD = good_bodies(MODEL)
SETTINGS = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def loop():
    with asyncio.Runner() as runner:
        yield runner


async def answer_of(app, request):
    """Status, headers and body, without a client that would correct or refuse the request."""
    path, _, query = request.target.partition("?")
    length = (b"content-length", str(len(request.body)).encode())
    scope = {
        "type": "http",
        "http_version": "1.1",
        "scheme": "http",
        "method": request.method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value) for name, value in request.headers] + [length],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message):
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 30)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(one["body"] for one in sent[1:])


def check(app, loop, request):
    """Ask, and return the status of an answer that is as documented."""
    status, headers, body = loop.run(answer_of(app, request))
    assert status < 500 or (status == 503 and b"retry-after" in headers), body
    if status >= 400 and request.method != "HEAD":
        ((name, told),) = json.loads(body).items()
        assert name == ("error" if unquote(request.path).startswith("/v2") else "detail")
        assert isinstance(told, str) or 1 <= len(told) <= 20
    assert (app.state.work.count, app.state.work.arrived) == (0, 0)
    return status, body


# --- drawn -------------------------------------------------------------------------------------------------


@settings(max_examples=250, **SETTINGS)
@given(strange_requests(MODEL), st.integers(0, 2**32))
def test_strange_requests_and_damaged_copies_are_answered_as_documented(app, loop, one_request, number):
    random = Random(number)
    for one in (one_request, damaged(one_request, random), damaged(one_request, random)):
        check(app, loop, one)


@settings(max_examples=250, **SETTINGS)
@given(st.sampled_from(GOOD).flatmap(lambda good: st.tuples(st.just(good[0]), json_texts(good[1]))))
def test_bodies_in_json_are_answered_or_refused_in_every_dialect(app, loop, drawn):
    status, _ = check(app, loop, Strange("POST", drawn[0], (("Content-Type", JSON.encode()),), drawn[1]))
    assert status in (200, 400, 422)


@settings(max_examples=250, **SETTINGS)
@given(arrow_streams(), st.integers(0, 2**32))
def test_arrow_streams_are_answered_with_a_probability_for_each_item_or_refused(app, loop, stream, number):
    whole = Strange("POST", "/v1/score", (("Content-Type", ARROW.encode()),), stream)
    for one in (whole, damaged(whole, Random(number))):
        status, body = check(app, loop, one)
        assert status in (200, 422)
        if status == 200:
            found = pa.ipc.open_stream(body).read_all()["probability"].to_pylist()
            assert len(found) == pa.ipc.open_stream(one.body).read_all().num_rows
            assert all(0 < each < 1 and math.isfinite(each) for each in found)


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_what_is_spoiled_here_is_good_before(app, loop, path, body):
    request = Strange("POST", path, (("Content-Type", JSON.encode()),), json.dumps(body).encode())
    assert check(app, loop, request)[0] == 200


# --- found once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"user_id": 1, "item_ids": [1], "category_ids": [-1] * 250_000}),
        ("/v1/score", {"user_id": 1, "item_ids": [0] * 250_000}),
        ("/v1/score", {"user_id": 1, "item_ids": [1], "recent": [{}] * 250_000}),
        ("/invocations", {"dataframe_records": [{}] * 250_000}),
        ("/invocations", {"inputs": [{}] * 250_000}),
        ("/invocations", {"inputs": {"user_id": [0] * 340_000, "item_id": [1]}}),
        ("/invocations", {"dataframe_split": {"columns": [0] * 340_000, "data": []}}),
        ("/invocations", {"dataframe_split": {"columns": [], "data": [0] * 340_000}}),
        (f"/v2/models/{MODEL}/infer", {"inputs": [{}] * 250_000}),
        (f"/v2/models/{MODEL}/infer", {"inputs": [{"shape": [0.5] * 190_000}]}),
        (f"/v2/models/{MODEL}/infer", {"inputs": [], "outputs": [{}] * 250_000}),
    ],
)
def test_of_a_long_list_of_wrong_values_only_the_first_is_told(app, loop, path, body):
    """All of them took five seconds, in which nobody else was answered, and 80 MB."""
    request = Strange("POST", path, (("Content-Type", JSON.encode()),), json.dumps(body).encode())
    status, told = check(app, loop, request)
    assert status == 422
    assert len(told) < 1_000


def test_of_many_unknown_fields_the_first_twenty_are_told(app, loop):
    body = json.dumps({"user_id": 1, "item_ids": [1]} | {f"field {number}": 0 for number in range(50_000)}).encode()
    status, told = check(app, loop, Strange("POST", "/v1/score", (("Content-Type", JSON.encode()),), body))
    assert status == 422
    assert len(json.loads(told)["detail"]) == 20


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"user_id": 1, ' * 60_000,
        b'{"user_id": "' + b"a" * 1_000_000 + b'"}',
        b'{"user_id": "' + b"\xff" * 1_000_000 + b'"}',
    ],
)
def test_a_body_that_is_refused_is_not_kept_until_cycles_are_collected(app, loop, body):
    """2,100 such requests took 900 MB."""
    request = Strange("POST", "/v1/score", (("Content-Type", JSON.encode()),), body)
    assert check(app, loop, request)[0] in (400, 422)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(10):
            check(app, loop, request)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < 3_000_000  # a worker keeps the latest until its next


@pytest.mark.parametrize("version", ["x", "1.x", "", "1..0", "²"])
def test_metrics_are_told_to_a_scraper_that_asks_for_a_version_that_is_no_number(app, loop, version):
    for kind in ("text/plain", "application/openmetrics-text"):
        accept = ("Accept", f"{kind}; version={version}".encode("latin-1"))
        status, body = check(app, loop, Strange("GET", "/metrics", (accept,), b""))
        assert status == 200
        assert b"encode_requests_total" in body
