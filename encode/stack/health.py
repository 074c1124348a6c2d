"""Questions to a server on the loopback interface: is it ready, and if not, what is missing.

Every probe returns None when the server is ready and otherwise a short reason for the progress
line. No probe raises on a server that is down, slow or confused. The standard library is enough,
so that a status costs no import; proxies of the environment are ignored on purpose.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote, unquote_plus, urlsplit
from xml.etree import ElementTree

PROBE_TIMEOUT = 5.0
AIRFLOW_PARTS = ("metadatabase", "scheduler", "dag_processor", "triggerer")

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def object_store_problem(endpoint_url: str, bucket: str, access_key: str, secret_key: str) -> str | None:
    """Ready when the first object of `bucket` can be read; 403 means other credentials are in force.

    A listing alone comes from the index, which answers before the volumes with the objects have reported.
    """
    url = f"{endpoint_url}/{bucket}?encoding-type=url&list-type=2&max-keys=1"
    status, body = _get(url, signed_headers(url, access_key, secret_key))
    if status != 200:
        return _reason(status, body)
    try:
        key = ElementTree.fromstring(body).findtext("{*}Contents/{*}Key")
    except ElementTree.ParseError:
        return "another program answers on its port"
    if key is None:
        return None
    url = f"{endpoint_url}/{bucket}/{quote(unquote_plus(key))}"
    status, body = _get(url, {**signed_headers(url, access_key, secret_key), "range": "bytes=0-0"})
    # 404: deleted meanwhile; 416: an empty object.
    return None if status in (200, 206, 404, 416) else _reason(status, body)


def mlflow_problem(url: str) -> str | None:
    """Ready when the API answers; `/health` alone is green while the Host header is refused."""
    status, body = _get(f"{url}/api/2.0/mlflow/experiments/search?max_results=1")
    return None if status == 200 else _reason(status, body)


def serving_problem(url: str) -> str | None:
    """Alive when `/health` answers 200; it may have no model to serve yet."""
    status, body = _get(f"{url}/health")
    return None if status == 200 else _reason(status, body)


def airflow_problem(url: str) -> str | None:
    """Ready when the API answers and all of `AIRFLOW_PARTS` report a fresh heartbeat."""
    status, body = _get(f"{url}/api/v2/monitor/health")
    if status != 200:
        return _reason(status, body)
    try:
        parts = json.loads(body)
        waiting = [name for name in AIRFLOW_PARTS if parts[name]["status"] != "healthy"]
    except (ValueError, KeyError, TypeError):
        return "another program answers on its port"
    return f"waiting for {', '.join(waiting)}" if waiting else None


def signed_headers(url: str, access_key: str, secret_key: str) -> dict[str, str]:
    """Headers of a GET without a body, by AWS Signature Version 4 for region us-east-1.

    Args:
        url: The address, its query parameters sorted by name and already encoded.
        access_key: Id of the key.
        secret_key: The key.
    """
    parts = urlsplit(url)
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{now[:8]}/us-east-1/s3/aws4_request"
    empty = hashlib.sha256(b"").hexdigest()
    headers = {"host": parts.netloc, "x-amz-content-sha256": empty, "x-amz-date": now}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = "\n".join(["GET", parts.path, parts.query, lines, names, empty])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    to_sign = "\n".join(["AWS4-HMAC-SHA256", now, scope, digest])
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={access_key}/{scope}"
    headers["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
    return headers


def _get(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body of a GET; status 0 and the reason when there was no answer."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    try:
        with _opener.open(request, timeout=PROBE_TIMEOUT) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, str(getattr(error, "reason", error)).encode()


def _reason(status: int, body: bytes) -> str:
    text = body.decode(errors="replace").strip()
    if status:
        return f"HTTP {status} {text[:200]}".rstrip()
    return "no answer yet" if "refused" in text else f"no answer ({text})"
