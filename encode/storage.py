"""Objects by key, and outputs that are either complete or absent.

Two stores with the same behavior: a folder, and any S3-compatible service. Both can create a key only if it is
absent and replace it only if it is unchanged; everything that publishes rests on these two. Only this module knows S3.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from encode import __version__
from encode.config import Places
from encode.errors import ArtifactError, ConfigError
from encode.schema import canonical_json, digest, fingerprint

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


# --- outputs: immutable directories that a manifest completes ----------------------------------------------

MANIFEST = "manifest.json"


class Part(BaseModel):
    """One file of an output."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    bytes: int
    sha256: str
    rows: int | None = None


class Manifest(BaseModel):
    """What an output is, what it was made from, and with what. Written last; without it the output does not exist."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    fingerprint: str
    parts: tuple[Part, ...]
    counts: dict[str, int | float]
    columns: dict[str, str]
    config: dict[str, Any]
    inputs: dict[str, str]
    details: dict[str, Any]
    seed: int | None
    version: str
    git_commit: str

    def to_bytes(self) -> bytes:
        """Return the one spelling of this manifest."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Return the digest that names this output wherever another was made from it; the commit is not in it."""
        return digest(canonical_json(self.model_dump(mode="json", exclude={"git_commit"})))


def recipe(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str], seed: int | None = None) -> str:
    """Return the fingerprint of an output before it is made: what kind, from what, with what settings."""
    return fingerprint({"kind": kind, "config": dict(config), "inputs": dict(inputs), "seed": seed, "v": __version__})


def read_manifest(storage: Storage, prefix: str) -> Manifest | None:
    """Return the manifest of the output at `prefix`, or None when the output is absent or unfinished.

    Raises:
        ArtifactError: there is a manifest, but it cannot be read.
    """
    found = storage.get_versioned(f"{prefix}/{MANIFEST}")
    if found is None:
        return None
    try:
        return Manifest.model_validate_json(found[0])
    except ValidationError as error:
        raise ArtifactError(
            f"{storage.uri}/{prefix}/{MANIFEST}: not a manifest ({error.error_count()} errors, first: "
            f"{error.errors()[0]['msg']}); remove the output and run its step again"
        ) from None


def write_output(
    storage: Storage,
    prefix: str,
    parts: Mapping[str, bytes],
    *,
    kind: str,
    fingerprint: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    rows: Mapping[str, int] | None = None,
    columns: Mapping[str, str] | None = None,
    counts: Mapping[str, int | float] | None = None,
    details: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Manifest:
    """Write all parts, then the manifest. Killed in between, the output is absent and the next try overwrites it.

    Two writers of one output write the same bytes, so whoever is second changes nothing.

    Raises:
        ArtifactError: a complete output with another content is already there.
    """
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint,
        parts=tuple(
            Part(name=name, bytes=len(data), sha256=digest(data), rows=(rows or {}).get(name))
            for name, data in sorted(parts.items())
        ),
        counts=dict(counts or {}),
        columns=dict(columns or {}),
        config=dict(config),
        inputs=dict(inputs),
        details=dict(details or {}),
        seed=seed,
        version=__version__,
        git_commit=git_commit(),
    )
    if (existing := read_manifest(storage, prefix)) is not None:
        return _same(storage, prefix, existing, manifest)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(lambda item: storage.put(f"{prefix}/{item[0]}", item[1]), parts.items()))
    try:
        storage.create(f"{prefix}/{MANIFEST}", manifest.to_bytes())
    except LostRace:
        written = read_manifest(storage, prefix)
        return _same(storage, prefix, written, manifest) if written else manifest
    return manifest


def _same(storage: Storage, prefix: str, existing: Manifest, manifest: Manifest) -> Manifest:
    if existing.parts != manifest.parts:
        changed = sorted({p.name for p in set(existing.parts) ^ set(manifest.parts)})
        raise ArtifactError(
            f"{storage.uri}/{prefix}: already complete with another content (differs in {', '.join(changed)}); "
            "outputs are immutable: write under another key, or remove this one first"
        )
    return existing


def read_part(storage: Storage, prefix: str, part: Part) -> bytes:
    """Return one file of an output after checking its digest.

    Raises:
        ArtifactError: the file is missing or is not the one that the manifest names.
    """
    data = storage.get(f"{prefix}/{part.name}")
    if digest(data) != part.sha256:
        raise ArtifactError(
            f"{storage.uri}/{prefix}/{part.name}: damaged: {len(data)} bytes with digest {digest(data)[:12]}, "
            f"expected {part.bytes} bytes with {part.sha256[:12]}; remove the output and run its step again"
        )
    return data


def read_parts(storage: Storage, prefix: str, parts: Sequence[Part]) -> list[bytes]:
    """Return several files of an output, checked, in the order of `parts`."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda part: read_part(storage, prefix, part), parts))


def read_files(storage: Storage, prefix: str, manifest: Manifest) -> dict[str, bytes]:
    """Return all files of an output by name, checked."""
    names = [part.name for part in manifest.parts]
    return dict(zip(names, read_parts(storage, prefix, manifest.parts), strict=True))


@cache
def git_commit() -> str:
    """Return the commit of this code: ENCODE_GIT_COMMIT where an image was built from it, else what git says."""
    if commit := os.environ.get("ENCODE_GIT_COMMIT"):
        return commit
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"
