"""The one object that changes: of many who move it one wins, and it never goes back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import pytest

from encode.errors import ArtifactError
from encode.outputs import write_output
from encode.pointers import Pointer, move_pointer, publish, read_base, read_current, read_pointer
from encode.storage import LostRace

MONDAY, TUESDAY = date(2024, 3, 4), date(2024, 3, 5)
FOLDER = "things"


def output(storage, day, name="a"):
    """A finished output: its name and its manifest."""
    facts = {"kind": "things", "fingerprint": name, "config": {}, "inputs": {}, "details": {"as_of": str(day)}}
    snapshot = f"{day:%Y%m%d}-{name}"
    return snapshot, write_output(storage, f"{FOLDER}/{snapshot}", {}, **facts)


@pytest.mark.parametrize("first", [True, False])
def test_of_many_who_move_the_pointer_one_wins(storage, first):
    if not first:
        move_pointer(storage, FOLDER, Pointer("before", MONDAY, "0"), None)
    found = read_pointer(storage, FOLDER)
    version = found[1] if found else None
    gate = threading.Barrier(16)

    def attempt(number):
        pointer = Pointer(f"snapshot-{number}", MONDAY, "0")
        gate.wait()
        try:
            move_pointer(storage, FOLDER, pointer, version)
        except LostRace:
            return None
        return pointer

    with ThreadPoolExecutor(16) as pool:
        won = [pointer for pointer in pool.map(attempt, range(16)) if pointer]
    assert won == [read_pointer(storage, FOLDER)[0]]


def test_the_pointer_moves_once_from_each_version(storage):
    for day in (MONDAY, TUESDAY):
        found = read_pointer(storage, FOLDER)
        version = found[1] if found else None
        first, second = (Pointer(name, day, "0") for name in ("first", "second"))
        move_pointer(storage, FOLDER, first, version)
        with pytest.raises(LostRace):
            move_pointer(storage, FOLDER, second, version)
        assert read_pointer(storage, FOLDER)[0] == first


def test_many_who_publish_end_with_the_latest_day(storage):
    """Each retries until its snapshot or a later one is current."""
    days = [date(2024, 3, day) for day in range(1, 9)]
    manifests = {day: output(storage, day) for day in days}
    gate = threading.Barrier(len(days))

    def attempt(day):
        gate.wait()
        return publish(storage, FOLDER, *manifests[day])

    with ThreadPoolExecutor(len(days)) as pool:
        returned = list(pool.map(attempt, days))
    assert all(pointer.as_of >= day for pointer, day in zip(returned, days, strict=True))
    assert read_pointer(storage, FOLDER)[0].as_of == days[-1]


def test_publishing_never_goes_back_to_an_earlier_day(storage):
    later = publish(storage, FOLDER, *output(storage, TUESDAY))
    assert publish(storage, FOLDER, *output(storage, MONDAY)) == later
    assert read_pointer(storage, FOLDER)[0] == later


def test_the_same_day_is_published_anew_by_who_built_on_it(folder):
    first = publish(folder, FOLDER, *output(folder, MONDAY, "a"))
    assert publish(folder, FOLDER, *output(folder, MONDAY, "b")) == first, "of two who knew nothing of each other"
    second = publish(folder, FOLDER, *output(folder, MONDAY, "b"), based_on=first)
    assert second.snapshot == "20240304-b"
    assert publish(folder, FOLDER, *output(folder, MONDAY, "c"), based_on=first) == second
    pointer, manifest = read_current(folder, FOLDER)
    assert (pointer, manifest.fingerprint) == (second, "b")


def test_a_publisher_gives_up_when_the_pointer_never_stays(folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    made = output(folder, MONDAY)

    class Busy:
        def __getattr__(self, name):
            return getattr(folder, name)

        def create(self, key, data):
            raise LostRace(key)

    with pytest.raises(ArtifactError, match=r"current\.json: moved by others 20 times"):
        publish(Busy(), FOLDER, *made)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"snapshot":"a","as_of":"today","manifest":"b"}', b"\xff"])
def test_a_pointer_that_cannot_be_read_is_named(folder, data):
    folder.put(f"{FOLDER}/current.json", data)
    with pytest.raises(ArtifactError, match=r"current\.json: not a pointer .*; remove it and refresh again"):
        read_pointer(folder, FOLDER)


def test_what_a_pointer_names_must_be_there_and_be_it(folder):
    assert read_current(folder, FOLDER) is None
    move_pointer(folder, FOLDER, Pointer("20240304-a", MONDAY, "0123456789abcdef"), None)
    with pytest.raises(ArtifactError, match=r"things/20240304-a: absent or unfinished, pointer expects 0123456789ab"):
        read_current(folder, FOLDER)
    output(folder, MONDAY, "a")
    with pytest.raises(ArtifactError, match=r"things/20240304-a: has manifest [0-9a-f]{12}, pointer expects"):
        read_current(folder, FOLDER)


def test_what_cannot_be_built_on_is_said_and_its_pointer_still_known(folder):
    """So that what is made without it can take its place."""
    said = []
    assert read_base(folder, FOLDER, said.append) == (None, None)
    pointer = publish(folder, FOLDER, *output(folder, MONDAY, "a"))
    assert read_base(folder, FOLDER, said.append) == read_current(folder, FOLDER)
    assert said == []
    broken = Pointer(pointer.snapshot, MONDAY, "0123456789abcdef")
    move_pointer(folder, FOLDER, broken, read_pointer(folder, FOLDER)[1])
    assert read_base(folder, FOLDER, said.append) == (broken, None)
    (told,) = said
    assert told.startswith(f"{folder.uri}/things/20240304-a: has manifest ")
    assert publish(folder, FOLDER, *output(folder, MONDAY, "b"), based_on=broken).snapshot == "20240304-b"
    folder.put(f"{FOLDER}/current.json", b"{}")
    with pytest.raises(ArtifactError, match="not a pointer"):
        read_base(folder, FOLDER, said.append)
