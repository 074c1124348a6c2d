"""MLflow's webhook: the registry tells that an alias moved, instead of being asked every few seconds.

A delivery is signed (HMAC-SHA256 over `id.timestamp.body`, as Standard Webhooks have it) with a secret that both sides
know; without the secret anybody could make this process look at the registry as often as they please.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Request

from encode.serving.follower import Follower
from encode.serving.messages import Status
from encode.serving.problems import Problem

PATH = "/v1/release/webhook"
SECRET = "ENCODE_WEBHOOK_SECRET"
"""Environment variable of the secret."""
_REFUSALS: dict[int | str, dict[str, Any]] = {
    403: {"model": Problem, "description": "not signed with the secret, or not lately"},
    422: {"model": Problem, "description": "not a delivery"},
}
_TOLERANCE_SECONDS = 300
"""Between the clocks of the two sides; MLflow repeats a failed delivery within seconds."""


def webhook_routes(follower: Follower, secret: str) -> APIRouter:
    """Make the route; without a secret it refuses everything."""
    routes = APIRouter(tags=["encode"])

    @routes.post(PATH, status_code=202, responses=_REFUSALS)
    async def told(
        request: Request,
        x_mlflow_delivery_id: Annotated[str, Header()] = "",
        x_mlflow_timestamp: Annotated[str, Header()] = "",
        x_mlflow_signature: Annotated[str, Header()] = "",
    ) -> Status:
        """Look at the registry now: for MLflow, which signs what it sends."""
        if not secret:
            raise HTTPException(403, f"no webhooks are taken: {SECRET} is not set")
        if not _is_recent(x_mlflow_timestamp):
            raise HTTPException(403, f"expected a time within {_TOLERANCE_SECONDS} s of now")
        expected = signature(secret, x_mlflow_delivery_id, x_mlflow_timestamp, await request.body())
        if not hmac.compare_digest(expected.encode(), x_mlflow_signature.encode()):
            raise HTTPException(403, "the signature is not made with this secret")
        follower.look_now()
        return Status(status="looking")

    return routes


def signature(secret: str, delivery: str, timestamp: str, body: bytes) -> str:
    """Return what MLflow signs a delivery with, as its header has it."""
    signed = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def _is_recent(timestamp: str) -> bool:
    if not re.fullmatch("[0-9]{1,12}", timestamp):
        return False
    return abs(time.time() - int(timestamp)) <= _TOLERANCE_SECONDS
