"""Our own dialect, `/v1`, in JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request, Response

from encode.serving.bundle import Asked, Bundle
from encode.serving.messages import (
    BundleInfo,
    Explained,
    ExplainRequest,
    ExplainResponse,
    Id,
    InterestsResponse,
    Refusal,
    Release,
    ScoreRequest,
    ScoreResponse,
    Status,
    written,
)
from encode.serving.problems import Problem
from encode.serving.rollout import BY_ROLE
from encode.serving.scoring import Scorer, check_shard

UNKNOWN_USER: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "the snapshot holds no interests of this user"}
}


def own_routes(scorer: Scorer, score_also: dict[str, Any]) -> APIRouter:
    """Make the routes; `score_also` is what OpenAPI says of `/v1/score` in another content type."""
    routes = APIRouter(prefix="/v1", tags=["encode"])
    follower = scorer.follower

    @routes.get("/release")
    def release() -> Release:
        """Return the bundles at hand, what is refused, and why the newest look at the registry failed, if it did."""
        return Release(
            bundle=_info(follower.bundle),
            previous=_info(follower.previous),
            challenger=_info(follower.challenger),
            refused=[
                Refusal(model_version=version, snapshot=pointer.snapshot, why=why)
                for (version, pointer), why in dict(follower.refused).items()
            ],
            error=follower.error,
        )

    @routes.post("/release/reload", status_code=202)
    def reload(again: bool = False) -> Status:
        """Look at the registry and the pointers now; `again` also at what was refused or withdrawn."""
        follower.look_now(again)
        return Status(status="looking")

    @routes.post("/score", response_model=ScoreResponse, openapi_extra=score_also | BY_ROLE)
    async def score(request: Request, asked: ScoreRequest) -> Response:
        """Return a probability for each candidate, in order, the bundle it came from, and what was assumed."""
        bundle = scorer.bundle(request, asked.user_id)
        scored = await scorer.score_soon(request, bundle, asked.asked())
        answer = ScoreResponse.model_construct(  # checking numbers of our own takes longer than writing them
            user_id=asked.user_id,
            item_ids=asked.item_ids,
            probabilities=scored.probabilities.tolist(),
            bundle=BundleInfo(**bundle.describe()),
            fallbacks=scorer.fallbacks(bundle, scored),
        )
        return written(answer)

    @routes.post("/explain", response_model=ExplainResponse, response_model_exclude_unset=True, openapi_extra=BY_ROLE)
    async def explain(request: Request, asked: ExplainRequest) -> dict[str, Any]:
        """Return the probability of each candidate, and how much of its attention each interest of the user has."""
        bundle, wanted = scorer.bundle(request, asked.user_id), asked.asked()
        scored = await scorer.score_soon(request, bundle, wanted)
        attention, itself = bundle.attention(wanted)
        found = zip(asked.item_ids, scored.probabilities.tolist(), attention.tolist(), itself.tolist(), strict=True)
        return {
            "user_id": asked.user_id,
            "interests": bundle.interests(asked.user_id) or [],
            "scores": [dict(zip(Explained.model_fields, one, strict=True)) for one in found],
            "bundle": bundle.describe(),
            "fallbacks": scorer.fallbacks(bundle, scored).model_dump(),
        }

    _add_interests(routes, scorer)
    return routes


def _add_interests(routes: APIRouter, scorer: Scorer) -> None:
    @routes.get(
        "/users/{user_id}/interests",
        response_model=InterestsResponse,
        response_model_exclude_unset=True,
        responses=UNKNOWN_USER,
        openapi_extra=BY_ROLE,
    )
    def interests(request: Request, user_id: Id, item_id: Id | None = None) -> dict[str, Any]:
        """Return a user's interests, largest first; with `item_id` also how much that item attends to each.

        `attention_to_itself` is to the user's own past with that very item.
        """
        bundle = scorer.bundle(request, user_id)
        check_shard(bundle, user_id)
        found = bundle.interests(user_id)
        if found is None:
            raise HTTPException(404, f"user {user_id}: no interests in snapshot {bundle.pointer.snapshot}")
        answer = {"user_id": user_id, "interests": found, "bundle": bundle.describe()}
        if item_id is not None:
            (weights,), (itself,) = (part.tolist() for part in bundle.attention(Asked(user_id, np.array([item_id]))))
            for interest, weight in zip(found, weights, strict=True):
                interest["attention"] = weight
            answer |= {"item_id": item_id, "attention_to_itself": itself, "unknown_item": not bundle.knows(item_id)}
        return answer


def _info(bundle: Bundle | None) -> BundleInfo | None:
    return BundleInfo(**bundle.describe()) if bundle else None
