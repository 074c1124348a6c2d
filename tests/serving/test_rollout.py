"""Releases while serving: what is refused, what is kept, what is withdrawn, and who answers whom."""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from made import END, FILES, SPACE, Client, make_model, refresh, score, wait
from mlflow.entities.webhook import WebhookEvent

from encode.config import Places, RegistryConfig, load_config
from encode.errors import ArtifactError, ConfigError
from encode.interests.snapshots import write_space
from encode.registry import CHAMPION, Registry
from encode.serving.app import create_app
from encode.serving.bundle import Asked, Bundle, load_bundle
from encode.serving.rollout import Rollout, Watch
from encode.serving.shard import Shard
from encode.serving.trial import Recorder, try_bundle
from encode.serving.webhook import signature
from encode.storage import open_storage

SECRET = "known to both"


@pytest.fixture
def second(storage):
    """Space and files of another model, with a snapshot."""
    space, _, files = make_model(1)
    write_space(storage, space, {})
    refresh(storage, space=space)
    return files, space


@pytest.fixture
def serve(own_places, storage, registry, tmp_path):
    """A function that makes the application with some rollout; the first version is released."""
    registry.release("1", FILES, SPACE)

    def make(**options):
        webhook_secret = options.pop("webhook_secret", "")
        app = create_app(
            own_places,
            RegistryConfig(),
            tmp_path / "cache",
            seconds=3600,
            rollout=Rollout(**options),
            webhook_secret=webhook_secret,
        )
        return Client(app)

    return make


def answers_badly(monkeypatch, number):
    """Let bundles of a version fail once they serve: in their trial they do not."""
    plain = Bundle.score
    serving = threading.Event()

    def failing(bundle, *arguments):
        if serving.is_set() and bundle.model_version == number:
            raise FloatingPointError("made to fail")
        return plain(bundle, *arguments)

    monkeypatch.setattr(Bundle, "score", failing)
    return serving


def withdrawn(client):
    """Bundles that were, by their role, as /metrics tells."""
    found = re.findall(r'encode_bundles_withdrawn_total\{role="(\w+)"\} (\S+)', client.get("/metrics").text)
    return {role: float(count) for role, count in found}


# --- the trial ---------------------------------------------------------------------------------------------


def test_a_bundle_whose_scores_are_not_numbers_is_refused_until_asked_again(client, registry, second, monkeypatch):
    files, space = second
    plain = Bundle.compute

    def sick(bundle, found):
        return plain(bundle, found) * (np.nan if bundle.model_version == "2" else 1)

    monkeypatch.setattr(Bundle, "compute", sick)
    before = score(client)
    registry.release("2", files, space)
    client.post("/v1/release/reload")
    state = wait(client, lambda state: state["error"])
    assert "a probability is not a number" in state["error"]
    assert [(one["model_version"], one["why"]) for one in state["refused"]] == [("2", state["error"])]
    assert score(client) == before
    with pytest.raises(ArtifactError, match=r"model version 2 with snapshot .* stays refused: .*not a number"):
        client.app.state.follower.look()
    monkeypatch.undo()
    monkeypatch.setattr("encode.serving.follower.Registry", lambda *_: registry)
    client.post("/v1/release/reload?again=true")
    state = wait(client, lambda state: state["bundle"]["model_version"] == "2")
    assert state["refused"] == []


def test_the_oldest_refusals_are_forgotten(client, registry, second, monkeypatch):
    monkeypatch.setattr("encode.serving.follower._MOST_REFUSED", 2)
    monkeypatch.setattr("encode.serving.trial._score", lambda *_: 1 / 0)
    follower = client.app.state.follower
    for number in ("2", "3", "4"):
        registry.release(number, *second)
        with pytest.raises(ZeroDivisionError):
            follower.look()
    assert [number for number, _ in follower.refused] == ["3", "4"]


def test_a_slow_bundle_is_refused(bundle, monkeypatch):
    try_bundle(bundle, [], max_ms=1_000)
    with pytest.raises(ArtifactError, match=r"1,000 candidates take .* ms, expected at most 0\.0001"):
        try_bundle(bundle, [], max_ms=0.0001)
    other, plain = replace(bundle, id="slower"), Bundle.score

    def slow(one, *arguments):
        if one.id == "slower":
            until = time.thread_time() + 0.03
            while time.thread_time() < until:
                pass
        return plain(one, *arguments)

    monkeypatch.setattr(Bundle, "score", slow)
    with pytest.raises(ArtifactError, match=rf"bundle slower: 1,000 .* ms of the processor, bundle {bundle.id} .* ms"):
        try_bundle(other, [], max_ms=1_000, beside=bundle)


def test_a_trial_asks_what_was_asked_lately(bundle, monkeypatch):
    recorder, asked = Recorder(2), []
    for user in (1, 2, 3):
        recorder.record(Asked(user, np.array([10, 11])))
    plain = Bundle.score
    monkeypatch.setattr(Bundle, "score", lambda one, given: asked.append(given) or plain(one, given))
    try_bundle(bundle, recorder.latest(), max_ms=1_000)
    assert [(one.user_id, one.item_ids.tolist()) for one in asked[:2]] == [(2, [10, 11]), (3, [10, 11])]
    assert len({one.user_id for one in asked}) > 2


def test_requests_are_recorded(client):
    score(client, user_id=5, item_ids=[12, 13])
    (asked,) = client.app.state.follower.recorder.latest()
    assert (asked.user_id, asked.item_ids.tolist()) == (5, [12, 13])


def test_the_process_settles_once_before_it_serves(serve, registry, second):
    follower, seen = serve().app.state.follower, []
    follower.before_first = lambda: seen.append(follower.bundle)
    follower.look()
    registry.release("2", *second)
    follower.look()
    assert follower.bundle.model_version == "2"
    assert seen == [None]


# --- the bundle before -------------------------------------------------------------------------------------


def test_going_back_takes_no_load(client, registry, second, monkeypatch):
    before, (files, space) = score(client), second
    registry.release("2", files, space)
    client.app.state.follower.look()
    state = client.get("/v1/release").json()
    assert (state["bundle"]["model_version"], state["previous"]["model_version"]) == ("2", "1")

    def forbidden(*_arguments):
        raise AssertionError("loaded again")

    monkeypatch.setattr("encode.serving.follower.load_bundle", forbidden)
    registry.number = "1"
    client.app.state.follower.look()
    assert score(client) == before
    assert client.get("/v1/release").json()["previous"]["model_version"] == "2"


def test_a_bundle_that_fails_while_serving_is_withdrawn(client, registry, storage, second, monkeypatch):
    before, (files, space) = score(client), second
    serving = answers_badly(monkeypatch, "2")
    registry.release("2", files, space)
    client.app.state.follower.look()
    serving.set()
    failed = [client.post("/v1/score", json={"user_id": 1, "item_ids": [10]}).status_code for _ in range(3)]
    assert failed == [500] * 3
    assert score(client) == before
    state = client.get("/v1/release").json()
    assert "of model version 2 was withdrawn: 3 of its last 3 requests got no probabilities" in state["error"]
    assert state["previous"] is None
    assert withdrawn(client) == {"champion": 1, "challenger": 0}
    with pytest.raises(ArtifactError, match="stays refused: 3 of its last 3"):
        client.app.state.follower.look()
    assert score(client) == before
    refresh(storage, END, space)
    client.post("/v1/release/reload")
    wait(client, lambda state: "stays refused" in state["error"])
    assert score(client) == before, "neither a newer snapshot nor a reload of the platform brings it back"
    serving.clear()
    client.post("/v1/release/reload?again=true")
    wait(client, lambda state: state["bundle"]["model_version"] == "2")


def test_a_bundle_that_people_went_back_to_is_not_measured_by_what_they_left(client, registry, second):
    registry.release("2", *second)
    follower = client.app.state.follower
    slow = follower.bundle
    follower.look()
    for _ in range(200):
        follower.note(follower.bundle, 0.001, 1_000)
    registry.number = "1"
    follower.look()
    assert follower.bundle is slow
    for _ in range(1_000):
        follower.note(slow, 0.02, 1_000)
    assert follower.bundle is slow


def test_a_failing_bundle_in_use_does_not_keep_its_repair_out(client, registry, second, monkeypatch):
    answers_badly(monkeypatch, "1").set()
    registry.release("2", *second)
    client.app.state.follower.look()
    assert score(client)["bundle"]["model_version"] == "2"


def test_a_promoted_challenger_is_the_champion_only_and_a_refused_one_is_none(serve, registry, second, monkeypatch):
    registry.release("2", *second)
    registry.number, registry.challenger = "1", "2"
    with serve(challenger="challenger", challenger_share=1.0) as client:
        wait(client, lambda state: state["challenger"])
        registry.number = "2"
        follower = client.app.state.follower
        follower.look()
        assert (follower.bundle.model_version, follower.challenger) == ("2", None)
        registry.number = "1"
        monkeypatch.setattr(registry, "tags", {"encode.refused": "rolled back"})
        follower.look()
        assert (follower.bundle.model_version, follower.challenger) == ("1", None)


def test_the_first_bundle_is_never_withdrawn(client, monkeypatch):
    serving = answers_badly(monkeypatch, "1")
    serving.set()
    for _ in range(5):
        assert client.post("/v1/score", json={"user_id": 1, "item_ids": [10]}).status_code == 500
    serving.clear()
    assert score(client)["bundle"]["model_version"] == "1"


def test_a_watch_minds_failures_and_slowness():
    good = Watch()
    assert not any(good.note(0.004, 1_000) for _ in range(400))
    assert not any(
        [good.note(None, 1_000), good.note(None, 1_000), good.note(None, 1_000)]
    )  # 3 of 403 are fewer than 1 of 100
    assert good.note(None, 1_000) is None
    assert "5 of its last 405" in good.note(None, 1_000)

    for _ in range(10_000):
        good.note(0.004, 1_000)
    late = [good.note(None, 1_000) for _ in range(11)]
    assert late[:10] == [None] * 10, "10 of the last 1,000"
    assert late[10] == "11 of its last 1000 requests got no probabilities"

    slower = Watch(good)
    noted = [slower.note(0.011, 1_000) for _ in range(1_000)]
    assert not any(noted)
    slow = Watch(good)
    noted = [slow.note(0.013, 1_000) for _ in range(200)]
    assert [bool(why) for why in noted] == [False] * 199 + [True]
    assert noted[-1] == "1,000 candidates take 13.0 ms, those of the bundle before took 4.0 ms"
    assert not any(Watch().note(9.0, 1_000) for _ in range(400))
    larger = Watch(good)
    assert not any(larger.note(0.012, 5_000) for _ in range(1_000)), "five times the candidates are not slower"
    quick = Watch(good)
    assert not any(quick.note(0.003, 1_000) for _ in range(1_000))
    assert not any(quick.note(0.1, 1_000) for _ in range(400)), "after its first 1,000 requests it is not compared"


# --- champion and challenger -------------------------------------------------------------------------------


def test_a_challenger_answers_its_share_of_the_users_and_who_asks_for_it(serve, registry, second):
    files, space = second
    registry.release("2", files, space)
    registry.number, registry.challenger = "1", "2"
    with serve(challenger="challenger", challenger_share=0.5) as client:
        wait(client, lambda state: state["challenger"])
        served = {user: score(client, user_id=user)["bundle"]["model_version"] for user in range(1, 41)}
        assert 10 < list(served.values()).count("2") < 30
        assert served == {user: score(client, user_id=user)["bundle"]["model_version"] for user in range(1, 41)}
        for role, number in (("champion", "1"), ("challenger", "2")):
            for path in ("/v1/users/1/interests", "/v1/users/2/interests"):
                answer = client.get(path, headers={"X-Encode-Role": role})
                assert answer.json()["bundle"]["model_version"] == number
        refused = client.get("/v1/users/1/interests", headers={"X-Encode-Role": "loser"})
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"] == ["header", "X-Encode-Role"]
        metrics = client.get("/metrics").text
        assert 'encode_bundle_info{id="' in metrics
        assert 'role="challenger"' in metrics
        registry.challenger = None
        client.app.state.follower.look()
        assert all(score(client, user_id=user)["bundle"]["model_version"] == "1" for user in served)
        answer = client.get("/v1/users/1/interests", headers={"X-Encode-Role": "challenger"})
        assert answer.status_code == 503
        assert "no challenger" in answer.json()["detail"]


def test_a_share_of_no_challenger_is_refused():
    for challenger in (None, ""):
        with pytest.raises(ConfigError, match="name its alias by --challenger"):
            Rollout(challenger=challenger, shadow_share=0.1)
    with pytest.raises(ConfigError, match="serves already"):
        Rollout(challenger="champion")


def test_a_challenger_that_is_the_champion_is_none(serve, registry):
    registry.challenger = "1"
    with serve(challenger="challenger", challenger_share=1.0) as client:
        wait(client, lambda state: state["bundle"])
        assert client.get("/v1/release").json()["challenger"] is None


def test_a_failing_challenger_is_withdrawn_and_the_champion_answers(serve, registry, second, monkeypatch):
    registry.release("2", *second)
    registry.number, registry.challenger = "1", "2"
    with serve(challenger="challenger", challenger_share=1.0) as client:
        wait(client, lambda state: state["challenger"])
        answers_badly(monkeypatch, "2").set()
        failed = [client.post("/v1/score", json={"user_id": 1, "item_ids": [10]}).status_code for _ in range(4)]
        assert failed == [500, 500, 500, 200]
        state = client.get("/v1/release").json()
        assert state["challenger"] is None
        assert state["bundle"]["model_version"] == "1"
        assert withdrawn(client) == {"champion": 0, "challenger": 1}


def test_the_challenger_scores_in_the_shadow(serve, registry, second):
    registry.release("2", *second)
    registry.number, registry.challenger = "1", "2"
    with serve(challenger="challenger", shadow_share=1.0) as client:
        wait(client, lambda state: state["challenger"])
        ours = score(client)["probabilities"]
        answer = client.post(
            "/v1/score", json={"user_id": 1, "item_ids": [10, 11, 12]}, headers={"X-Encode-Role": "challenger"}
        )
        theirs = answer.json()["probabilities"]

        def shadowed():
            lines = client.get("/metrics").text.splitlines()
            return dict(line.rsplit(" ", 1) for line in lines if line.startswith("encode_shadow"))

        for _ in range(200):
            found = shadowed()
            if float(found['encode_shadow_requests_total{outcome="scored"}']):
                break
            time.sleep(0.01)
        assert float(found['encode_shadow_requests_total{outcome="scored"}']) == 1
        apart = float(np.abs(np.subtract(ours, theirs)).mean())
        assert float(found["encode_shadow_difference_sum"]) == pytest.approx(apart, abs=1e-6)


# --- shards ------------------------------------------------------------------------------------------------


def test_shards_hold_all_users_once_and_send_others_away(workdir, places, released, tmp_path):
    registry = Registry(places, load_config("tiny").registry)
    version = registry.by_alias(CHAMPION)
    files, storage = registry.files(version), open_storage(places)
    everybody = np.sort(np.concatenate(list(released.snapshot.user_ids())))
    shards = [load_bundle(storage, files, version.number, tmp_path / str(one), Shard(one, 3)) for one in range(3)]
    held = [np.concatenate(list(one.snapshot.user_ids())) for one in shards]
    assert min(len(users) for users in held) > 0
    assert np.array_equal(np.sort(np.concatenate(held)), everybody)
    for users, one in zip(held, shards, strict=True):
        asked = Asked(int(users[0]), released.space.vocabulary.item_ids[:5])
        assert one.snapshot.shard_of(asked.user_id) == one.snapshot.shard
        assert np.array_equal(one.score(asked).probabilities, released.score(asked).probabilities)
    size = [sum(file.stat().st_size for file in (tmp_path / str(one)).rglob("*.arrow")) for one in range(3)]
    assert max(size) < 0.6 * sum(size)


def test_a_user_of_another_shard_is_sent_away(make_client, released):
    client = make_client(bundle=replace(released, snapshot=_Sharded(released.snapshot)))
    for path, body in (
        ("/v1/score", {"user_id": 1, "item_ids": [1]}),
        ("/invocations", {"dataframe_records": [{"user_id": 1, "item_id": 1}]}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 421
        assert answer.json()["detail"] == "user 1: of shard 1/2, this process holds 0/2"
    assert client.get("/v1/users/1/interests").status_code == 421


class _Sharded:
    """A snapshot of which this process holds the half that user 1 is not in."""

    shard = Shard(0, 2)

    def __init__(self, whole):
        self._whole = whole

    def shard_of(self, user_id):
        return Shard(user_id % 2, 2)


def test_more_shards_than_buckets_are_refused(storage, tmp_path):
    with pytest.raises(ArtifactError, match="1 buckets cannot make 2 shards"):
        load_bundle(storage, FILES, "1", tmp_path / "cache", Shard(0, 2))


@pytest.mark.parametrize("text", ["", "1", "1/1", "-1/2", "a/b", "0/0", "0/2/3"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(ConfigError, match="expected PLACE/COUNT"):
        Shard.parse(text)
    assert str(Shard.parse("0/4")) == "0/4"


# --- the webhook -------------------------------------------------------------------------------------------


def deliver(client, secret=SECRET, body=b'{"entity": "model_version_alias"}', at=None, signed=None):
    at = str(int(time.time())) if at is None else at
    headers = {
        "Content-Type": "application/json",
        "X-MLflow-Delivery-Id": "a delivery",
        "X-MLflow-Timestamp": at,
        "X-MLflow-Signature": signature(secret, "a delivery", at, body) if signed is None else signed,
    }
    return client.post("/v1/release/webhook", content=body, headers=headers)


def test_a_signed_delivery_makes_it_look(serve, registry, storage):
    with serve(webhook_secret=SECRET) as client:
        wait(client, lambda state: state["bundle"])
        refresh(storage, END)
        assert deliver(client).status_code == 202
        wait(client, lambda state: state["bundle"]["as_of"] == "2024-03-12")


def test_what_is_not_signed_or_old_is_refused(serve):
    client = serve(webhook_secret=SECRET)
    old = str(int(time.time()) - 3600)
    for answer in (
        deliver(client, secret="another"),
        deliver(client, signed=""),
        deliver(client, signed="v1,ÿ".encode()),
        deliver(client, at=old),
        deliver(client, at="soon"),
        deliver(client, at="9" * 5_000),
    ):
        assert answer.status_code == 403, answer.text
    answer = deliver(serve())
    assert answer.status_code == 403
    assert "ENCODE_WEBHOOK_SECRET is not set" in answer.json()["detail"]


def test_mlflow_signs_as_we_check():
    from mlflow.webhooks.delivery import _generate_hmac_signature

    body = '{"entity": "model_version_alias", "data": {"name": "encode-ctr"}}'
    expected = _generate_hmac_signature(SECRET, "an id", "1700000000", body)
    assert signature(SECRET, "an id", "1700000000", body.encode()) == expected


def test_mlflow_tells_a_serving_process_that_an_alias_moved(mlflow_server, start_serving, tmp_path):
    serving = start_serving("--poll", "3600", ENCODE_WEBHOOK_SECRET=SECRET)
    registry = Registry(Places(store=str(tmp_path), tracking_uri=mlflow_server), RegistryConfig())
    address = f"{serving.url}/v1/release/webhook"
    client = registry._client
    first = registry.notify(address, "an old secret")
    event = WebhookEvent("registered_model", "created")
    for place in range(100):  # a page of them
        client.create_webhook(f"other-{place}", f"http://127.0.0.1:9/{place}", [event], status="DISABLED")
    client.update_webhook(first, status="DISABLED")
    assert registry.notify(address, SECRET) == first
    assert client.get_webhook(first).status == "ACTIVE"
    client.create_registered_model("told")
    version = client.create_model_version("told", source="s3://nowhere/told", run_id=None)
    client.set_registered_model_alias("told", "champion", version.version)
    for _ in range(100):
        told = [one for one in serving.requests() if one["route"] == "/v1/release/webhook"]
        if told:
            break
        time.sleep(0.1)
    assert [one["status"] for one in told] == [202]


def test_an_address_that_mlflow_does_not_call_is_refused(mlflow_server, tmp_path):
    registry = Registry(Places(store=str(tmp_path), tracking_uri=mlflow_server), RegistryConfig())
    with pytest.raises(ConfigError, match=r"no webhook for ftp://here: .*Invalid webhook URL scheme"):
        registry.notify("ftp://here", SECRET)


# --- when things go wrong around it ------------------------------------------------------------------------


def test_it_serves_on_without_store_and_registry_and_says_so(workdir, tmp_path, start_serving):
    """And a process that starts without them says what is missing, and serves once they are there."""
    there, gone = tmp_path / "there", tmp_path / "gone"
    shutil.copytree(workdir, there)
    serving = start_serving("--poll", "0.2", workdir=there)
    body = {"user_id": 1, "item_ids": [1, 2, 3]}
    before = httpx.post(f"{serving.url}/v1/score", json=body).json()
    there.rename(gone)

    def state():
        return httpx.get(f"{serving.url}/v1/release").json()

    for _ in range(100):
        if state()["error"]:
            break
        time.sleep(0.1)
    assert state()["error"]
    assert httpx.get(f"{serving.url}/ready").status_code == 200
    assert httpx.post(f"{serving.url}/v1/score", json=body).json() == before
    shutil.rmtree(there, ignore_errors=True)  # what it made itself when it looked for the registry
    gone.rename(there)
    for _ in range(100):
        if state()["error"] is None:
            break
        time.sleep(0.1)
    assert state()["error"] is None


def test_killed_in_the_middle_it_serves_the_same_when_started_again(start_serving):
    first = start_serving()
    body = {"user_id": 1, "item_ids": [1, 2, 3]}
    before = httpx.post(f"{first.url}/v1/score", json=body).json()
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    again = start_serving()
    assert httpx.post(f"{again.url}/v1/score", json=body).json() == before
