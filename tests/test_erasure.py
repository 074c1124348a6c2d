"""A user is erased: from the running service at once, from what is made next, and in the end from the store."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from contextlib import suppress
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest
from made import AS_OF, FILES, SPACE, Client, OneVersion, refresh, score, wait

from encode.cli import main
from encode.config import Places, RefreshConfig, RegistryConfig, SourceConfig
from encode.data.erasures import ERASURES, erase_users
from encode.data.grouping import FOLDER
from encode.data.parquet import parquet_bytes
from encode.engines.local import LocalEngine
from encode.errors import ArtifactError, ConfigError
from encode.interests.pruning import find_garbage, remove_garbage
from encode.interests.refresh import refresh_interests
from encode.interests.remains import describe, find_users
from encode.interests.snapshots import folder_of, write_space
from encode.outputs import MANIFEST, read_manifest, read_parts
from encode.pointers import POINTER, read_current
from encode.schema import QUARANTINE, day_start
from encode.serving.app import create_app
from encode.serving.bundle import load_bundle
from encode.serving.local_snapshot import fetch_snapshot, remove_files
from encode.storage import FolderStorage, open_storage

START = date(2024, 3, 1)
CONFIG = RefreshConfig(min_buckets=4, max_deltas=1, max_delta_share=1.0, max_drift=9.0)
TAOBAO = SourceConfig(reader="taobao")


def day(number):
    return START + timedelta(days=number)


def draw(number, users, num_rows=60):
    """Behaviors of some users on a day."""
    rng = np.random.default_rng([number, len(users)])
    times = day_start(day(number)) + rng.integers(0, 86_400, num_rows)
    items = rng.integers(10, 50, num_rows)
    return np.column_stack([rng.choice(users, num_rows), items, 1 + items % 3, times])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Refresh as of a day."""
    engine = LocalEngine(CONFIG, Places(store="unused", scratch=tmp_path_factory.mktemp("scratch")))
    yield lambda storage, number: refresh_interests(storage, [SPACE.id], day(number), CONFIG, engine, lambda _: None)
    engine.close()


# --- the running service ------------------------------------------------------------------------------------


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """The application on a store of its own, which it looks at again only when asked; and the store."""
    places = Places(store=str(tmp_path / "store"), tracking_uri="not used")
    storage = open_storage(places)
    write_space(storage, SPACE, {})
    refresh(storage)
    registry = OneVersion()
    registry.release("1", FILES, SPACE)
    monkeypatch.setattr("encode.serving.follower.Registry", lambda *_: registry)
    app = create_app(places, RegistryConfig(), tmp_path / "cache", seconds=3600)
    with Client(app) as client:
        wait(client, lambda state: state["bundle"])
        yield client, storage


def look(client):
    """Let the service look at the store, and return why that failed, if it did."""
    with suppress(ArtifactError):
        client.app.state.follower.look()


def test_the_running_service_answers_an_erased_user_as_unknown_before_the_next_snapshot(serving, capsys):
    client, storage = serving
    known, stranger = score(client, 1), score(client, 999)
    assert not known["fallbacks"]["unknown_user"]
    assert client.get("/v1/users/1/interests").status_code == 200
    erase_users(storage, [1, 7])
    look(client)
    erased = score(client, 1)
    assert erased["fallbacks"]["unknown_user"]
    assert erased["probabilities"] == stranger["probabilities"] != known["probabilities"]
    assert erased["bundle"] == known["bundle"]
    assert client.get("/v1/users/1/interests").status_code == 404
    assert client.get("/v1/users/1/interests?item_id=10").status_code == 404
    assert score(client, 2)["fallbacks"]["unknown_user"] is False
    assert "encode_erased_users 2.0" in client.get("/metrics").text
    rows = {"dataframe_records": [{"user_id": 1, "item_id": 10}]}
    assert client.post("/invocations", json=rows).json()["fallbacks"]["unknown_users"] == [1]


def test_an_erasure_does_not_wait_for_a_load_that_is_under_way(serving, monkeypatch, tmp_path):
    _, storage = serving
    registry = OneVersion()
    registry.release("1", FILES, SPACE)
    monkeypatch.setattr("encode.serving.follower.Registry", lambda *_: registry)
    begun, go_on = threading.Event(), threading.Event()
    places = Places(store=str(tmp_path / "store"), tracking_uri="not used")
    with Client(create_app(places, RegistryConfig(), tmp_path / "second", seconds=0.05)) as client:
        wait(client, lambda state: state["bundle"])

        def load_slowly(*given):
            begun.set()
            go_on.wait(30)
            return load_bundle(*given)

        monkeypatch.setattr("encode.serving.follower.load_bundle", load_slowly)
        refresh(storage, AS_OF + timedelta(days=1))
        assert begun.wait(30)
        erase_users(storage, [1])
        for _ in range(600):
            if unknown := score(client, 1)["fallbacks"]["unknown_user"]:
                break
            time.sleep(0.05)
        go_on.set()
    assert unknown


def test_a_bundle_that_is_loaded_after_the_erasure_and_the_one_before_it_obey(serving):
    client, storage = serving
    erase_users(storage, [1])
    refresh(storage, AS_OF + timedelta(days=1))
    look(client)
    follower = client.app.state.follower
    assert follower.previous is not None
    assert follower.bundle.interests(1) is follower.previous.interests(1) is None
    assert follower.bundle.interests(2)
    assert follower.previous.interests(2)
    erase_users(storage, [2])
    look(client)
    assert follower.bundle.interests(2) is follower.previous.interests(2) is None


def test_a_bundle_outside_the_service_obeys_too(serving, tmp_path):
    _, storage = serving
    before = load_bundle(storage, FILES, "1", tmp_path / "other")
    busiest = before.snapshot.busiest_user()
    erase_users(storage, [busiest])
    after = load_bundle(storage, FILES, "1", tmp_path / "other")
    assert after.interests(busiest) is None
    assert after.snapshot.busiest_user() != busiest


def test_a_list_that_cannot_be_read_keeps_the_one_that_was_and_loads_nothing_new(serving, tmp_path):
    client, storage = serving
    erase_users(storage, [1])
    look(client)
    storage.put(ERASURES, b"{")
    refresh(storage, AS_OF + timedelta(days=1))
    served = client.app.state.follower.bundle
    with pytest.raises(ArtifactError, match="mend it"):
        client.app.state.follower.look()
    assert client.app.state.follower.bundle is served
    assert score(client, 1)["fallbacks"]["unknown_user"]
    with pytest.raises(ArtifactError, match="mend it"):
        load_bundle(storage, FILES, "1", tmp_path / "other")


# --- what still holds a user --------------------------------------------------------------------------------


@pytest.fixture
def full(storage, write_day, run):
    """A store with user 5 in all that can hold one, and user 6 in all but the raw day, in the folder and in S3."""
    lines = b"5,10,1,pv,%d\n6x5,1\n51,10,1,pv,%d\n" % (day_start(day(0)), day_start(day(0)))
    storage.put(f"raw/dt={day(0)}/log.csv", lines)
    rejected = [("log.csv", 2, "malformed_row", text, None, None, None, None) for text in ("6.0", "5,10,pv", "51,7")]
    table = pa.table(list(map(list, zip(*rejected, strict=True))), schema=QUARANTINE)
    storage.put(f"quarantine/dt={day(0)}/part-00000.parquet", parquet_bytes(table))
    told = pa.table({"user_id": [5, 51, 7], "item_id": [1, 1, 1], "label": [0, 1, 0]})
    storage.put(f"feedback/dt={day(0)}/log.parquet", parquet_bytes(told))
    write_space(storage, SPACE, {})
    write_day(storage, day(0), draw(0, [5, 6, 7, 8]))
    run(storage, 1)
    return storage


def test_a_user_is_found_wherever_there_is_one(full, run):
    histories, interests = read_current(full, FOLDER)[0].snapshot, read_current(full, folder_of(SPACE.id))[0].snapshot
    made = [f"{FOLDER}/{histories}", f"{folder_of(SPACE.id)}/{interests}"]
    found = find_users(full, [5, 6, 12], TAOBAO)
    assert found == {
        f"raw/dt={day(0)}": [5, 6],  # a line that does not split may be anybody's
        f"behaviors/dt={day(0)}": [5, 6],
        f"quarantine/dt={day(0)}": [5, 6],
        f"feedback/dt={day(0)}": [5],
        **{prefix: [5, 6] for prefix in made},
    }
    erase_users(full, [5])
    run(full, 1)
    after = find_users(full, [5], TAOBAO)
    assert set(after) == set(found), "what was made before still holds the user"
    current = [f"{folder}/{read_current(full, folder)[0].snapshot}" for folder in (FOLDER, folder_of(SPACE.id))]
    assert not set(current) & set(after)


def test_what_is_said_names_the_places_and_who_is_nowhere():
    found = {"behaviors/dt=2024-03-01": [5], "behaviors/dt=2024-03-02": [5], "interests/s/a": [5]}
    lines = list(describe([5, 12], [5], found))
    assert lines[0] == "not on the list of erased users: 12"
    assert lines[1].startswith("still in 2 of behaviors/, behaviors/dt=2024-03-01 to behaviors/dt=2024-03-02: ")
    assert lines[2].startswith("still in interests/s/a: `encode refresh` ")
    assert lines[3] == "in nothing that the store holds: 12; is the id right?"


def test_the_command_erases_and_says_where_the_user_still_is(tmp_path, write_day, run, capsys):
    storage = FolderStorage(tmp_path / "work" / "store")
    write_space(storage, SPACE, {})
    write_day(storage, day(0), draw(0, [5, 6]))
    run(storage, 1)
    place = ["--preset", "tiny", "--workdir", str(tmp_path / "work")]
    assert main(["erase", "--check", "5", *place]) == 0
    assert "not on the list of erased users: 5" in capsys.readouterr().out
    assert main(["erase", "5", "77", "--json", *place]) == 0
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert summary["erased"] == 2
    assert summary["on_list"] == [5, 77]
    assert summary["held"][f"behaviors/dt={day(0)}"] == [5]
    assert "in nothing that the store holds: 77; is the id right?" in told.err
    with pytest.raises(SystemExit, match="2"):
        main(["erase", "0", *place])
    assert "found '0', expected an id" in capsys.readouterr().err


# --- retention ----------------------------------------------------------------------------------------------


class Removals:
    """Lets a store that dies at its n-th write die at its n-th removal."""

    def __init__(self, dying):
        self._dying = dying

    def __getattr__(self, name):
        return getattr(self._dying, name)

    def remove(self, key):
        self._dying._write("remove", key)


@pytest.fixture(scope="module")
def seven_days(tmp_path_factory, write_day, run):
    """Seven days, refreshed each day: files of early snapshots are in late ones, and most users come only once."""
    root = tmp_path_factory.mktemp("seven") / "store"
    storage = FolderStorage(root)
    write_space(storage, SPACE, {})
    for number in range(7):
        users = range(1, 25) if number == 0 else [1 + number % 3]
        write_day(storage, day(number), draw(number, list(users), 200 if number == 0 else 8))
        run(storage, number + 1)
    return root


@pytest.fixture
def grown(seven_days, tmp_path):
    """A copy of them."""
    return FolderStorage(shutil.copytree(seven_days, tmp_path / "grown"))


def assert_reachable(storage, least):
    """Check that what is current, and at least so many snapshots of each folder, are there to the last byte."""
    for folder in (FOLDER, folder_of(SPACE.id)):
        pointer, _ = read_current(storage, folder)
        finished = [key for key in storage.list(f"{folder}/") if key.endswith(f"/{MANIFEST}")]
        for key in finished[-least:]:
            prefix = key.removesuffix(f"/{MANIFEST}")
            read_parts(storage, prefix, read_manifest(storage, prefix).parts)
        assert f"{folder}/{pointer.snapshot}/{MANIFEST}" in finished[-least:]


def test_old_outputs_go_and_what_is_reached_stays(grown):
    before = {folder: grown.list(f"{folder}/") for folder in (FOLDER, "interests")}
    assert find_garbage(grown, [SPACE.id], 3, 30).keys == ()
    garbage = find_garbage(grown, [SPACE.id], 3, 1)
    assert {key.rpartition(".")[2] for key in garbage.keys} == {"json", "arrow", "npy"}
    remove_garbage(grown, garbage)
    assert_reachable(grown, 3)
    assert find_garbage(grown, [SPACE.id], 3, 1).keys == ()
    for folder, keys in before.items():
        left = grown.list(f"{folder}/")
        manifests = [key for key in left if key.endswith(f"/{MANIFEST}")]
        assert len(manifests) == 3
        assert set(left) < set(keys)
        parents = {key.removesuffix(f"/{MANIFEST}") for key in manifests}
        assert {key.rpartition("/")[0] for key in left if "/part-" in key} - parents, "files of earlier ones are in use"


def test_a_snapshot_that_is_current_stays_however_old_it_is_and_its_histories_with_it(grown, run, write_day):
    folder = folder_of(SPACE.id)
    data = grown.get(f"{folder}/current.json")
    first = min(key for key in grown.list(f"{folder}/") if key.endswith(MANIFEST)).removesuffix(f"/{MANIFEST}")
    manifest = read_manifest(grown, first)
    pointer = json.loads(data) | {"snapshot": first.rpartition("/")[2], "manifest": manifest.digest()}
    grown.put(f"{folder}/current.json", json.dumps(pointer).encode())
    remove_garbage(grown, find_garbage(grown, [SPACE.id], 3, 1))
    read_parts(grown, first, read_manifest(grown, first).parts)
    made_of = manifest.details["histories"]
    read_parts(grown, made_of, read_manifest(grown, made_of).parts)


@pytest.mark.parametrize("after", [False, True])
def test_dying_at_any_removal_leaves_all_that_is_reached_and_the_next_time_goes_on(grown, dying, after, tmp_path):
    dies, power_cut = dying
    garbage = find_garbage(grown, [SPACE.id], 3, 1)
    root = tmp_path / "grown"
    expected = None
    for last in (*range(1, len(garbage.keys), 7), len(garbage.keys)):
        copy = tmp_path / f"copy-{last}"
        shutil.copytree(root, copy)
        storage = FolderStorage(copy)
        with pytest.raises(power_cut):
            remove_garbage(Removals(dies(storage, last, after)), garbage)
        assert_reachable(storage, 3)
        whole = [key.removesuffix(f"/{MANIFEST}") for key in storage.list("") if key.endswith(f"/{MANIFEST}")]
        for prefix in whole:  # what says that it is complete is so
            read_parts(storage, prefix, read_manifest(storage, prefix).parts)
        remove_garbage(storage, find_garbage(storage, [SPACE.id], 3, 1))
        left = storage.list("")
        expected = expected or left
        assert left == expected
        shutil.rmtree(copy)


def test_what_is_being_written_and_what_has_another_name_is_left_alone(grown):
    folder = folder_of(SPACE.id)
    kept = [f"{folder}/{day(7):%Y%m%d}-abc/part-000.arrow", f"{folder}/notes/a", "interests/new/notes/a"]
    gone = f"{folder}/{day(1):%Y%m%d}-abc/part-000.arrow"
    for key in (*kept, gone):
        grown.put(key, b"x")
    garbage = find_garbage(grown, [SPACE.id], 3, 1)
    assert gone in garbage.keys
    assert not set(kept) & set(garbage.keys)


def test_pruning_lets_an_erased_user_go(grown, run):
    erase_users(grown, [24])
    for number in range(7, 11):
        run(grown, number + 1)
    assert any(prefix.startswith("interests/") for prefix in find_users(grown, [24], TAOBAO))
    remove_garbage(grown, find_garbage(grown, [SPACE.id], 3, 1))
    assert set(find_users(grown, [24], TAOBAO)) == {f"behaviors/dt={day(0)}"}


def in_another_space(storage, name):
    """Give a space the outputs that another has by now."""
    folder = folder_of(name)
    for key in storage.list(f"{folder_of(SPACE.id)}/"):
        storage.put(key.replace(folder_of(SPACE.id), folder, 1), storage.get(key))
    return folder


def test_serving_keeps_no_file_with_an_erased_user_on_its_disk(grown, run, write_day, tmp_path):
    """Files of earlier snapshots go on being used, one by one; those beside them, that are not, are removed."""
    cache, folder = tmp_path / "cache", folder_of(SPACE.id)

    def follow():
        pointer, manifest = read_current(grown, folder)
        snapshot = fetch_snapshot(grown, f"{folder}/{pointer.snapshot}", manifest, cache)
        remove_files(cache, snapshot.keys)
        on_disk = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
        assert on_disk == snapshot.keys
        return {int(user) for key in on_disk for user in ids_in(cache / key)}

    assert 24 in follow()
    erase_users(grown, [24])
    write_day(grown, day(7), draw(7, [3], 5))
    run(grown, 8)
    assert follow() == set(range(1, 24))


def ids_in(path):
    return pa.ipc.open_file(path).read_all().column("user_id").to_pylist()


def test_pruning_lets_an_erased_user_go_from_spaces_that_are_not_refreshed_any_more(grown, run, dying):
    retired = in_another_space(grown, "0123456789abcdef")
    erase_users(grown, [24])
    assert not any(key.startswith(f"{retired}/current") for key in find_garbage(grown, [SPACE.id], 3, 1).keys)
    for number in range(7, 11):
        run(grown, number + 1)
    at_hand = find_garbage(grown, [SPACE.id, "0123456789abcdef"], 3, 1)
    assert f"{retired}/{POINTER}" not in at_hand.keys
    assert f"{retired}/{POINTER}" not in find_garbage(grown, [], 3, 1).keys, "a registry that names none is no reason"
    garbage = find_garbage(grown, [SPACE.id], 3, 1)
    assert garbage.keys[0] == f"{retired}/{POINTER}"
    dies, power_cut = dying
    with pytest.raises(power_cut):
        remove_garbage(Removals(dies(grown, 2, True)), garbage)
    remove_garbage(grown, find_garbage(grown, [SPACE.id], 3, 1))
    assert grown.list(f"{retired}/") == []
    assert set(find_users(grown, [24], TAOBAO)) == {f"behaviors/dt={day(0)}"}
    assert_reachable(grown, 3)


def test_after_pruning_a_refresh_goes_on_from_what_is_left(grown, run, write_day):
    remove_garbage(grown, find_garbage(grown, [SPACE.id], 3, 1))
    write_day(grown, day(7), draw(7, [3], 5))
    run(grown, 8)
    _, manifest = read_current(grown, folder_of(SPACE.id))
    assert manifest.counts["users"] == 24
    assert manifest.counts["clustered"] == 1


def test_too_little_is_never_kept(grown):
    for keep, days in ((2, 7), (3, 0)):
        with pytest.raises(ConfigError, match="expected at least 3 snapshots and 1 day"):
            find_garbage(grown, [SPACE.id], keep, days)


def test_a_pointer_that_cannot_be_read_stops_it(grown):
    grown.put(f"{FOLDER}/current.json", b"{")
    with pytest.raises(ArtifactError, match="not a pointer"):
        find_garbage(grown, [SPACE.id], 3, 1)


@pytest.mark.filterwarnings("ignore")  # of MLflow on SQLite
def test_the_command_tries_first_and_then_removes(tmp_path, write_day, run, capsys):
    storage = FolderStorage(tmp_path / "work" / "store")
    write_space(storage, SPACE, {})
    for number in range(6):
        write_day(storage, day(number), draw(number, [5, 6], 8))
        run(storage, number + 1)
    before = storage.list("")
    command = ["prune", "--older-than", "1", "--preset", "tiny", "--workdir", str(tmp_path / "work")]
    assert main([*command, "--dry-run"]) == 0
    assert re.search(r"would remove \d+ files? of [1-9] outputs?", capsys.readouterr().out)
    assert set(storage.list("")) - {"log.json"} == set(before)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"]
    assert set(storage.list("")) < set(before) | {"log.json"}
    with pytest.raises(SystemExit):
        main([*command, "--keep-snapshots", "2"])
    assert "expected 3 or more" in capsys.readouterr().err
