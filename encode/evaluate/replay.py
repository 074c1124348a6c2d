"""Impressions replayed against the user state that serving would have had at that moment.

Long-term interests are those of the last snapshot before the impression's day; the recent branch holds what came
since, strictly before the impression. Training and evaluation read the same batches, so the model is trained as served.

    I impressions   H histories (one user as of one snapshot day)   N behaviors of a batch
    B impressions of a batch   G histories of a batch   S items of a batch   K clusters   R recent behaviors
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from encode.config import ClusteringConfig
from encode.data.histories import Histories, rows_of
from encode.data.impressions import Impressions
from encode.data.vocabulary import Vocabulary
from encode.interests.kmeans import cluster
from encode.model.ctr import Items, Reader, Reading
from encode.model.relevance import pool_interests
from encode.schema import PADDING, SECONDS_PER_DAY, UNKNOWN, Window, day_start

Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.uint8]
_HISTORIES_PER_BATCH = 64


class Batch(NamedTuple):
    """All impressions of G histories, with all that the model needs to know of them."""

    items: Int64[Tensor, " S"]
    """Vocabulary index of each item that the batch speaks of, ascending; padding first."""
    behavior: Int64[Tensor, " N"]
    """Behaviors of the histories; this, `target` and `recent` are rows of `items`."""
    history_offsets: Int64[Tensor, " G_plus_1"]
    segment: Int64[Tensor, " N"]
    """history * K + cluster."""
    num_clusters: int
    target: Int64[Tensor, " B"]
    history_of: Int64[Tensor, " B"]
    recent: Int64[Tensor, "B R"]
    label: Float[Tensor, " B"]
    rows: Ints
    """Where the impressions are in `Impressions`."""


@dataclass(frozen=True)
class Replay:
    """Impressions of one split joined to histories; positions are rows of the histories' arrays."""

    impressions: Impressions
    behavior_index: Ints
    """Vocabulary index of every behavior, [all behaviors]."""
    target_index: Ints
    """[I]"""
    history_user_ids: Ints
    """[H]"""
    history_begin: Ints
    history_end: Ints
    """Rows of each history: the behaviors before its snapshot day, [H]."""
    impression_offsets: Ints
    """Impressions of each history, [H + 1]."""
    recent_begin: Ints
    recent_end: Ints
    """Rows of each impression's recent branch, [I]."""
    recent_length: int

    def history_lengths(self) -> Ints:
        """Return the length of the history of each impression, [I]."""
        return np.repeat(self.history_end - self.history_begin, np.diff(self.impression_offsets))


def make_replay(
    histories: Histories,
    impressions: Impressions,
    days: Window,
    vocabulary: Vocabulary,
    snapshot_days: int,
    recent_length: int,
) -> Replay:
    """Join each impression to the snapshot before its day and to the behaviors before its second."""
    first_day = day_start(days.start)
    age = (impressions.timestamps - first_day) // SECONDS_PER_DAY // snapshot_days
    as_of = first_day + age * snapshot_days * SECONDS_PER_DAY
    new = np.append(True, (impressions.user[1:] != impressions.user[:-1]) | (as_of[1:] != as_of[:-1]))
    first = np.flatnonzero(new)
    user = impressions.user[first]
    end = _row_before(histories, impressions.user, impressions.timestamps)
    return Replay(
        impressions=impressions,
        behavior_index=vocabulary.index(histories.item_ids, histories.category_ids),
        target_index=vocabulary.index(impressions.item_ids, impressions.category_ids),
        history_user_ids=histories.user_ids[user],
        history_begin=histories.offsets[user],
        history_end=_row_before(histories, user, as_of[first]),
        impression_offsets=np.append(first, len(impressions)),
        recent_begin=np.maximum(histories.offsets[impressions.user], end - recent_length),
        recent_end=end,
        recent_length=recent_length,
    )


def _row_before(histories: Histories, user: Ints, timestamp: Ints) -> Ints:
    """Return the row after the last behavior of each user strictly before each timestamp."""
    start = min(histories.timestamps.min(initial=0), timestamp.min(initial=0))
    span = max(histories.timestamps.max(initial=0), timestamp.max(initial=0)) - start + 1
    place = histories.user_of * span + (histories.timestamps - start)
    rows: Ints = np.searchsorted(place, user * span + (timestamp - start))
    return rows


def assign_clusters(replay: Replay, key: npt.NDArray[np.float32], config: ClusteringConfig) -> list[Labels]:
    """Cluster every history of the replay with the keys of the moment, [V, P]; labels of each, in row order."""
    labels: list[Labels] = []
    for chosen in np.array_split(np.arange(len(replay.history_begin)), max(1, len(replay.history_begin) // 2048)):
        rows, offsets = rows_of(replay.history_begin[chosen], replay.history_end[chosen])
        flat = cluster(key[replay.behavior_index[rows]], offsets, replay.history_user_ids[chosen], config)
        labels += np.split(flat, offsets[1:-1])
    return labels


def batches(
    replay: Replay,
    labels: list[Labels],
    num_clusters: int,
    histories_per_batch: int,
    rng: np.random.Generator | None = None,
    unknown_share: float = 0.0,
) -> Iterator[Batch]:
    """Yield batches of whole histories, in order.

    For training, `rng` shuffles the histories and makes a share of the targets unknown, so that the model learns what
    an item outside the vocabulary is worth.
    """
    vocabulary_size = 1 + max(int(replay.behavior_index.max(initial=0)), int(replay.target_index.max(initial=0)))
    order = np.arange(len(replay.history_begin))
    if rng is not None:
        rng.shuffle(order)
    for chosen in np.split(order, range(histories_per_batch, len(order), histories_per_batch)):
        behavior_rows, history_offsets = rows_of(replay.history_begin[chosen], replay.history_end[chosen])
        rows, offsets = rows_of(replay.impression_offsets[chosen], replay.impression_offsets[chosen + 1])
        lengths = np.diff(history_offsets)
        cluster_of = np.concatenate([labels[history] for history in chosen]).astype(np.int64)
        segment = np.repeat(np.arange(len(chosen)), lengths) * num_clusters + cluster_of
        behavior, target = replay.behavior_index[behavior_rows], replay.target_index[rows]
        if rng is not None:
            target = np.where(rng.random(len(target)) < unknown_share, UNKNOWN, target)
        recent = _recent(replay, rows)
        items, row_of = _distinct(vocabulary_size, behavior, target, recent)
        yield Batch(
            items=torch.from_numpy(items),
            behavior=torch.from_numpy(row_of[behavior]),
            history_offsets=torch.from_numpy(history_offsets),
            segment=torch.from_numpy(segment),
            num_clusters=num_clusters,
            target=torch.from_numpy(row_of[target]),
            history_of=torch.from_numpy(np.repeat(np.arange(len(chosen)), np.diff(offsets))),
            recent=torch.from_numpy(row_of[recent]),
            label=torch.from_numpy(replay.impressions.labels[rows].astype(np.float32)),
            rows=rows,
        )


def _distinct(vocabulary_size: int, *indices: Ints) -> tuple[Ints, Ints]:
    """Return the distinct indices, padding among them, and where each index of the vocabulary is in them."""
    present = np.zeros(vocabulary_size, bool)
    present[PADDING] = True
    for index in indices:
        present[index] = True
    return np.flatnonzero(present), np.cumsum(present) - 1


def _recent(replay: Replay, rows: Ints) -> Ints:
    place = replay.recent_begin[rows, None] + np.arange(replay.recent_length)
    real = place < replay.recent_end[rows, None]
    return np.where(real, replay.behavior_index[np.where(real, place, 0)], PADDING)


def read_batch(items: Items, reader: Reader, batch: Batch, pooling: str) -> Reading:
    """Run the model on a batch as serving would: pool the interests once a history, then let each target read.

    Args:
        items: e and h of `batch.items`.
        reader: the model.
        batch: histories and impressions.
        pooling: how a cluster's value is made, as in `ModelConfig.pooling`.
    """
    interests = pool_interests(
        F.embedding(batch.behavior, items.embedding),
        F.embedding(batch.behavior, items.key),
        batch.segment,
        len(batch.history_offsets) - 1,
        batch.num_clusters,
        reader.scale,
        pooling == "relevance",
    )
    reading: Reading = reader(interests, items, batch.history_of, batch.recent, batch.target)
    return reading


def predict(
    table: Items, reader: Reader, replay: Replay, pooling: str, clustering: ClusteringConfig
) -> npt.NDArray[np.float32]:
    """Return the probability of each impression of the replay, [I]; `table` holds the whole vocabulary."""
    reader.eval()
    probabilities = np.zeros(len(replay.impressions), np.float32)
    with torch.no_grad():
        labels = assign_clusters(replay, table.key.numpy(), clustering)
        for batch in batches(replay, labels, clustering.num_clusters, _HISTORIES_PER_BATCH):
            items = Items(table.embedding[batch.items], table.key[batch.items])
            probabilities[batch.rows] = torch.sigmoid(read_batch(items, reader, batch, pooling).logit).numpy()
    return probabilities
