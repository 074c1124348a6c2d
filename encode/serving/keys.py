"""API keys: known by their SHA-256 only. A key has 256 random bits, so that its hash needs no salt."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Set
from pathlib import Path

from fastapi import Security
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from encode.errors import ConfigError
from encode.serving.problems import problem

DOCUMENTED = Security(HTTPBearer(auto_error=False, description="required where the process was started with keys"))
"""For OpenAPI only: keys are asked for by the middleware, before a route is known."""

_REMEDY = "`encode serve --new-key` prints a key and its hash"


def new_key() -> str:
    """Make a key."""
    return f"ek_{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """Return what is kept of a key: 64 hex digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_hashes(file: Path | None, listed: str = "") -> frozenset[str]:
    """Return the hashes of the keys that are let in.

    Args:
        file: a hash a line; what follows `#` is a comment.
        listed: more of them, separated by commas or spaces.

    Raises:
        ConfigError: the file cannot be read, is empty, or something is not a hash. What it is instead is not shown: it
            may be a key.
    """
    lines = [] if file is None else _lines(file)
    found = [(f"{file}, line {number}", line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    found += [("ENCODE_SERVING_KEYS", part) for part in re.split(r"[,\s]+", listed)]
    hashes = {(where, text.lower()) for where, text in found if text}
    for where, text in sorted(hashes):
        if not re.fullmatch("[0-9a-f]{64}", text):
            raise ConfigError(f"{where}: expected a SHA-256 in 64 hex digits, never the key itself; {_REMEDY}")
    if file is not None and not hashes:
        raise ConfigError(f"{file}: holds no hash; {_REMEDY}")
    return frozenset(text for _, text in hashes)


def require_keys(host: str, hashes: Set[str]) -> None:
    """Refuse to listen where others can reach us without asking them for a key.

    Raises:
        ConfigError: there is no key and the host is not of the loopback interface.
    """
    if not hashes and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: reachable from other machines, but no API keys are set; give hashes by --keys FILE or "
            f"ENCODE_SERVING_KEYS, or listen on 127.0.0.1. {_REMEDY}"
        )


class KeyRequired:
    """ASGI middleware: `Authorization: Bearer KEY` on all but the open paths, if there are any keys."""

    def __init__(self, app: ASGIApp, hashes: Set[str], open_paths: Set[str]) -> None:
        self._app, self._hashes, self._open = app, sorted(hashes), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["type"] == "http" and self._hashes and scope["path"] not in self._open
        if asked and not self._admits(Headers(scope=scope).getlist("authorization")):
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            detail = "expected the header `Authorization: Bearer KEY` with a known key"
            await problem(scope, 401, detail, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admits(self, given: list[str]) -> bool:
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # All are compared, in constant time each: how long it takes says nothing about them.
        same = [hmac.compare_digest(hash_of(key.strip()), known) for known in self._hashes]
        return scheme.lower() == "bearer" and any(same)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__}); expected a file of hashes") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
