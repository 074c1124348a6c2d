"""Any model of long-term interest, told how often the target, or its category, is in the history.

G histories   L behaviors of the longest   T targets   M vectors   E scalars   D embedding_dim
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from encode.model.long_term import Behaviors, Catalog, History, Ints, LongTerm, Read, Target
from encode.model.relevance import Remembered, remember, times_of

_MOST = 4096
"""Items, and categories, whose counts are kept; ENCODE keeps as many."""


class Told(NamedTuple):
    """State of the model, and the counts."""

    own: Any
    item: Remembered
    category: Remembered


class Counted(LongTerm):
    """Another model with one more scalar for the MLP, log(1 + n) of the target, or two, of its category as well.

    Where people repeat themselves the counts are most of the answer, so a comparison of what models make of the history
    must give them to all or to none.

    Args:
        own: the model.
        items: whether it is told how often the target was had.
        categories: whether it is told how often something of the target's category was had.
    """

    def __init__(self, own: LongTerm, *, items: bool, categories: bool) -> None:
        super().__init__()
        self.own, self.items, self.categories = own, items, categories
        self.num_vectors, self.target_free = own.num_vectors, own.target_free
        self.num_scalars = own.num_scalars + items + categories

    def assign(self, catalog: Catalog, behaviors: Behaviors) -> Ints | None:
        """Return what the model assigns."""
        return self.own.assign(catalog, behaviors)

    def follow(self, catalog: Catalog, count: Float[Tensor, " V"]) -> None:
        """Bring the model up to the tables of the moment."""
        self.own.follow(catalog, count)

    def summarise(self, history: History) -> Told:
        """Return the model's state and the counts."""
        item = remember(history.item, _MOST if self.items else 0)
        category = remember(history.category, _MOST if self.categories else 0)
        return Told(self.own.summarise(history), item, category)

    def profile(self, state: Told, history: History) -> Float[Tensor, "G D"]:
        """Return what the model gives of the user whatever the target."""
        return self.own.profile(state.own, history)

    def read(self, state: Told, target: Target) -> Read:
        """Return what the model reads, and the counts."""
        read = self.own.read(state.own, target)
        counts = [times_of(target.item, state.item)] if self.items else []
        counts += [times_of(target.category, state.category)] if self.categories else []
        told = [count.to(read.vectors.dtype).log1p()[..., None] for count in counts]
        return Read(read.vectors, torch.cat([read.scalars, *told], 2))

    def auxiliary_loss(self, state: Told, history: History) -> Float[Tensor, ""]:
        """Return the model's own."""
        return self.own.auxiliary_loss(state.own, history)
