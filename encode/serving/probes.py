"""Questions of orchestrators and of Prometheus; they are answered whatever the load."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from encode.serving.keys import DOCUMENTED
from encode.serving.messages import BundleInfo, Ready, Status
from encode.serving.page import PATHS
from encode.serving.problems import Problem
from encode.serving.scoring import Scorer

OPEN_PATHS = PATHS | {"/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"}
"""Asked without a key."""
SPARED_PATHS = OPEN_PATHS | {"/metrics"}
"""Never counted, never told to come back."""


def probe_routes(scorer: Scorer) -> APIRouter:
    """Make the routes. They do not wait for a thread, of which requests may have taken all."""
    routes = APIRouter(tags=["probes"])
    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"model": Problem, "description": "nothing is loaded, or the process is about to end"}
    }

    in_text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {}}},
        401: {"model": Problem, "description": "no key, or none that is known"},
    }

    @routes.get("/health")
    async def health() -> Status:
        """Tell that the process is alive, whether or not it has something to serve."""
        return Status(status="alive")

    @routes.get("/ready", responses=not_ready)
    @routes.get("/ping", responses=not_ready)
    async def is_ready() -> Ready:
        """Tell that a verified bundle is loaded and the process is to stay; 503 otherwise."""
        return Ready(status="ready", bundle=BundleInfo(**scorer.ready().describe()))

    @routes.get("/metrics", response_class=Response, responses=in_text, dependencies=[DOCUMENTED])
    async def metrics(request: Request) -> Response:
        """Return metrics for Prometheus."""
        body, content_type = scorer.metrics.render(request.headers.get("accept"))
        return Response(body, media_type=None, headers={"Content-Type": content_type})

    return routes
