"""A day against the days before it: what is unusual, by bands that the past itself gives.

A weekday is compared with itself: the center of a band is the median of the values on the same weekday, where there
are three, else of all days. A month has four of each weekday, too few to say how much they scatter; so the spread is
taken over all days, as the median absolute deviation of each from the center of its own weekday. Both are medians: a
holiday, or a day that went wrong and was let pass, moves neither, and needs no marking. Counts are compared by their
logarithm, for they grow by factors.

How far two distributions are apart is their population stability index (PSI), the sum of (p - q) log(p / q), half a
row added to every bin. Its usual size depends on how many rows a day has, so the textbook's 0.25 says nothing by
itself: the band comes from the index of each past day against the other past days.

None of this refuses a day: whether a day is published must not depend on which of its neighbors were there first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from encode.config import TrendsConfig
from encode.data.profiles import NUM_BEHAVIORS, NUM_SAMPLED, Ints, Profile

Floats = npt.NDArray[np.float64]
Severity = Literal["warning", "info"]
_NUM_BINS = 100
"""Categories that are bins of their own, the most frequent of the past; all others share one."""
_MIN_SAME_WEEKDAY = 3
_FEW_ROWS = 3
"""So many rows are usual whatever share of a small day they are."""
_MAX_NAMED = 10
_DIGITS = 6


@dataclass(frozen=True)
class Measure:
    """One number about a day, and what it usually is."""

    name: str
    value: float
    low: float | None
    high: float | None
    severity: Severity = "warning"
    named: tuple[str, ...] = ()
    """What the number counts, by name, the first ten."""


def compare(day: date, today: Profile, past: Mapping[date, Profile], config: TrendsConfig) -> list[Measure]:
    """Measure a day beside those before it; nothing where these are fewer than `config.min_days`, or it has no rows."""
    if len(past) < config.min_days or not today.rows:
        return []
    month = _Month(list(past.values()), np.array([one.weekday() for one in past]), day.weekday(), config)
    return [
        month.count("rows", lambda p: p.rows, today),
        month.count("users", lambda p: p.users, today),
        month.count("items", lambda p: p.items, today, "info"),
        month.share("rejected rows", _rejected, today, one_sided=True),
        *(
            month.share(f"rejected rows: {reason}", _rejected_for(reason), today, one_sided=True)
            for reason in today.reasons
        ),
        month.share("rows without a category", lambda p: p.without_category / max(p.rows, 1), today, one_sided=True),
        *(month.share(f"rows of {name}", _share_of(name), today) for name in _behaviors(month.past, today)),
        month.vanished("behaviors", lambda p: p.behaviors, today),
        month.vanished("categories", _categories, today),
        month.shifted("hours", np.array([p.hours for p in month.past], float), today.hours.astype(float)),
        month.shifted("categories", *_binned(month.past, today)),
        month.unseen("users", [p.sampled_users for p in month.past], today.sampled_users),
        month.unseen("items", [p.sampled_items for p in month.past], today.sampled_items, "info"),
        month.share("rows of the largest user", lambda p: p.largest_user / max(p.rows, 1), today, "info", True),
    ]


@dataclass(frozen=True)
class _Month:
    """The past days, N of them, and the weekday of the day that is compared with them."""

    past: Sequence[Profile]
    weekdays: Ints
    """[N]"""
    weekday: int
    config: TrendsConfig

    def count(self, name: str, of: Callable[[Profile], int], today: Profile, severity: Severity = "warning") -> Measure:
        """Compare a count, by its logarithm."""
        center, spread = self._usual(np.log(np.maximum([of(p) for p in self.past], 1)))
        around = max(self.config.width * spread, float(np.log1p(self.config.min_change)))
        low, high = np.exp([center - around, center + around])
        return _measure(name, of(today), low, high, severity)

    def share(
        self,
        name: str,
        of: Callable[[Profile], float],
        today: Profile,
        severity: Severity = "warning",
        one_sided: bool = False,
    ) -> Measure:
        """Compare a share of the rows; `one_sided`: less of it is never unusual."""
        center, spread = self._usual(np.array([of(p) for p in self.past], float))
        around = max(
            self.config.width * spread,
            self.config.min_change * min(center, 1 - center),
            self.config.min_share,
            _FEW_ROWS / max(today.raw_rows, 1),
        )
        low = None if one_sided else max(center - around, 0.0)
        return _measure(f"share of {name}", of(today), low, min(center + around, 1.0), severity)

    def vanished(self, name: str, of: Callable[[Profile], Mapping[Any, int]], today: Profile) -> Measure:
        """Count what was there on every past day, was to be expected today by its share, and is not there."""
        total = Counter[Any]()
        for profile in self.past:
            total.update(of(profile))
        every = set.intersection(*(set(of(p)) for p in self.past))
        rows = max(sum(p.rows for p in self.past), 1)
        expected = {one for one in every if total[one] / rows * today.rows >= self.config.min_expected}
        gone = sorted(expected - set(of(today)), key=lambda one: (-total[one], one))
        return _measure(f"vanished {name}", len(gone), None, 0, named=tuple(str(one) for one in gone[:_MAX_NAMED]))

    def shifted(self, name: str, past: Floats, today: Floats) -> Measure:
        """Compare a distribution over B bins, [N, B] and [B], with the sum of the past ones."""
        total = past.sum(axis=0)
        return self._above(f"PSI of {name}", psi(today, total), psi(past, total - past), self.config.min_psi)

    def unseen(self, name: str, past: Sequence[Ints], today: Ints, severity: Severity = "warning") -> Measure:
        """Estimate the share of users or items that were there on none of the past days, from those that are kept.

        Of each day those with the smallest hashes are kept: up to the least of the days' largest hashes, all of them.
        """
        limit = min((sample[-1] for sample in (*past, today) if len(sample) == NUM_SAMPLED), default=np.inf)
        cut = [sample[sample <= limit] for sample in past]
        known, times = np.unique(np.concatenate(cut), return_counts=True)
        once = known[times == 1]
        usual = np.array([np.isin(sample, once).mean() if len(sample) else 0.0 for sample in cut])
        asked = today[today <= limit]
        share = 1 - np.isin(asked, known).mean() if len(asked) else 0.0
        return self._above(f"share of {name} not seen before", share, usual, self.config.min_change, severity)

    def _above(self, name: str, value: float, past: Floats, least: float, severity: Severity = "warning") -> Measure:
        center = float(np.median(past))
        spread = _SPREAD * float(np.median(np.abs(past - center)))
        return _measure(name, value, None, max(center + self.config.width * spread, least), severity)

    def _usual(self, values: Floats) -> tuple[float, float]:
        """Return what a value, [N], is on the weekday in question, and how much it scatters."""
        centers = np.zeros(7)
        for weekday in range(7):
            same = values[self.weekdays == weekday]
            centers[weekday] = np.median(same if len(same) >= _MIN_SAME_WEEKDAY else values)
        return float(centers[self.weekday]), _SPREAD * float(np.median(np.abs(values - centers[self.weekdays])))


_SPREAD = 1.4826
"""Standard deviations in a median absolute deviation, where values are normal."""


def psi(counts: npt.NDArray[Any], others: npt.NDArray[Any]) -> Any:
    """Return the population stability index of counts over B bins, [B] or [N, B], against others."""
    p, q = ((one + 0.5) / (one + 0.5).sum(axis=-1, keepdims=True) for one in (counts, others))
    return ((p - q) * np.log(p / q)).sum(axis=-1)


def _measure(
    name: str, value: float, low: float | None, high: float, severity: Severity = "warning", named: tuple[str, ...] = ()
) -> Measure:
    """Round: the last digits of a logarithm differ between machines, and results are to be the same bytes."""
    rounded = [None if one is None else float(f"{one:.{_DIGITS}g}") for one in (value, low, high)]
    return Measure(name, rounded[0] or 0.0, rounded[1], rounded[2], severity, named)


def _rejected(profile: Profile) -> float:
    return sum(profile.reasons.values()) / max(profile.raw_rows, 1)


def _rejected_for(reason: str) -> Callable[[Profile], float]:
    return lambda profile: profile.reasons.get(reason, 0) / max(profile.raw_rows, 1)


def _share_of(behavior: str) -> Callable[[Profile], float]:
    return lambda profile: profile.behaviors.get(behavior, 0) / max(profile.rows, 1)


def _behaviors(past: Sequence[Profile], today: Profile) -> list[str]:
    """Return the most frequent behaviors of all days, by name."""
    total = Counter[str]()
    for profile in (*past, today):
        total.update(profile.behaviors)
    return sorted(sorted(total, key=lambda name: (-total[name], name))[:NUM_BEHAVIORS])


def _categories(profile: Profile) -> dict[int, int]:
    return {
        category: rows
        for category, rows in zip(profile.categories.tolist(), profile.category_rows.tolist(), strict=True)
        if category
    }


def _binned(past: Sequence[Profile], today: Profile) -> tuple[Floats, Floats]:
    """Return the rows by category of the past days, [N, B], and of today, [B]; the last bin holds the rest."""
    ids, place = np.unique(np.concatenate([p.categories for p in past]), return_inverse=True)
    total = np.bincount(place, np.concatenate([p.category_rows for p in past]))
    bins = np.sort(ids[np.lexsort((ids, -total))[:_NUM_BINS]])

    def counts(profile: Profile) -> Floats:
        at = np.searchsorted(bins, profile.categories)
        at = np.where(bins[np.minimum(at, len(bins) - 1)] == profile.categories, at, len(bins))
        rows = np.bincount(at, profile.category_rows, minlength=len(bins) + 1).astype(float)
        rows[-1] += profile.rows - profile.category_rows.sum()
        return rows

    return np.array([counts(p) for p in past]), counts(today)
