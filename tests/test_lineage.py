"""Lineage both ways, on a store of three days, two refreshes and two versions."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest
from made import draw_space

from encode.config import Places, RefreshConfig
from encode.data.erasures import erase_users
from encode.data.parquet import parquet_bytes
from encode.data.raw_days import find_raw_days
from encode.engines.local import LocalEngine
from encode.errors import ArtifactError, ConfigError, DataError
from encode.interests.refresh import refresh_interests
from encode.interests.snapshots import folder_of, write_space
from encode.lineage import Lineage, Node
from encode.lineage_text import tree
from encode.model.files import MODEL_FILES, model_digest
from encode.outputs import read_manifest, write_output
from encode.pointers import read_pointer
from encode.registry import Version
from encode.schema import BEHAVIORS, day_start, fingerprint
from encode.serving.bundle import bundle_id

START, NUM_ITEMS, USER = date(2024, 3, 1), 40, 3
CONFIG = RefreshConfig(min_buckets=2, max_drift=9.0)


SPACE = draw_space(NUM_ITEMS, 4, 3)
FILES = {number: {name: f"{name} {number}".encode() for name in MODEL_FILES} for number in ("1", "2")}
"""What decides a model's scores is not read here, so it may be anything."""


class Registered:
    """Stands for MLflow: two versions of one space, and aliases that a test moves."""

    def __init__(self):
        tags = {"encode.git_commit": "c0ffee", "encode.as_of": "2024-03-03"}
        self.held = [Version(number, SPACE.id, model_digest(files), tags) for number, files in FILES.items()]
        self.aliases = {"champion": "1", "candidate": "2"}

    def versions(self):
        return self.held

    def by_alias(self, alias):
        return next((one for one in self.held if one.number == self.aliases.get(alias)), None)

    def by_number(self, number):
        for one in self.held:
            if one.number == number:
                return one
        raise ArtifactError(f"version {number}: not in the registry")


def day(number):
    return START + timedelta(days=number)


def behaviors_of(number):
    """Users 1 to 8; user 3 is away on the second day."""
    rng = np.random.default_rng(number)
    users = rng.integers(1, 9, 60)
    users = users[(users != USER) | (number != 1)]
    items = rng.integers(1, NUM_ITEMS + 1, len(users))
    times = day_start(day(number)) + np.sort(rng.integers(0, 86_400, len(users)))
    kinds = pa.array(["pv"] * len(users)).dictionary_encode()
    columns = [users, items, 1 + (items - 1) % 4, kinds, times]
    return pa.table([pa.array(c).cast(f.type) for c, f in zip(columns, BEHAVIORS, strict=True)], schema=BEHAVIORS)


def validate(storage, number, settings=None):
    """What a validation leaves of a day that is accepted as a whole."""
    table = behaviors_of(number)
    name = f"dt={day(number)}"
    inputs = {f"raw/{name}": fingerprint(find_raw_days(storage, [day(number)])[day(number)].digests)}
    write_output(
        storage,
        f"behaviors/{name}",
        {"part-00000.parquet": parquet_bytes(table)},
        kind="behaviors",
        fingerprint=f"{number}",
        config=settings or {},
        inputs=inputs,
        counts={"rows": len(table)},
    )


def land(storage, number):
    data = {"part-00000.landed.parquet": parquet_bytes(behaviors_of(number))}
    write_output(storage, f"raw/dt={day(number)}", data, kind="raw", fingerprint="log", config={}, inputs={"log": "ab"})


@pytest.fixture
def store(folder, tmp_path):
    """Two landed days and one that its owner wrote; models of the first two; refreshed after the second and third."""
    land(folder, 0)
    land(folder, 1)
    folder.put(f"raw/dt={day(2)}/mine.parquet", parquet_bytes(behaviors_of(2)))
    for number in range(3):
        validate(folder, number)
    inputs = {}
    for number in range(2):
        inputs[f"behaviors/dt={day(number)}"] = read_manifest(folder, f"behaviors/dt={day(number)}").digest()
    write_space(folder, SPACE, inputs)
    for number, files in FILES.items():
        write_output(folder, f"models/m{number}", files, kind="model", fingerprint="m", config={}, inputs=inputs)
    engine = LocalEngine(CONFIG, Places(store=str(tmp_path), scratch=tmp_path / "scratch"))
    for number in (2, 3):
        refresh_interests(folder, [SPACE.id], day(number), CONFIG, engine, lambda _: None)
    return folder


@pytest.fixture
def registered():
    return Registered()


@pytest.fixture
def lineage(store, registered):
    return Lineage(store, registered)


def snapshots(storage):
    """The older and the current one."""
    keys = storage.list(f"{folder_of(SPACE.id)}/")
    return [key.removesuffix("/manifest.json") for key in keys if key.endswith("/manifest.json")]


def score_of(storage, **changes):
    pointer = read_pointer(storage, folder_of(SPACE.id))[0]
    bundle = bundle_id(model_digest(FILES["1"]), pointer.manifest)
    told = {"id": bundle, "model_version": "1", "space": SPACE.id, "snapshot": pointer.snapshot}
    return json.dumps({"user_id": USER, "item_ids": [5], "probabilities": [0.25], "bundle": told | changes})


def every(node):
    yield node
    for one in (*node.made_from, *node.goes_into):
        yield from every(one)


def names(node, kind):
    return {one.name for one in every(node) if one.kind == kind}


def found(node, name):
    return next(one for one in every(node) if one.name == name)


def test_a_score_leads_to_the_raw_partitions_it_rests_on(store, lineage):
    node = lineage.of_score(score_of(store), "score.json")
    assert node.all_problems() == []
    assert names(node, "raw") == {f"raw/dt={day(number)}" for number in range(3)}
    assert names(node, "version") == {"version 1"}
    assert names(node, "models") == {"models/m1"}
    assert names(node, "spaces") == {f"spaces/{SPACE.id}"}
    bundle = node.made_from[0]
    assert bundle.facts["served"] is True
    snapshot, version = bundle.made_from
    assert snapshot.facts["current"] is True
    assert version.facts["git_commit"] == "c0ffee"
    histories = next(one for one in snapshot.made_from if one.kind == "histories")
    manifest = read_manifest(store, histories.name)
    assert histories.facts["digest"] == manifest.digest()
    assert histories.facts["settings"] == fingerprint(manifest.config)
    rows = [behaviors_of(number)["user_id"].to_pylist().count(USER) for number in range(3)]
    assert histories.facts["user"] == {"user_id": USER, "behaviors": sum(rows), "days": [str(day(0)), str(day(2))]}


def test_a_bundle_is_found_by_its_id_alone(store, registered):
    current, pointer = score_of(store), read_pointer(store, folder_of(SPACE.id))[0]
    older = read_manifest(store, snapshots(store)[0]).digest()
    for told, expected in (
        (json.loads(current)["bundle"]["id"], True),
        (bundle_id(model_digest(FILES["2"]), pointer.manifest), False),
        (bundle_id(model_digest(FILES["1"]), older), False),
    ):
        node = Lineage(store, registered).trace(told)
        assert node.name == f"bundle {told}"
        assert node.facts["served"] is expected, "champion and pointer must both name it"
    with pytest.raises(ArtifactError, match="bundle 0123456789ab: none of the 2 registered versions"):
        Lineage(store, registered).trace("0123456789ab")


def test_a_partition_leads_to_everything_that_was_made_of_it(store, lineage, registered):
    node = lineage.trace(f"behaviors/dt={day(0)}")
    assert names(node, "interests") == set(snapshots(store))
    assert names(node, "models") == {"models/m1", "models/m2"}
    assert names(node, "version") == {"version 1", "version 2"}
    served = {one.name: one.facts["served"] for one in every(node) if one.kind in ("interests", "version", "models")}
    old, new = snapshots(store)
    expected = {old: False, new: True, "version 1": True, "version 2": False, "models/m1": True, "models/m2": False}
    assert served == expected
    assert [found(node, name).facts["current"] for name in (old, new)] == [False, True]
    last = Lineage(store, registered).trace(f"raw/dt={day(2)}")
    assert names(last, "interests") == {new}
    assert names(last, "models") == set(), "no model was trained on it"
    assert last.facts["served"] is True
    registered.aliases["champion"] = "2"
    assert found(Lineage(store, registered).trace("2"), "version 2").facts["served"] is True
    assert found(Lineage(store, registered).trace(f"behaviors/dt={day(0)}"), "models/m1").facts["served"] is False


def replay(storage, number):
    """What a replay adds to a day that was validated before."""
    base = f"behaviors/dt={day(number)}"
    made = read_manifest(storage, base)
    return write_output(
        storage,
        f"{base}/replay-001",
        {"part-00000.parquet": parquet_bytes(behaviors_of(number).slice(0, 5))},
        kind="behaviors",
        fingerprint="replayed",
        config={},
        inputs=dict(made.inputs) | {base: made.digest()},
        counts={"rows": 5},
        details={"adds_to": base},
    )


def test_what_a_replay_added_is_on_the_way_and_is_found_by_its_key(store, registered, tmp_path):
    engine = LocalEngine(CONFIG, Places(store=str(tmp_path), scratch=tmp_path / "scratch"))
    replay(store, 2)
    refresh_interests(store, [SPACE.id], day(3), CONFIG, engine, lambda _: None)
    raw, added, newest = f"raw/dt={day(2)}", f"behaviors/dt={day(2)}/replay-001", read_pointer(store, "histories")[0]
    node = Lineage(store, registered).trace(raw)
    assert [one.name for one in node.goes_into] == [added, f"behaviors/dt={day(2)}"]
    assert names(node.goes_into[0], "histories") == {f"histories/{newest.snapshot}"}
    node = Lineage(store, registered, verify=True).trace(added)
    assert node.all_problems() == []
    assert names(node, "raw") == {raw}
    assert node.facts["served"] is True
    lines = list(tree(Lineage(store, registered).trace(f"histories/{newest.snapshot}")))
    assert sum("behaviors/dt=2024-03-01 .. dt=2024-03-03 (3 days)" in line for line in lines) == 1
    assert sum(f"from {added}  5 rows" in line for line in lines) == 1


def test_a_snapshot_is_found_by_name_key_and_uri(store, lineage):
    old, _ = snapshots(store)
    by_name, by_key, by_uri = (lineage.trace(what) for what in (old.rpartition("/")[2], old, f"{store.uri}/{old}/"))
    assert by_name == by_key == by_uri
    assert names(by_name, "raw") == {f"raw/dt={day(number)}" for number in range(2)}


def test_a_base_is_named_but_not_followed(store, lineage):
    old, new = snapshots(store)
    assert found(lineage.trace(new), old).made_from == ()


# --- links that do not hold --------------------------------------------------------------------------------


def remove(storage, key):
    (storage._root / key).unlink()


def test_a_missing_partition_is_said(store, lineage):
    remove(store, f"behaviors/dt={day(1)}/manifest.json")
    problems = lineage.of_score(score_of(store), "x").all_problems()
    assert problems == [f"behaviors/dt={day(1)}: missing: no manifest in the store"]
    assert names(lineage.trace(f"behaviors/dt={day(1)}"), "interests") == set(snapshots(store)), (
        "what it went into, too"
    )


def test_a_partition_that_was_validated_again_is_said_both_ways(store, registered):
    remove(store, f"behaviors/dt={day(1)}/manifest.json")
    validate(store, 1, {"validation": "other"})
    problems = Lineage(store, registered).of_score(score_of(store), "x").all_problems()
    assert len(problems) == 1
    assert f"behaviors/dt={day(1)}: is another one now: found " in problems[0]
    forward = Lineage(store, registered).trace(f"behaviors/dt={day(1)}").all_problems()
    assert any(line.startswith("models/m1: was made from another behaviors/") for line in forward)


def test_a_damaged_manifest_is_said(store, lineage):
    histories = read_manifest(store, snapshots(store)[1]).details["histories"]
    store.put(f"{histories}/manifest.json", b"{}")
    assert (
        any(f"{histories}/manifest.json: not a manifest" in line for line in lineage.trace("1").all_problems()) is False
    )
    assert any("not a manifest" in line for line in lineage.of_score(score_of(store), "x").all_problems())


def test_missing_files_are_said_and_damaged_ones_where_they_are_read(store, registered):
    new = snapshots(store)[1]
    part = read_manifest(store, new).parts[0]
    sound = store.get(part.key(new))
    data = bytearray(sound)
    data[len(data) // 2] ^= 1
    store.put(part.key(new), bytes(data))
    assert Lineage(store, registered).trace(new).all_problems() == []
    verifying = Lineage(store, registered, verify=True)
    assert any("damaged" in line for line in verifying.trace(new).all_problems())
    whole = verifying.files_whole
    store.put(part.key(new), sound)
    verifying = Lineage(store, registered, verify=True)
    assert verifying.trace(new).all_problems() == []
    assert verifying.files_whole > whole > 0
    remove(store, part.key(new))
    assert any("missing: 1 of 4 files" in line for line in Lineage(store, registered).trace(new).all_problems())


def test_a_raw_partition_without_manifest_is_checked_where_files_are_read(store, registered):
    where = f"raw/dt={day(2)}"
    assert found(Lineage(store, registered).trace(where), where).facts["verified"] is False
    assert Lineage(store, registered, verify=True).trace(f"behaviors/dt={day(2)}").all_problems() == []
    store.put(f"{where}/mine.parquet", parquet_bytes(behaviors_of(1)))
    problems = Lineage(store, registered, verify=True).trace(f"behaviors/dt={day(2)}").all_problems()
    assert [line.partition(" now")[0] for line in problems] == [f"{where}: is another one"]


def test_a_score_of_a_bundle_that_cannot_be_made_again_is_said(store, registered):
    score = score_of(store, model_version="2")
    assert any("make bundle" in line for line in Lineage(store, registered).of_score(score, "x").all_problems())
    score = score_of(store, model_version="7")
    assert any(
        "version 7: not in the registry" in line
        for line in Lineage(store, registered).of_score(score, "x").all_problems()
    )


def test_more_erased_users_are_told_and_are_no_problem(store, lineage, tmp_path, registered):
    erase_users(store, [8])
    engine = LocalEngine(CONFIG, Places(store=str(tmp_path), scratch=tmp_path / "scratch"))
    refresh_interests(store, [SPACE.id], day(3), CONFIG, engine, lambda _: None)
    assert (
        found(Lineage(store, registered).of_score(score_of(store), "x"), "erasures.json").facts["grown_since"] is False
    )
    erase_users(store, [7])
    node = Lineage(store, registered).of_score(score_of(store), "x")
    assert found(node, "erasures.json").facts["grown_since"] is True
    assert node.all_problems() == []


class Counting:
    """A store that counts how often each key is read."""

    def __init__(self, storage):
        self._storage, self.reads = storage, Counter()

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def get(self, key):
        self.reads[key] += 1
        return self._storage.get(key)


def test_what_several_were_made_from_is_read_and_checked_once(store, registered):
    remove(store, f"behaviors/dt={day(0)}/part-00000.parquet")
    counting = Counting(store)
    node = Lineage(counting, registered, verify=True).of_score(score_of(store), "x")
    shared = [one for one in every(node) if one.name == f"behaviors/dt={day(0)}"]
    assert len(shared) == 3, "of histories, model and space"
    assert all("not found" in one.problems[0] for one in shared)
    assert counting.reads[f"behaviors/dt={day(0)}/part-00000.parquet"] == 1
    assert counting.reads[f"behaviors/dt={day(1)}/part-00000.parquet"] == 1


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("nonsense", ConfigError, "found 'nonsense', expected a score"),
        ("behaviors/dt=2031-01-01", ArtifactError, "not in the store, or unfinished"),
        ("behaviors/dt=2024-03-01/replay-007", ArtifactError, "not in the store, or unfinished"),
        (f"interests/{SPACE.id}/20310101-abcdef", ArtifactError, "not in the store, or unfinished"),
        ("raw", ConfigError, "or any output by its key"),
        ("raw/dt=", ArtifactError, "not in the store, or unfinished"),
        ("20310101-abcdef", ArtifactError, "has no snapshot 20310101-abcdef"),
        ("9", ArtifactError, "version 9: not in the registry"),
    ],
)
def test_what_is_not_there_is_refused(lineage, what, error, message):
    with pytest.raises(error, match=message):
        lineage.trace(what)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bundle": 3}', '{"bundle": {"id": 1}}', '{"user_id": "x"}', "\xff"])
def test_what_is_no_score_is_refused(lineage, text):
    with pytest.raises(DataError, match=r"score.json: not the answer of /v1/score"):
        lineage.of_score(text.encode("latin-1"), "score.json")


# --- for people --------------------------------------------------------------------------------------------


def test_days_that_say_the_same_are_one_line(store, lineage):
    lines = list(tree(lineage.trace("1")))
    assert sum("behaviors/dt=2024-03-01 .. dt=2024-03-02 (2 days)" in line for line in lines) == 2
    assert sum("raw/dt=2024-03-01 .. dt=2024-03-02 (2 days)" in line for line in lines) == 1
    assert lines[0].startswith("version 1  served, as of 2024-03-03, champion, ")


def test_files_that_days_were_split_from_are_told_once():
    log = (Node("source", "log.parquet", {"digest": "f00"}), Node("source", "items.parquet", {"digest": "ba4"}))
    days = tuple(Node("raw", f"raw/dt=2024-02-{day}", made_from=log) for day in (27, 28, 29))
    assert [line.strip() for line in tree(Node("behaviors", "behaviors/x", made_from=days))][1:] == [
        "from raw/dt=2024-02-27 .. dt=2024-02-29 (3 days)",
        "from log.parquet  digest f00",
        "from items.parquet  digest ba4",
    ]


def test_days_that_are_not_in_a_row_have_lines_of_their_own():
    days = ("2024-02-28", "2024-02-29", "2024-03-01", "2024-03-03")
    node = Node("histories", "histories/x", made_from=tuple(Node("behaviors", f"behaviors/dt={one}") for one in days))
    assert [line.strip() for line in tree(node)][1:] == [
        "from behaviors/dt=2024-02-28 .. dt=2024-03-01 (3 days)",
        "from behaviors/dt=2024-03-03",
    ]


def test_a_day_with_a_problem_has_a_line_of_its_own(store, lineage):
    remove(store, f"behaviors/dt={day(0)}/part-00000.parquet")
    lines = list(tree(lineage.trace("1")))
    place = next(place for place, line in enumerate(lines) if "behaviors/dt=2024-03-01" in line)
    assert ".." not in lines[place]
    assert lines[place + 1].strip().startswith("! missing: 1 of 1 file")


def test_the_tree_is_json(store, lineage):
    told = json.loads(json.dumps(lineage.of_score(score_of(store), "x").as_json()))
    assert told["kind"] == "score"
    assert told["probabilities"] == [0.25]
    assert told["made_from"][0]["made_from"][0]["counts"]["users"] == 8
