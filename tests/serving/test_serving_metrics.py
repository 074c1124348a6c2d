"""Metrics say what happened, of this application only."""

import re
import time
from datetime import UTC, datetime

import pytest
from made import FILES, SPACE, Client, wait
from prometheus_client.parser import text_string_to_metric_families

from encode.config import RegistryConfig
from encode.serving.app import create_app

BUCKETS = ["0.001", "0.002", "0.003", "0.005", "0.008", "0.01", "0.015", "0.02", "0.03", "0.05", "0.1", "+Inf"]


def scrape(client):
    """Return the samples by name and labels."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {(one.name, *sorted(one.labels.items())): one.value for family in families for one in family.samples}


@pytest.fixture
def client(make_client):
    now = datetime(2024, 3, 4, 12, tzinfo=UTC)
    return make_client(max_age_days=2, now=lambda: now)


def test_requests_are_counted_and_timed_by_route_and_status(client):
    for body in ({"user_id": 1, "item_ids": [10, 11]}, {"user_id": 2, "item_ids": [10] * 40}, {}):
        client.post("/v1/score", json=body)
    client.get("/v1/users/1/interests")
    client.get("/v1/users/2/interests")
    client.get("/v1/anything/1")
    found = scrape(client)
    score = ("route", "/v1/score")
    assert found["encode_requests_total", score, ("status", "200")] == 2
    assert found["encode_requests_total", score, ("status", "422")] == 1
    assert found["encode_requests_total", ("route", "/v1/users/{user_id}/interests"), ("status", "200")] == 2
    assert found["encode_requests_total", ("route", "unrouted"), ("status", "404")] == 1
    assert found["encode_request_seconds_count", score] == 3
    assert [dict(labels)["le"] for name, *labels in found if name == "encode_model_seconds_bucket"] == BUCKETS
    assert 0 < found["encode_model_seconds_sum", ("role", "champion")] < found["encode_request_seconds_sum", score]
    assert (found["encode_candidates_count",], found["encode_candidates_sum",]) == (2, 42)
    assert found["encode_candidates_bucket", ("le", "3.0")] == 1


def test_fallbacks_are_counted_by_kind(client, make_client):
    client.post("/v1/score", json={"user_id": 10**9, "item_ids": [10, 10**9, 10**9 + 1]})
    client.post("/v1/score", json={"user_id": 1, "item_ids": [10]})
    found = scrape(client)
    counts = {dict(labels)["kind"]: n for (name, *labels), n in found.items() if name == "encode_fallbacks_total"}
    assert counts == {"unknown_user": 1, "unknown_item": 2, "stale_snapshot": 2}
    fresh = scrape(make_client())
    assert fresh["encode_fallbacks_total", ("kind", "unknown_item")] == 0, "another application counts for itself"


def test_the_bundle_and_its_age_are_shown(client, released):
    found = scrape(client)
    told = {key: value for key, value in released.describe().items() if key != "as_of"}
    assert found["encode_bundle_info", *sorted(told.items() | {("role", "champion")})] == 1
    assert found["encode_snapshot_age_seconds", ("role", "champion")] == 3.5 * 86_400
    assert found["encode_ready",] == 1
    assert found["encode_requests_at_work",] == 0
    assert found["process_resident_memory_bytes",] > 1e6


def test_without_a_bundle_it_is_not_ready_and_has_no_age(make_client):
    client = make_client(bundle=None)
    assert client.post("/v1/score", json={"user_id": 1, "item_ids": [1]}).status_code == 503
    found = scrape(client)
    assert found["encode_ready",] == 0
    assert not {name for name, *_ in found} & {"encode_bundle_info", "encode_snapshot_age_seconds"}


@pytest.mark.filterwarnings("ignore")  # MLflow on SQLite warns of what SQLAlchemy deprecates
@pytest.mark.parametrize(("store", "kind"), [("gs://elsewhere", "ConfigError"), ("empty", "ArtifactError")])
def test_loads_that_were_refused_are_counted_by_kind(places, tmp_path, make_client, store, kind):
    """Of a store that nobody can open, and of one that has not what the registry names."""
    client = make_client(bundle=None, places=places.model_copy(update={"store": store.replace("empty", str(tmp_path))}))
    follower = client.app.state.follower
    follower.start()
    until = time.monotonic() + 60
    while follower.error is None and time.monotonic() < until:
        time.sleep(0.02)
    follower.stop()
    assert scrape(client)["encode_loads_refused_total", ("kind", kind)] == 1


def test_a_look_that_failed_is_shown_until_one_succeeds(storage, own_places, registry, tmp_path):
    with Client(create_app(own_places, RegistryConfig(), tmp_path / "cache", seconds=3600)) as client:
        state = wait(client, lambda state: state["error"])
        assert "release one first" in state["error"]
        assert scrape(client)["encode_look_failed",] == 1
        registry.release("1", FILES, SPACE)
        client.post("/v1/release/reload")
        wait(client, lambda state: state["bundle"] and not state["error"])
        assert scrape(client)["encode_look_failed",] == 0


def test_scrapers_that_ask_for_open_metrics_get_it(client):
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = client.get("/metrics", headers=accept)
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    plain = client.get("/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")


def test_no_label_holds_what_clients_send(client):
    secret = "a1b2c3d4"
    client.get(f"/{secret}")
    client.request(secret.upper(), "/v1/score")
    client.get(f"/v2/models/{secret}")
    assert not re.search(secret, client.get("/metrics").text, re.IGNORECASE)
