"""Impressions replayed against the user state that serving would have had at that moment.

Long-term interests are those of the last snapshot before the impression's day; the recent branch holds what came
since, strictly before the impression. Training and evaluation read the same batches, so the model is trained as served.

    I impressions   H histories (one user as of one moment)   B impressions of a batch   G histories of a batch
    L behaviors of the longest   T targets of the one with most   S items of a batch   R recent behaviors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from encode.data.histories import Histories, rows_of
from encode.data.impressions import Impressions
from encode.data.vocabulary import Vocabulary
from encode.distributed import place, sum_arrays
from encode.model.ctr import Reader, Recent
from encode.model.long_term import Behaviors, Catalog, History, Target
from encode.schema import PADDING, SECONDS_PER_DAY, UNKNOWN

Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.uint8]
Offline = Callable[[Catalog, Behaviors], Ints | None]
"""`LongTerm.assign`."""
_HISTORIES_PER_BATCH = 64
_HISTORIES_PER_ASSIGNMENT = 2048
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
    recent: Int64[Tensor, "B R"]
    recent_kind: Int64[Tensor, "B R"]
    label: Float[Tensor, " B"]
    rows: Ints
    """Where the impressions are in `Impressions`, [B]."""
    weight: float
    """Share of the impressions of all processes' batches that are these; 1 where there is one process."""
    lengths: Int64[Tensor, " all"]
    """Behaviors of each history of all processes' batches; those of this one are every `world`-th from `rank` on."""


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
    recent_end = _row_before(histories, impressions.user, impressions.timestamps)
    begin, end = histories.offsets[user], _row_before(histories, user, as_of[first])
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


def _row_before(histories: Histories, user: Ints, timestamp: Ints) -> Ints:
    """Return the row after the last behavior of each user strictly before each timestamp."""
    start = min(histories.timestamps.min(initial=0), timestamp.min(initial=0))
    span = max(histories.timestamps.max(initial=0), timestamp.max(initial=0)) - start + 1
    place = histories.user_of * span + (histories.timestamps - start)
    rows: Ints = np.searchsorted(place, user * span + (timestamp - start))
    return rows


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


# --- batches -----------------------------------------------------------------------------------------------


def batches(
    replay: Replay,
    labels: list[Labels] | None,
    histories_per_batch: int = _HISTORIES_PER_BATCH,
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
        recent_places, recent_real = _padded(replay.recent_begin[rows], replay.recent_end[rows], replay.recent_length)
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
            label=torch.from_numpy(replay.impressions.labels[rows].astype(np.float32)),
            rows=rows,
            weight=float(weight),
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


# --- the model on a batch ----------------------------------------------------------------------------------


def read_batch(items: Catalog, reader: Reader, batch: Batch) -> tuple[Float[Tensor, " B"], Float[Tensor, ""]]:
    """Run the model on a batch as serving would: each history is summarised once, then its targets read it.

    Args:
        items: e and h of `batch.items`.
        reader: the model.
        batch: histories and impressions.

    Returns:
        The logit of each impression, and the auxiliary loss of the model of long-term interest.
    """
    history = history_of(items, batch, reader.scale)
    mask = batch.recent != PADDING
    recent = Recent(
        _embedding(items, batch.recent, batch.recent_kind, mask), F.embedding(batch.recent, items.key), mask
    )
    user = reader.summarise(history)
    logit: Tensor = reader(user, recent, targets_of(items, batch), batch.place)
    return logit, reader.long_term.auxiliary_loss(user.long_term, history)


def history_of(items: Catalog, batch: Batch, scale: Tensor) -> History:
    """Return the histories of a batch as a model of long-term interest sees them."""
    mask = batch.history != PADDING
    return History(
        _embedding(items, batch.history, batch.kind, mask),
        F.embedding(batch.history, items.key),
        mask,
        batch.items[batch.history],
        items.category[batch.history],
        batch.kind,
        batch.age,
        batch.cluster,
        scale,
    )


def targets_of(items: Catalog, batch: Batch) -> Target:
    """Return the targets of a batch as a model of long-term interest sees them."""
    embedding, key = F.embedding(batch.target, items.embedding), F.embedding(batch.target, items.key)
    return Target(embedding, key, batch.items[batch.target], items.category[batch.target])


def _embedding(
    items: Catalog, row: Int64[Tensor, "*shape"], kind: Int64[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape D"]:
    embedding = F.embedding(row, items.embedding)
    return embedding if len(items.kind) == 1 else embedding + F.embedding(kind, items.kind) * mask[..., None]


def of_batch(table: Catalog, batch: Batch) -> Catalog:
    """Return the rows of the whole vocabulary that a batch speaks of."""
    items = batch.items
    return Catalog(table.embedding[items], table.key[items], table.category[items], table.kind)


def predict(table: Catalog, reader: Reader, replay: Replay, offline: Offline | None = None) -> npt.NDArray[np.float32]:
    """Return the probability of each impression of the replay, [I].

    Args:
        table: the whole vocabulary.
        reader: the model.
        replay: impressions and histories.
        offline: the offline stage, where the reader's own has none.
    """
    reader.eval()
    probabilities = np.zeros(len(replay.impressions), np.float32)
    with torch.no_grad():
        labels = assign(replay, table, offline or reader.long_term.assign)
        for batch in batches(replay, labels, _HISTORIES_PER_BATCH):
            logit, _ = read_batch(of_batch(table, batch), reader, batch)
            probabilities[batch.rows] = torch.sigmoid(logit).numpy() * (batch.weight > 0)
    return sum_arrays(probabilities)
