"""Which port each component gets: the wanted one, the one of the last time, the usual one, a free one."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Collection, Mapping
from dataclasses import replace

from encode.errors import ConfigError
from encode.stack import components, processes
from encode.stack.home import Entry

# Below the range that systems hand out for outgoing connections, so that a port that was free when
# it was chosen is not taken by a passing connection before its server listens.
PORT_RANGE = range(20000, 32000)


def settle(entries: Mapping[str, Entry], wishes: Mapping[str, int]) -> dict[str, Entry]:
    """Entries with ports for all components, so that each can be told where the others are or will be.

    Args:
        entries: What the home remembers.
        wishes: Wanted main port by component; 0 is the remembered one, else any free one.

    Raises:
        ConfigError: A wanted port is taken.
    """
    settled = dict(entries)
    taken = {port for entry in entries.values() for port in entry.ports.values()}
    for name in components.NAMES:
        old = entries.get(name, Entry({}, "", "", None))
        alive = old.process is not None and processes.is_running(old.process)
        chosen = _choose(name, old.ports, alive, wishes.get(name), taken)
        taken.update(chosen.values())
        settled[name] = replace(old, ports=chosen, url=components.loopback(chosen["main"]))
    return settled


def _choose(name: str, old: Mapping[str, int], alive: bool, wish: int | None, taken: Collection[int]) -> dict[str, int]:
    chosen: dict[str, int] = {}
    for role in components.PORTS[name]:
        usual = components.DEFAULT_PORTS[name] if role == "main" and wish is None else 0
        wanted = wish if role == "main" and wish else old.get(role, usual)
        is_mine = wanted == old.get(role)
        if (is_mine and alive) or (wanted and is_free(wanted) and (is_mine or wanted not in taken)):
            chosen[role] = wanted
        elif wanted and wanted == wish:
            raise ConfigError(f"{name}: port {wish} is taken on 127.0.0.1; stop what uses it or choose another")
        else:
            chosen[role] = free_port({*taken, *chosen.values()})
    return chosen


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port(taken: Collection[int] = ()) -> int:
    """A port of `PORT_RANGE` that is free now and not in `taken`.

    Raises:
        ConfigError: None was found.
    """
    for port in secrets.SystemRandom().sample(PORT_RANGE, 200):
        if port not in taken and is_free(port):
            return port
    raise ConfigError(f"No free port among 200 of {PORT_RANGE.start}-{PORT_RANGE.stop - 1} on 127.0.0.1")
