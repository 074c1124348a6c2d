import json
import os
import socket
from contextlib import contextmanager
from dataclasses import replace

import pytest

from encode.errors import ConfigError
from encode.stack import components, home, local, ports
from encode.stack.processes import ProcessRecord, start_identity


def quiet(line: str) -> None:
    """Nobody reads the progress."""


@contextmanager
def held(port):
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
        holder.listen()
        yield


@pytest.fixture(autouse=True)
def usual(monkeypatch):
    """Usual ports, of a range from which no other server of the suite and no outgoing connection takes any."""
    monkeypatch.setattr(ports, "PORT_RANGE", range(12000, 16000))
    found = {}
    for name in components.NAMES:
        found[name] = ports.free_port(set(found.values()))
    monkeypatch.setattr(components, "DEFAULT_PORTS", found)
    return found


def main_ports(entries):
    return {name: entry.ports["main"] for name, entry in entries.items()}


def while_running(entries, name):
    """The entries while a process of a component is alive: this one."""
    alive = ProcessRecord(os.getpid(), start_identity(os.getpid()), "marker", "/")
    return {**entries, name: replace(entries[name], process=alive)}


def test_a_moved_port_goes_back_once_it_is_free_and_nothing_runs(usual):
    with held(usual["serving"]):
        moved = ports.settle({}, {})
        assert ports.settle(moved, {}) == moved
    assert main_ports(moved) == {**usual, "serving": moved["serving"].ports["main"]}
    assert moved["serving"].ports["main"] != usual["serving"]
    running = while_running(moved, "mlflow")
    assert ports.settle(running, {}) == running
    back = ports.settle(moved, {})
    assert main_ports(back) == usual
    assert back["serving"].url == components.loopback(usual["serving"])
    assert back["objectstore"].ports == moved["objectstore"].ports


def test_a_port_that_was_asked_for_is_the_one_to_go_back_to(usual):
    wanted = ports.free_port(usual.values())
    asked = ports.settle(ports.settle({}, {}), {"serving": wanted})
    assert main_ports(asked) == {**usual, "serving": wanted}
    assert ports.settle(asked, {}) == asked
    with held(wanted):
        moved = ports.settle(asked, {})
        with pytest.raises(ConfigError, match=f"serving: port {wanted} is taken"):
            ports.settle(asked, {"serving": wanted})
    assert moved["serving"].ports["main"] not in (wanted, usual["serving"])
    assert ports.settle(moved, {}) == asked
    assert main_ports(ports.settle(asked, {"serving": usual["serving"]})) == usual


def test_a_port_found_for_one_component_is_never_the_usual_one_of_another(monkeypatch, usual):
    monkeypatch.setattr(ports, "PORT_RANGE", range(min(usual.values()), min(usual.values()) + 200))
    close = {name: min(usual.values()) + place for place, name in enumerate(usual)}
    monkeypatch.setattr(components, "DEFAULT_PORTS", close)
    assert all(main_ports(ports.settle({}, {})) == close for _ in range(100))


def test_whoever_asked_for_any_port_keeps_the_one_that_was_found(usual):
    any_port = ports.settle({}, {"airflow": 0})
    assert any_port["airflow"].ports["main"] != usual["airflow"]
    assert ports.settle(any_port, {}) == any_port


def test_a_home_of_before_wishes_were_noted_keeps_its_ports(usual, tmp_path):
    with held(usual["mlflow"]):
        moved = ports.settle({}, {})
    home.write_state(tmp_path, home.State("id", moved))
    raw = json.loads((tmp_path / "state.json").read_text())
    for fields in raw["components"].values():
        del fields["wanted"]
    (tmp_path / "state.json").write_text(json.dumps(raw))
    assert main_ports(ports.settle(home.read_state(tmp_path).entries, {})) == main_ports(moved)


def test_a_port_of_a_server_that_is_no_longer_started_is_given_up(usual, tmp_path):
    """Airflow had two for its log servers."""
    made = ports.settle({}, {})
    before = {**made["airflow"].ports, "worker_logs": 1, "trigger_logs": 2}
    home.write_state(tmp_path, home.State("id", {**made, "airflow": replace(made["airflow"], ports=before)}))
    assert ports.settle(home.read_state(tmp_path).entries, {}) == made


def test_what_clients_and_the_state_are_told_follows_the_port(usual, tmp_path):
    folder, store = tmp_path / "home", ("objectstore",)
    try:
        with held(usual["objectstore"]):
            moved = local.up(folder, dags_folder=tmp_path, say=quiet, components=store)
        assert local.load_client_environment(folder)["AWS_ENDPOINT_URL"] == moved.urls["objectstore"]
        assert local.up(folder, dags_folder=tmp_path, say=quiet, components=store) == moved
        assert not local.is_stopped(folder)
        local.down(folder, say=quiet)
        assert local.is_stopped(folder)
        back = local.up(folder, dags_folder=tmp_path, say=quiet, components=store)
        assert back.urls["objectstore"] == components.loopback(usual["objectstore"]) != moved.urls["objectstore"]
        assert local.load_client_environment(folder)["AWS_ENDPOINT_URL"] == back.urls["objectstore"]
        (found,) = [one for one in local.status(folder) if one.name == "objectstore"]
        assert (found.state, found.url) == ("healthy", back.urls["objectstore"])
    finally:
        local.down(folder, say=quiet)
