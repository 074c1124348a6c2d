"""Names that lineage understands. Apart from `encode.lineage`, so that what it does not is refused at once."""

from __future__ import annotations

import re
from pathlib import Path

from encode.errors import ConfigError

DAILY = ("raw", "behaviors")
"""What lies in the store by day."""
OUTPUT = re.compile(r"items|(raw|behaviors|quarantine|histories|spaces|interests|models)/.+")
SHORT = 12
"""Hex digits of a bundle's id, and of a digest that is shown."""
_PATTERNS = {
    "version": re.compile(rf"[0-9]{{1,{SHORT - 1}}}"),
    "bundle": re.compile(rf"[0-9a-f]{{{SHORT}}}"),
    "output": OUTPUT,
    "snapshot": re.compile(r"\d{8}-\w+"),
}


def uri_of(store: str) -> str:
    """Return the URI that the store of `Places` has once it is open, for a name to be read before."""
    if store.startswith("s3://"):
        bucket, _, prefix = store.removeprefix("s3://").partition("/")
        return f"s3://{bucket}/{prefix.strip('/')}".rstrip("/")
    return str(Path(store.removeprefix("file://")).absolute())


def named(what: str, store: str) -> tuple[str, str]:
    """Return what a text names, "version", "bundle", "output" or "snapshot", and the name without the store's URI.

    Raises:
        ConfigError: it is none of these.
    """
    name = what.removeprefix(f"{store}/").strip("/")
    for kind, pattern in _PATTERNS.items():
        if pattern.fullmatch(name):
            return kind, name
    raise ConfigError(
        f"lineage: found {what!r}, expected a score (its JSON as a file, or - for stdin), a bundle id, a snapshot, "
        "behaviors/dt=YYYY-MM-DD or raw/dt=YYYY-MM-DD, the number of a model version, or any output by its key"
    )
