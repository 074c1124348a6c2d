"""A folder as a store."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from encode.errors import ArtifactError
from encode.schema import digest
from encode.storage.contract import LostRace, check_key, whole

_ASIDE = ".aside-"


class FolderStorage:
    """A folder as a store: writes are atomic (write aside, rename), conditions hold between processes of a machine."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._swept: set[Path] = set()

    @property
    def uri(self) -> str:
        return str(self._root)

    def get(self, key: str) -> bytes:
        data = self._read(key)
        if data is None:
            raise ArtifactError(f"{self.uri}/{key}: not found")
        return data

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        try:
            with (self._root / check_key(key)).open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), end - begin, begin)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ArtifactError(f"{self.uri}/{key}: not found") from None
        return whole(data, f"{self.uri}/{key}", begin, end)

    def get_versioned(self, key: str) -> tuple[bytes, str] | None:
        data = self._read(key)
        return None if data is None else (data, digest(data))

    def _read(self, key: str) -> bytes | None:
        try:
            return (self._root / check_key(key)).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def put(self, key: str, data: bytes) -> None:
        with self._written_aside(key, data) as (aside, path):
            aside.replace(path)

    def create(self, key: str, data: bytes) -> None:
        with self._written_aside(key, data) as (aside, path):
            try:
                os.link(aside, path)
            except FileExistsError:
                raise LostRace(key) from None

    def replace(self, key: str, data: bytes, version: str) -> None:
        with self._written_aside(key, data) as (aside, path), (path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.get_versioned(key)
            if found is None or found[1] != version:
                raise LostRace(key)
            aside.replace(path)

    def remove(self, key: str) -> None:
        (self._root / check_key(key)).unlink(missing_ok=True)

    def list(self, prefix: str) -> list[str]:
        folder = self._root / prefix.rpartition("/")[0]
        keys = (p.relative_to(self._root).as_posix() for p in folder.rglob("*") if p.is_file())
        return sorted(k for k in keys if k.startswith(prefix) and not k.rpartition("/")[2].startswith("."))

    @contextmanager
    def _written_aside(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        path = self._root / check_key(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in self._swept:
            _remove_abandoned(path.parent)
            self._swept.add(path.parent)
        file, aside = _locked_file(path.parent)
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                yield aside, path
        finally:
            aside.unlink(missing_ok=True)


def _locked_file(folder: Path) -> tuple[BinaryIO, Path]:
    """Make a file that nobody takes for abandoned while it is open."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_ASIDE, dir=folder)
        file = os.fdopen(descriptor, "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return file, Path(name)
        file.close()  # somebody was faster than the lock


def _remove_abandoned(folder: Path) -> None:
    """Remove what writers that were killed have left: nobody holds the locks of their files any more."""
    for path in folder.glob(f"{_ASIDE}*"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
