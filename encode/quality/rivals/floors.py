"""Floors: what is had without asking the target what it is interested in, or without a long history at all.

G histories   T targets   D embedding_dim
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector


class Mean(NamedTuple):
    """State of `MeanPooling`."""

    mean: Float[Tensor, "G D"]


class MeanPooling(LongTerm):
    """The mean of the history, whatever the target: v = (1 / L) sum_i e_i."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()

    def summarise(self, history: History) -> Mean:
        """Return the mean embedding; zero for an empty history."""
        return Mean(history.embedding.sum(1) / history.mask.sum(1, keepdim=True).clamp(min=1))

    def read(self, state: Mean, target: Target) -> Read:
        """Return the mean for every target."""
        return only_vector(state.mean[:, None].expand_as(target.embedding))


class RecentOnly(LongTerm):
    """No long-term interest: the backbone's recent branch alone, which is target attention over the last R behaviors.

    Deep Interest Network (arXiv 1706.06978) as it is used where histories are long: cut to the latest 50.
    """

    num_vectors = 0

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()

    def summarise(self, history: History) -> None:
        """Return nothing."""

    def profile(self, state: None, history: History) -> Float[Tensor, "G D"]:
        """Return zeros: the mean of the history would be long-term interest."""
        return history.embedding.new_zeros(len(history.mask), history.embedding.shape[2])

    def read(self, state: None, target: Target) -> Read:
        """Return no vector."""
        shape = target.embedding.shape
        return Read(target.embedding.new_zeros(*shape[:2], 0, shape[2]), target.embedding.new_zeros(*shape[:2], 0))
