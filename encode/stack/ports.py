"""Which port each component gets: the wanted one or the usual one, the one of the last time, a free one.

A port that was moved because another program held it goes back once that is gone, but only when nothing of the stack
runs: what runs was told where the others are, and would have to be restarted.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Collection, Mapping
from dataclasses import replace

from encode.errors import ConfigError
from encode.stack import components
from encode.stack.home import Entry

# Below the range that systems hand out for outgoing connections, so that a port that was free when
# it was chosen is not taken by a passing connection before its server listens.
PORT_RANGE = range(20000, 32000)


def settle(entries: Mapping[str, Entry], wishes: Mapping[str, int]) -> dict[str, Entry]:
    """Entries with ports for all components, so that each can be told where the others are or will be.

    Args:
        entries: What the home remembers.
        wishes: Wanted main port by component, also for later calls; 0 is the remembered one, else any free one.

    Raises:
        ConfigError: A wanted port is taken.
    """
    settled = dict(entries)
    unknown = {name: Entry({}, "", "", None, components.DEFAULT_PORTS[name]) for name in components.NAMES}
    previous = {**unknown, **entries}
    asked = {name: previous[name].wanted if wishes.get(name) is None else wishes[name] for name in components.NAMES}
    taken = {port for entry in entries.values() for port in entry.ports.values()}
    may_return = not any(entry.is_alive() for entry in entries.values())
    for name in components.NAMES:
        old, wanted = previous[name], asked[name]
        chosen = _choose(name, old, wanted, bool(wishes.get(name)), may_return, taken, asked.values())
        taken.update(chosen.values())
        settled[name] = replace(old, ports=chosen, url=components.loopback(chosen["main"]), wanted=wanted)
    return settled


def _choose(
    name: str,
    old: Entry,
    wanted: int,
    must: bool,
    may_return: bool,
    taken: Collection[int],
    asked: Collection[int],
) -> dict[str, int]:
    chosen: dict[str, int] = {}
    alive = old.is_alive()

    def fits(port: int, is_mine: bool) -> bool:
        return (is_mine and alive) or (is_free(port) and (is_mine or port not in taken))

    for role in components.PORTS[name]:
        mine = old.ports.get(role, 0)
        options = [mine]
        if role == "main":
            options = [wanted] if must else [wanted, mine] if may_return else [mine, wanted]
        port = next((port for port in options if port and fits(port, port == mine)), None)
        if port is None and role == "main" and must:
            raise ConfigError(
                f"{name}: port {wanted} is taken on 127.0.0.1, or kept for another component (`encode stack status`); "
                "stop what uses it or choose another"
            )
        chosen[role] = port or free_port({*taken, *asked, *chosen.values()})
    return chosen


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now."""
    return why_not_free(port) is None


def why_not_free(port: int, host: str = "127.0.0.1") -> str | None:
    """Why a server could not listen there now; None if it could."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror
    return None


def free_port(taken: Collection[int] = ()) -> int:
    """A port of `PORT_RANGE` that is free now and not in `taken`.

    Raises:
        ConfigError: None was found.
    """
    for port in secrets.SystemRandom().sample(PORT_RANGE, 200):
        if port not in taken and is_free(port):
            return port
    raise ConfigError(f"No free port among 200 of {PORT_RANGE.start}-{PORT_RANGE.stop - 1} on 127.0.0.1")
