"""The serving process: HTTP in front of one bundle that is replaced as a whole.

A thread follows the registry's alias and the space's pointer. What it finds is loaded beside the bundle in use,
verified, and put in its place by one reference; requests under way finish on the bundle they started with.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from encode import __version__
from encode.config import Places, RegistryConfig
from encode.errors import EncodeError
from encode.interests.snapshots import folder_of
from encode.pointers import read_pointer
from encode.registry import CHAMPION, Registry
from encode.serving.bundle import Behavior, Bundle, load_bundle
from encode.serving.local_snapshot import remove_snapshots
from encode.storage import Storage, open_storage

MAX_CANDIDATES = 5_000
Id = Annotated[int, Field(gt=0, le=2**63 - 1)]
StrictId = Annotated[int, Field(gt=0, le=2**63 - 1, strict=True)]
_LOG = logging.getLogger("uvicorn.error")


class Request(BaseModel):
    """Base of request bodies: unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecentBehavior(Request):
    """A behavior since the snapshot."""

    item_id: StrictId
    category_id: int = Field(0, ge=0, le=2**63 - 1)
    timestamp: int = Field(ge=0, le=2**63 - 1, description="UTC seconds")


class ScoreRequest(Request):
    """A user and the candidates to score."""

    user_id: StrictId
    item_ids: list[StrictId] = Field(min_length=1, max_length=MAX_CANDIDATES)
    category_ids: list[Annotated[int, Field(ge=0, le=2**63 - 1)]] | None = Field(
        None, description="of the items, in the same order: how an item outside the vocabulary is scored"
    )
    recent: list[RecentBehavior] = Field(
        [], max_length=1_000, description="behaviors that the snapshot cannot hold yet"
    )

    @model_validator(mode="after")
    def _check(self) -> ScoreRequest:
        if self.category_ids is not None and len(self.category_ids) != len(self.item_ids):
            raise ValueError(f"{len(self.category_ids)} category_ids for {len(self.item_ids)} item_ids")
        return self


class Follower:
    """Keeps `bundle` equal to what the registry's alias and the space's pointer name."""

    def __init__(self, places: Places, config: RegistryConfig, cache: Path, seconds: float) -> None:
        """Prepare; `start` begins to follow. `seconds` is the time between looks when nobody asks for one."""
        self.bundle: Bundle | None = None
        self.error: str | None = None
        self._places, self._config, self._cache, self._seconds = places, config, cache, seconds
        self._registry: Registry | None = None
        self._storage: Storage | None = None
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def look_now(self) -> None:
        """Look at once instead of at the next interval."""
        self._wake.set()

    def stop(self) -> None:
        """Stop following; the bundle stays."""
        self._stopping = True
        self._wake.set()

    def _follow(self) -> None:
        while not self._stopping:
            self._wake.clear()
            before, problem = self.error, None
            try:
                self.look()
            except EncodeError as error:
                problem = str(error)
            except Exception as error:  # the network, the store, MLflow: keep serving and try again
                problem = f"{type(error).__name__}: {error}"
            self.error = problem
            if problem and problem != before:
                _LOG.warning("not following: %s", problem)
            self._wake.wait(self._seconds)

    def look(self) -> None:
        """Load what alias and pointer name now, if it is not what serves.

        Raises:
            EncodeError: there is no champion, or its bundle cannot be loaded; the bundle in use stays.
        """
        self._storage = self._storage or open_storage(self._places, writing=False)
        self._registry = self._registry or Registry(self._places, self._config)
        version = self._registry.by_alias(CHAMPION)
        if version is None:
            raise EncodeError(f"no version of {self._config.model_name} has the alias {CHAMPION}; release one first")
        held = self.bundle
        if held is not None and held.model_version == version.number:
            pointer = read_pointer(self._storage, folder_of(version.space))
            if pointer is not None and pointer[0] == held.pointer:
                return
        files = self._registry.files(version)
        self.bundle = load_bundle(self._storage, files, version.number, self._cache)
        _LOG.info("serving bundle %s", self.bundle.describe())
        kept = [one.snapshot.prefixes for one in (held, self.bundle) if one]
        remove_snapshots(self._cache, set().union(*kept))


def create_app(
    places: Places,
    config: RegistryConfig,
    cache: Path,
    seconds: float = 10.0,
    max_age_days: int | None = None,
    today: Callable[[], date] = lambda: datetime.now(UTC).date(),
) -> FastAPI:
    """Make the application.

    Args:
        places: store and registry to follow.
        config: which registered model.
        cache: folder for fetched snapshots.
        seconds: between looks at registry and pointer.
        max_age_days: a snapshot older than this is reported as stale in every response; None never.
        today: the clock behind `max_age_days`.
    """
    follower = Follower(places, config, cache, seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        follower.start()
        yield
        follower.stop()

    app = FastAPI(title="ENCODE serving", version=__version__, lifespan=lifespan)
    app.state.follower = follower

    @app.exception_handler(RequestValidationError)
    def refuse(_: object, error: RequestValidationError) -> Response:
        """Say where and why, but not what was found: FastAPI's own answer breaks on NaN and on halves of characters."""
        problems = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
        return Response(json.dumps({"detail": problems}), 422, media_type="application/json")

    def ready() -> Bundle:
        bundle = follower.bundle
        if bundle is None:
            raise HTTPException(503, f"not ready: {follower.error or 'loading'}", {"Retry-After": "2"})
        return bundle

    def stale(bundle: Bundle) -> bool:
        return max_age_days is not None and (today() - bundle.pointer.as_of).days > max_age_days

    @app.get("/health")
    def health() -> dict[str, str]:
        """Tell that the process is alive, whether or not it has something to serve."""
        return {"status": "alive"}

    @app.get("/ready")
    @app.get("/ping")
    def is_ready() -> dict[str, Any]:
        """Tell that a verified bundle is loaded; 503 until then."""
        return {"status": "ready", "bundle": ready().describe()}

    @app.get("/v1/release")
    def release() -> dict[str, Any]:
        """Return the bundle in use and why the newest look at the registry failed, if it did."""
        bundle = follower.bundle
        return {"bundle": bundle.describe() if bundle else None, "error": follower.error}

    @app.post("/v1/release/reload", status_code=202)
    def reload() -> dict[str, str]:
        """Look at the registry and the pointer now."""
        follower.look_now()
        return {"status": "looking"}

    @app.post("/v1/score")
    def score(request: ScoreRequest) -> dict[str, Any]:
        """Return a probability for each candidate, in order, the bundle it came from, and what was assumed."""
        bundle = ready()
        recent = [Behavior(one.item_id, one.category_id, one.timestamp) for one in request.recent]
        scored = bundle.score(request.user_id, request.item_ids, request.category_ids, recent)
        return {
            "user_id": request.user_id,
            "item_ids": request.item_ids,
            "probabilities": scored.probabilities,
            "bundle": bundle.describe(),
            "fallbacks": {
                "unknown_user": scored.unknown_user,
                "unknown_items": scored.unknown_items,
                "stale_snapshot": stale(bundle),
            },
        }

    @app.get("/v1/users/{user_id}/interests")
    def interests(user_id: Id, item_id: Id | None = None) -> dict[str, Any]:
        """Return a user's interests, largest first; with `item_id` also how much that item attends to each.

        `attention_to_itself` is to the user's own past with that very item.
        """
        bundle = ready()
        found = bundle.interests(user_id)
        if found is None:
            raise HTTPException(404, f"user {user_id}: no interests in snapshot {bundle.pointer.snapshot}")
        answer = {"user_id": user_id, "interests": found, "bundle": bundle.describe()}
        if item_id is not None:
            *weights, itself = bundle.attention(user_id, item_id) or []
            for interest, weight in zip(found, weights, strict=True):
                interest["attention"] = weight
            answer |= {"item_id": item_id, "attention_to_itself": itself, "unknown_item": not bundle.knows(item_id)}
        return answer

    return app
