"""MIRRN: three questions to a history, each answered by what hashes alike, filtered in time (arXiv 2411.15005).

    G histories   T targets   L behaviors   k behaviors retrieved   D embedding_dim   B num_bits
    Q queries of a history   U queries that need no target

Xu et al., KDD 2025.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from encode.errors import ConfigError
from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.eta import random_planes
from encode.quality.rivals.retrieved import MultiHeadTargetAttention, check_counts, gather_behaviors, top_behaviors


class Retrievable(NamedTuple):
    """State of `Mirrn`: what targets retrieve from, and what the other two queries have retrieved already."""

    interests: Float[Tensor, "G U D"]
    """Of the local and the global query, as far as they are asked."""
    known: Bool[Tensor, " G"]
    """Whether there is any behavior."""
    embedding: Float[Tensor, "G L D"]
    """Of behaviors with their positions; none, L = 0, without the query of the target."""
    code: Bool[Tensor, "G L B"]
    """Hash of each behavior: bits on the positive side."""
    mask: Bool[Tensor, "G L"]


class Mirrn(LongTerm):
    r"""Target, recent past and whole past each retrieve k behaviors; filtered and averaged, they are attended to.

    Queries are the target e_t, the mean of the last `num_local` embeddings and the mean of all. Each takes the k
    behaviors nearest to it by Hamming distance of hash bits [<r_b, x> > 0], r_b fixed and random, b = 1 .. B, in the
    order of time. For X in R^(k x D), their embeddings with p_rank added, rank counted from the latest behavior:

        X'  = LN( X + F^-1( F(X) W ) ),    F the Fourier transform along time, W complex and block-diagonal
        u_r = mean of the rows of X' that are behaviors,    r = target, local, global
        v   = MultiHeadTargetAttention(e_t; u_target, u_local, u_global),   width D

    each query with its own W and LN. Blocks are the heads of the paper's "multi-head Fourier transformer": W is the
    same at all frequencies, so its real part mixes dimensions and its imaginary part mixes time, too (as a Hilbert
    transform does). The full text of the paper could not be had; details are those of the authors' code, but for its
    product, which takes only the diagonal of each block: we multiply by the blocks.

    We differ in: places that hold nothing are zero in F and not counted in the mean (their code counts them); ranks
    from `num_positions` - 1 on share a position; no dropout in the filter. The last two queries do not need the
    target: what they retrieve is in the state.

    Args:
        sizes: of the backbone.
        k: behaviors that each query retrieves; 50 in the authors' code.
        by_target: ask with the target. False leaves a state without the history, which may be stored.
        by_local: ask with the mean of the last `num_local`.
        by_global: ask with the mean of all.
        fourier: filter; False leaves X' = X.
        num_blocks: of W; 4 is the authors'.
        positions: whether p_rank is added.
        num_positions: rows of p.
        num_local: behaviors that the local query is the mean of.
        num_bits: B.
        num_heads: of the attention over the three.
        seed: of r_b.
    """

    planes: Tensor

    def __init__(
        self,
        sizes: Sizes,
        *,
        k: int = 20,
        by_target: bool = True,
        by_local: bool = True,
        by_global: bool = True,
        fourier: bool = True,
        num_blocks: int = 4,
        positions: bool = True,
        num_positions: int = 1024,
        num_local: int = 16,
        num_bits: int = 32,
        num_heads: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (by_target or by_local or by_global):
            raise ConfigError("Mirrn: none of by_target, by_local and by_global is set; expected at least one")
        counts = {"num_blocks": num_blocks, "num_positions": num_positions, "num_local": num_local}
        check_counts("Mirrn", k=k, num_bits=num_bits, **counts)
        dim = sizes.embedding_dim
        self.target_free = not by_target
        self.k, self.num_local = k, num_local
        self.position = nn.Embedding(num_positions, dim) if positions else None
        if self.position is not None:
            nn.init.normal_(self.position.weight, std=0.02)
        asked = [name for name, is_on in (("target", by_target), ("local", by_local), ("global", by_global)) if is_on]
        self.filters = nn.ModuleDict(
            {name: FourierFilter(dim, num_blocks) if fourier else nn.Identity() for name in asked}
        )
        self.attention = MultiHeadTargetAttention(dim, dim, num_heads, dim)
        self.register_buffer("planes", random_planes(dim, num_bits, seed))

    def summarise(self, history: History) -> Retrievable:
        """Hash the behaviors, and ask for the two queries that need no target."""
        embedding, mask = history.embedding, history.mask
        rank = mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1], device=mask.device)
        rows = embedding
        if self.position is not None:
            rows = embedding + self.position(rank.clamp(0, self.position.num_embeddings - 1)) * mask[:, :, None]
        code = self._hash(embedding)
        interests = [embedding.new_zeros(len(mask), 0, embedding.shape[2])]
        for name, counted in (("local", mask & (rank < self.num_local)), ("global", mask)):
            if name in self.filters:
                total = counted[:, None].to(embedding.dtype) @ embedding  # a mean is on the same side of each plane
                interests.append(self._retrieve(name, self._hash(total), code, rows, mask))
        seen = mask
        if "target" not in self.filters:
            rows, code, seen = rows[:, :0], code[:, :0], mask[:, :0]
        return Retrievable(torch.cat(interests, 1), mask.any(1), rows, code, seen)

    def read(self, state: Retrievable, target: Target) -> Read:
        """Return v of each target."""
        num_targets = target.embedding.shape[1]
        interests = state.interests[:, None].expand(-1, num_targets, -1, -1)
        if "target" in self.filters:
            query = self._hash(target.embedding)
            own = self._retrieve("target", query, state.code, state.embedding, state.mask)
            interests = torch.cat([own[:, :, None], interests], 2)
        known = state.known[:, None, None].expand(interests.shape[:3])
        return only_vector(self.attention(target.embedding, interests, known))

    @torch.no_grad()
    def _hash(self, rows: Float[Tensor, "G Q D"]) -> Bool[Tensor, "G Q B"]:
        """The side of each plane; of vectors on a plane, as zeros are, the negative one."""
        return rows @ self.planes > 0

    def _retrieve(
        self,
        name: str,
        query: Bool[Tensor, "G Q B"],
        code: Bool[Tensor, "G L B"],
        rows: Float[Tensor, "G L D"],
        mask: Bool[Tensor, "G L"],
    ) -> Float[Tensor, "G Q D"]:
        """Return u of each query: the behaviors that hash most alike, filtered and averaged; zero if none."""
        # Signs multiply to the number of bits that agree less those that do not, which goes in steps of two. Less than
        # one for the place keeps the latest of equals, as sorting them would, in less time.
        signs, sign = (2.0 * bits.to(rows.dtype) - 1 for bits in (code, query))
        place = torch.linspace(0, 1, mask.shape[1], device=mask.device, dtype=rows.dtype)
        places, real = top_behaviors(sign @ signs.transpose(1, 2) + place, mask, self.k)
        weight = real[..., None].to(rows.dtype)
        kept = self.filters[name](gather_behaviors(rows, places) * weight) * weight
        interest: Tensor = kept.sum(2) / weight.sum(2).clamp(min=1)
        return interest


class FourierFilter(nn.Module):
    """X' = LN(X + F^-1(F(X) W)) along the places, W block-diagonal, complex, and the same at all frequencies."""

    def __init__(self, dim: int, num_blocks: int) -> None:
        super().__init__()
        if dim % num_blocks:
            raise ConfigError(f"Mirrn: embedding_dim {dim} is not divisible by num_blocks {num_blocks}")
        self.num_blocks = num_blocks
        self.weight = nn.Parameter(0.02 * torch.randn(2, num_blocks, dim // num_blocks, dim // num_blocks))
        """Real and imaginary part."""
        self.norm = nn.LayerNorm(dim)

    def forward(self, rows: Float[Tensor, "G Q k D"]) -> Float[Tensor, "G Q k D"]:
        """Return the filtered rows; places that hold nothing are zero when they come in, not when they go out."""
        num_histories, num_queries, k, dim = rows.shape
        spectrum = torch.fft.rfft(rows, dim=2, norm="ortho")
        spectrum = spectrum.view(num_histories, num_queries, k // 2 + 1, self.num_blocks, dim // self.num_blocks)
        mixed = torch.einsum("gqfbd,bde->gqfbe", spectrum, torch.complex(self.weight[0], self.weight[1]))
        filtered = torch.fft.irfft(mixed.flatten(3), n=k, dim=2, norm="ortho")
        output: Tensor = self.norm(rows + filtered)
        return output
