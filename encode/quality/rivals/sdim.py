"""SDIM, sampling-based deep interest modeling: what collides with the target is what it attends to (arXiv 2205.10249).

    G histories   T targets   L behaviors   D embedding_dim   g num_groups   B buckets of a group (2^num_bits)

Cao et al., CIKM 2022. The only search model with a state that does not grow with the history.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.eta import random_planes
from encode.quality.rivals.retrieved import check_counts


class Buckets(NamedTuple):
    """State of `Sdim`. A new behavior is added to g of its rows, without the history."""

    total: Float[Tensor, "G g B D"]
    """Sum of the embeddings in each bucket of each group."""


class Sdim(LongTerm):
    """The mean over hash groups of what shares the target's bucket, each group scaled to unit length.

    u = (1/g) sum_j l2norm( sum_i e_i [h_j(e_i) = h_j(e_t)] ), where h_j(x) packs the tau bits x^T R_j > 0 and all R_j
    are drawn once and never trained. In expectation over R the inner sum weighs e_i with (1 - angle(e_i, e_t)/pi)^tau:
    a target attention without parameters, in which tau takes the place of the temperature.

    The sums of all buckets are made once a user; a target hashes itself and reads g of them. Scaling to unit length
    needs no target either. Empty buckets give zero, and count in 1/g.

    Args:
        sizes: see `Sizes`.
        num_groups: g.
        num_bits: tau, bits of each group's hash; 2^tau buckets.
        l2_norm: whether each group is scaled to unit length; if not, the plain sums are read.
        seed: of R.
    """

    planes: Tensor

    def __init__(
        self, sizes: Sizes, *, num_groups: int = 48, num_bits: int = 3, l2_norm: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        check_counts("Sdim", num_groups=num_groups, num_bits=num_bits)
        self.num_groups, self.num_bits, self.l2_norm = num_groups, num_bits, l2_norm
        self.register_buffer("planes", random_planes(sizes.embedding_dim, num_groups * num_bits, seed))

    def summarise(self, history: History) -> Buckets:
        num_histories, length, width = history.embedding.shape
        bucket, num_buckets = self._hash(history.embedding)[..., None], 2**self.num_bits
        real = history.mask[:, :, None, None].to(history.embedding.dtype).expand_as(bucket)
        member = real.new_zeros(num_histories, length, self.num_groups, num_buckets).scatter_(3, bucket, real)
        total = member.flatten(2).transpose(1, 2) @ history.embedding
        return Buckets(total.view(num_histories, self.num_groups, num_buckets, width))

    def read(self, state: Buckets, target: Target) -> Read:
        num_histories, num_targets, width = target.embedding.shape
        rows = (F.normalize(state.total, dim=3) if self.l2_norm else state.total).flatten(0, 2)
        bucket = self._hash(target.embedding)
        first = torch.arange(num_histories * self.num_groups, device=bucket.device) * 2**self.num_bits
        slots = bucket + first.view(num_histories, 1, self.num_groups)
        vector = F.embedding_bag(slots.flatten(0, 1), rows, mode="mean")
        return only_vector(vector.view(num_histories, num_targets, width))

    def _hash(self, embedding: Float[Tensor, "G N D"]) -> Int64[Tensor, "G N g"]:
        """Return the bucket of each embedding in each group, the first plane being the lowest bit."""
        bits = (embedding.detach() @ self.planes > 0).view(*embedding.shape[:2], self.num_groups, self.num_bits)
        powers = torch.arange(self.num_bits, dtype=self.planes.dtype, device=bits.device).exp2()
        return (bits.to(powers.dtype) @ powers).long()
