"""The model on a batch, as serving would run it: each history is summarised once, then its targets read it.

I impressions   B impressions of a batch
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from encode.distributed import sum_arrays
from encode.evaluate.batches import Batch, batches
from encode.evaluate.replay import Offline, Replay, assign
from encode.model.ctr import Reader, Recent
from encode.model.long_term import Catalog, History, Target
from encode.schema import PADDING

HISTORIES_PER_BATCH = 64
"""Histories that are read at a time where nothing is learned."""


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
        _embedding(items, batch.recent, batch.recent_kind, mask),
        F.embedding(batch.recent, items.key),
        mask,
        batch.moment,
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
        for batch in batches(replay, labels, HISTORIES_PER_BATCH):
            logit, _ = read_batch(of_batch(table, batch), reader, batch)
            probabilities[batch.rows] = torch.sigmoid(logit).numpy() * (batch.weight > 0)
    return sum_arrays(probabilities)
