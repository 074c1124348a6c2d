"""Fidelity: how much of full attention's long-term vector is in that of a model which attends by the same relevance.

B impressions   D embedding_dim
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from encode.evaluate.batches import batches
from encode.evaluate.reading import HISTORIES_PER_BATCH, history_of, of_batch, targets_of
from encode.evaluate.replay import Replay, assign
from encode.model.ctr import Encode, Reader
from encode.model.long_term import Catalog, History, LongTerm, Sizes, Target
from encode.quality.rivals.attention import FullAttention
from encode.quality.variants import Variant

Floats = npt.NDArray[np.float32]
_IMPRESSIONS = 20_000
"""Impressions at most on which it is measured, spread evenly over batches of similar length."""


class Fidelity(NamedTuple):
    """How close two sets of vectors are."""

    correlation: float
    """Pearson's, over all coordinates of all vectors, each coordinate centered: 1 is equal up to scale and an offset.
    NaN where nothing varies."""
    max_error: float
    """Largest difference of a coordinate."""
    relative_error: float
    """Norm of the difference over the norm of full attention's, over all vectors."""


def measure_fidelity(table: Catalog, reader: Reader, replay: Replay) -> Fidelity | None:
    """Compare v with full attention's over the same history, by the same embeddings and the same relevance.

    None for models that attend by another relevance, to which full attention is not the measure.
    """
    if not isinstance(reader.long_term, Encode | Variant):
        return None
    full = FullAttention(Sizes(0, 0, 0, 0, 0))
    ours: list[Floats] = []
    theirs: list[Floats] = []
    reader.eval()
    with torch.no_grad():
        labels = assign(replay, table, reader.long_term.assign)
        every = max(1, len(replay.impressions) // _IMPRESSIONS)
        for batch in islice(batches(replay, labels, HISTORIES_PER_BATCH), 0, None, every):
            items = of_batch(table, batch)
            history, target = history_of(items, batch, reader.scale), targets_of(items, batch)
            ours.append(_vectors(reader.long_term, history, target)[batch.place])
            theirs.append(_vectors(full, history, target)[batch.place])
    return compare(np.concatenate(ours), np.concatenate(theirs))


def _vectors(model: LongTerm, history: History, target: Target) -> Floats:
    """Return the vector of each target, [G T, D]."""
    vectors: Floats = model.read(model.summarise(history), target).vectors[:, :, 0].flatten(0, 1).numpy()
    return vectors


def compare(found: Floats, expected: Floats) -> Fidelity:
    """Return how close vectors are to what they should be, both [B, D]."""
    x, y = (vectors.astype(np.float64) for vectors in (found, expected))
    a, b = x - x.mean(0), y - y.mean(0)
    spread = np.sqrt((a * a).sum() * (b * b).sum())
    correlation = (a * b).sum() / spread if spread else np.nan
    error = np.linalg.norm(x - y) / max(np.linalg.norm(y), np.finfo(np.float64).tiny)
    return Fidelity(float(correlation), float(np.abs(x - y).max(initial=0)), float(error))
