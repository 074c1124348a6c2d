"""The serving application on a real bundle, without sockets: it scores as training did, and says what it assumed."""

from __future__ import annotations

import io
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made import (
    AS_OF,
    END,
    FILES,
    HISTORIES,
    MODEL,
    READER,
    SETTINGS,
    SPACE,
    UNKNOWN_USER,
    VOCABULARY,
    Client,
    make_model,
    refresh,
    release_another,
    score,
    wait,
)

from encode.config import RegistryConfig
from encode.data.impressions import Impressions
from encode.evaluate.reading import predict
from encode.evaluate.replay import make_replay
from encode.interests.clustered import cluster_histories
from encode.interests.extract import state_of
from encode.interests.snapshots import folder_of, write_space
from encode.model.files import read_user
from encode.pointers import read_pointer
from encode.schema import SECONDS_PER_DAY, day_start
from encode.serving.app import create_app
from encode.serving.bundle import Asked, Behavior, Bundle
from encode.serving.messages import MAX_CANDIDATES

# --- train-serve parity ------------------------------------------------------------------------------------


def test_serving_scores_as_replay_does(bundle):
    """Impressions all over the day after the snapshot: what came since is given as recent behaviors."""
    rng = np.random.default_rng(1)
    count = 200
    user = np.sort(rng.integers(0, len(HISTORIES), count))
    item = rng.integers(1, 60, count)
    at = day_start(AS_OF) + rng.integers(0, SECONDS_PER_DAY, count)
    at[::10] = day_start(AS_OF)  # nothing since the snapshot
    at = at[np.lexsort((at, user))]
    shown = Impressions(user, item, 1 + item % 4, np.zeros(count, np.int8), at, np.ones(count, bool))
    replay = make_replay(HISTORIES, shown, np.full(count, day_start(AS_OF)), VOCABULARY, MODEL.recent_length)
    expected = predict(SPACE.items, READER, replay, partial(cluster_histories, clustering=SETTINGS.clustering))
    found, since = [], []
    for place in range(count):
        rows = range(HISTORIES.offsets[user[place]], HISTORIES.offsets[user[place] + 1])
        recent = [
            Behavior(*(int(column[i]) for column in (HISTORIES.item_ids, HISTORIES.category_ids, HISTORIES.timestamps)))
            for i in rows
            if day_start(AS_OF) <= HISTORIES.timestamps[i] < at[place]
        ]
        items, categories = item[place : place + 1], 1 + item[place : place + 1] % 4
        found += bundle.score(
            Asked(int(HISTORIES.user_ids[user[place]]), items, categories, recent)
        ).probabilities.tolist()
        since.append(len(recent))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert min(since) == 0
    assert max(since) > MODEL.recent_length
    assert expected.std() > 0.01


def test_recent_behaviors_count_as_if_they_had_been_in_the_history(client):
    """And change the score."""
    day = day_start(AS_OF)
    recent = [{"item_id": 20, "category_id": 3, "timestamp": day + 5}, {"item_id": 33, "timestamp": day + 60}]
    changed = score(client, recent=recent)["probabilities"]
    assert np.abs(np.subtract(changed, score(client)["probabilities"])).max() > 1e-4
    state = state_of(client.app.state.follower.bundle.snapshot.find(1), SPACE)
    own = state.recent[state.recent != 0]
    both = np.concatenate([own, VOCABULARY.index(np.array([20, 33]))])[-MODEL.recent_length :]
    user = state._replace(recent=both)
    logit = read_user(READER, SPACE.items, user, torch.from_numpy(VOCABULARY.index(np.array([10, 11, 12]))))
    assert changed == pytest.approx(torch.sigmoid(logit).tolist(), abs=1e-6)


def test_more_recent_behaviors_than_are_read_push_out_the_oldest(client):
    day = day_start(AS_OF)
    recent = [{"item_id": 10 + place, "timestamp": day + place} for place in range(MODEL.recent_length + 3)]
    changed = score(client, recent=recent)["probabilities"]
    assert changed == score(client, recent=recent[3:])["probabilities"]
    assert changed == score(client, recent=recent[::-1])["probabilities"], "given in any order"
    assert changed != score(client, recent=recent[:-3])["probabilities"]


def test_other_candidates_change_no_score(client):
    together = score(client, item_ids=range(10, 50))["probabilities"]
    for place in (0, 17, 39):
        assert score(client, item_ids=[10 + place])["probabilities"] == pytest.approx([together[place]], abs=1e-6)
    assert score(client, item_ids=range(49, 9, -1))["probabilities"] == pytest.approx(together[::-1], abs=1e-6)
    assert len(set(together)) > 30


# --- answers -----------------------------------------------------------------------------------------------


def test_an_answer_says_what_it_came_from(client, storage):
    answer = score(client, user_id=3)
    pointer, _ = read_pointer(storage, folder_of(SPACE.id))
    assert (answer["user_id"], answer["item_ids"]) == (3, [10, 11, 12])
    assert all(0 < p < 1 for p in answer["probabilities"])
    assert answer["bundle"] == {
        "id": client.app.state.follower.bundle.id,
        "model_version": "1",
        "space": SPACE.id,
        "snapshot": pointer.snapshot,
        "as_of": "2024-03-11",
    }
    assert answer["fallbacks"] == {"unknown_user": False, "unknown_items": [], "stale_snapshot": False}


def test_an_unknown_user_is_answered_and_reported(client):
    answer = score(client, user_id=UNKNOWN_USER)
    assert answer["fallbacks"]["unknown_user"] is True
    other = score(client, user_id=UNKNOWN_USER + 1)
    assert answer["probabilities"] == other["probabilities"]
    assert answer["probabilities"] != score(client, user_id=1)["probabilities"]
    assert all(math.isfinite(p) for p in answer["probabilities"])


def test_an_unknown_item_is_answered_and_reported(client):
    answer = score(client, item_ids=[10, 7_000, 8_000, 2**63 - 1])
    assert answer["fallbacks"]["unknown_items"] == [7_000, 8_000, 2**63 - 1]
    assert answer["probabilities"][1] == answer["probabilities"][2] == answer["probabilities"][3]
    assert answer["probabilities"][0] != answer["probabilities"][1]


def test_an_unknown_item_is_scored_as_its_category(client):
    items, categories = [7_000, 8_000, 9_000, 6_000, 10], [1, 2, 77, 0, 3]
    answer = score(client, item_ids=items, category_ids=categories)
    first, second, unheard, none, known = answer["probabilities"]
    assert len({first, second, unheard}) == 3
    assert unheard == none == pytest.approx(score(client, item_ids=[7_000])["probabilities"][0], abs=1e-6)
    assert known == pytest.approx(score(client, item_ids=[10])["probabilities"][0], abs=1e-6), "its own category counts"
    assert answer["fallbacks"]["unknown_items"] == items[:4]


def test_a_stale_snapshot_is_reported(storage, own_places, registry, tmp_path):
    registry.release("1", FILES, SPACE)
    for day, stale in ((13, False), (14, True)):
        now = datetime(2024, 3, day, 23, tzinfo=UTC)
        app = create_app(own_places, RegistryConfig(), tmp_path / "cache", max_age_days=2, now=lambda now=now: now)
        app.state.follower.look()
        assert score(Client(app))["fallbacks"]["stale_snapshot"] is stale


def test_interests_are_explained(storage, client):
    storage.put("items/items.parquet", item_names({10: "bread", 11: "milk"}))
    client.app.state.follower.bundle = None
    client.app.state.follower.look()
    answer = client.get("/v1/users/1/interests", params={"item_id": 10}).json()
    sizes = [one["size"] for one in answer["interests"]]
    own = slice(HISTORIES.offsets[0], HISTORIES.offsets[1])
    assert sum(sizes) == (HISTORIES.timestamps[own] < day_start(AS_OF)).sum()
    assert sizes == sorted(sizes, reverse=True)
    assert sum(one["weight"] for one in answer["interests"]) == pytest.approx(1)
    itself = answer["attention_to_itself"]
    assert sum(one["attention"] for one in answer["interests"]) + itself == pytest.approx(1, abs=1e-5)
    had = HISTORIES.item_ids[own][HISTORIES.timestamps[own] < day_start(AS_OF)]
    assert (itself > 0) == (10 in had)
    new = next(item for item in range(10, 60) if item not in had)
    assert client.get("/v1/users/1/interests", params={"item_id": new}).json()["attention_to_itself"] == 0
    named = {item["item_id"]: item["name"] for one in answer["interests"] for item in one["top_items"]}
    assert set(named) <= set(HISTORIES.item_ids[own].tolist())
    assert all(name == {10: "bread", 11: "milk"}.get(item) for item, name in named.items())
    plain = client.get("/v1/users/1/interests").json()
    assert "attention" not in plain["interests"][0]
    assert client.get(f"/v1/users/{UNKNOWN_USER}/interests").status_code == 404


def item_names(names):
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"item_id": list(names), "name": list(names.values()), "category": ["c"] * len(names)}), sink
    )
    return sink.getvalue()


# --- bad requests ------------------------------------------------------------------------------------------

GOOD = {"user_id": 1, "item_ids": [10]}
LATER = {"item_id": 10, "timestamp": 1}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (GOOD | {"user_id": 0}, "user_id"),
        (GOOD | {"user_id": -1}, "user_id"),
        (GOOD | {"user_id": 2**63}, "user_id"),
        (GOOD | {"user_id": "me"}, "user_id"),
        (GOOD | {"user_id": 1.5}, "user_id"),
        (GOOD | {"user_id": None}, "user_id"),
        (GOOD | {"item_ids": []}, "item_ids"),
        (GOOD | {"item_ids": [0]}, "item_ids"),
        (GOOD | {"item_ids": [10, -3]}, "item_ids"),
        (GOOD | {"item_ids": [2**70]}, "item_ids"),
        (GOOD | {"item_ids": 10}, "item_ids"),
        (GOOD | {"item_ids": list(range(1, MAX_CANDIDATES + 2))}, "item_ids"),
        (GOOD | {"category_ids": [1, 2]}, "2 category_ids for 1 item_ids"),
        (GOOD | {"category_ids": []}, "0 category_ids for 1 item_ids"),
        (GOOD | {"category_ids": [-1]}, "category_ids"),
        (GOOD | {"recent": [{"item_id": 10}]}, "timestamp"),
        (GOOD | {"recent": [LATER | {"item_id": 0}]}, "item_id"),
        (GOOD | {"recent": [LATER | {"timestamp": -1}]}, "timestamp"),
        (GOOD | {"recent": [LATER | {"when": 1}]}, "when"),
        (GOOD | {"recent": [LATER] * 1001}, "recent"),
        (GOOD | {"items": [1]}, "items"),
        ({"user_id": 1}, "item_ids"),
        ({}, "user_id"),
        ([], "body"),
        (None, "body"),
    ],
)
def test_a_bad_request_is_refused_and_told_why(client, body, named):
    answer = client.post("/v1/score", json=body)
    assert answer.status_code == 422
    assert named in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"user_id": NaN, "item_ids": [1]}',
        b'{"user_id": 1, "item_ids": [Infinity]}',
        b'{"user_id": "\\ud800", "item_ids": [1]}',
        b'{"user_id": 1e400, "item_ids": [1]}',
        b'{"user_id": 1, "item_ids": [1], "\\ud800": 1}',
    ],
)
def test_what_is_hardly_json_is_refused_as_well(storage, own_places, registry, tmp_path, body):
    registry.release("1", FILES, SPACE)
    app = create_app(own_places, RegistryConfig(), tmp_path / "cache")
    app.state.follower.look()
    client = Client(app)
    answer = client.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize(
    "path", ["0/interests", "-1/interests", "me/interests", f"{2**63}/interests", "1/interests?item_id=0"]
)
def test_a_bad_user_is_refused(client, path):
    assert client.get(f"/v1/users/{path}").status_code == 422


def test_as_many_candidates_as_allowed_are_scored(client):
    answer = score(client, item_ids=range(1, MAX_CANDIDATES + 1))
    assert len(answer["probabilities"]) == MAX_CANDIDATES
    assert all(0 < p < 1 for p in answer["probabilities"])


# --- releases ----------------------------------------------------------------------------------------------


def test_not_ready_before_there_is_a_champion(storage, own_places, registry, tmp_path):
    app = create_app(own_places, RegistryConfig(), tmp_path / "cache", seconds=3600)
    with Client(app) as client:
        state = wait(client, lambda state: state["error"])
        nothing = {"bundle": None, "previous": None, "challenger": None, "refused": []}
        assert state == nothing | {"error": "no version of encode-ctr has the alias champion; release one first"}
        assert client.get("/health").status_code == 200
        for answer in (
            client.get("/ready"),
            client.get("/ping"),
            client.post("/v1/score", json=GOOD),
            client.get("/v1/users/1/interests"),
        ):
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "2"
            open_to_all = answer.url.path in ("/ready", "/ping")
            why = "no bundle yet; /v1/release tells why" if open_to_all else "no version of encode-ctr"
            assert answer.json()["detail"].startswith(f"not ready: {why}")
        assert client.post("/v1/score", json={}).status_code == 422
        registry.release("1", FILES, SPACE)
        assert client.post("/v1/release/reload").status_code == 202
        wait(client, lambda state: state["bundle"] and state["error"] is None)
        assert client.get("/ready").json()["bundle"]["model_version"] == "1"


def test_it_follows_the_pointer_without_being_asked(storage, own_places, registry, tmp_path):
    registry.release("1", FILES, SPACE)
    with Client(create_app(own_places, RegistryConfig(), tmp_path / "cache", seconds=0.01)) as client:
        wait(client, lambda state: state["bundle"] and state["bundle"]["as_of"] == "2024-03-11")
        refresh(storage, END)
        wait(client, lambda state: state["bundle"]["as_of"] == "2024-03-12")
        assert score(client, user_id=12)["fallbacks"]["unknown_user"] is False


def test_a_reload_without_news_keeps_the_bundle(client, monkeypatch):
    bundle = client.app.state.follower.bundle

    def forbidden(*_arguments):
        raise AssertionError("loaded again")

    monkeypatch.setattr("encode.serving.follower.load_bundle", forbidden)
    client.app.state.follower.look()
    assert client.app.state.follower.bundle is bundle


def test_a_new_version_brings_its_own_space(client, storage, registry):
    before = score(client)
    space = release_another(client, storage, registry)
    after = score(client)
    assert after["bundle"]["space"] == space.id != before["bundle"]["space"]
    assert after["probabilities"] != before["probabilities"]
    registry.number = "1"
    client.post("/v1/release/reload")
    wait(client, lambda state: state["bundle"]["model_version"] == "1")
    assert score(client) == before


def test_a_swap_is_atomic(client, storage, registry):
    """While bundles change, each answer's numbers are those of the bundle that it names."""
    space, _, files = make_model(1)
    write_space(storage, space, {})
    refresh(storage, space=space)
    follower = client.app.state.follower
    versions = {"1": (FILES, SPACE), "2": (files, space)}
    expected = {}
    for number, held in versions.items():
        registry.release(number, *held)
        follower.look()
        expected[follower.bundle.id] = score(client)
    done = threading.Event()

    def ask(_):
        answers = []
        while not done.is_set():
            answers.append(score(client))
        return answers

    with ThreadPoolExecutor(3) as pool:
        asking = pool.map(ask, range(3))
        for round_ in range(20):
            registry.number = "12"[round_ % 2]
            follower.look()
            time.sleep(0.01)
        done.set()
        answers = [answer for mine in asking for answer in mine]
    assert {answer["bundle"]["id"] for answer in answers} == set(expected)
    assert all(answer == expected[answer["bundle"]["id"]] for answer in answers)


def test_a_request_under_way_finishes_on_its_bundle(client, storage, monkeypatch):
    before = score(client)
    entered, go_on = threading.Event(), threading.Event()
    plain, serving = Bundle.score, client.app.state.follower.bundle

    def slow(bundle, *arguments):
        if bundle is serving and not entered.is_set():
            entered.set()
            assert go_on.wait(10)
        return plain(bundle, *arguments)

    monkeypatch.setattr(Bundle, "score", slow)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(score, client)
        assert entered.wait(10)
        refresh(storage, END)
        client.app.state.follower.look()
        go_on.set()
        assert under_way.result() == before
    assert score(client)["bundle"]["as_of"] == "2024-03-12"


def test_a_damaged_snapshot_keeps_the_bundle_and_is_reported(client, storage):
    before = score(client)
    pointer = refresh(storage, END)
    key = f"interests/{SPACE.id}/{pointer.snapshot}/part-000.arrow"
    whole = storage.get(key)
    storage.put(key, whole[:-8])
    client.post("/v1/release/reload")
    state = wait(client, lambda state: state["error"])
    assert f"{key}: damaged" in state["error"]
    assert score(client) == before
    assert client.get("/ready").status_code == 200
    storage.put(key, whole)
    client.post("/v1/release/reload")
    state = wait(client, lambda state: state["error"] is None)
    assert state["bundle"]["as_of"] == "2024-03-12"


def test_a_failing_registry_keeps_the_bundle_and_is_reported(client, registry, monkeypatch):
    before = score(client)

    def down(_alias):
        raise ConnectionError("refused")

    monkeypatch.setattr(registry, "by_alias", down)
    client.post("/v1/release/reload")
    wait(client, lambda state: state["error"] == "ConnectionError: refused")
    assert score(client) == before


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}])
def test_a_body_that_is_not_said_to_be_json_is_told_so(client, headers):
    told = client.post("/v1/score", content=b'{"user_id": 1, "item_ids": [10]}', headers=headers)
    assert told.status_code == 422
    assert told.json()["detail"] == [
        {"type": "value_error", "loc": ["header", "Content-Type"], "msg": "expected application/json"}
    ]
    answer = client.post("/v1/score", content=b"[]", headers={"Content-Type": "application/json"})
    assert answer.json()["detail"][0]["loc"] == ["body"]


def test_explanations_are_of_the_scores_and_of_the_interests(client):
    body = {"user_id": 1, "item_ids": [10, 11, 999_999], "category_ids": [1, 2, 3]}
    told = client.post("/v1/explain", json=body).json()
    scored = client.post("/v1/score", json=body).json()
    assert [one["item_id"] for one in told["scores"]] == body["item_ids"]
    assert [one["probability"] for one in told["scores"]] == scored["probabilities"]
    assert (told["bundle"], told["fallbacks"]) == (scored["bundle"], scored["fallbacks"])
    assert told["interests"] == client.get("/v1/users/1/interests").json()["interests"]
    for one in told["scores"]:
        assert len(one["attention"]) == len(told["interests"]) > 1
        assert sum(one["attention"]) + one["attention_to_itself"] == pytest.approx(1, abs=1e-5)
    asked = client.get("/v1/users/1/interests", params={"item_id": 10}).json()
    assert told["scores"][0]["attention"] == pytest.approx([one["attention"] for one in asked["interests"]], abs=1e-6)
    assert told["scores"][0]["attention_to_itself"] == pytest.approx(asked["attention_to_itself"], abs=1e-6)


def test_explanations_of_an_unknown_user_are_empty_and_of_too_many_items_refused(client):
    told = client.post("/v1/explain", json={"user_id": UNKNOWN_USER, "item_ids": [10]}).json()
    assert told["interests"] == told["scores"][0]["attention"] == []
    assert told["scores"][0]["attention_to_itself"] == 0
    assert told["fallbacks"]["unknown_user"]
    assert client.post("/v1/explain", json={"user_id": 1, "item_ids": [10] * 101}).status_code == 422
