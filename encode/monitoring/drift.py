"""Drift: one snapshot against another of the same space, on samples of their users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from encode.interests.extract import state_of
from encode.interests.user_rows import UserRow, UserRows
from encode.model.space import Space
from encode.monitoring.sample import Sample
from encode.monitoring.stability import Counts, Floats, chance, counts_of, edges_of, psi
from encode.schema import UNKNOWN, bucket_of
from encode.serving.engine import Engine

_NUM_USERS, _NUM_ITEMS = 200, 50
"""Whose scores are compared, and for which items each."""


@dataclass(frozen=True)
class Shift:
    """One measure of users, before and now, in bins of about equal size before."""

    name: str
    edges: Floats
    before: Counts
    after: Counts
    mean_before: float
    mean_now: float

    @property
    def psi(self) -> float:
        """How far apart they are."""
        return psi(self.before, self.after)

    @property
    def chance(self) -> float:
        """How far apart two samples of one distribution would be."""
        return chance(len(self.before), int(self.before.sum()), int(self.after.sum()))

    def summary(self) -> dict[str, float]:
        """Return the numbers; what is not a number is left out."""
        told = {"psi": self.psi, "chance": self.chance, "before": self.mean_before, "now": self.mean_now}
        return {name: value for name, value in told.items() if value == value}


def shift(name: str, before: npt.NDArray[np.generic], now: npt.NDArray[np.generic]) -> Shift:
    """Compare values, in bins of the first."""
    edges = edges_of(before)
    means = (float(values.mean()) if len(values) else float("nan") for values in (before, now))
    return Shift(name, edges, counts_of(before, edges), counts_of(now, edges), *means)


def shifts(before: Sample, now: Sample) -> list[Shift]:
    """Compare history lengths, interests a user, and the mass of the largest interest."""
    return [
        shift("behaviors a user", before.num_behaviors, now.num_behaviors),
        shift("interests a user", before.num_interests, now.num_interests),
        shift("share of the largest interest", before.largest_share, now.largest_share),
    ]


def kept_share(before: Sample, now: Sample) -> float:
    """Return the share of the earlier sample's users that the later one holds; NaN where there were none.

    Fewer than all are there where users were erased, or where the number of buckets has grown.
    """
    held = np.isin(before.user_ids, now.user_ids, assume_unique=True)
    return float(held.mean()) if len(held) else float("nan")


def coverage(user_ids: npt.NDArray[np.int64], sample: Sample, num_buckets: int) -> float:
    """Return the share of those users, of the sample's buckets, that the sample holds; NaN where none is of them.

    Args:
        user_ids: in any order, also several times.
        sample: of a snapshot.
        num_buckets: of that snapshot.
    """
    users = np.unique(user_ids)
    users = users[bucket_of(users, num_buckets) < sample.num_buckets]
    return float(np.isin(users, sample.user_ids, assume_unique=True).mean()) if len(users) else float("nan")


def score_shift(before: Sample, now: Sample, space: Space, engine: Engine) -> Shift:
    """Compare the scores that users in both samples get from one model for the same items of the vocabulary.

    At most 200 users with 50 items each, spread evenly over the vocabulary: what moves a score is the users' interests
    alone.
    """
    both = np.intersect1d(before.rows["user_id"].to_numpy(), now.rows["user_id"].to_numpy())[:_NUM_USERS]
    first = len(space.vocabulary) - len(space.vocabulary.item_ids)
    items = np.unique(np.linspace(first, len(space.vocabulary) - 1, _NUM_ITEMS).astype(np.int64))
    target = np.maximum(items, UNKNOWN)
    scores = [
        np.concatenate([np.zeros(0), *(_scores(row, space, engine, target) for row in _rows_of(sample, both))])
        for sample in (before, now)
    ]
    return shift("score", *scores)


def _rows_of(sample: Sample, users: npt.NDArray[np.int64]) -> list[UserRow]:
    places, rows = np.searchsorted(sample.rows["user_id"].to_numpy(), users), UserRows(sample.rows)
    return [rows[int(place)] for place in places]


def _scores(row: UserRow, space: Space, engine: Engine, target: npt.NDArray[np.int64]) -> Floats:
    return engine.score(state_of(row, space), target).astype(np.float64)
