"""Impressions replayed against the user state that serving would have had at that moment.

Long-term interests are those of the last snapshot before the impression's day; the recent branch holds what came
since, strictly before the impression. Training and evaluation read the same, so the model is trained as served.

    I impressions   H histories (one user as of one moment)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from encode.data.histories import Histories, rows_of
from encode.data.impressions import Impressions
from encode.data.vocabulary import Vocabulary
from encode.model.long_term import Behaviors, Catalog

Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.integer]
Offline = Callable[[Catalog, Behaviors], Ints | None]
"""`LongTerm.assign`."""
_HISTORIES_PER_ASSIGNMENT = 2048


@dataclass(frozen=True)
class Replay:
    """Impressions of one split joined to histories; positions are rows of the histories' arrays."""

    impressions: Impressions
    behavior_index: Ints
    """Vocabulary index of every behavior, [all behaviors]."""
    behavior_kind: Ints
    behavior_timestamps: Ints
    category_index: Ints
    """Category index of each index of the vocabulary."""
    target_index: Ints
    """[I]"""
    history_user_ids: Ints
    """[H]"""
    history_begin: Ints
    history_end: Ints
    """Rows of each history: the behaviors before its moment, [H]."""
    history_as_of: Ints
    """That moment, [H]."""
    impression_offsets: Ints
    """Impressions of each history, [H + 1]."""
    recent_begin: Ints
    recent_end: Ints
    """Rows of each impression's recent branch, [I]."""
    recent_length: int

    def counts(self) -> Float[Tensor, " V"]:
        """Return how often each index occurs among the behaviors that are in any history."""
        steps = np.zeros(len(self.behavior_index) + 1, np.int64)
        np.add.at(steps, self.history_begin, 1)
        np.add.at(steps, self.history_end, -1)
        inside = np.cumsum(steps)[:-1] > 0
        return torch.from_numpy(np.bincount(self.behavior_index[inside], minlength=len(self.category_index))).float()

    def history_lengths(self) -> Ints:
        """Return the length of the history of each impression, [I]."""
        return np.repeat(self.history_end - self.history_begin, np.diff(self.impression_offsets))


def make_replay(
    histories: Histories,
    impressions: Impressions,
    as_of: Ints,
    vocabulary: Vocabulary,
    recent_length: int,
    window: int | None = None,
) -> Replay:
    """Join each impression to its user's history as of a moment, and to the last behaviors before its second.

    Args:
        histories: all behaviors.
        impressions: sorted by user, then time.
        as_of: the moment before which an impression knows the long-term history, at most its timestamp, [I]; see
            `data.impressions.snapshot_times`.
        vocabulary: of items and categories.
        recent_length: R.
        window: cut each history to its latest behaviors, this many.
    """
    new = np.append(True, (impressions.user[1:] != impressions.user[:-1]) | (as_of[1:] != as_of[:-1]))
    first = np.flatnonzero(new[: len(impressions)])
    user = impressions.user[first]
    recent_end = histories.rows_before(impressions.user, impressions.timestamps)
    begin, end = histories.offsets[user], histories.rows_before(user, as_of[first])
    return Replay(
        impressions=impressions,
        behavior_index=vocabulary.index(histories.item_ids, histories.category_ids),
        behavior_kind=histories.behaviors.astype(np.int64),
        behavior_timestamps=histories.timestamps,
        category_index=vocabulary.category_index,
        target_index=vocabulary.index(impressions.item_ids, impressions.category_ids),
        history_user_ids=histories.user_ids[user],
        history_begin=begin if window is None else np.maximum(begin, end - window),
        history_end=end,
        history_as_of=as_of[first],
        impression_offsets=np.append(first, len(impressions)),
        recent_begin=np.maximum(histories.offsets[impressions.user], recent_end - recent_length),
        recent_end=recent_end,
        recent_length=recent_length,
    )


def assign(replay: Replay, catalog: Catalog, offline: Offline) -> list[Labels] | None:
    """Run the offline stage over every history with the embeddings of the moment; labels of each, in row order."""
    labels: list[Labels] = []
    for first in range(0, len(replay.history_begin), _HISTORIES_PER_ASSIGNMENT):
        chosen = np.arange(first, min(first + _HISTORIES_PER_ASSIGNMENT, len(replay.history_begin)))
        rows, offsets = rows_of(replay.history_begin[chosen], replay.history_end[chosen])
        item = replay.behavior_index[rows]
        behaviors = Behaviors(
            offsets,
            replay.history_user_ids[chosen],
            item,
            replay.category_index[item],
            replay.behavior_kind[rows],
            replay.behavior_timestamps[rows],
        )
        flat = offline(catalog, behaviors)
        if flat is None:
            return None
        labels += np.split(flat.astype(np.uint8 if flat.max(initial=0) < 256 else np.int64), offsets[1:-1])
    return labels
