"""The page for people: what holds of its files, and what somebody sees of it in a real browser at a real process."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import time
from datetime import UTC, date, datetime

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import BINARY, open_browser
from conftest import Serving

from encode.serving.keys import hash_of
from encode.serving.page import PATHS

KEY = "ek_for_the_page"
NAME = '<script>document.title = "run"</script><img src="x" onerror="document.title = \'run\'">'


# --- its files -------------------------------------------------------------------------------------------------


def test_it_is_open_where_keys_are_asked_for(make_client):
    client = make_client(hashes={hash_of(KEY)})
    for path in PATHS:
        assert client.get(path).status_code == client.head(path).status_code == 200
    assert client.get("/v1/release").status_code == 401


def test_it_takes_scripts_and_styles_from_its_own_files_only(make_client):
    client = make_client()
    for path in PATHS:
        policy = client.get(path).headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
    page = client.get("/")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", page.text)


def test_all_that_it_names_exists_and_nothing_is_foreign(make_client):
    client = make_client()
    texts = {path: client.get(path).text for path in PATHS}
    named = set(re.findall(r'(?:src|href)="([^"]+)"', texts["/"]))
    assert named == PATHS - {"/"}
    foreign = set(re.findall(r"https?://[^\s\"']+", "".join(texts.values())))
    assert foreign == {"http://www.w3.org/2000/svg"}  # a name, not an address
    ids = set(re.findall(r'\bid="([^"]+)"', texts["/"]))
    asked = set(re.findall(r'\b(?:by|say|attempt)\("([^"]+)"', texts["/page.js"]))
    assert len(asked) > 10
    assert asked <= ids


def test_it_is_small(make_client):
    client = make_client()
    assert sum(len(client.get(path).content) for path in PATHS) < 40_000


def test_its_script_never_makes_markup_of_text(make_client):
    text = make_client().get("/page.js").text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b", text)


def test_pages_that_need_other_servers_are_not_there(make_client):
    for path in ("/docs", "/redoc"):
        assert make_client().get(path).status_code == 404


def test_interests_name_the_categories_of_their_top_items(make_client, released):
    vocabulary = released.space.vocabulary
    known = dict(zip(vocabulary.item_ids.tolist(), vocabulary.item_category_ids.tolist(), strict=True))
    answer = make_client().get(f"/v1/users/{released.snapshot.busiest_user()}/interests").json()
    assert any(one["categories"] for one in answer["interests"])
    for interest in answer["interests"]:
        items = [one["item_id"] for one in interest["top_items"]]
        assert interest["categories"] == list(dict.fromkeys(known[one] for one in items if one in known))


# --- in a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named_workdir(workdir, tmp_path_factory):
    """The tiny release, with names of items that try to be scripts."""
    folder = tmp_path_factory.mktemp("named") / "workdir"
    shutil.copytree(workdir, folder)
    ids = list(range(1, 2_000))
    sink = io.BytesIO()
    pq.write_table(pa.table({"item_id": ids, "name": [f"{NAME} {one}" for one in ids]}), sink)
    items = folder / "store" / "items" / "items.parquet"
    items.parent.mkdir(exist_ok=True)
    items.write_bytes(sink.getvalue())
    return folder


@pytest.fixture(scope="module")
def serving(named_workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    keys = folder / "keys"
    keys.write_text(hash_of(KEY))
    process = Serving(named_workdir, folder, "--keys", str(keys), "--max-age", "1")
    process.wait_until_ready()
    yield process
    process.end()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, serving):
    """The page with the key in use."""
    browser.open(serving.url)
    if browser.run("sessionStorage.getItem('key')") != KEY:
        browser.run(f"sessionStorage.setItem('key', '{KEY}')")
        browser.open(serving.url)
    browser.logged.clear()
    browser.wait("document.getElementById('release').textContent.includes('Bundle')")
    return browser


@pytest.fixture(scope="module")
def api(serving):
    with httpx.Client(base_url=serving.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture(scope="module")
def liked(api, released):
    """What the API answers about somebody with a long history."""
    return api.get(f"/v1/users/{released.snapshot.busiest_user()}/interests").raise_for_status().json()


def look_up(page, user_id):
    page.type("user-id", user_id)
    page.click("#user-form button")


def score(page, *item_ids):
    page.type("items", ", ".join(map(str, item_ids)))
    page.click("#score-form button")


def test_it_shows_the_release(page, api):
    told = api.get("/v1/release").json()["bundle"]
    shown = page.text("#release")
    assert all(told[name] in shown for name in ("id", "model_version", "space", "snapshot", "as_of"))
    assert page.text("#state") == "ready"
    days = (datetime.now(UTC).date() - date.fromisoformat(told["as_of"])).days
    assert f"{told['as_of']}, {days:,} days ago" in shown
    assert f"in the last {days:,} days is not in it" in page.text("#age")
    assert page.logged == []


def test_it_shows_a_users_interests(page, liked):
    look_up(page, liked["user_id"])
    page.wait("!document.getElementById('picture').hidden")
    page.run("document.querySelectorAll('#interests details').forEach((one) => { one.open = true })")
    count = len(liked["interests"])
    assert count > 3
    assert page.run("document.querySelectorAll('#bubbles circle').length") == count
    rows = page.run("[...document.querySelectorAll('#interests > li')].map((row) => row.innerText)")
    assert len(rows) == count
    for row, interest in zip(rows, liked["interests"], strict=True):
        assert f"{100 * interest['weight']:.1f}% of behaviors" in row
        assert all(f"{item['name']} {item['item_id']}" in row for item in interest["top_items"])
        assert f"categories {', '.join(map(str, interest['categories']))}" in row
    assert page.logged == []


def test_names_of_items_are_inert(page, liked):
    """They are shown letter by letter; in test_it_shows_a_users_interests, too."""
    look_up(page, liked["user_id"])
    page.wait("!document.getElementById('picture').hidden")
    page.click("#fill")
    page.click("#score-form button")
    page.wait("!document.getElementById('scores').hidden")
    assert NAME in page.text("#interests")
    assert NAME in page.text("#scores")
    assert page.run("document.querySelectorAll('main script, main img').length") == 0
    assert page.run("document.title") == "ENCODE serving"


def test_it_scores_and_sorts_as_the_api_does(page, api, liked):
    items = [*range(1, 20), *(one["top_items"][0]["item_id"] for one in liked["interests"])]
    answer = api.post("/v1/score", json={"user_id": liked["user_id"], "item_ids": items}).json()
    expected = [item for _, item in sorted(zip(answer["probabilities"], items, strict=True), key=lambda one: -one[0])]
    page.type("user-id", liked["user_id"])
    score(page, *items)
    page.wait("!document.getElementById('scores').hidden")
    assert page.run("[...document.querySelectorAll('#scores button')].map((one) => +one.dataset.item)") == expected
    told = [f"{one:.4f}" for one in answer["probabilities"] if 0.001 < one < 0.9999]
    assert told
    assert all(one in page.text("#scores") for one in told)


def test_it_shows_why(page, api, liked):
    item = liked["interests"][0]["top_items"][0]["item_id"]
    look_up(page, liked["user_id"])
    score(page, item)
    page.wait("!document.getElementById('scores').hidden")
    page.click("#scores button")
    page.wait("document.querySelector('#scores [aria-pressed=true]')")
    page.click("#more")
    answer = api.get(f"/v1/users/{liked['user_id']}/interests", params={"item_id": item}).json()
    rows = page.run("[...document.querySelectorAll('#interests > li')].map((row) => row.innerText)")
    weights = [("The item itself", answer["attention_to_itself"])]
    weights += [(f"{place}\n", one["attention"]) for place, one in enumerate(answer["interests"], 1)]
    assert len(rows) == len(weights)
    for start, weight in weights:
        assert any(start in row and f"{100 * weight:.1f}% of attention" in row for row in rows), (start, weight, rows)


def test_it_says_what_was_assumed(page, liked):
    """The snapshot is older than `--max-age`, too; and no digit of a long id is lost."""
    page.type("user-id", 2**53 + 1)
    score(page, 2**53 + 3, 2**63 - 1)
    page.wait("!document.getElementById('scores').hidden")
    assumed = page.text("#assumed")
    assert "The user is unknown" in assumed
    assert f"{2**53 + 3}, {2**63 - 1}" in assumed
    assert "older than allowed" in assumed
    assert page.run("document.querySelector('#scores button').disabled")
    page.wait("document.getElementById('state').textContent === 'ready, stale snapshot'")
    assert "older than the server's --max-age" in page.text("#age")


def test_it_says_that_a_user_is_unknown(page):
    look_up(page, 2**53 + 1)
    page.wait("!document.getElementById('user-problem').hidden")
    assert f"user {2**53 + 1}: no interests" in page.text("#user-problem")


@pytest.mark.parametrize("typed", ["0", "1.5", "", "1 2", str(2**63)])
def test_it_says_what_is_not_an_id(page, serving, typed):
    before = len(serving.requests())
    look_up(page, typed)
    page.wait("!document.getElementById('user-problem').hidden")
    assert "whole number from 1" in page.text("#user-problem")
    page.type("user-id", 1)
    score(page, typed.replace(" ", "x"))
    page.wait("!document.getElementById('score-problem').hidden")
    asked = {line["route"] for line in serving.requests()[before:]}
    assert not asked & {"/v1/score", "/v1/users/{user_id}/interests"}


def test_latency_is_computed_as_prometheus_does(page):
    """10 requests since the first sample: 4 up to 1 ms, 4 up to 2 ms, 2 up to 5 ms; then one beyond all buckets."""
    lines = [
        f'encode_request_seconds_bucket{{le="{edge}",route="{route}"}} {count}'
        for route, counts in {"/v1/score": (4, 8, 10, 10), "/metrics": (900, 900, 900, 900)}.items()
        for edge, count in zip(("0.001", "0.002", "0.005", "+Inf"), counts, strict=True)
    ]
    told = json.dumps("\n".join(lines))
    beyond = json.dumps("\n".join(lines).replace('+Inf",route="/v1/score"} 10', '+Inf",route="/v1/score"} 30'))
    script = f"""import('/page.js').then(({{ quantile, sampleOf }}) => {{
        const none = sampleOf(''), last = sampleOf({told}), beyond = sampleOf({beyond});
        return [quantile(0.5, none, last), quantile(0.9, none, last), quantile(0.99, none, beyond)];
    }})"""
    assert page.run(script) == ["1.3 ms", "3.5 ms", "> 5 ms"]


def test_it_shows_the_load_of_now(page, api, liked):
    page.wait("document.getElementById('window').textContent.includes('last')")
    for _ in range(20):
        api.post("/v1/score", json={"user_id": liked["user_id"], "item_ids": [1, 2, 3]}).raise_for_status()
    page.wait(r"/\dms|\d ms/.test(document.getElementById('now').innerText)")
    rate = float(page.text("#now dd"))
    assert 0 < rate <= 20
    assert page.run("document.querySelectorAll('#load rect').length") > 0


def test_it_asks_for_a_key_and_says_that_one_is_wrong(page, serving):
    page.run("sessionStorage.clear()")
    page.open(serving.url)
    page.wait("document.getElementById('key').open")
    assert page.text("#key-problem") == "The server asks for a key."
    look_up(page, 1)
    page.wait("!document.getElementById('user-problem').hidden")
    assert "asks for a key" in page.text("#user-problem")
    page.type("key-text", "ek_wrong")
    page.click("#key-form button")
    page.wait("document.getElementById('key-problem').textContent.includes('does not know')")
    page.type("key-text", KEY)
    page.click("#key-form button")
    page.wait("document.getElementById('release').textContent.includes('Bundle')")
    assert not page.run("document.getElementById('key').open")
    assert KEY not in page.run("document.documentElement.outerHTML + document.cookie + JSON.stringify(localStorage)")


def test_it_lists_the_routes(page, api):
    page.click("#api summary")
    page.wait("document.querySelectorAll('#routes li').length")
    shown = page.text("#routes")
    assert all(path in shown for path in api.get("/openapi.json").json()["paths"])


def test_it_waits_for_a_release_and_for_a_server_that_is_gone(browser, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "workdir")
    (pointer,) = (tmp_path / "workdir" / "store" / "interests").glob("*/current.json")
    pointer.rename(tmp_path / "held back")
    serving = Serving(tmp_path / "workdir", tmp_path)
    try:
        wait_until_alive(serving)
        browser.open(serving.url)
        browser.wait("document.getElementById('banner').textContent.includes('no snapshot yet')")
        assert browser.text("#state") == "not ready"
        assert "none yet" in browser.text("#release")
        (tmp_path / "held back").rename(pointer)
        browser.click("#look")
        browser.wait("document.getElementById('state').textContent === 'ready'")
        assert browser.run("document.getElementById('banner').hidden")
    finally:
        serving.end()
    browser.wait("document.getElementById('banner').textContent.includes('No answer from the server since')")
    assert browser.text("#state") == "no answer"
    tries = "performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/ready')).length"
    browser.wait(f"{tries} > {browser.run(tries)}")


def wait_until_alive(serving):
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{serving.url}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(serving.log())
