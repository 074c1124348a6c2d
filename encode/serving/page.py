"""The page at `/`, for people: plain HTML, CSS and JavaScript without a build step and without a foreign resource.

It holds no data, so it is open; its script asks the other routes, with the key that is typed in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Response

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
PATHS = frozenset(_FILES)
"""All that it consists of."""

_HEADERS = {
    # Names of items are untrusted: neither script nor style that stands in the page itself is ever taken.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """Make the routes: they read their files once, here."""
    routes = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        content = (resources.files("encode.serving") / "static" / name).read_bytes()
        routes.add_api_route(path, _answering(content, media_type), methods=["GET", "HEAD"])
    return routes


def _answering(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return answer
