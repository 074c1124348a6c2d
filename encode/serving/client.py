"""Ask what serves now: the serving process if one is configured, else the champion's bundle loaded here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from encode.config import Places, RegistryConfig
from encode.errors import ArtifactError, DataError


def score(places: Places, config: RegistryConfig, user_id: int, item_ids: Sequence[int]) -> dict[str, Any]:
    """Return the answer of `POST /v1/score`.

    Raises:
        DataError: the request is refused; the message says why.
        ArtifactError: nothing serves yet.
    """
    return _ask(places, config, "POST", "/v1/score", json={"user_id": user_id, "item_ids": list(item_ids)})


def interests(places: Places, config: RegistryConfig, user_id: int, item_id: int | None = None) -> dict[str, Any]:
    """Return the answer of `GET /v1/users/{user_id}/interests`.

    Raises:
        DataError: the user is unknown.
        ArtifactError: nothing serves yet.
    """
    params = {} if item_id is None else {"item_id": item_id}
    return _ask(places, config, "GET", f"/v1/users/{user_id}/interests", params=params)


def _ask(places: Places, config: RegistryConfig, method: str, path: str, **options: Any) -> dict[str, Any]:
    import httpx

    with _client(places, config) as client:
        answer: httpx.Response = client.request(method, path, **options)
    if answer.status_code in (404, 422):
        raise DataError(_detail(answer.json()["detail"]))
    if answer.status_code == 503:
        raise ArtifactError(str(answer.json()["detail"]))
    answer.raise_for_status()
    return dict(answer.json())


@contextmanager
def _client(places: Places, config: RegistryConfig) -> Iterator[Any]:
    import httpx

    if places.serving_url:
        with httpx.Client(base_url=places.serving_url, timeout=60) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="encode-") as cache:
        yield _InProcess(places, config, Path(cache))


class _InProcess:
    """The serving application without a socket: the same routes, the same checks."""

    def __init__(self, places: Places, config: RegistryConfig, cache: Path) -> None:
        from encode.serving.app import create_app

        self._app: FastAPI = create_app(places, config, cache)
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
