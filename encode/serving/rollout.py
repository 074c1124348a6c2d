"""How a release gets its share of the requests, and when it is withdrawn."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, get_args

import numpy as np

from encode.errors import ConfigError
from encode.registry import CHAMPION
from encode.schema import bucket_of
from encode.serving.shard import ALL_USERS, Shard
from encode.serving.trial import NEVER_SLOW_MS, TIMES_SLOWER

Role = Literal["champion", "challenger"]
ROLE_HEADER = "X-Encode-Role"
"""Of a request: which bundle is to answer, whatever the user."""
BY_ROLE: dict[str, Any] = {
    "parameters": [
        {
            "name": ROLE_HEADER,
            "in": "header",
            "description": "which bundle is to answer, whatever the user",
            "schema": {"type": "string", "enum": list(get_args(Role))},
        }
    ]
}
"""What OpenAPI says of it: added to that of a route."""

_FEWEST_FAILURES, _MOST_FAILED, _OF_LATEST = 3, 0.01, 1_000
_WINDOW, _EVERY, _PROBATION = 200, 50, 1_000
_GROUPS = 10_000
_SALT = 0x5EED << 40
"""So that who asks the challenger has nothing to do with shards and buckets."""


@dataclass(frozen=True)
class Rollout:
    """What one serving process does with releases."""

    shard: Shard = ALL_USERS
    """Users whose interests it holds."""
    max_model_ms: float = 50.0
    """A bundle that needs longer for 1,000 candidates is refused."""
    challenger: str | None = None
    """Alias of the version that is served beside the champion; None for none."""
    challenger_share: float = 0.0
    """Of the users, by a hash of their id: the challenger answers them."""
    shadow_share: float = 0.0
    """Of the champion's requests: the challenger scores them, too, and nobody waits for it."""

    def __post_init__(self) -> None:
        """Raise a `ConfigError` where the challenger is the champion, or a share is of none."""
        if self.challenger == CHAMPION:
            raise ConfigError(f"--challenger {CHAMPION}: serves already; name another alias")
        if not self.challenger and (self.challenger_share or self.shadow_share):
            raise ConfigError(
                "--challenger-share and --shadow-share: there is no challenger; name its alias by --challenger"
            )

    def role_of(self, user_id: int) -> Role:
        """Return who answers a user; the same for all processes, and as long as the share stays."""
        if not self.challenger_share:
            return "champion"
        group = int(bucket_of(np.array([user_id ^ _SALT]), _GROUPS)[0])
        return "challenger" if group < self.challenger_share * _GROUPS else "champion"


class Watch:
    """How a bundle does since it began to serve, and whether it should go on.

    It should not if at least 3 of the last 1,000 requests, and more than 1 of 100, got no probabilities. Nor if, within
    its first 1,000 requests, the median of the last 200 took more than three times as long as the median of the last
    200 of what served before (and more than 5 ms), all as if of 1,000 candidates: what a request takes whatever its
    candidates is about as much as what 1,000 take. Threads may note at once.
    """

    def __init__(self, before: Watch | None = None) -> None:
        self._lock = threading.Lock()
        self._asked = 0
        self._failed: deque[bool] = deque(maxlen=_OF_LATEST)
        self._latest: deque[float] = deque(maxlen=_WINDOW)
        self._before_ms = before.median_ms() if before else None

    def median_ms(self) -> float | None:
        """Return the median of the last 200 requests, None of fewer."""
        with self._lock:
            return median(self._latest) if len(self._latest) == _WINDOW else None

    def note(self, seconds: float | None, num_candidates: int) -> str | None:
        """Note a request; return why the bundle should not go on, or None.

        Args:
            seconds: it took to score, None if it failed.
            num_candidates: that were scored.
        """
        with self._lock:
            self._asked += 1
            self._failed.append(seconds is None)
            if seconds is not None:
                self._latest.append(1e3 * seconds * 2_000 / (1_000 + num_candidates))
            asked, latest = self._asked, len(self._failed)
            failed = sum(self._failed) if seconds is None else 0  # only a failure can be one too many
        if failed >= _FEWEST_FAILURES and failed > _MOST_FAILED * latest:
            return f"{failed} of its last {latest} requests got no probabilities"
        if self._before_ms is None or asked > _PROBATION or asked % _EVERY:
            return None
        now_ms = self.median_ms()
        if now_ms is None or now_ms <= max(NEVER_SLOW_MS, TIMES_SLOWER * self._before_ms):
            return None
        return f"1,000 candidates take {now_ms:.1f} ms, those of the bundle before took {self._before_ms:.1f} ms"
