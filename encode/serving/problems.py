"""Refusals: one shape of JSON for every error, whoever finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope


class Place(BaseModel):
    """Where in a request something is wrong, and what."""

    type: str
    loc: list[str | int]
    msg: str


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str | list[Place]


class InferenceProblem(BaseModel):
    """The same in the Open Inference Protocol."""

    error: str


_NOT_JSON = {"type": "value_error", "loc": ["header", "Content-Type"], "msg": "expected application/json"}
_MOST_PLACES = 20
"""That are told of one request: each unknown field is one."""
_REASONS = {
    400: "the body cannot be read: not UTF-8, nested too deeply, or a number of thousands of digits",
    401: "no key, or none that is known",
    408: "the body did not arrive in time",
    413: "the body is larger than allowed",
    421: "the user is of a shard that this process does not hold",
    422: "the request is not what is expected; says where and why",
    500: "a fault of this program; its trace is in the log",
    503: "not ready, too many requests at work, or not answered in time; `Retry-After` says when to try again",
}


def documented(model: type[BaseModel] = Problem, *more: tuple[int, str]) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's `responses`: the errors that every limited route may answer, and further ones."""
    return {status: {"model": model, "description": text} for status, text in (_REASONS | dict(more)).items()}


def problem(
    scope: Scope, status: int, detail: str | Sequence[Mapping[str, Any]], headers: Mapping[str, str] | None = None
) -> Response:
    """Make the response: `{"detail": ...}`, under `/v2` `{"error": ...}` as the Open Inference Protocol wants."""
    body = {"error": _text(detail)} if scope["path"].startswith("/v2") else {"detail": detail}
    return Response(json.dumps(body), status, headers, media_type="application/json")


def invalid(message: str, *where: str | int) -> RequestValidationError:
    """Return the error of a body whose form FastAPI cannot check."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", *where), "msg": message}])


def invalid_body(error: ValidationError) -> RequestValidationError:
    """Return the error of a body that was made into a model here."""
    return RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in error.errors()])


def handle_problems(app: FastAPI) -> None:
    """Answer errors of routes in the one shape."""

    @app.exception_handler(RequestValidationError)
    def refuse(request: Request, error: RequestValidationError) -> Response:
        """Say where and why, but not what was found: FastAPI's own answer breaks on NaN and on halves of characters."""
        _forget_frames(error)
        if _is_unread(request, error):
            return problem(request.scope, 422, [_NOT_JSON])
        places = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()[:_MOST_PLACES]]
        return problem(request.scope, 422, places)

    @app.exception_handler(HTTPException)
    def tell(request: Request, error: HTTPException) -> Response:
        _forget_frames(error)
        return problem(request.scope, error.status_code, error.detail, error.headers)


def _is_unread(request: Request, error: RequestValidationError) -> bool:
    """Tell whether a body was not read as JSON, for it is not said to be: FastAPI checks bytes then."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = given.startswith("application/") and given.endswith(("/json", "+json"))
    return not is_json and any(one["type"] == "model_attributes_type" for one in error.errors())


def _forget_frames(error: BaseException | None) -> None:
    """Free the body: frames of FastAPI hold it and the error, which holds the frames. Cycles are collected late."""
    while error:
        error.__traceback__ = None
        error = error.__context__


def _text(detail: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(detail, str):
        return detail
    return "; ".join(f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in detail)
