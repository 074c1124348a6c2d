"""The gates between a candidate and production: what a bundle is worth on the test days and what it costs, and limits.

I impressions
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from encode.config import ReleaseConfig, TrainingConfig
from encode.data.histories import Histories, rows_of, to_batch
from encode.data.impressions import draw_impressions, snapshot_times
from encode.evaluate.metrics import curves, summary
from encode.evaluate.reading import predict
from encode.evaluate.replay import Replay, make_replay
from encode.interests.clustered import cluster_histories
from encode.interests.extract import extract, state_of
from encode.interests.user_rows import UserRows
from encode.schema import Window, day_start
from encode.serving.bundle import Bundle
from encode.serving.engine import one_thread
from encode.serving.local_snapshot import LocalSnapshot
from encode.serving.trial import median_ms

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
_PARITY_HISTORIES, _PARITY_IMPRESSIONS = 64, 8
"""Histories whose scores are compared, spread evenly over all users, and impressions of each at most."""


@dataclass(frozen=True)
class Gate:
    """One measured value and the range that it must lie in."""

    name: str
    value: float
    lowest: float = float("-inf")
    highest: float = float("inf")
    champion: float | None = None
    """The same of the champion, for people to compare."""

    @property
    def passed(self) -> bool:
        """Tell whether the value is in range; NaN never is."""
        return self.lowest <= self.value <= self.highest

    @property
    def limit(self) -> str:
        """The range in words."""
        bounds = [f">= {self.lowest:g}"] * (self.lowest > float("-inf"))
        bounds += [f"<= {self.highest:g}"] * (self.highest < float("inf"))
        return " and ".join(bounds)

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} ({self.limit})"


@dataclass(frozen=True)
class Measured:
    """A bundle on the impressions of the test days."""

    metrics: dict[str, float]
    """Of `evaluate.metrics.summary`; and `coverage`, `parity`, `latency_ms` and `size_mb`, see `measure`."""
    curves: dict[str, list[dict[str, float]]]
    """Of `evaluate.metrics.curves`."""
    probabilities: Floats
    """[I]"""


def measure(bundle: Bundle, histories: Histories, days: Window, config: TrainingConfig) -> Measured:
    """Replay the impressions of some days with a bundle's model, and ask its engine.

    The same days, histories and settings give the same impressions for every bundle, so that two can be compared.

    Beside the metrics of the replay: `coverage`, the share of the days' users that the snapshot holds; `parity`, see
    there; `latency_ms`, the median for 1,000 candidates on one thread; `size_mb`, megabytes of weights and space.

    Args:
        bundle: loaded and checked.
        histories: all behaviors before the end of the days.
        days: whose behaviors are predicted.
        config: sampling of the impressions and age of snapshots.

    Raises:
        DataError: the days hold no positive.
    """
    impressions = draw_impressions(histories, days, config, config.max_eval_positives)
    as_of = snapshot_times(impressions, days, config.snapshot_days)
    settings = bundle.space.config
    replay = make_replay(histories, impressions, as_of, bundle.space.vocabulary, settings.recent_length)
    offline = partial(cluster_histories, clustering=settings.clustering)
    probabilities = predict(bundle.space.items, bundle.reader, replay, offline)
    metrics = summary(impressions.user, impressions.labels, probabilities, impressions.first_time)
    active = (histories.timestamps >= day_start(days.start)) & (histories.timestamps < day_start(days.end))
    users = np.unique(histories.user_ids[histories.user_of[active]])
    weights = sum(weight.numel() * weight.element_size() for weight in bundle.reader.state_dict().values())
    metrics |= {
        "coverage": share_held(users, bundle.snapshot),
        "parity": parity(bundle, histories, replay, probabilities),
        "latency_ms": _latency_ms(bundle),
        "size_mb": (weights + sum(map(len, bundle.space.files.values()))) / 1e6,
    }
    return Measured(metrics, curves(impressions.labels, probabilities, replay.history_lengths()), probabilities)


def _latency_ms(bundle: Bundle) -> float:
    """Time a bundle on one thread, as the serving process runs."""
    with one_thread():
        return median_ms(bundle)


def parity(bundle: Bundle, histories: Histories, replay: Replay, probabilities: Floats) -> float:
    """Return how far serving is from the replay: the largest difference of a probability, on a sample of impressions.

    The sample's interests are extracted as the refresh does, and scored by the bundle's engine. NaN if any score is.

    Args:
        bundle: whose space and engine are asked.
        histories: that were replayed.
        replay: of the bundle's space.
        probabilities: that the replay gave, [I].
    """
    count = len(replay.history_begin)
    chosen = np.unique(np.linspace(0, count - 1, _PARITY_HISTORIES).astype(np.int64))
    rows, offsets = rows_of(replay.history_begin[chosen], replay.history_end[chosen])
    columns = (histories.item_ids, histories.category_ids, histories.timestamps)
    batch = to_batch(replay.history_user_ids[chosen], offsets, [column[rows] for column in columns])
    interests = UserRows(extract(batch, bundle.space))
    differences = []
    for place, history in enumerate(chosen):
        state = state_of(interests[place], bundle.space)
        first, last = replay.impression_offsets[history : history + 2]
        for shown in range(first, min(last, first + _PARITY_IMPRESSIONS)):
            since = replay.behavior_index[replay.recent_begin[shown] : replay.recent_end[shown]]
            recent = np.pad(since, (0, replay.recent_length - len(since)))
            target = replay.target_index[shown : shown + 1]
            served = bundle.engine.score(state._replace(recent=recent), target)
            differences.append(abs(served.item() - float(probabilities[shown])))
    return float(np.max(differences))


def share_held(users: Ints, snapshot: LocalSnapshot) -> float:
    """Return the share of some users, ascending and each once, that a snapshot holds; 0 where there is none."""
    held = sum(int(np.isin(users, ids, assume_unique=True).sum()) for ids in snapshot.user_ids())
    return held / max(len(users), 1)


def gates_of(
    candidate: Measured, champion: Measured | None, champions_users: float | None, limits: ReleaseConfig
) -> list[Gate]:
    """Hold what was measured against its limits.

    Args:
        candidate: what is to serve.
        champion: what serves, on the same impressions; None where nothing does.
        champions_users: share of the users of the champion's snapshot that the candidate's holds, too.
        limits: for each value.
    """
    new, old = candidate.metrics, champion.metrics if champion else {}
    inf = float("inf")
    absolute = {
        "auc": (limits.min_auc, inf),
        "gauc": (limits.min_gauc, inf),
        "auc_first_time": (limits.min_auc_first_time, inf),
        "logloss": (-inf, limits.max_logloss),
        "calibration": limits.calibration,
        "coverage": (limits.min_coverage, inf),
        "parity": (-inf, limits.max_parity),
        "latency_ms": (-inf, limits.max_latency_ms),
        "size_mb": (-inf, limits.max_size_mb),
    }
    gates = [Gate(name, new[name], *bounds, champion=old.get(name)) for name, bounds in absolute.items()]
    if champion is None or champions_users is None:
        return gates
    away = abs(new["calibration"] - 1) - abs(old["calibration"] - 1)
    return [
        *gates,
        Gate("auc_over_champion", new["auc"] - old["auc"], lowest=-limits.max_auc_loss),
        Gate("gauc_over_champion", new["gauc"] - old["gauc"], lowest=-limits.max_gauc_loss),
        Gate("logloss_over_champion", new["logloss"] - old["logloss"], highest=limits.max_logloss_gain),
        Gate("miscalibration_over_champion", away, highest=limits.max_miscalibration_gain),
        Gate("coverage_of_champion", champions_users, lowest=limits.min_coverage_of_champion),
    ]
