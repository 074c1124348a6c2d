"""Requests at once: one is read and answered while another is computed, and each gets what it gets alone."""

from __future__ import annotations

import asyncio
import re
import threading
import time

import httpx
import numpy as np
import pytest
from made import FILES, SPACE, Client, arrow_stream, release_another, score

from encode.config import RegistryConfig
from encode.serving.app import create_app
from encode.serving.arrow import CONTENT_TYPE
from encode.serving.bundle import Bundle
from encode.serving.scoring import num_processors

ITEMS = [10, 11, 12]


def in_json(user):
    return "/v1/score", {"json": {"user_id": user, "item_ids": ITEMS}}


def in_arrow(user):
    body = arrow_stream({"item_id": ITEMS}, str(user))
    return "/v1/score", {"content": body, "headers": {"Content-Type": CONTENT_TYPE}}


def in_v2(user):
    user_id = {"name": "user_id", "datatype": "INT64", "shape": [1], "data": [user]}
    item_id = {"name": "item_id", "datatype": "INT64", "shape": [len(ITEMS)], "data": ITEMS}
    return "/v2/models/encode-ctr/infer", {"json": {"inputs": [user_id, item_id]}}


def at_once(app, requests, meanwhile=lambda _client: asyncio.sleep(0)):
    """Send requests together, do something, and return the answers."""

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://serving") as client:
            answers = [asyncio.ensure_future(client.post(path, **options)) for path, options in requests]
            await meanwhile(client)
            return await asyncio.gather(*answers)

    return asyncio.run(ask())


@pytest.fixture
def threads(monkeypatch):
    """Names of the threads that computed."""
    names, plain = [], Bundle.compute

    def noted(bundle, found):
        names.append(threading.current_thread().name)
        return plain(bundle, found)

    monkeypatch.setattr(Bundle, "compute", noted)
    return names


def test_each_gets_what_it_gets_alone(client, threads):
    requests = [write(user) for user in range(1, 13) for write in (in_json, in_arrow, in_v2)]
    alone = [client.post(path, **options) for path, options in requests]
    assert set(threads) == {threading.current_thread().name}, "the only request is computed where it is read"
    threads.clear()
    together = at_once(client.app, requests)
    assert {answer.status_code for answer in alone + together} == {200}
    assert [answer.content for answer in together] == [answer.content for answer in alone]
    assert len({answer.content for answer in together}) == len(requests), "each of another user or in another dialect"
    assert sum(name.startswith("scoring") for name in threads) >= len(requests) - 1


def test_others_are_answered_while_one_is_computed(client, monkeypatch):
    alone = score(client)
    go_on, plain = threading.Event(), Bundle.compute

    def slow(bundle, found):
        assert go_on.wait(10)
        return plain(bundle, found)

    monkeypatch.setattr(Bundle, "compute", slow)

    async def meanwhile(other):
        while client.app.state.work.count < 2:
            await asyncio.sleep(0.001)
        for path in ("/health", "/v1/release"):
            assert (await other.get(path)).status_code == 200
        go_on.set()

    answers = at_once(client.app, [in_json(1)] * 2, meanwhile)
    assert [answer.json() for answer in answers] == [alone] * 2


def test_failures_beside_the_event_loop_withdraw_a_bundle_too(client, storage, registry, monkeypatch):
    release_another(client, storage, registry)
    plain = Bundle.compute

    def failing(bundle, found):
        if bundle.model_version == "2":
            raise FloatingPointError("made to fail")
        return plain(bundle, found)

    monkeypatch.setattr(Bundle, "compute", failing)
    assert {answer.status_code for answer in at_once(client.app, [in_json(1)] * 5)} == {500}
    assert score(client)["bundle"]["space"] == SPACE.id


def test_to_wait_for_a_thread_is_not_counted_as_scoring(own_places, storage, registry, tmp_path, monkeypatch):
    registry.release("1", FILES, SPACE)
    client = Client(create_app(own_places, RegistryConfig(), tmp_path / "cache", seconds=3600, threads=1))
    client.app.state.follower.look()
    count, seconds, plain = 8, 0.05, Bundle.compute

    def slow(bundle, found):
        time.sleep(seconds)
        return plain(bundle, found)

    monkeypatch.setattr(Bundle, "compute", slow)
    at_once(client.app, [in_json(1)] * count)
    found = re.search(r'encode_model_seconds_sum\{role="champion"\} (\S+)', client.get("/metrics").text)
    assert count * seconds <= float(found[1]) < 2 * count * seconds, "with the waits it would be 4.5 times that"


def test_numbers_that_are_none_are_refused_there_too(client, monkeypatch):
    plain = Bundle.compute
    monkeypatch.setattr(Bundle, "compute", lambda bundle, found: plain(bundle, found) * np.nan)
    assert [answer.status_code for answer in at_once(client.app, [in_json(1)] * 2)] == [500, 500]


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        (None, 6),
        ("max 100000", 6),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("900000 100000", 6),
    ],
)
def test_processors_are_those_that_the_container_may_use(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(6)))
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert num_processors(tmp_path / "cpu.max") == expected
