"""SIM, the search-based interest model: find few behaviors for the target, then attend to these (arXiv 2006.05639).

    G histories   T targets   L behaviors   D embedding_dim   R search_dim   Z D + gap_dim

Qi et al., CIKM 2020. The search unit is `SimHard` (same category) or `SimSoft` (inner product); the exact unit is one
for both. The history itself is the state, so neither can be stored small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from encode.errors import ConfigError
from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.retrieved import (
    MultiHeadTargetAttention,
    check_counts,
    gather_behaviors,
    top_behaviors,
)
from encode.schema import UNKNOWN

NUM_GAPS = 24
"""Time gaps told apart: below 1 minute, below 3, 7, 15, ... and above 16 years."""
GAP_STD = 0.05
"""Of the embeddings of time gaps at first: that of the items, so that neither drowns the other."""


def time_gap(age: Float[Tensor, "G L"]) -> Int64[Tensor, "G L"]:
    """Return floor(log2(1 + minutes)) of an age in days, at most NUM_GAPS - 1.

    The paper embeds the gap between behavior and target and leaves the steps open; these are ours.
    """
    minutes = torch.arange(1, NUM_GAPS, dtype=age.dtype, device=age.device).exp2() - 1
    return torch.bucketize(age, minutes / 1440, right=True)


class ExactSearchUnit(nn.Module):
    """Multi-head target attention over z_j = [e_j; g_j] of the k behaviors found, g_j the embedding of the time gap.

    We differ in that the gap is taken to the moment as of which the history is, which is at or before the impression,
    and in a width of the attention of embedding_dim, so that what is read has the width that the backbone expects.
    """

    def __init__(self, sizes: Sizes, num_heads: int, gap_dim: int) -> None:
        super().__init__()
        if gap_dim < 0:
            raise ConfigError(f"ExactSearchUnit: gap_dim is {gap_dim}, expected 0 or more")
        self.gap = nn.Embedding(NUM_GAPS, gap_dim) if gap_dim else None
        if self.gap is not None:
            nn.init.normal_(self.gap.weight, std=GAP_STD)
        width = sizes.embedding_dim
        self.attention = MultiHeadTargetAttention(width, width + gap_dim, num_heads, width)

    def behaviors(self, history: History) -> Float[Tensor, "G L Z"]:
        """Return z of each behavior."""
        if self.gap is None:
            return history.embedding
        return torch.cat([history.embedding, self.gap(time_gap(history.age))], 2)

    def forward(
        self,
        target: Float[Tensor, "G T D"],
        behaviors: Float[Tensor, "G L Z"],
        mask: Bool[Tensor, "G L"],
        score: Float[Tensor, "G T L"],
        k: int,
    ) -> Float[Tensor, "G T D"]:
        """Return what each target takes from the k behaviors that score highest for it."""
        places, kept = top_behaviors(score, mask, k)
        output: Tensor = self.attention(target, gather_behaviors(behaviors, places), kept)
        return output


class CategorizedHistory(NamedTuple):
    """State of `SimHard`."""

    behaviors: Float[Tensor, "G L Z"]
    """z: embedding and time gap."""
    category: Int64[Tensor, "G L"]
    mask: Bool[Tensor, "G L"]


class SimHard(LongTerm):
    """SIM with hard search: the latest k behaviors of the target's category.

    r_i = 1 if the category of i is that of the target, else 0; u = ESU(e_t, the latest k behaviors with r_i = 1), where
    ESU is the `ExactSearchUnit`.

    An unknown category is like no other, not even like another unknown one: nothing is found for such a target.

    Args:
        sizes: see `Sizes`.
        k: behaviors kept for each target.
        num_heads: of the exact unit; divides embedding_dim.
        gap_dim: width of the embedding of time gaps; 0 leaves time gaps out.
    """

    target_free = False

    def __init__(self, sizes: Sizes, *, k: int = 50, num_heads: int = 2, gap_dim: int = 8) -> None:
        super().__init__()
        check_counts("SimHard", k=k)
        self.k = k
        self.exact = ExactSearchUnit(sizes, num_heads, gap_dim)

    def summarise(self, history: History) -> CategorizedHistory:
        return CategorizedHistory(self.exact.behaviors(history), history.category, history.mask)

    def read(self, state: CategorizedHistory, target: Target) -> Read:
        category = target.category[:, :, None]
        found = (state.category[:, None] == category) & (category != UNKNOWN)
        place = torch.arange(found.shape[2], dtype=target.embedding.dtype, device=found.device)
        score = torch.where(found, place, float("-inf"))
        return only_vector(self.exact(target.embedding, state.behaviors, state.mask, score, self.k))


class SearchableHistory(NamedTuple):
    """State of `SimSoft`."""

    behaviors: Float[Tensor, "G L Z"]
    """z: embedding and time gap."""
    key: Float[Tensor, "G L R"]
    """W_b e_i."""
    mask: Bool[Tensor, "G L"]
    memory: Float[Tensor, "G R D"]
    """(1/n) sum_i (W_b e_i) e_i^T, which all of U_r needs of the user."""


class SimSoft(LongTerm):
    """SIM with soft search: the k behaviors with the largest inner product.

    r_i = (W_b e_i)^T (W_a e_t); u = ESU(e_t, the k behaviors with the largest r_i), where ESU is the `ExactSearchUnit`.

    The choice of k passes no gradient, so something else must train W_a and W_b. In the paper it is a second click
    model on [U_r; e_t] with U_r = sum_i r_i e_i and a log loss of its own, added to the main one. `auxiliary_loss` sees
    neither targets nor labels, so that such a loss cannot be had. We differ: U_r is read as a second vector, and the
    backbone's MLP and log loss train W_a and W_b (`trains_search`). It hands SIM, beyond the paper, a linear attention
    over the whole history. Without the switch both stay what they were drawn as. In either case they start as one
    matrix: inner products survive one random projection, not two that differ.

    U_r is divided by the number of behaviors, so that it does not grow with the history. It is linear in e_t and costs
    O(R D) a target, whatever L.

    Args:
        sizes: see `Sizes`.
        k: behaviors kept for each target.
        num_heads: of the exact unit; divides embedding_dim.
        gap_dim: width of the embedding of time gaps; 0 leaves time gaps out.
        search_dim: R, width that is searched in; None takes projected_dim.
        trains_search: whether U_r is read.
    """

    target_free = False

    def __init__(
        self,
        sizes: Sizes,
        *,
        k: int = 50,
        num_heads: int = 2,
        gap_dim: int = 8,
        search_dim: int | None = None,
        trains_search: bool = True,
    ) -> None:
        super().__init__()
        width = sizes.projected_dim if search_dim is None else search_dim
        check_counts("SimSoft", k=k, search_dim=width)
        self.k = k
        self.num_vectors = 2 if trains_search else 1
        self.exact = ExactSearchUnit(sizes, num_heads, gap_dim)
        self.W_b = nn.Linear(sizes.embedding_dim, width, bias=False).requires_grad_(trains_search)
        self.W_a = nn.Linear(sizes.embedding_dim, width, bias=False) if trains_search else None
        if self.W_a is not None:
            self.W_a.load_state_dict(self.W_b.state_dict())

    def summarise(self, history: History) -> SearchableHistory:
        key = self.W_b(history.embedding) * history.mask[..., None]
        memory = key.transpose(1, 2) @ history.embedding / history.mask.sum(1).clamp(min=1)[:, None, None]
        return SearchableHistory(self.exact.behaviors(history), key, history.mask, memory)

    def read(self, state: SearchableHistory, target: Target) -> Read:
        query = (self.W_b if self.W_a is None else self.W_a)(target.embedding)
        with torch.no_grad():
            score = query @ state.key.transpose(1, 2)
        vector = self.exact(target.embedding, state.behaviors, state.mask, score, self.k)
        if self.W_a is None:
            return only_vector(vector)
        return Read(torch.stack([vector, query @ state.memory], 2), vector.new_zeros(*vector.shape[:2], 0))
