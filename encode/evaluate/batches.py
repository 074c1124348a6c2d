"""A replay in batches: histories side by side, padded, each with its impressions.

B impressions of a batch   G histories of a batch   L behaviors of the longest   T targets of the one with most
S items of a batch   R recent behaviors
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from encode.distributed import place
from encode.evaluate.replay import Labels, Replay
from encode.schema import PADDING, SECONDS_PER_DAY, UNKNOWN

Ints = npt.NDArray[np.int64]
_MAX_TARGETS = 128
"""Impressions of a history in one batch; more of them are read in turns, so that none makes all others pad."""
_SORTED_BATCHES = 16
"""Batches of training among which histories are sorted by length: they are padded to the longest of their batch."""


class Batch(NamedTuple):
    """Impressions of G histories, with all that the model needs to know of them."""

    items: Int64[Tensor, " S"]
    """Vocabulary index of each item that the batch speaks of, ascending; padding first."""
    history: Int64[Tensor, "G L"]
    """Behaviors of each history, oldest first; this, `target` and `recent` are rows of `items`, 0 where padded."""
    kind: Int64[Tensor, "G L"]
    age: Float[Tensor, "G L"]
    """Days before the moment as of which the history is."""
    cluster: Int64[Tensor, "G L"]
    """What the offline stage assigned."""
    target: Int64[Tensor, "G T"]
    place: Int64[Tensor, " B"]
    """Where the impressions are among the G T targets."""
    recent: Int64[Tensor, "Q R"]
    recent_kind: Int64[Tensor, "Q R"]
    moment: Int64[Tensor, " B"]
    """Which of the Q each impression is of, ascending."""
    label: Float[Tensor, " B"]
    rows: Ints
    """Where the impressions are in `Impressions`, [B]."""
    weight: float
    """Share of the impressions of all processes' batches that are these; 1 where there is one process."""
    share: float
    """Share of the histories of all processes' batches that are these."""
    lengths: Int64[Tensor, " all"]
    """Behaviors of each history of all processes' batches; those of this one are every `world`-th from `rank` on."""


def batches(
    replay: Replay,
    labels: list[Labels] | None,
    histories_per_batch: int,
    rng: np.random.Generator | None = None,
    unknown_share: float = 0.0,
) -> Iterator[Batch]:
    """Yield batches of histories of similar length, each with its impressions.

    For training, `rng` shuffles the histories and makes a share of the targets unknown, so that the model learns what
    an item outside the vocabulary is worth.
    """
    vocabulary_size = len(replay.category_index)
    history, begin, end = _turns(replay)
    lengths = (replay.history_end - replay.history_begin)[history]
    rank, world = place()
    for together in _order(lengths, histories_per_batch, rng):
        counts = (end - begin)[together]
        unknown = None if rng is None else rng.random(counts.sum()) < unknown_share
        chosen = together[rank::world]
        weight = counts[rank::world].sum() / counts.sum()
        if not len(chosen):  # fewer histories than processes: read one that another reads, and let it count nothing
            chosen, weight = together[:1], 0.0
        of, first, last = history[chosen], begin[chosen], end[chosen]
        places, real = _padded(replay.history_begin[of], replay.history_end[of])
        behavior = np.where(real, replay.behavior_index[places], PADDING)
        rows, shown = _padded(first, last)
        target = np.where(shown, replay.target_index[rows], PADDING)
        if unknown is not None:
            until = np.cumsum(counts)[rank::world] if weight else counts[:1]
            drawn, _ = _padded(until - (last - first), until)
            target = np.where(shown & unknown[drawn], UNKNOWN, target)
        rows = rows[shown]
        begins, ends = replay.recent_begin[rows], replay.recent_end[rows]
        new = np.append(True, (begins[1:] != begins[:-1]) | (ends[1:] != ends[:-1]))[: len(rows)]
        recent_places, recent_real = _padded(begins[new], ends[new], replay.recent_length)
        recent = np.where(recent_real, replay.behavior_index[recent_places], PADDING)
        cluster = np.zeros(real.shape, np.int64)
        if labels is not None:
            cluster[real] = np.concatenate([labels[place] for place in of])
        items, row_of = _distinct(vocabulary_size, behavior, target, recent)
        age = (replay.history_as_of[of, None] - replay.behavior_timestamps[places]) / SECONDS_PER_DAY
        yield Batch(
            items=torch.from_numpy(items),
            history=torch.from_numpy(row_of[behavior]),
            kind=torch.from_numpy(replay.behavior_kind[places] * real),
            age=torch.from_numpy((age * real).astype(np.float32)),
            cluster=torch.from_numpy(cluster),
            target=torch.from_numpy(row_of[target]),
            place=torch.from_numpy(np.flatnonzero(shown)),
            recent=torch.from_numpy(row_of[recent]),
            recent_kind=torch.from_numpy(replay.behavior_kind[recent_places] * recent_real),
            moment=torch.from_numpy(np.cumsum(new) - 1),
            label=torch.from_numpy(replay.impressions.labels[rows].astype(np.float32)),
            rows=rows,
            weight=float(weight),
            share=len(chosen) / len(together) if weight else 0.0,
            lengths=torch.from_numpy(lengths[together]),
        )


def _turns(replay: Replay) -> tuple[Ints, Ints, Ints]:
    """Cut each history's impressions into turns: return whose turn it is, and the rows that it reads."""
    counts = -(-np.diff(replay.impression_offsets) // _MAX_TARGETS)
    history = np.repeat(np.arange(len(counts)), counts)
    turn = np.arange(len(history)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = replay.impression_offsets[history] + turn * _MAX_TARGETS
    return history, begin, np.minimum(begin + _MAX_TARGETS, replay.impression_offsets[history + 1])


def _order(lengths: Ints, size: int, rng: np.random.Generator | None) -> list[Ints]:
    """Return which turns make up each batch: of similar length, and in training in an order that is drawn."""
    if rng is None:
        order = np.argsort(lengths, kind="stable")
        return np.split(order, range(size, len(order), size))
    order = rng.permutation(len(lengths))
    for first in range(0, len(order), _SORTED_BATCHES * size):
        part = order[first : first + _SORTED_BATCHES * size]
        order[first : first + _SORTED_BATCHES * size] = part[np.argsort(lengths[part], kind="stable")]
    made = np.split(order, range(size, len(order), size))
    return [made[place] for place in rng.permutation(len(made))]


def _padded(begin: Ints, end: Ints, width: int | None = None) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return the rows of each range [begin, end) side by side, and which of them are real; others are row 0."""
    column = np.arange((end - begin).max(initial=0) if width is None else width)
    places = begin[:, None] + column
    real = places < end[:, None]
    return np.where(real, places, 0), real


def _distinct(vocabulary_size: int, *indices: Ints) -> tuple[Ints, Ints]:
    """Return the distinct indices, padding among them, and where each index of the vocabulary is in them."""
    present = np.zeros(vocabulary_size, bool)
    present[PADDING] = True
    for index in indices:
        present[index] = True
    return np.flatnonzero(present), np.cumsum(present) - 1
