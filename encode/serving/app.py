"""The serving application: routes of three dialects on one scoring function, behind keys and limits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Set
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from anyio import to_thread
from fastapi import FastAPI
from starlette.middleware import Middleware

from encode import __version__
from encode.config import Places, RegistryConfig
from encode.serving import keys, webhook
from encode.serving.arrow import ALSO_ARROW, arrow_route
from encode.serving.follower import Follower
from encode.serving.inference import inference_probes, inference_routes
from encode.serving.invocations import invocation_routes
from encode.serving.limits import Limited, Limits, Work
from encode.serving.metrics import Metrics, State
from encode.serving.observe import Observed
from encode.serving.page import page_routes
from encode.serving.probes import OPEN_PATHS, SPARED_PATHS, probe_routes
from encode.serving.problems import documented, handle_problems
from encode.serving.rollout import Rollout
from encode.serving.routes import own_routes
from encode.serving.scoring import Scorer


def create_app(
    places: Places,
    config: RegistryConfig,
    cache: Path,
    seconds: float = 10.0,
    max_age_days: int | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    limits: Limits | None = None,
    hashes: Set[str] = frozenset(),
    rollout: Rollout | None = None,
    webhook_secret: str = "",
    threads: int | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        places: store and registry to follow.
        config: which registered model.
        cache: folder for fetched snapshots.
        seconds: between looks at registry and pointer.
        max_age_days: a snapshot older than this is reported as stale in every response; None never.
        now: the clock behind `max_age_days` and the age in the metrics.
        limits: what a request may take.
        hashes: SHA-256 of the keys that are let in, in hex; none lets everybody in.
        rollout: which users it holds, whether there is a challenger, and what is too slow.
        webhook_secret: by which MLflow signs; without it no webhook is taken.
        threads: that compute beside the event loop; by default one for each processor but the event loop's.
    """
    metrics, work, rollout = Metrics(), Work(), rollout or Rollout()
    follower = Follower(places, config, cache, seconds, rollout, metrics.load_refused, metrics.withdrawn)
    scorer = Scorer(follower, rollout, metrics, work, max_age_days, now, threads)
    metrics.registry.register(
        State(
            follower.in_use,
            scorer.is_ready,
            work,
            now,
            erased=lambda: len(follower.erased),
            failed=lambda: follower.error is not None,
        )
    )

    open_paths = OPEN_PATHS | ({webhook.PATH} if webhook_secret else set())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # What scores for one user is a coroutine. What may take longer, `/invocations` with many users, has one thread,
        # in order of arrival: two that read and write JSON at once hand the GIL to and fro, and both are late.
        to_thread.current_default_thread_limiter().total_tokens = 1
        follower.start()
        scorer.shadow.start()
        yield
        scorer.shadow.stop()
        scorer.close()
        app.state.loading = follower.stop()

    app = FastAPI(
        title="ENCODE serving",
        version=__version__,
        redirect_slashes=False,  # to whatever host the request names
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere; the page at / lists the routes instead
        redoc_url=None,
        middleware=[
            Middleware(Observed, metrics=metrics, is_draining=lambda: scorer.draining),
            Middleware(keys.KeyRequired, hashes=hashes, open_paths=open_paths),
            Middleware(Limited, limits=limits or Limits(), work=work, spared=SPARED_PATHS, on_shed=metrics.shed),
        ],
    )
    app.state.follower, app.state.scorer, app.state.work, app.state.loading = follower, scorer, work, False
    handle_problems(app)
    _add_routes(app, scorer, config.model_name)
    app.include_router(webhook.webhook_routes(follower, webhook_secret))
    return app


def _add_routes(app: FastAPI, scorer: Scorer, model_name: str) -> None:
    key = keys.DOCUMENTED
    # Routes are tried in order: first what is asked for most.
    app.routes.append(arrow_route(scorer))
    app.include_router(own_routes(scorer, ALSO_ARROW), dependencies=[key], responses=documented())
    app.include_router(page_routes())
    app.include_router(probe_routes(scorer))
    app.include_router(inference_probes(scorer))
    app.include_router(invocation_routes(scorer), dependencies=[key], responses=documented())
    app.include_router(inference_routes(scorer, model_name), dependencies=[key])
