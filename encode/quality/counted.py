"""Any model of long-term interest, told how often the target is in the history: what ENCODE is told, for all.

G histories   L behaviors of the longest   T targets   M vectors   E scalars   D embedding_dim
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from encode.model.long_term import Behaviors, Catalog, History, Ints, LongTerm, Read, Target
from encode.model.relevance import Remembered, remember, times_of

_ITEMS = 4096
"""Items whose counts are kept, as many as ENCODE keeps."""


class Told(NamedTuple):
    """State of the model, and the counts."""

    own: Any
    remembered: Remembered


class Counted(LongTerm):
    """Another model with one more scalar for the MLP, log(1 + n_t).

    Where people repeat themselves the count is most of the answer, so a comparison of what models make of the history
    must give it to all or to none.

    Args:
        own: the model.
    """

    def __init__(self, own: LongTerm) -> None:
        super().__init__()
        self.own = own
        self.num_vectors, self.num_scalars, self.target_free = own.num_vectors, own.num_scalars + 1, own.target_free

    def assign(self, catalog: Catalog, behaviors: Behaviors) -> Ints | None:
        """Return what the model assigns."""
        return self.own.assign(catalog, behaviors)

    def follow(self, catalog: Catalog, count: Float[Tensor, " V"]) -> None:
        """Bring the model up to the tables of the moment."""
        self.own.follow(catalog, count)

    def summarise(self, history: History) -> Told:
        """Return the model's state and the items' counts."""
        return Told(self.own.summarise(history), remember(history.item, _ITEMS))

    def profile(self, state: Told, history: History) -> Float[Tensor, "G D"]:
        """Return what the model gives of the user whatever the target."""
        return self.own.profile(state.own, history)

    def read(self, state: Told, target: Target) -> Read:
        """Return what the model reads, and log(1 + n_t)."""
        read = self.own.read(state.own, target)
        times = times_of(target.item, state.remembered).to(read.vectors.dtype)
        return Read(read.vectors, torch.cat([read.scalars, times.log1p()[..., None]], 2))

    def auxiliary_loss(self, state: Told, history: History) -> Float[Tensor, ""]:
        """Return the model's own."""
        return self.own.auxiliary_loss(state.own, history)
