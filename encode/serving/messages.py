"""Bodies of our own dialect: what is asked, what is answered."""

from __future__ import annotations

from typing import Annotated, TypeVar

import numpy as np
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from encode.serving.bundle import Asked, Behavior

MAX_CANDIDATES = 5_000
MAX_EXPLAINED = 100
Id = Annotated[int, Field(gt=0, le=2**63 - 1)]
StrictId = Annotated[int, Field(gt=0, le=2**63 - 1, strict=True)]
Category = Annotated[int, Field(ge=0, le=2**63 - 1)]
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list that is read up to its first error: a body of 1 MiB has room for a million, and telling all takes seconds."""


class Body(BaseModel):
    """Base of request bodies: unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecentBehavior(Body):
    """A behavior since the snapshot."""

    item_id: StrictId
    category_id: Category = 0
    timestamp: int = Field(ge=0, le=2**63 - 1, description="UTC seconds")


class ScoreRequest(Body):
    """A user and the candidates to score."""

    user_id: StrictId
    item_ids: Many[StrictId] = Field(min_length=1, max_length=MAX_CANDIDATES)
    category_ids: Many[Category] | None = Field(
        None, description="of the items, in the same order: how an item outside the vocabulary is scored"
    )
    recent: Many[RecentBehavior] = Field(
        [], max_length=1_000, description="behaviors that the snapshot cannot hold yet"
    )

    @model_validator(mode="after")
    def _check(self) -> ScoreRequest:
        if self.category_ids is not None and len(self.category_ids) != len(self.item_ids):
            raise ValueError(f"{len(self.category_ids)} category_ids for {len(self.item_ids)} item_ids")
        return self

    def asked(self) -> Asked:
        """Return the same as arrays."""
        categories = None if self.category_ids is None else np.array(self.category_ids, np.int64)
        recent = [Behavior(one.item_id, one.category_id, one.timestamp) for one in self.recent]
        return Asked(self.user_id, np.array(self.item_ids, np.int64), categories, recent)


class ExplainRequest(ScoreRequest):
    """A user and the candidates whose scores are to be explained."""

    item_ids: Many[StrictId] = Field(min_length=1, max_length=MAX_EXPLAINED)


def written(answer: BaseModel) -> Response:
    """Return an answer as JSON, written here and now: FastAPI would change threads for it."""
    return Response(answer.model_dump_json(), media_type="application/json")


class BundleInfo(BaseModel):
    """Where the numbers of a response come from."""

    id: str = Field(description="of model and snapshot together: 12 hex digits")
    model_version: str
    space: str
    snapshot: str
    as_of: str = Field(description="no behavior of this day or later is in the snapshot")


class Fallbacks(BaseModel):
    """What had to be assumed."""

    unknown_user: bool = Field(description="scored without a history")
    unknown_items: list[int] = Field(description="scored as their category, else as an average new item")
    stale_snapshot: bool = Field(description="older than the age that was allowed at the start")


class ScoreResponse(BaseModel):
    """A probability for each candidate, in order."""

    user_id: int
    item_ids: list[int]
    probabilities: list[float]
    bundle: BundleInfo
    fallbacks: Fallbacks


class TopItem(BaseModel):
    """An item that stands for an interest."""

    item_id: int
    name: str | None


class Interest(BaseModel):
    """What a user likes."""

    weight: float = Field(description="share of the user's behaviors")
    size: int = Field(description="behaviors")
    newest: int = Field(description="time of the newest behavior, UTC seconds")
    top_items: list[TopItem]
    categories: list[int] = Field(description="of the top items that the space knows, in their order")
    attention: float = Field(0, description="of the item that was asked about; absent without one")


class InterestsResponse(BaseModel):
    """A user's interests, largest first."""

    user_id: int
    interests: list[Interest]
    bundle: BundleInfo
    item_id: int = Field(0, description="the item that was asked about; absent without one, as all that follows")
    attention_to_itself: float = Field(0, description="to the user's own past with that very item")
    unknown_item: bool = False


class Explained(BaseModel):
    """Why an item scores as it does."""

    item_id: int
    probability: float
    attention: list[float] = Field(description="to each of the interests, in their order")
    attention_to_itself: float = Field(description="to the user's own past with that very item")


class ExplainResponse(BaseModel):
    """Scores of a user, and what of the user each of them attends to."""

    user_id: int
    interests: list[Interest] = Field(description="largest first; none for an unknown user")
    scores: list[Explained]
    bundle: BundleInfo
    fallbacks: Fallbacks


class Ready(BaseModel):
    """A verified bundle is loaded."""

    status: str
    bundle: BundleInfo


class Refusal(BaseModel):
    """A model version with a snapshot that is not to serve."""

    model_version: str
    snapshot: str
    why: str


class Release(BaseModel):
    """What serves, and why the newest look at the registry failed, if it did."""

    bundle: BundleInfo | None = Field(description="the champion's")
    previous: BundleInfo | None = Field(description="served before it, and is kept")
    challenger: BundleInfo | None = Field(description="serves beside it")
    refused: list[Refusal] = Field(description="too slow, not a number, or withdrawn; a reload tries again")
    error: str | None


class Status(BaseModel):
    """One word."""

    status: str
