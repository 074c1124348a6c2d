"""MLflow's dialect: `/invocations`, with the columns of the pyfunc of the same model, and its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from encode.serving.bundle import Asked
from encode.serving.messages import MAX_CANDIDATES, Body, BundleInfo, Many, StrictId, written
from encode.serving.problems import invalid, invalid_body
from encode.serving.rollout import BY_ROLE
from encode.serving.scoring import Scorer

MAX_USERS = 100


class Row(BaseModel):
    """A user and an item; further columns are ignored, as by MLflow."""

    model_config = ConfigDict(frozen=True)

    user_id: StrictId
    item_id: StrictId


class Columns(BaseModel):
    """The same as columns."""

    user_id: Many[StrictId]
    item_id: Many[StrictId]


class Split(Body):
    """A frame as pandas writes it with `orient="split"`."""

    columns: Many[str]
    data: Many[list[Any]] = Field(max_length=MAX_CANDIDATES)
    index: list[Any] | None = None


class Invocation(Body):
    """Rows in one of three forms."""

    dataframe_split: Split | None = None
    dataframe_records: Many[Row] | None = None
    inputs: Columns | Many[Row] | None = None
    params: dict[str, Any] | None = Field(None, description="ignored: the model has none")

    @model_validator(mode="after")
    def _check(self) -> Invocation:
        forms = (self.dataframe_split, self.dataframe_records, self.inputs)
        if sum(one is not None for one in forms) != 1:
            raise ValueError("expected exactly one of dataframe_split, dataframe_records and inputs")
        return self

    def rows(self) -> list[Row]:
        """Return the rows, whatever their form.

        Raises:
            RequestValidationError: columns are missing or differ in length.
        """
        if self.dataframe_split is not None:
            return _split_rows(self.dataframe_split)
        if isinstance(self.inputs, Columns):
            users, items = self.inputs.user_id, self.inputs.item_id
            if len(users) != len(items):
                raise invalid(f"{len(users)} user_id for {len(items)} item_id", "inputs")
            return [Row.model_construct(user_id=user, item_id=item) for user, item in zip(users, items, strict=True)]
        return self.dataframe_records or self.inputs or []


class Prediction(BaseModel):
    """The model's output for a row."""

    probability: float


class InvocationFallbacks(BaseModel):
    """What had to be assumed, of all users of a request."""

    unknown_users: list[int]
    unknown_items: list[int]
    stale_snapshot: bool


class Predictions(BaseModel):
    """A prediction for each row, in order; MLflow's clients read no further."""

    predictions: list[Prediction]
    bundle: BundleInfo
    fallbacks: InvocationFallbacks


def invocation_routes(scorer: Scorer) -> APIRouter:
    """Make the route."""
    routes = APIRouter(tags=["mlflow"])

    @routes.post("/invocations", response_model=Predictions, openapi_extra=BY_ROLE)
    def invocations(request: Request, asked: Invocation) -> Response:
        """Return a probability for each row; rows of one user are scored together."""
        places = _by_user(asked.rows())
        bundle = scorer.bundle(request)
        probabilities: dict[int, float] = {}
        unknown_users, unknown_items = [], set()
        for user, held in places.items():
            scored = scorer.score(request, bundle, Asked(user, np.array(list(held.values()), np.int64)))
            probabilities |= zip(held, scored.probabilities.tolist(), strict=True)
            unknown_items |= set(scored.unknown_items)
            unknown_users += [user] if scored.unknown_user else []
        answer = Predictions(
            predictions=[Prediction(probability=probabilities[place]) for place in range(len(probabilities))],
            bundle=BundleInfo(**bundle.describe()),
            fallbacks=InvocationFallbacks(
                unknown_users=unknown_users,
                unknown_items=sorted(unknown_items),
                stale_snapshot=scorer.stale(bundle),
            ),
        )
        return written(answer)

    return routes


def _by_user(rows: list[Row]) -> dict[int, dict[int, int]]:
    """Return the item of each row, by user and place of the row."""
    places: dict[int, dict[int, int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.user_id, {})[place] = row.item_id
    if not 1 <= len(rows) <= MAX_CANDIDATES or len(places) > MAX_USERS:
        raise invalid(
            f"{len(rows):,} rows of {len(places):,} users; expected 1 to {MAX_CANDIDATES:,} rows of at most "
            f"{MAX_USERS} users. `mlflow.pyfunc.load_model` scores batches"
        )
    return places


def _split_rows(split: Split) -> list[Row]:
    for name in Row.model_fields:
        if split.columns.count(name) > 1:
            raise invalid(f"two columns {name}", "dataframe_split", "columns")
    try:
        return [Row(**dict(zip(split.columns, row, strict=True))) for row in split.data]
    except ValidationError as error:
        raise invalid_body(error) from None
    except ValueError:
        raise invalid(f"a row that has not {len(split.columns)} values", "dataframe_split", "data") from None
