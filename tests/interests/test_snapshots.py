"""Snapshots: what is in them, and that spaces do not mix."""

from __future__ import annotations

from datetime import date

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_rows import plain
from safetensors.numpy import load, save

from encode.config import ClusteringConfig, ModelConfig, Places, RefreshConfig
from encode.data.by_user import group
from encode.data.vocabulary import Vocabulary
from encode.engines.local import LocalEngine
from encode.errors import ArtifactError
from encode.interests import snapshots
from encode.interests.extract import extract, state_of
from encode.interests.refresh import refresh_interests
from encode.interests.snapshots import folder_of, merged, read_space, write_space
from encode.model.ctr import Encode, Reader, Tables
from encode.model.files import ModelCard, model_files
from encode.model.space import SpaceConfig, load_space, space_of
from encode.outputs import read_manifest
from encode.pointers import read_pointer
from encode.schema import SECONDS_PER_DAY, day_of, day_start
from encode.serving.bundle import Asked, load_bundle
from encode.storage import open_storage

MODEL = ModelConfig(embedding_dim=6, category_dim=2, projected_dim=3, recent_length=4, hidden_dims=(8,))
VOCABULARY = Vocabulary(np.array([1, 2]), np.arange(10, 30), 1 + np.arange(20) % 2)
MONDAY = date(2024, 3, 4)
NUM_BUCKETS = 4


def make_model(seed=0):
    """A space and the files of a model that needs it, with random weights."""
    torch.manual_seed(seed)
    tables = Tables(MODEL, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories)
    reader = Reader(MODEL, Encode(MODEL))
    space = space_of(tables, reader, VOCABULARY, SpaceConfig(ClusteringConfig(num_clusters=3), "relevance", 4, 50))
    card = ModelCard(model=MODEL, space=space.id, as_of=MONDAY, first_day=MONDAY, test_days=1, metrics={})
    targets = torch.arange(1, 9)[None]
    return space, model_files(card, reader, space.items, [state_of(None, space)], targets, {})


SPACE, FILES = make_model()


def draw(num_users, until=MONDAY):
    """Behaviors of users who have 1 to 30 each, on the days before `until`, [N, 4]."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, num_users)
    users = np.repeat(rng.choice(10**6, num_users, replace=False) + 1, lengths)
    items = rng.integers(5, 35, len(users))
    times = rng.integers(day_start(date(2024, 2, 27)), day_start(date(2024, 3, 8)), len(users))
    times[np.cumsum(lengths) - 1] = day_start(date(2024, 2, 27))  # nobody comes later
    rows = np.column_stack([users, items, items % 3, times])
    return rows[times < day_start(until)]


@pytest.fixture
def refresh(write_day, tmp_path):
    """What the step does, on one machine: refresh one space as of a day, from behaviors drawn for it."""
    engine = LocalEngine(RefreshConfig(), Places(store=str(tmp_path), scratch=tmp_path / "scratch"))

    def run(storage, until=MONDAY, space=SPACE, num_users=12):
        rows = draw(num_users, until)
        for day in {day_of(int(timestamp)) for timestamp in rows[:, 3]}:
            if read_manifest(storage, f"behaviors/dt={day}") is None:
                first = day_start(day)
                write_day(storage, day, rows[(rows[:, 3] >= first) & (rows[:, 3] < first + SECONDS_PER_DAY)])
        config = RefreshConfig(min_buckets=NUM_BUCKETS)
        return refresh_interests(storage, [space.id], until, config, engine, lambda _: None)[1][space.id]

    return run


def contents(storage):
    return {key: storage.get(key) for key in storage.list("")}


# --- the content -------------------------------------------------------------------------------------------


def test_a_rerun_changes_nothing(storage, refresh, dying, monkeypatch):
    """It neither extracts nor writes."""
    write_space(storage, SPACE, {})
    first = refresh(storage)
    before = {key: storage.get_versioned(key) for key in storage.list("")}
    monkeypatch.setattr("encode.interests.bucket.extract", None)
    assert refresh(dying[0](storage, 1)) == first  # it would die at its first write
    assert {key: storage.get_versioned(key) for key in storage.list("")} == before


def test_the_same_inputs_give_the_same_bytes(storage, refresh, tmp_path):
    other = open_storage(Places(store=str(tmp_path / "other")))
    for one in (storage, other):
        write_space(one, SPACE, {})
        refresh(one)
    assert contents(storage) == contents(other)


def rows_by_user(num_users):
    """Extraction of everybody at once, by user."""
    rows = extract(group(draw(num_users)).batch(0, num_users), SPACE).to_pylist()
    return {row["user_id"]: row for row in rows}


def test_every_user_is_in_one_part_with_the_row_of_extraction(folder, refresh, tmp_path):
    """And the manifest counts what is there."""
    write_space(folder, SPACE, {})
    pointer = refresh(folder)
    manifest = read_manifest(folder, f"interests/{SPACE.id}/{pointer.snapshot}")
    rows = rows_by_user(12)
    snapshot = load_bundle(folder, FILES, "1", tmp_path / "cache").snapshot
    assert sorted(np.concatenate(list(snapshot.user_ids()))) == sorted(rows)
    for user, row in rows.items():
        assert {name: plain(snapshot.find(user)[name]) for name in row} == row
    assert snapshot.find(999_999_999) is None
    assert manifest.counts == {
        "users": 12,
        "clustered": 12,
        "behaviors": len(draw(12)),
        "interests": sum(len(row["size"]) for row in rows.values()),
    }
    assert sum(part.rows for part in manifest.parts) == 12
    assert manifest.details["space"] == SPACE.id
    assert snapshot.busiest_user() == max(rows.values(), key=lambda row: row["num_behaviors"])["user_id"]


@pytest.mark.parametrize("num_users", [1, 2])
def test_parts_without_users_do_no_harm(folder, refresh, tmp_path, num_users):
    write_space(folder, SPACE, {})
    refresh(folder, num_users=num_users)
    snapshot = load_bundle(folder, FILES, "1", tmp_path / "cache").snapshot
    assert snapshot.num_users == num_users
    assert all(snapshot.find(user) for user in np.unique(draw(num_users)[:, 0]).tolist())
    assert snapshot.find(3) is None


def test_more_users_than_a_batch_holds(folder, refresh, tmp_path, monkeypatch):
    """Files in batches of 5, extracted in batches of 40 behaviors, hold the same rows."""
    monkeypatch.setattr("encode.interests.snapshots._USERS_PER_BATCH", 5)
    monkeypatch.setattr("encode.interests.bucket._BEHAVIORS_PER_BATCH", 40)
    write_space(folder, SPACE, {})
    refresh(folder, num_users=60)
    snapshot = load_bundle(folder, FILES, "1", tmp_path / "cache").snapshot
    for user, row in rows_by_user(60).items():
        assert {name: plain(snapshot.find(user)[name]) for name in row} == row


# --- spaces do not mix -------------------------------------------------------------------------------------


@pytest.fixture
def two_spaces(folder, refresh):
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
    pointer = read_pointer(folder, folder_of(SPACE.id))[0]
    theirs = read_pointer(folder, folder_of(other.id))[0].snapshot
    folder.put(
        f"interests/{SPACE.id}/{pointer.snapshot}/manifest.json",
        folder.get(f"interests/{other.id}/{theirs}/manifest.json"),
    )
    with pytest.raises(ArtifactError, match=f"has manifest [0-9a-f]{{12}}, pointer expects {pointer.manifest[:12]}"):
        load_bundle(folder, FILES, "1", tmp_path / "cache")


def test_parts_of_another_space_are_refused(folder, two_spaces, tmp_path):
    other, _ = two_spaces
    ours, theirs = (read_pointer(folder, folder_of(space.id))[0].snapshot for space in (SPACE, other))
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


def test_a_space_is_written_once_and_read_back(storage, dying):
    prefix = write_space(storage, SPACE, {})
    write_space(dying[0](storage, 1), SPACE, {"other": "inputs"})
    assert read_space(storage, SPACE.id).files == SPACE.files
    storage.put(f"{prefix}/space.safetensors", SPACE.files["space.safetensors"][:-1])
    with pytest.raises(ArtifactError, match=r"space\.safetensors: damaged"):
        read_space(storage, SPACE.id)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        *((name, lambda one: np.full_like(one, np.nan), "not finite") for name in ("embedding", "key", "projection")),
        ("scale", lambda one: np.full_like(one, np.inf), "not finite"),
        ("key", lambda one: one[:, :0], "no width of 0"),
        ("key", lambda one: one[:, 1:], "expected"),
        ("projection", lambda one: one[1:], "expected"),
        ("projection", lambda one: one.ravel(), "expected"),
        ("embedding", lambda one: one[:, :, None], "expected"),
    ],
)
def test_tables_that_interests_cannot_be_made_of_are_refused(name, change, told):
    """They would be clustered into NaN, or fail far from where they came from."""
    tensors = load(SPACE.files["space.safetensors"])
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    with pytest.raises(ArtifactError, match=f"over here: .*{told}.*; train it again"):
        load_space(SPACE.files | {"space.safetensors": save(tensors)}, "over here")


# --- merging -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_merged_sources_are_one_source_in_order(source_of, size, num_users):
    """Whatever batches they come in; and a file holds them in batches of equal size, each with its checksum."""
    rows = extract(group(draw(max(1, len(source_of)))).batch(0, len(source_of)), SPACE) if source_of else None
    if rows is None:
        assert list(merged([iter([])])) == []
        return
    place = np.arange(len(rows))
    sources = [rows.take(pa.array(place[np.array(source_of) == source])) for source in range(4)]
    batches = [iter([one[first : first + size] for first in range(0, len(one) + size, size)]) for one in sources]
    assert pa.Table.from_batches(merged(batches), rows.schema).equals(pa.Table.from_batches([rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "_USERS_PER_BATCH", num_users)
        file = pa.ipc.open_file(snapshots.snapshot_bytes(rows.schema, [rows[:1], rows[1:1], rows[1:]]))
    assert file.read_all().equals(pa.Table.from_batches([rows]))
    lengths = [file.get_batch(number).num_rows for number in range(file.num_record_batches)]
    assert lengths == [num_users] * (len(rows) // num_users) + [len(rows) % num_users] * (len(rows) % num_users > 0)


# --- the local copy ----------------------------------------------------------------------------------------


def test_a_damaged_local_copy_is_fetched_again(folder, refresh, tmp_path):
    write_space(folder, SPACE, {})
    pointer = refresh(folder)
    first = load_bundle(folder, FILES, "1", tmp_path / "cache")
    user = int(next(first.snapshot.user_ids())[0])
    asked = Asked(user, np.array([10, 11]))
    scored = first.score(asked).probabilities
    part = tmp_path / "cache" / "interests" / SPACE.id / pointer.snapshot / "part-000.arrow"
    whole = part.read_bytes()
    part.unlink()
    part.write_bytes(whole[:100])
    again = load_bundle(folder, FILES, "1", tmp_path / "cache").score(asked)
    assert np.array_equal(again.probabilities, scored)
    assert part.read_bytes() == whole
