"""Snapshots: whatever breaks in between, the old one serves until the new one is whole."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import SecretStr

from encode.config import ClusteringConfig, ModelConfig, Places
from encode.data.histories import Histories, to_histories
from encode.data.vocabulary import Vocabulary
from encode.errors import ArtifactError
from encode.interests.extract import extract, state_of
from encode.interests.snapshots import (
    Pointer,
    history_batch,
    move_pointer,
    publish,
    read_pointer,
    read_space,
    write_snapshot,
    write_space,
)
from encode.model.ctr import Reader, Tables
from encode.model.files import ModelCard, model_files
from encode.model.space import SpaceConfig, space_of
from encode.schema import BEHAVIORS, day_start
from encode.serving.bundle import load_bundle
from encode.storage import LostRace, open_storage, read_manifest

MODEL = ModelConfig(embedding_dim=6, category_dim=2, projected_dim=3, recent_length=4, hidden_dims=(8,))
VOCABULARY = Vocabulary(np.array([1, 2]), np.arange(10, 30), 1 + np.arange(20) % 2)
MONDAY, TUESDAY = date(2024, 3, 4), date(2024, 3, 5)
NUM_PARTS = 3
NUM_WRITES = NUM_PARTS + 2  # parts, manifest, pointer


def make_model(seed=0):
    """A space and the files of a model that needs it, with random weights."""
    torch.manual_seed(seed)
    tables = Tables(MODEL, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories)
    reader = Reader(MODEL)
    space = space_of(tables, reader, VOCABULARY, SpaceConfig(ClusteringConfig(num_clusters=3), "relevance", 4))
    card = ModelCard(model=MODEL, space=space.id, as_of=MONDAY, first_day=MONDAY, test_days=1, metrics={})
    targets = torch.arange(1, 9)[None]
    return space, model_files(card, reader, space.items, [state_of(None, space)], targets, {})


SPACE, FILES = make_model()


def draw_histories(num_users, until):
    """Histories of 1 to 30 behaviors on the days before `until`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, num_users)
    users = np.repeat(rng.choice(10**6, num_users, replace=False) + 1, lengths)
    items = rng.integers(5, 35, len(users))
    times = rng.integers(day_start(date(2024, 2, 1)), day_start(date(2024, 3, 8)), len(users))
    columns = [users, items, items % 3, pa.array(["pv"] * len(users)).dictionary_encode(), times]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, BEHAVIORS, strict=True)], schema=BEHAVIORS)
    return to_histories(table).before(day_start(until))


def refresh(storage, until=MONDAY, space=SPACE, num_users=12):
    """What the step does."""
    inputs = {f"behaviors/dt={until}": "d"}
    histories = draw_histories(num_users, until)
    snapshot, manifest = write_snapshot(storage, space, histories, until, inputs, NUM_PARTS, lambda _: None)
    return publish(storage, space.id, snapshot, manifest)


def contents(storage):
    return {key: storage.get(key) for key in storage.list("")}


@pytest.fixture(params=["folder", "s3"])
def storage(request, tmp_path):
    if request.param == "folder":
        return open_storage(Places(store=str(tmp_path / "store")))
    server = request.getfixturevalue("object_store")
    store = f"s3://{server.bucket}/test-snapshots/{secrets.token_hex(8)}"
    secret = SecretStr(server.secret_key)
    return open_storage(
        Places(store=store, endpoint_url=server.endpoint_url, access_key=server.access_key, secret_key=secret)
    )


@pytest.fixture
def folder(tmp_path):
    return open_storage(Places(store=str(tmp_path / "store")))


class PowerCut(Exception):  # noqa: N818
    """The process died."""


class Dying:
    """A store in front of which the process dies at the n-th write, just before or just after it took effect."""

    def __init__(self, storage, last, after):
        self._storage, self._left, self._after = storage, last, after
        self._lock = threading.Lock()

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def _write(self, name, *arguments):
        with self._lock:
            self._left -= 1
            if self._left < 0 or (self._left == 0 and not self._after):
                raise PowerCut
            getattr(self._storage, name)(*arguments)
            if self._left == 0:
                raise PowerCut

    def put(self, *arguments):
        self._write("put", *arguments)

    def create(self, *arguments):
        self._write("create", *arguments)

    def replace(self, *arguments):
        self._write("replace", *arguments)


# --- crash at each write -----------------------------------------------------------------------------------


def test_a_refresh_writes_parts_manifest_and_pointer(folder):
    with pytest.raises(PowerCut):
        refresh(Dying(folder, NUM_WRITES, after=True))
    assert read_pointer(folder, SPACE.id)[0].as_of == MONDAY


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_write_leaves_the_old_snapshot_served(storage, after, tmp_path):
    write_space(storage, SPACE, {})
    old = refresh(storage, MONDAY)
    users = draw_histories(12, MONDAY).user_ids.tolist()
    expected = [load_bundle(storage, FILES, "1", tmp_path / "cache").score(user, [10, 11]) for user in users]
    days = [date(2024, 3, 4 + last) for last in range(1, NUM_WRITES + 1)]
    for last, day in enumerate(days, 1):
        with pytest.raises(PowerCut):
            refresh(Dying(storage, last, after), day)
        pointer, _ = read_pointer(storage, SPACE.id)
        if last == NUM_WRITES and after:
            assert pointer.as_of == day  # the pointer is all that makes it current
            break
        assert pointer == old
        bundle = load_bundle(storage, FILES, "1", tmp_path / f"cache-{last}")
        assert [bundle.score(user, [10, 11]) for user in users] == expected
    clean = open_storage(Places(store=str(tmp_path / "clean")))
    write_space(clean, SPACE, {})
    for one in (storage, clean):
        for day in [MONDAY, *days]:
            refresh(one, day)
    assert load_bundle(storage, FILES, "1", tmp_path / "cache").pointer.as_of == days[-1]
    assert contents(storage) == contents(clean)


def test_a_crash_at_the_first_snapshot_leaves_none(folder, tmp_path):
    write_space(folder, SPACE, {})
    for last in range(1, NUM_WRITES + 1):
        with pytest.raises(PowerCut):
            refresh(Dying(folder, last, after=False))
        with pytest.raises(ArtifactError, match=r"current\.json: no snapshot yet in this space; refresh it first"):
            load_bundle(folder, FILES, "1", tmp_path / "cache")


# --- the pointer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_of_many_who_move_the_pointer_one_wins(storage, first):
    if not first:
        move_pointer(storage, SPACE.id, Pointer("before", MONDAY, "0"), None)
    found = read_pointer(storage, SPACE.id)
    version = found[1] if found else None
    gate = threading.Barrier(16)

    def attempt(number):
        pointer = Pointer(f"snapshot-{number}", MONDAY, "0")
        gate.wait()
        try:
            move_pointer(storage, SPACE.id, pointer, version)
        except LostRace:
            return None
        return pointer

    with ThreadPoolExecutor(16) as pool:
        won = [pointer for pointer in pool.map(attempt, range(16)) if pointer]
    assert won == [read_pointer(storage, SPACE.id)[0]]


def test_the_pointer_moves_once_from_each_version(storage):
    for day in (MONDAY, TUESDAY):
        found = read_pointer(storage, SPACE.id)
        version = found[1] if found else None
        first, second = (Pointer(name, day, "0") for name in ("first", "second"))
        move_pointer(storage, SPACE.id, first, version)
        with pytest.raises(LostRace):
            move_pointer(storage, SPACE.id, second, version)
        assert read_pointer(storage, SPACE.id)[0] == first


def test_many_who_publish_end_with_the_latest_day(storage):
    """Each retries until its snapshot or a later one is current."""
    days = [date(2024, 3, day) for day in range(1, 9)]
    manifests = {}
    for day in days:
        made = write_snapshot(storage, SPACE, draw_histories(2, MONDAY), day, {}, 1, lambda _: None)
        manifests[day] = made
    gate = threading.Barrier(len(days))

    def attempt(day):
        gate.wait()
        return publish(storage, SPACE.id, *manifests[day])

    with ThreadPoolExecutor(len(days)) as pool:
        returned = list(pool.map(attempt, days))
    assert all(pointer.as_of >= day for pointer, day in zip(returned, days, strict=True))
    assert read_pointer(storage, SPACE.id)[0].as_of == days[-1]


def test_publishing_never_goes_back_to_an_earlier_day(storage):
    later = refresh(storage, TUESDAY)
    assert refresh(storage, MONDAY) == later
    assert read_pointer(storage, SPACE.id)[0] == later


def test_the_same_day_can_be_published_anew(folder):
    first = refresh(folder, MONDAY)
    histories = draw_histories(12, MONDAY)
    made = write_snapshot(folder, SPACE, histories, MONDAY, {"behaviors/dt=2": "late"}, NUM_PARTS, lambda _: None)
    second = publish(folder, SPACE.id, *made)
    assert second.snapshot != first.snapshot
    assert read_pointer(folder, SPACE.id)[0] == second


def test_a_publisher_gives_up_when_the_pointer_never_stays(folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    made = write_snapshot(folder, SPACE, draw_histories(2, MONDAY), MONDAY, {}, 1, lambda _: None)

    class Busy:
        def __getattr__(self, name):
            return getattr(folder, name)

        def create(self, key, data):
            raise LostRace(key)

    with pytest.raises(ArtifactError, match=r"current\.json: moved by others 20 times"):
        publish(Busy(), SPACE.id, *made)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"snapshot":"a","as_of":"today","manifest":"b"}', b"\xff"])
def test_a_pointer_that_cannot_be_read_is_named(folder, data):
    folder.put(f"interests/{SPACE.id}/current.json", data)
    with pytest.raises(ArtifactError, match=r"current\.json: not a pointer .*; publish a snapshot again"):
        read_pointer(folder, SPACE.id)


# --- the content -------------------------------------------------------------------------------------------


def test_a_rerun_changes_nothing(storage, monkeypatch):
    """It neither extracts nor writes."""
    first = refresh(storage)
    before = {key: storage.get_versioned(key) for key in storage.list("")}
    monkeypatch.setattr("encode.interests.snapshots.extract", None)
    assert refresh(Dying(storage, 1, after=False)) == first  # it would die at its first write
    assert {key: storage.get_versioned(key) for key in storage.list("")} == before


def test_the_same_inputs_give_the_same_bytes(storage, tmp_path):
    other = open_storage(Places(store=str(tmp_path / "other")))
    for one in (storage, other):
        write_space(one, SPACE, {})
        refresh(one)
    assert contents(storage) == contents(other)


def test_every_user_is_in_one_part_with_the_row_of_extraction(folder, tmp_path):
    """And the manifest counts what is there."""
    write_space(folder, SPACE, {})
    pointer = refresh(folder)
    manifest = read_manifest(folder, f"interests/{SPACE.id}/{pointer.snapshot}")
    histories = draw_histories(12, MONDAY)
    rows = extract(history_batch(histories, np.arange(12)), SPACE)
    snapshot = load_bundle(folder, FILES, "1", tmp_path / "cache").snapshot
    assert sorted(np.concatenate(list(snapshot.user_ids()))) == histories.user_ids.tolist()
    for place, user in enumerate(histories.user_ids.tolist()):
        assert {name: value.as_py() for name, value in snapshot.find(user).items()} == rows.slice(place, 1).to_pylist()[
            0
        ]
    assert snapshot.find(999_999_999) is None
    assert manifest.counts == {
        "users": 12,
        "behaviors": len(histories.timestamps),
        "interests": sum(len(sizes) for sizes in rows.column("size").to_pylist()),
    }
    assert sum(part.rows for part in manifest.parts) == 12
    assert manifest.details == {"as_of": "2024-03-04", "space": SPACE.id}
    assert histories.timestamps.max() < day_start(MONDAY)


@pytest.mark.parametrize("num_users", [1, 2])
def test_parts_without_users_do_no_harm(folder, tmp_path, num_users):
    write_space(folder, SPACE, {})
    refresh(folder, num_users=num_users)
    snapshot = load_bundle(folder, FILES, "1", tmp_path / "cache").snapshot
    assert snapshot.num_users == num_users
    assert all(snapshot.find(user) for user in draw_histories(num_users, MONDAY).user_ids.tolist())


def test_more_users_than_a_batch_holds(folder, tmp_path, monkeypatch):
    """Batches of 5 or of 1024 hold the same rows."""
    monkeypatch.setattr("encode.interests.snapshots._USERS_PER_BATCH", 5)
    write_space(folder, SPACE, {})
    refresh(folder, num_users=60)
    histories = draw_histories(60, MONDAY)
    rows = extract(history_batch(histories, np.arange(60)), SPACE)
    snapshot = load_bundle(folder, FILES, "1", tmp_path / "cache").snapshot
    for place, user in enumerate(histories.user_ids.tolist()):
        assert {name: value.as_py() for name, value in snapshot.find(user).items()} == rows.slice(place, 1).to_pylist()[
            0
        ]


def test_history_batch_takes_users_in_any_order():
    histories = draw_histories(5, MONDAY)
    for row, user in zip(history_batch(histories, np.array([3, 0, 3])).to_pylist(), (3, 0, 3), strict=True):
        rows = slice(histories.offsets[user], histories.offsets[user + 1])
        assert row == {
            "user_id": histories.user_ids[user],
            "item_id": histories.item_ids[rows].tolist(),
            "category_id": histories.category_ids[rows].tolist(),
            "timestamp": histories.timestamps[rows].tolist(),
        }
    none = Histories(*(np.zeros(n, np.int64) for n in (0, 1, 0, 0, 0)), np.zeros(0, np.int32), ())
    assert history_batch(none, np.zeros(0, np.int64)).num_rows == 0


# --- spaces do not mix -------------------------------------------------------------------------------------


@pytest.fixture
def two_spaces(folder):
    """A store with two spaces, each with a current snapshot; the second space and its model's files."""
    other, other_files = make_model(seed=1)
    for space in (SPACE, other):
        write_space(folder, space, {})
        refresh(folder, space=space)
    return other, other_files


def copy(storage, source, target):
    for key in storage.list(source):
        storage.put(target + key.removeprefix(source), storage.get(key))


def test_each_model_gets_the_snapshot_of_its_space(folder, two_spaces, tmp_path):
    other, other_files = two_spaces
    for space, files in ((SPACE, FILES), (other, other_files)):
        bundle = load_bundle(folder, files, "1", tmp_path / "cache")
        assert bundle.describe()["space"] == space.id == bundle.space.id
    assert SPACE.id != other.id


def test_a_snapshot_copied_under_another_space_is_refused(folder, two_spaces, tmp_path):
    other, _ = two_spaces
    copy(folder, f"interests/{other.id}/", f"interests/{SPACE.id}/")
    with pytest.raises(ArtifactError, match=f"of space {other.id}, model needs {SPACE.id}"):
        load_bundle(folder, FILES, "1", tmp_path / "cache")


def test_a_pointer_of_another_space_is_refused(folder, two_spaces, tmp_path):
    other, _ = two_spaces
    folder.put(f"interests/{SPACE.id}/current.json", folder.get(f"interests/{other.id}/current.json"))
    with pytest.raises(
        ArtifactError, match=f"interests/{SPACE.id}/20240304-[0-9a-f]{{12}}: absent or unfinished, pointer"
    ):
        load_bundle(folder, FILES, "1", tmp_path / "cache")


def test_a_manifest_other_than_the_one_pointed_at_is_refused(folder, two_spaces, tmp_path):
    other, _ = two_spaces
    pointer = read_pointer(folder, SPACE.id)[0]
    theirs = read_pointer(folder, other.id)[0].snapshot
    folder.put(
        f"interests/{SPACE.id}/{pointer.snapshot}/manifest.json",
        folder.get(f"interests/{other.id}/{theirs}/manifest.json"),
    )
    with pytest.raises(ArtifactError, match=f"has manifest [0-9a-f]{{12}}, pointer expects {pointer.manifest[:12]}"):
        load_bundle(folder, FILES, "1", tmp_path / "cache")


def test_parts_of_another_space_are_refused(folder, two_spaces, tmp_path):
    other, _ = two_spaces
    ours, theirs = (read_pointer(folder, space.id)[0].snapshot for space in (SPACE, other))
    name = "part-000.arrow"
    folder.put(f"interests/{SPACE.id}/{ours}/{name}", folder.get(f"interests/{other.id}/{theirs}/{name}"))
    with pytest.raises(ArtifactError, match=f"{name}: damaged"):
        load_bundle(folder, FILES, "1", tmp_path / "cache")


def test_the_content_of_another_space_is_refused(folder, two_spaces, tmp_path):
    other, _ = two_spaces
    copy(folder, f"spaces/{other.id}/", f"spaces/{SPACE.id}/")
    with pytest.raises(ArtifactError, match=f"is space {other.id}, expected {SPACE.id}"):
        load_bundle(folder, FILES, "1", tmp_path / "cache")


def test_weights_of_another_space_fail_the_mirror_test(folder, two_spaces, tmp_path):
    _, other_files = two_spaces
    mixed = FILES | {"reader.safetensors": other_files["reader.safetensors"]}
    with pytest.raises(ArtifactError, match="model version 1: mirror test"):
        load_bundle(folder, mixed, "1", tmp_path / "cache")


def test_a_missing_space_is_named(folder, tmp_path):
    with pytest.raises(ArtifactError, match=f"spaces/{SPACE.id}: no such space; train a model first"):
        load_bundle(folder, FILES, "1", tmp_path / "cache")


def test_a_space_is_written_once_and_read_back(storage):
    prefix = write_space(storage, SPACE, {})
    write_space(Dying(storage, 1, after=False), SPACE, {"other": "inputs"})
    assert read_space(storage, SPACE.id).files == SPACE.files
    storage.put(f"{prefix}/space.safetensors", SPACE.files["space.safetensors"][:-1])
    with pytest.raises(ArtifactError, match=r"space\.safetensors: damaged"):
        read_space(storage, SPACE.id)


# --- the local copy ----------------------------------------------------------------------------------------


def test_a_damaged_local_copy_is_fetched_again(folder, tmp_path):
    write_space(folder, SPACE, {})
    pointer = refresh(folder)
    first = load_bundle(folder, FILES, "1", tmp_path / "cache")
    user = int(next(first.snapshot.user_ids())[0])
    scored = first.score(user, [10, 11])
    part = tmp_path / "cache" / "interests" / SPACE.id / pointer.snapshot / "part-000.arrow"
    whole = part.read_bytes()
    part.unlink()
    part.write_bytes(whole[:100])
    assert load_bundle(folder, FILES, "1", tmp_path / "cache").score(user, [10, 11]) == scored
    assert part.read_bytes() == whole
