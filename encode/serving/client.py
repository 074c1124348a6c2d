"""Ask what serves now: the serving process if one is configured, else the champion's bundle loaded here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from encode.config import Places, RegistryConfig
from encode.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    import httpx


def score(places: Places, config: RegistryConfig, user_id: int, item_ids: Sequence[int]) -> dict[str, Any]:
    """Return the answer of `POST /v1/score`.

    Raises:
        DataError: the request is refused; the message says why.
        ArtifactError: nothing serves yet.
        ConfigError: the serving process asks for another key.
    """
    return _ask(places, config, "POST", "/v1/score", json={"user_id": user_id, "item_ids": list(item_ids)})


def interests(places: Places, config: RegistryConfig, user_id: int, item_id: int | None = None) -> dict[str, Any]:
    """Return the answer of `GET /v1/users/{user_id}/interests`.

    Raises:
        DataError: the user is unknown.
        ArtifactError: nothing serves yet.
        ConfigError: the serving process asks for another key.
    """
    params = {} if item_id is None else {"item_id": item_id}
    return _ask(places, config, "GET", f"/v1/users/{user_id}/interests", params=params)


def _ask(places: Places, config: RegistryConfig, method: str, path: str, **options: Any) -> dict[str, Any]:
    import httpx

    try:
        with _client(places, config) as client:
            answer: httpx.Response = client.request(method, path, **options)
    except httpx.TransportError as error:
        raise ConnectionError(f"{places.serving_url}: {error}") from None
    if answer.status_code == 401:
        raise ConfigError(f"{places.serving_url}: asks for a key; set ENCODE_SERVING_KEY to one that it knows")
    if answer.status_code in (404, 422):
        raise DataError(_detail(answer.json()["detail"]))
    if answer.status_code == 503:
        raise ArtifactError(str(answer.json()["detail"]))
    answer.raise_for_status()
    return dict(answer.json())


def connect(places: Places) -> httpx.Client:
    """Return a client of the serving process, with the key if there is one."""
    import httpx

    key = places.serving_key
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    return httpx.Client(base_url=places.serving_url or "", headers=headers, timeout=60)


@contextmanager
def _client(places: Places, config: RegistryConfig) -> Iterator[Any]:
    if places.serving_url:
        with connect(places) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="encode-") as cache:
        yield _InProcess(places, config, Path(cache))


class _InProcess:
    """The serving application without a socket: the same routes, the same checks."""

    def __init__(self, places: Places, config: RegistryConfig, cache: Path) -> None:
        from encode.serving.app import create_app
        from encode.serving.limits import Limits

        self._app: FastAPI = create_app(places, config, cache, limits=Limits(deadline_seconds=60))
        self._app.state.follower.look()

    def request(self, method: str, path: str, **options: Any) -> Any:
        import asyncio

        import httpx

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://in-process") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


def _detail(detail: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(detail, str):
        return detail
    return "; ".join(f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in detail)
