"""Both stores behave the same; outputs are complete or absent; a store that cannot be trusted is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import SecretStr

from encode import outputs
from encode.config import Places
from encode.errors import ArtifactError, ConfigError
from encode.outputs import read_manifest, read_part, read_parts, read_range, read_referenced, recipe, write_output
from encode.storage import FolderStorage, LostRace, S3Storage, check_key, open_storage


@pytest.fixture(params=["folder", "s3"])
def places(request, tmp_path):
    """An empty store of each kind."""
    if request.param == "folder":
        return Places(store=str(tmp_path / "store"))
    return request.getfixturevalue("s3_places")


@pytest.fixture
def storage(places):
    return open_storage(places)


def write(storage, prefix="out/a", parts=None, **options):
    given = {"kind": "test", "fingerprint": "f" * 64, "config": {"k": 3}, "inputs": {"behaviors/dt=1": "d"}} | options
    return write_output(storage, prefix, {"one.bin": b"first", "two.bin": b""} if parts is None else parts, **given)


# --- objects -----------------------------------------------------------------------------------------------


def test_what_was_put_is_there_for_everybody(storage, places):
    for data in (b"first", b"", bytes(range(256)) * 40_000):
        storage.put("a/b=1/c.bin", data)
        assert storage.get("a/b=1/c.bin") == data
        assert open_storage(places).get_versioned("a/b=1/c.bin")[0] == data


def test_a_missing_object_is_named(storage):
    assert storage.get_versioned("a/none") is None
    with pytest.raises(ArtifactError, match="a/none: not found") as caught:
        storage.get("a/none")
    assert storage.uri in str(caught.value)


def test_a_folder_is_not_an_object(storage):
    storage.put("a/b/c", b"x")
    assert storage.get_versioned("a/b") is None
    assert storage.get_versioned("a/b/c/d") is None


def test_create_only_where_nothing_is(storage):
    storage.create("a/b", b"first")
    with pytest.raises(LostRace):
        storage.create("a/b", b"second")
    assert storage.get("a/b") == b"first"


def test_replace_only_what_is_as_it_was_read(storage):
    storage.put("a/b", b"first")
    _, version = storage.get_versioned("a/b")
    storage.replace("a/b", b"second", version)
    with pytest.raises(LostRace):
        storage.replace("a/b", b"third", version)
    assert storage.get("a/b") == b"second"
    assert storage.get_versioned("a/b")[1] != version
    with pytest.raises(LostRace):
        storage.replace("a/none", b"x", version)
    assert storage.get_versioned("a/none") is None


def test_a_put_spoils_the_version(storage):
    storage.put("a/b", b"first")
    _, version = storage.get_versioned("a/b")
    storage.put("a/b", b"other")
    with pytest.raises(LostRace):
        storage.replace("a/b", b"third", version)


def test_of_many_who_create_one_wins(storage):
    def attempt(number):
        gate.wait()
        try:
            storage.create("race", b"%d" % number)
        except LostRace:
            return None
        return b"%d" % number

    gate = threading.Barrier(16)
    with ThreadPoolExecutor(16) as pool:
        won = [data for data in pool.map(attempt, range(16)) if data is not None]
    assert won == [storage.get("race")]


def test_counting_with_replace_loses_nothing(storage):
    """8 threads add 1 to a number 40 times, reading again whenever they lost. They sign what they write: on S3 whoever
    finds there exactly what it wanted to write believes that a retry of its own was first."""
    storage.put("count", b"0 by nobody")

    def add(who):
        while True:
            data, version = storage.get_versioned("count")
            try:
                return storage.replace("count", b"%d by %d" % (int(data.split()[0]) + 1, who), version)
            except LostRace:
                continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert storage.get("count").startswith(b"40 by ")


def test_listings_are_in_byte_order_and_by_prefix(storage):
    keys = ["a/b/c", "a/b-1", "a/B", "a/b.x", "ab", "a/10", "a/9", "z/a/b"]
    for key in keys:
        storage.put(key, b"x")
    assert storage.list("") == sorted(keys, key=str.encode)
    assert storage.list("a/") == ["a/10", "a/9", "a/B", "a/b-1", "a/b.x", "a/b/c"]
    assert storage.list("a/b") == ["a/b-1", "a/b.x", "a/b/c"]
    assert storage.list("a/b/") == ["a/b/c"]
    assert storage.list("none/") == []


def test_listings_hold_objects_only(storage):
    storage.create("a/b", b"1")
    storage.replace("a/b", b"2", storage.get_versioned("a/b")[1])
    assert storage.list("") == ["a/b"]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "a/../b",
        "a/./b",
        ".hidden",
        "a/.lock",
        "a b",
        "a:b",
        "a+b",
        "ä",
        "a\\b",
        "a\n",
        "x" * 256,
    ],
)
def test_keys_that_some_store_would_change_are_refused(storage, key):
    with pytest.raises(ConfigError, match="is not 1 to 255 of"):
        check_key(key)
    for attempt in (
        lambda: storage.put(key, b"x"),
        lambda: storage.create(key, b"x"),
        lambda: storage.replace(key, b"x", "v"),
        lambda: storage.get_versioned(key),
    ):
        with pytest.raises(ConfigError):
            attempt()
    assert storage.list("") == []


@pytest.mark.parametrize("key", ["a", "behaviors/dt=2024-03-01/part-000.parquet", "A_1.b-c=d", "x" * 255])
def test_keys_that_every_store_keeps_are_taken(key):
    assert check_key(key) == key


@pytest.mark.parametrize("store", ["gs://bucket/a", "http://host/a", "s3://"])
def test_other_stores_are_refused(store):
    with pytest.raises(ConfigError, match=r"store: found .* expected s3://bucket\[/prefix\]"):
        open_storage(Places(store=store))


def test_a_file_uri_is_a_folder(tmp_path):
    open_storage(Places(store=f"file://{tmp_path}/store")).put("a", b"x")
    assert (tmp_path / "store" / "a").read_bytes() == b"x"


def test_a_failed_write_leaves_nothing(tmp_path):
    storage = open_storage(Places(store=str(tmp_path)))
    with pytest.raises(TypeError):
        storage.put("a/b", "text")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from encode.storage import FolderStorage
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
FolderStorage(Path(sys.argv[1])).put("a/b", b"half")
"""


def test_what_a_killed_writer_leaves_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path):
    storage = FolderStorage(tmp_path)
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "a").iterdir()
    with storage._written_aside("a/c", b"alive") as (aside, _):
        assert not left.exists()
        FolderStorage(tmp_path).put("a/b", b"whole")
        assert aside.read_bytes() == b"alive"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_file_taken_for_abandoned_before_its_lock_is_made_again(tmp_path, monkeypatch):
    storage, names = FolderStorage(tmp_path), iter(["unlucky", "lucky"])
    make = tempfile.mkstemp

    def swept_at_once(prefix, dir):
        descriptor, name = make(prefix=prefix + next(names), dir=dir)
        if "unlucky" in name:
            Path(name).unlink()
        return descriptor, name

    monkeypatch.setattr("tempfile.mkstemp", swept_at_once)
    storage.put("a", b"x")
    assert storage.get("a") == b"x"
    assert next(names, None) is None


def test_reading_an_object_digests_nothing(tmp_path, monkeypatch):
    """Whoever needs a digest of a part makes one: of each file one, not two."""
    storage = FolderStorage(tmp_path)
    storage.put("a", b"x")
    monkeypatch.setattr("encode.storage.folder.digest", None)
    assert storage.get("a") == b"x"


# --- the probe ---------------------------------------------------------------------------------------------


class AgreesToEverything(BaseHTTPRequestHandler):
    """A server that ignores conditions, as some S3 servers do."""

    protocol_version = "HTTP/1.1"  # which answers "Expect: 100-continue"; the client waits a second for it
    requests: list[str]

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(200)

    def do_DELETE(self):
        self.answer(204)

    def answer(self, status):
        self.requests.append(self.command)
        self.send_response(status)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args):
        pass


@pytest.fixture
def careless_server():
    handler = type("Handler", (AgreesToEverything,), {"requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.requests
        server.shutdown()
        thread.join()


def test_a_store_that_ignores_conditions_is_refused(careless_server):
    url, requests = careless_server
    places = Places(store="s3://encode/x", endpoint_url=url, access_key="a", secret_key=SecretStr("b"))
    for _ in range(2):  # nor does it pass the second time
        with pytest.raises(
            ConfigError, match=f"s3://encode/x at {url}: it ignores If-None-Match on PUT.*ENCODE_SINGLE_WRITER=1"
        ):
            open_storage(places)
    assert requests == ["PUT", "PUT", "DELETE"] * 2


def test_unless_one_says_that_only_one_writes(careless_server):
    url, requests = careless_server
    given = {"store": "s3://encode/x", "endpoint_url": url, "access_key": "a", "secret_key": SecretStr("b")}
    open_storage(Places(**given, single_writer=True)).put("a", b"x")
    assert requests == ["PUT"]


def test_the_probe_leaves_nothing_behind(places, monkeypatch):
    monkeypatch.setattr(S3Storage, "_probed", set())
    assert open_storage(places).list("") == []


def test_no_bucket_is_not_a_lost_race(object_store):
    from botocore.exceptions import ClientError

    places = Places(
        store="s3://no-such-bucket",
        endpoint_url=object_store.endpoint_url,
        access_key=object_store.access_key,
        secret_key=SecretStr(object_store.secret_key),
    )
    with pytest.raises(ClientError, match="NoSuchBucket"):
        open_storage(places)


# --- outputs -----------------------------------------------------------------------------------------------


def test_an_output_makes_the_round_trip(storage):
    written = write(storage, rows={"one.bin": 7}, counts={"rows": 7}, columns={"user_id": "int64"}, seed=3)
    found = read_manifest(storage, "out/a")
    assert found == written
    assert [(part.name, part.bytes, part.rows) for part in found.parts] == [("one.bin", 5, 7), ("two.bin", 0, None)]
    assert found.config == {"k": 3}
    assert found.inputs == {"behaviors/dt=1": "d"}
    assert (found.counts, found.columns, found.seed) == ({"rows": 7}, {"user_id": "int64"}, 3)
    assert read_parts(storage, "out/a", found.parts) == [b"first", b""]
    assert storage.list("") == ["out/a/manifest.json", "out/a/one.bin", "out/a/two.bin"]


def test_without_a_manifest_there_is_no_output(storage):
    storage.put("out/a/one.bin", b"half")
    assert read_manifest(storage, "out/a") is None
    write(storage)
    assert storage.get("out/a/one.bin") == b"first"


def test_writing_the_same_again_changes_nothing(storage):
    first = write(storage)
    before = {key: storage.get_versioned(key) for key in storage.list("")}
    assert write(storage) == first
    assert {key: storage.get_versioned(key) for key in storage.list("")} == before


@pytest.mark.parametrize("parts", [{"one.bin": b"other", "two.bin": b""}, {"one.bin": b"first"}])
def test_writing_something_else_over_it_is_refused(storage, parts):
    write(storage)
    with pytest.raises(
        ArtifactError, match=r"out/a: already complete with another content \(differs in (one|two)\.bin\)"
    ):
        write(storage, parts=parts)
    assert storage.get("out/a/one.bin") == b"first"


def test_two_writers_of_the_same_output_both_succeed(storage):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: write(storage), range(8)))
    assert {manifest.digest() for manifest in found} == {read_manifest(storage, "out/a").digest()}


def test_who_is_late_with_other_bytes_damages_nothing(storage, monkeypatch):
    """It has seen no manifest, and then writes its files while the other one completes the output."""
    looked = outputs.read_manifest
    first_look = iter([None])
    monkeypatch.setattr(outputs, "read_manifest", lambda *given: next(first_look, looked(*given)))
    manifest = write(storage, parts={"one.bin": b"first"})
    first_look = iter([None])
    with pytest.raises(ArtifactError, match=r"already complete with another content \(differs in one\.bin\)"):
        write(storage, parts={"one.bin": b"other"})
    assert read_parts(storage, "out/a", manifest.parts) == [b"first"]


def test_what_a_killed_try_has_left_is_written_over(storage):
    storage.put("out/a/one.bin", b"half")
    manifest = write(storage, parts={"one.bin": b"first"})
    assert read_parts(storage, "out/a", manifest.parts) == [b"first"]


def test_a_damaged_part_is_named_with_its_remedy(storage):
    manifest = write(storage)
    storage.put("out/a/one.bin", b"fIrst")
    with pytest.raises(ArtifactError) as caught:
        read_part(storage, "out/a", manifest.parts[0])
    text = str(caught.value)
    assert text.startswith(f"{storage.uri}/out/a/one.bin: damaged: 5 bytes with digest ")
    assert manifest.parts[0].sha256[:12] in text
    assert text.endswith("remove the output and run its step again")


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_part_of_an_earlier_output_is_named_with_what_holds_it(tmp_path, harm):
    storage = FolderStorage(tmp_path)
    part = write(storage).parts[0].referenced("out/a")
    (tmp_path / "out/a/one.bin").unlink()
    if harm == "damaged":
        storage.put("out/a/one.bin", b"fIrst")
    with pytest.raises(ArtifactError, match=r"one\.bin: .*; remove out/a and out/current\.json and refresh again$"):
        read_referenced(storage, part)
    if harm == "missing":
        with pytest.raises(ArtifactError, match=r"one\.bin: not found; remove out/a and out/current\.json and"):
            read_range(storage, part, 0, 2)


def test_a_missing_part_is_named_with_its_remedy(storage):
    manifest = write(storage)
    part = manifest.parts[0].model_copy(update={"name": "none.bin"})
    with pytest.raises(ArtifactError, match=r"none\.bin: not found; remove the output and run its step again"):
        read_part(storage, "out/a", part)


def test_a_part_cut_short_is_named_with_both_sizes(storage):
    manifest = write(storage)
    storage.put("out/a/one.bin", b"fir")
    with pytest.raises(ArtifactError, match=r"one\.bin: damaged: 3 bytes .*expected 5 bytes"):
        read_parts(storage, "out/a", manifest.parts)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_manifest_is_named_with_its_remedy(storage, data):
    write(storage)
    storage.put("out/a/manifest.json", data)
    with pytest.raises(
        ArtifactError, match=r"out/a/manifest\.json: not a manifest .*; remove the output and run its step"
    ):
        read_manifest(storage, "out/a")


def test_a_manifest_of_another_making_is_refused(storage):
    written = write(storage)
    storage.put("out/a/manifest.json", json.dumps(written.model_dump(mode="json") | {"extra": 1}).encode())
    with pytest.raises(ArtifactError, match="not a manifest"):
        read_manifest(storage, "out/a")


def test_the_same_output_is_the_same_bytes_in_any_store(storage, tmp_path):
    other = open_storage(Places(store=str(tmp_path / "other")))
    write(storage)
    write(other)
    assert storage.get("out/a/manifest.json") == other.get("out/a/manifest.json")


def test_a_recipe_changes_with_each_ingredient():
    given = ("kind", {"a": 1, "b": 2}, {"x": "1"}, 0)
    same = recipe("kind", {"b": 2, "a": 1}, {"x": "1"}, 0)
    others = [
        recipe("other", *given[1:]),
        recipe("kind", {"a": 1, "b": 3}, {"x": "1"}, 0),
        recipe("kind", {"a": 1, "b": 2}, {"x": "2"}, 0),
        recipe("kind", {"a": 1, "b": 2}, {"x": "1"}, 1),
    ]
    assert recipe(*given) == same
    assert len({same, *others}) == 5
