"""Objects by key.

Two stores with the same behavior: a folder, and any S3-compatible service. Both can create a key only if it is
absent and replace it only if it is unchanged; everything that publishes rests on these two.
"""

from __future__ import annotations

from pathlib import Path

from encode.config import Places
from encode.errors import ConfigError
from encode.schema import canonical_json
from encode.storage.contract import LostRace, ObjectFile, Storage, check_key
from encode.storage.folder import FolderStorage
from encode.storage.s3 import S3Storage

__all__ = [
    "FolderStorage",
    "LostRace",
    "ObjectFile",
    "S3Storage",
    "Storage",
    "check_key",
    "open_log",
    "open_storage",
]
_LOG = "log.json"


def open_storage(places: Places, writing: bool = True) -> Storage:
    """Open the store that `places.store` names: `s3://bucket[/prefix]`, or a folder.

    A store that will be written to is probed once; reading needs no more than the right to read.

    Raises:
        ConfigError: the URI is neither, or the store ignores conditional writes.
    """
    if places.store.startswith("s3://"):
        storage = S3Storage(places)
        if writing:
            storage.probe()
        return storage
    if "://" in places.store and not places.store.startswith("file://"):
        raise ConfigError(f"store: found {places.store!r}, expected s3://bucket[/prefix] or a folder")
    return FolderStorage(Path(places.store.removeprefix("file://")))


def open_log(places: Places, name: str, writing: bool = True) -> Storage:
    """Open the store of one log: the first preset that writes to a store gives it its name, others are refused.

    Two logs in one store would be trained on as one.

    Raises:
        ConfigError: the store holds another log.
    """
    storage = open_storage(places, writing)
    ours = canonical_json({"log": name})
    found = storage.get_versioned(_LOG)
    if found is None and writing:
        try:
            storage.create(_LOG, ours)
        except LostRace:
            found = storage.get_versioned(_LOG)
    if found is not None and found[0] != ours:
        raise ConfigError(
            f"{storage.uri}/{_LOG}: the store holds another log: found {found[0].decode()}, this preset is "
            f"{ours.decode()}; give the preset of that log (--preset, ENCODE_PRESET), or this one a store of its own "
            "(ENCODE_STORE, ENCODE_HOME or --workdir); `encode stack clean` empties the local stack's"
        )
    return storage
