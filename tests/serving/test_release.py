"""The release from outside a serving process that really serves."""

import threading
import time

import pytest
import uvicorn
from made import FILES, SPACE, make_model, refresh

from encode.config import RegistryConfig
from encode.interests.snapshots import folder_of, write_space
from encode.pointers import read_pointer
from encode.serving.app import create_app
from encode.serving.bundle import load_bundle
from encode.serving.release import see_served
from encode.stack.ports import free_port

OTHER, _, OTHER_FILES = make_model(1)


@pytest.fixture
def serving(storage, own_places, registry, tmp_path):
    """The follower of an application on a real port that serves version 1, and its places; 2 is to come."""
    write_space(storage, OTHER, {})
    refresh(storage, space=OTHER)
    registry.release("1", FILES, SPACE)
    app = create_app(own_places, RegistryConfig(), tmp_path / "cache", seconds=3600)
    port = free_port(())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and app.state.follower.bundle):
        time.sleep(0.02)
    yield app.state.follower, own_places.model_copy(update={"serving_url": f"http://127.0.0.1:{port}"})
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def second(storage, tmp_path, serving):
    return load_bundle(storage, OTHER_FILES, "2", tmp_path / "second")


def test_a_release_is_over_when_serving_has_it(serving, registry, second):
    follower, places = serving
    registry.release("2", OTHER_FILES, OTHER)
    assert see_served(places, second, print) == places.serving_url
    assert follower.bundle.id == second.id


def test_a_snapshot_that_was_published_meanwhile_is_as_good(serving, storage, registry, second):
    follower, places = serving
    refresh(storage, space=OTHER, name="late-days")
    registry.release("2", OTHER_FILES, OTHER)
    assert see_served(places, second, print) == places.serving_url
    assert (follower.bundle.pointer.as_of, follower.bundle.id == second.id) == (second.pointer.as_of, False)


def test_what_serving_has_refused_is_told_at_once_and_tried_again_when_somebody_decides_so(
    serving, storage, registry, second
):
    follower, places = serving
    follower.refused["2", read_pointer(storage, folder_of(OTHER.id))[0]] = "1,000 candidates take 80 ms"
    registry.release("2", OTHER_FILES, OTHER)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="The alias has moved to that version, and serving follows it by itself"):
        see_served(places, second, print)
    assert time.monotonic() - began < 30
    assert follower.bundle.model_version == "1"
    assert see_served(places, second, print, again=True) == places.serving_url
    assert follower.bundle.id == second.id


def test_without_a_serving_process_that_is_said(own_places, bundle):
    said = []
    assert see_served(own_places, bundle, said.append) == "no serving process"
    assert said == ["no serving process is configured; the bundle was loaded and checked here"]
