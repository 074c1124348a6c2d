"""S3-compatible services as stores. Only this module knows S3."""

from __future__ import annotations

import secrets
import threading
from typing import Self

from encode.config import Places
from encode.errors import ArtifactError, ConfigError
from encode.storage.contract import LostRace, check_key, whole

_NUM_THREADS = 8


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
                self.remove(key)
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
            return whole(b"", where, begin, end)
        return whole(answer["Body"].read(), where, begin, end)

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

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + check_key(key))

    def list(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        keys = (entry["Key"] for page in pages for entry in page.get("Contents", []))
        return sorted(key.removeprefix(self._prefix) for key in keys)
