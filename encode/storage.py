"""Objects by key.

Two stores with the same behavior: a folder, and any S3-compatible service. Both can create a key only if it is
absent and replace it only if it is unchanged; everything that publishes rests on these two. Only this module knows S3.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

from encode.config import Places
from encode.errors import ArtifactError, ConfigError
from encode.schema import canonical_json, digest

_KEY_PART = re.compile(r"[A-Za-z0-9._=-]{1,255}")
_NUM_THREADS = 8
_LOG = "log.json"


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

    def list(self, prefix: str) -> list[str]:
        """Return all keys that begin with `prefix`, sorted by bytes."""
        ...


class ObjectFile(io.RawIOBase):
    """An object as a file to read and seek in, fetched range by range: for readers that skip most of it."""

    def __init__(self, storage: Storage, key: str, size: int) -> None:
        self._storage, self._key, self._size, self._position = storage, key, size, 0

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
        data = self._storage.get_range(self._key, self._position, end)
        self._position = end
        return data


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


def open_log(places: Places, name: str) -> Storage:
    """Open the store of one log: the first preset that uses a store gives it its name, others are refused.

    Two logs in one store would be trained on as one.

    Raises:
        ConfigError: the store holds another log.
    """
    storage = open_storage(places)
    ours = canonical_json({"log": name})
    found = storage.get_versioned(_LOG)
    if found is None:
        try:
            storage.create(_LOG, ours)
        except LostRace:
            found = storage.get_versioned(_LOG)
    if found is not None and found[0] != ours:
        raise ConfigError(
            f"{storage.uri}: holds another log: found {found[0].decode()}, this preset is {ours.decode()}; use another "
            "store (ENCODE_STORE, ENCODE_HOME or --workdir), or remove this one first (`encode stack clean`)"
        )
    return storage


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


def _whole(data: bytes, where: str, begin: int, end: int) -> bytes:
    if len(data) != end - begin:
        raise ArtifactError(
            f"{where}: ends before byte {end:,} (found {len(data):,} bytes from {begin:,}); is it cut off?"
        )
    return data


class FolderStorage:
    """A folder as a store: writes are atomic (write aside, rename), conditions hold between processes of a machine."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    @property
    def uri(self) -> str:
        return str(self._root)

    def get(self, key: str) -> bytes:
        found = self.get_versioned(key)
        if found is None:
            raise ArtifactError(f"{self.uri}/{key}: not found")
        return found[0]

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        try:
            with (self._root / check_key(key)).open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), end - begin, begin)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ArtifactError(f"{self.uri}/{key}: not found") from None
        return _whole(data, f"{self.uri}/{key}", begin, end)

    def get_versioned(self, key: str) -> tuple[bytes, str] | None:
        try:
            data = (self._root / check_key(key)).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        return data, digest(data)

    def put(self, key: str, data: bytes) -> None:
        with self._written_aside(key, data) as (aside, path):
            Path(aside).replace(path)

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
            Path(aside).replace(path)

    def list(self, prefix: str) -> list[str]:
        folder = self._root / prefix.rpartition("/")[0]
        keys = (p.relative_to(self._root).as_posix() for p in folder.rglob("*") if p.is_file())
        return sorted(k for k in keys if k.startswith(prefix) and not k.rpartition("/")[2].startswith("."))

    @contextmanager
    def _written_aside(self, key: str, data: bytes) -> Iterator[tuple[str, Path]]:
        path = self._root / check_key(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=".aside-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield aside, path
        finally:
            Path(aside).unlink(missing_ok=True)


class S3Storage:
    """Any S3-compatible service that honors If-None-Match and If-Match on PUT."""

    _probed: set[tuple[str | None, str]] = set()
    _probe_lock = threading.Lock()

    def __init__(self, places: Places) -> None:
        import boto3
        from botocore.config import Config as ClientConfig

        bucket, _, prefix = places.store.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"store: found {places.store!r}, expected s3://bucket[/prefix]")
        self._bucket = bucket
        self._prefix = check_key(prefix.strip("/")) + "/" if prefix.strip("/") else ""
        self._places = places
        secret = places.secret_key.get_secret_value() if places.secret_key else None
        self._client = boto3.session.Session().client(
            "s3",
            endpoint_url=places.endpoint_url,
            region_name=places.region,
            aws_access_key_id=places.access_key,
            aws_secret_access_key=secret,
            config=ClientConfig(
                signature_version="s3v4",
                s3={"addressing_style": "path" if places.endpoint_url else "auto"},
                retries={"mode": "standard", "max_attempts": 5},
                max_pool_connections=2 * _NUM_THREADS,
            ),
        )

    def __reduce__(self) -> tuple[type[Self], tuple[Places]]:
        """Pickle as what it was opened with: a client holds connections."""
        return type(self), (self._places,)

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def probe(self) -> None:
        """Check once a process that a second `If-None-Match: *` PUT is refused: some servers ignore the header.

        Raises:
            ConfigError: the store answered 200 to both, so two publishers could both believe that they won.
        """
        with self._probe_lock:
            if (self._places.endpoint_url, self._bucket) in self._probed or self._places.single_writer:
                return
            key = f"probe/{secrets.token_hex(8)}"
            self.create(key, b"first")
            try:
                self.create(key, b"second")
            except LostRace:
                self._probed.add((self._places.endpoint_url, self._bucket))
                return
            finally:
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        raise ConfigError(
            f"store {self.uri} at {self._places.endpoint_url}: it ignores If-None-Match on PUT, so publishing is not "
            "safe; expected status 412. Use another store, or set ENCODE_SINGLE_WRITER=1 (in Airflow, `single_writer` "
            "in the extra of the connection encode_store) if only one process publishes"
        )

    def get(self, key: str) -> bytes:
        found = self.get_versioned(key)
        if found is None:
            raise ArtifactError(f"{self.uri}/{key}: not found")
        return found[0]

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        from botocore.exceptions import ClientError

        where = f"{self.uri}/{key}"
        if begin == end:
            return b""
        try:
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._prefix + check_key(key), Range=f"bytes={begin}-{end - 1}"
            )
        except self._client.exceptions.NoSuchKey:
            raise ArtifactError(f"{where}: not found") from None
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 416:
                raise
            return _whole(b"", where, begin, end)
        return _whole(answer["Body"].read(), where, begin, end)

    def get_versioned(self, key: str) -> tuple[bytes, str] | None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + check_key(key))
        except self._client.exceptions.NoSuchKey:
            return None
        return answer["Body"].read(), answer["ETag"]

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + check_key(key), Body=data)

    def create(self, key: str, data: bytes) -> None:
        self._put_if(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, version: str) -> None:
        self._put_if(key, data, IfMatch=version)

    def _put_if(self, key: str, data: bytes, **condition: str) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + check_key(key), Body=data, **condition)
        except ClientError as error:
            # 412 and 404: somebody else was first. 409: at the same time; the caller reads again either way.
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") not in (404, 409, 412):
                raise
            # A retried PUT can meet its own first success.
            found = self.get_versioned(key)
            if found is None or found[0] != data:
                raise LostRace(key) from None

    def list(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        keys = (entry["Key"] for page in pages for entry in page.get("Contents", []))
        return sorted(key.removeprefix(self._prefix) for key in keys)
