"""Prometheus metrics of one application, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, time
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from encode.serving.bundle import Bundle, Scored
from encode.serving.limits import Work
from encode.serving.rollout import Role

SECONDS = tuple(milliseconds / 1000 for milliseconds in (1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 100))
DIFFERENCES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
CANDIDATES = (1, 3, 10, 30, 100, 200, 300, 500, 1_000, 2_000, 5_000)
_TOLD = ("id", "model_version", "space", "snapshot")


class Metrics:
    """What is counted while requests are answered; the state of the process is read when it is asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._latency = self._histogram("request_seconds", "From headers to the end of the answer.", SECONDS, "route")
        self._model = self._histogram("model_seconds", "Scoring alone: reading the user, the model.", SECONDS, "role")
        self._candidates = self._histogram("candidates", "Candidates scored for a user.", CANDIDATES)
        self._requests = self._counter("requests", "Requests answered; 499: the client went away.", "route", "status")
        self._fallbacks = self._counter("fallbacks", "What had to be assumed; unknown_item counts items.", "kind")
        self._shed = self._counter("shed_requests", "Requests told to come back: too many were at work.")
        self._refused = self._counter("loads_refused", "Looks for a release that failed, by kind of error.", "kind")
        self._withdrawn = self._counter("bundles_withdrawn", "Bundles that did badly, by what they were.", "role")
        self._shadowed = self._counter("shadow_requests", "Requests for the challenger to score, too.", "outcome")
        self._apart = self._histogram(
            "shadow_difference", "Mean difference of a request's probabilities from the champion's.", DIFFERENCES
        )
        # At 0 from the start: of a series that begins with its first count, increase() does not see that count.
        for kind in ("unknown_user", "unknown_item", "stale_snapshot"):
            self._fallbacks.labels(kind)
        for role in get_args(Role):
            self._withdrawn.labels(role)
        for outcome in ("scored", "failed", "dropped"):
            self._shadowed.labels(outcome)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._latency.labels(route).observe(seconds)
        self._requests.labels(route, str(status)).inc()

    def scored(self, role: Role, seconds: float, scored: Scored, stale: bool) -> None:
        """Count what was scored for one user."""
        self._model.labels(role).observe(seconds)
        self._candidates.observe(len(scored.probabilities))
        kinds = {
            "unknown_user": int(scored.unknown_user),
            "unknown_item": len(scored.unknown_items),
            "stale_snapshot": int(stale),
        }
        for kind, times in kinds.items():
            if times:
                self._fallbacks.labels(kind).inc(times)

    def shed(self) -> None:
        """Count a request that was told to come back."""
        self._shed.inc()

    def load_refused(self, error: Exception) -> None:
        """Count a look for a release that failed."""
        self._refused.labels(type(error).__name__).inc()

    def withdrawn(self, role: Role) -> None:
        """Count a bundle that was withdrawn."""
        self._withdrawn.labels(role).inc()

    def shadowed(self, outcome: str, apart: float | None = None) -> None:
        """Count a request of the shadow: scored, with its mean difference, failed or dropped."""
        self._shadowed.labels(outcome).inc()
        if apart is not None:
            self._apart.observe(apart)

    def render(self, accept: str | None) -> tuple[bytes, str]:
        """Return the exposition in a format that the scraper accepts, and its content type."""
        try:
            encode, content_type = choose_encoder(accept or "")
        except (TypeError, ValueError):  # it fails on a version that is not made of numbers
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"encode_{name}", text, labels, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"encode_{name}", text, labels, registry=self.registry)


class State(Collector):
    """Gauges that are read at each scrape, not kept: nothing to forget when the bundle changes."""

    def __init__(
        self,
        in_use: Callable[[], Mapping[Role, Bundle]],
        ready: Callable[[], bool],
        work: Work,
        now: Callable[[], datetime],
        erased: Callable[[], int],
        failed: Callable[[], bool],
    ) -> None:
        self._in_use, self._ready, self._work, self._now = in_use, ready, work, now
        self._erased, self._failed = erased, failed

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("encode_ready", "1 if requests should be sent here.", float(self._ready()))
        for name, text, value in (
            ("requests_at_work", "Requests at work or waiting now.", self._work.count),
            ("arriving_bytes", "Of bodies that are not complete.", self._work.arrived),
            ("look_failed", "1 if the newest look for a release failed.", self._failed()),
            ("erased_users", "Users on the list of those who are answered as unknown.", self._erased()),
        ):
            yield GaugeMetricFamily(f"encode_{name}", text, float(value))
        age = GaugeMetricFamily(
            "encode_snapshot_age_seconds", "Since the day before which the snapshot ends.", labels=["role"]
        )
        info = GaugeMetricFamily("encode_bundle_info", "What serves.", labels=["role", *_TOLD])
        for role, bundle in self._in_use().items():
            as_of = datetime.combine(bundle.pointer.as_of, time(), UTC)
            age.add_metric([role], (self._now() - as_of).total_seconds())
            told = bundle.describe()
            info.add_metric([role, *(told[name] for name in _TOLD)], 1)
        yield age
        yield info
