"""What every store can do, and the keys that every store keeps as they are."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from typing import Protocol

from encode.errors import ArtifactError, ConfigError

_KEY_PART = re.compile(r"[A-Za-z0-9._=-]{1,255}")


class LostRace(Exception):  # noqa: N818 - an outcome to handle, not an error to report
    """A conditional write found another state than expected; read again and decide again."""


class Storage(Protocol):
    """Objects under one root. Keys are relative, parts joined by `/`; listings are in byte order."""

    @property
    def uri(self) -> str:
        """Where the root is, for people."""
        ...

    def get(self, key: str) -> bytes:
        """Return the object. Raises ArtifactError when there is none."""
        ...

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        """Return bytes [begin, end) of the object. Raises ArtifactError when there is none, or it ends before."""
        ...

    def get_versioned(self, key: str) -> tuple[bytes, str] | None:
        """Return the object and the version for `replace`, or None when there is none."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write the object whatever was there."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """Write the object if there is none. Raises LostRace when there is; equal bytes may count as written."""
        ...

    def replace(self, key: str, data: bytes, version: str) -> None:
        """Write the object if it still has `version`. Raises LostRace when it has not; equal bytes may count too."""
        ...

    def remove(self, key: str) -> None:
        """Remove the object if it is there."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Return all keys that begin with `prefix`, sorted by bytes."""
        ...


class ObjectFile(io.RawIOBase):
    """An object as a file to read and seek in, fetched range by range: for readers that skip most of it."""

    def __init__(self, get_range: Callable[[int, int], bytes], size: int) -> None:
        self._get_range, self._size, self._position = get_range, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._position + size, self._size)
        data = self._get_range(self._position, end)
        self._position = end
        return data


def check_key(key: str) -> str:
    """Return `key` if every S3 server and every file system keeps it as it is.

    Raises:
        ConfigError: a part is empty, begins with a dot, is too long, or holds another character than
            A-Z a-z 0-9 . _ = -
    """
    for part in key.split("/"):
        if not _KEY_PART.fullmatch(part) or part.startswith("."):
            raise ConfigError(f"key {key!r}: part {part!r} is not 1 to 255 of A-Z a-z 0-9 . _ = -, not starting with .")
    return key


def whole(data: bytes, where: str, begin: int, end: int) -> bytes:
    """Return `data` if it is all of the bytes [begin, end) of an object.

    Raises:
        ArtifactError: the object ended before.
    """
    if len(data) != end - begin:
        raise ArtifactError(
            f"{where}: ends before byte {end:,} (found {len(data):,} bytes from {begin:,}); is it cut off?"
        )
    return data
