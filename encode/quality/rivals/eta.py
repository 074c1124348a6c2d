"""ETA, end-to-end target attention: search by SimHash in the model itself (arXiv 2108.04468).

    G histories   T targets   L behaviors   D embedding_dim   M num_bits

Chen et al., 2021. Unlike SIM's, its search needs no training and no index that lags behind the embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.retrieved import MultiHeadTargetAttention, check_counts, gather_behaviors, top_behaviors


def random_planes(rows: int, columns: int, seed: int) -> Float[Tensor, "rows columns"]:
    """Return normally distributed hyperplanes, one a column, the same for the same seed."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


class HashedHistory(NamedTuple):
    """State of `Eta`: the history and its hashes."""

    embedding: Float[Tensor, "G L D"]
    bits: Bool[Tensor, "G L M"]
    """e_i^T R > 0: M bits a behavior."""
    mask: Bool[Tensor, "G L"]


class Eta(LongTerm):
    """Multi-head target attention over the k behaviors whose hash is nearest to the target's.

    b(x) = [x^T R > 0] with R in R^{D x M} drawn once and never trained; the k behaviors with the smallest Hamming
    distance |b(e_i) xor b(e_t)| are attended to. In expectation a share of 1 - angle / pi of the bits agrees, so that
    near in Hamming distance is near in angle. The attention is embedding_dim wide.

    Many behaviors lie at the same distance. Of those we keep the latest, which the paper leaves open. The distance is
    computed as a product of signs, which is the same.

    Args:
        sizes: see `Sizes`.
        k: behaviors kept for each target.
        num_bits: M.
        num_heads: of the attention; divides embedding_dim.
        seed: of R.
    """

    target_free = False
    planes: Tensor

    def __init__(self, sizes: Sizes, *, k: int = 50, num_bits: int = 32, num_heads: int = 2, seed: int = 0) -> None:
        super().__init__()
        check_counts("Eta", k=k, num_bits=num_bits)
        self.k = k
        width = sizes.embedding_dim
        self.register_buffer("planes", random_planes(width, num_bits, seed))
        self.attention = MultiHeadTargetAttention(width, width, num_heads, width)

    def summarise(self, history: History) -> HashedHistory:
        return HashedHistory(history.embedding, self._hash(history.embedding), history.mask)

    def read(self, state: HashedHistory, target: Target) -> Read:
        places, kept = top_behaviors(self._agreement(state, target), state.mask, self.k)
        behaviors = gather_behaviors(state.embedding, places)
        return only_vector(self.attention(target.embedding, behaviors, kept))

    def _hash(self, embedding: Float[Tensor, "G N D"]) -> Bool[Tensor, "G N M"]:
        return embedding.detach() @ self.planes > 0

    def _agreement(self, state: HashedHistory, target: Target) -> Float[Tensor, "G T L"]:
        """Return M - 2 |b(e_i) xor b(e_t)|, and in its last digits the place, so that of equals the latest is first.

        Whole numbers below 2^24, which a float holds exactly, as long as M L is; past it `top_behaviors` itself finds
        the latest of equals, at a price.
        """
        signs = state.bits.to(self.planes.dtype) * 2 - 1
        agreement = (self._hash(target.embedding).to(signs.dtype) * 2 - 1) @ signs.transpose(1, 2)
        length = signs.shape[1]
        return agreement * length + torch.arange(length, dtype=signs.dtype, device=signs.device)
