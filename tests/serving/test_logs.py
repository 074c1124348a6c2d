"""A line of JSON for each request, in the trace that it came with."""

import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encode.serving.bundle import Bundle
from encode.serving.keys import hash_of
from encode.serving.logs import REQUESTS, JsonLines
from encode.serving.trace import continue_trace

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{PARENT}-01"
FORM = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-0([01])")
MESSAGE = "secret_" + "message"
GOOD = {"user_id": 271828182, "item_ids": [10, 314159265]}


@pytest.fixture
def lines():
    """What is logged of requests, as written."""
    written = []
    handler = logging.Handler()
    handler.setFormatter(JsonLines())
    handler.emit = lambda record: written.append(handler.format(record))
    REQUESTS.addHandler(handler)
    REQUESTS.setLevel(logging.INFO)
    yield written
    REQUESTS.removeHandler(handler)


def test_a_request_leaves_one_line(make_client, lines, released):
    answer = make_client().post("/v1/score", json=GOOD, headers={"traceparent": VALID})
    [line] = map(json.loads, lines)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert 0 < line.pop("ms") < 60_000
    assert line == {
        "level": "info",
        "method": "POST",
        "route": "/v1/score",
        "status": 200,
        "candidates": 2,
        "bundle": released.id,
        "trace_id": TRACE,
        "span_id": answer.headers["traceparent"].split("-")[2],
    }


def test_refusals_and_faults_have_their_level(make_client, lines, monkeypatch):
    client = make_client()
    client.post("/v1/score", json={})
    client.get("/nowhere")
    make_client(bundle=None).get("/ready")
    monkeypatch.setattr(Bundle, "score", lambda *_: 1 / 0)
    client.post("/v1/score", json=GOOD)
    found = [json.loads(line) for line in lines]
    assert [(one["level"], one["status"], one["route"]) for one in found] == [
        ("warning", 422, "/v1/score"),
        ("warning", 404, "unrouted"),
        ("warning", 503, "/ready"),
        ("error", 500, "/v1/score"),
    ]
    assert found[-1]["error"] == "ZeroDivisionError"
    assert any("in score" in frame for frame in found[-1]["at"])


def test_no_line_holds_a_body_a_path_or_a_key(make_client, lines, monkeypatch):
    client = make_client(hashes={hash_of("ek_known")})
    headers = {"Authorization": "Bearer ek_known"}
    client.post("/v1/score", json=GOOD, headers=headers)
    client.post("/v1/score", json=GOOD | {"secret_field": 1}, headers=headers)
    client.post("/v1/score", json=GOOD, headers={"Authorization": "Bearer ek_other"})
    client.get("/v1/users/271828182/interests?item_id=314159265", headers=headers)
    client.get("/secret_path?secret_query", headers=headers)

    def fault(_bundle, user_id, *_more):
        raise ValueError(f"{user_id} {MESSAGE}")

    monkeypatch.setattr(Bundle, "score", fault)
    client.post("/v1/score", json=GOOD, headers=headers)
    assert len(lines) == 6
    assert not re.search("271828182|314159265|secret_[fpqm]|ek_", "".join(lines))


def test_other_records_are_lines_of_json_as_well():
    try:
        raise OSError('a "quoted"\nline')
    except OSError as error:
        record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, "not %s", ("well",), (None, error, None))
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line).items() >= {"logger": "uvicorn.error", "level": "warning", "message": "not well"}.items()
    assert 'a "quoted"\nline' in json.loads(line)["error"]


# --- trace context -----------------------------------------------------------------------------------------


def test_a_trace_is_continued_by_a_new_span(make_client):
    for sampled in "01":
        given_, _, _ = VALID.rpartition("-")
        answer = make_client().get("/health", headers={"traceparent": f"{given_}-0{sampled}"})
        trace, span, flag = FORM.fullmatch(answer.headers["traceparent"]).groups()
        assert (trace, flag) == (TRACE, sampled)
        assert span != PARENT


@pytest.mark.parametrize(
    "header",
    [
        f"cc-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-what-comes-later",
        f"00-{TRACE}-{PARENT}-03",
        f"00-{TRACE}-{PARENT}-ff",
    ],
)
def test_later_versions_and_other_flags_are_read_as_far_as_they_are_known(header):
    found = continue_trace([header])
    assert (found.trace_id, found.sampled) == (TRACE, True)
    assert FORM.fullmatch(found.header())


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        [VALID, VALID],
        [VALID.upper()],
        [f"{VALID}-more"],
        [f"{VALID}."],
        [f"cc-{TRACE}-{PARENT}-01.more"],
        [f"ff-{TRACE}-{PARENT}-01"],
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE[:-1]}-{PARENT}-01"],
        [f"00-{TRACE}-{PARENT}-1"],
        [f"0-{TRACE}-{PARENT}-01"],
        [f" {VALID}"],
        [f"{VALID}\n"],
        [f"00_{TRACE}_{PARENT}_01"],
    ],
)
def test_a_trace_that_is_not_valid_is_begun_anew(headers):
    found = continue_trace(headers)
    assert found.trace_id != TRACE
    assert FORM.fullmatch(found.header()).group(1, 2) == (found.trace_id, found.span_id)
    assert found.sampled is False


@given(st.lists(st.text("0123456789abcdef-f", max_size=70) | st.text(max_size=60), max_size=3))
def test_whatever_comes_a_trace_is_valid(headers):
    trace, span, _ = FORM.fullmatch(continue_trace(headers).header()).groups()
    assert int(trace, 16)
    assert int(span, 16)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255))
def test_a_valid_trace_is_kept(trace, parent, flags):
    found = continue_trace([f"00-{trace:032x}-{parent:016x}-{flags:02x}"])
    assert int(found.trace_id, 16) == trace
    assert found.sampled == bool(flags % 2)
    assert int(found.span_id, 16) not in (0, parent)
