"""TWIN: the search unit ranks by the very attention of the exact unit (arXiv 2302.02352).

    G histories   T targets   L behaviors   k behaviors kept   N num_heads   D embedding_dim

Chang et al., KDD 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.retrieved import MultiHeadTargetAttention, check_counts, softmax_over, top_behaviors
from encode.quality.rivals.sim import NUM_GAPS, time_gap


class BiasedHistory(NamedTuple):
    """State of `Twin`."""

    embedding: Float[Tensor, "G L D"]
    bias: Float[Tensor, "G N L"]
    """What the cross features of a behavior add to its logit, whatever the target."""
    mask: Bool[Tensor, "G L"]


class Twin(LongTerm):
    """Multi-head target attention over the k behaviors with the largest logit of that same attention.

    alpha_i = (W_q e_t)^T (W_h e_i) / sqrt(D / N) + beta_i for each head; a = softmax over the k largest alpha;
    u = W_o [sum_i a_i W_v e_i of each head]. With k >= L it is full target attention.

    In the paper K = [K_h, K_c]: inherent features of an item, whose projection is cached, and cross features of user
    and item, each compressed to one number, beta = K_c W_c. We simplify the split. The embedding e_i, which the
    backbone shares and which holds the kind of behavior, stands for K_h. Cross features are the kind of behavior and
    the time gap. Each has few values, so that "embed, then compress to a number" is one learned number a value and
    head, 0 at first; neither enters the values beyond what e_i holds. The attention is embedding_dim wide.

    Args:
        sizes: see `Sizes`.
        k: behaviors kept for each target.
        num_heads: N; divides embedding_dim.
        cross: whether the cross features count; False leaves beta out.
        per_head: each head keeps the k that are largest for itself, which is consistency to the letter and what public
            code does; False keeps the k with the largest mean of alpha over heads, the same for all.
    """

    target_free = False

    def __init__(
        self, sizes: Sizes, *, k: int = 100, num_heads: int = 4, cross: bool = True, per_head: bool = True
    ) -> None:
        super().__init__()
        check_counts("Twin", k=k)
        self.k, self.per_head = k, per_head
        width = sizes.embedding_dim
        self.attention = MultiHeadTargetAttention(width, width, num_heads, width)
        self.kind_bias = nn.Embedding(sizes.num_kinds, num_heads) if cross else None
        self.gap_bias = nn.Embedding(NUM_GAPS, num_heads) if cross else None
        for table in (self.kind_bias, self.gap_bias):
            if table is not None:
                nn.init.zeros_(table.weight)

    def summarise(self, history: History) -> BiasedHistory:
        if self.kind_bias is None or self.gap_bias is None:
            bias = history.embedding.new_zeros(*history.mask.shape, self.attention.num_heads)
        else:
            bias = self.kind_bias(history.kind) + self.gap_bias(time_gap(history.age))
        return BiasedHistory(history.embedding, bias.transpose(1, 2), history.mask)

    def read(self, state: BiasedHistory, target: Target) -> Read:
        (num_histories, num_targets, width), heads = target.embedding.shape, self.attention.num_heads
        length = state.mask.shape[1]
        if length == 0:  # no place for padding to point at
            return only_vector(
                self.attention.combine(target.embedding.new_zeros(num_histories, num_targets, heads, width))
            )
        # Heads beside targets: one product a user, and every head of every target chooses on its own.
        logits = self.attention.fold(target.embedding).flatten(1, 2) @ state.embedding.transpose(1, 2)
        logits = logits.view(num_histories, num_targets, heads, length) + state.bias[:, None]
        score = logits if self.per_head else logits.mean(2, keepdim=True).expand_as(logits)
        places, kept = top_behaviors(score.flatten(1, 2), state.mask, self.k)
        weights = softmax_over(logits.flatten(1, 2).gather(2, places), kept)
        first = length * torch.arange(num_histories, device=places.device)
        pooled = F.embedding_bag(
            (places + first[:, None, None]).flatten(0, 1),
            state.embedding.flatten(0, 1),
            per_sample_weights=weights.flatten(0, 1),
            mode="sum",
        )
        return only_vector(self.attention.combine(pooled.view(num_histories, num_targets, heads, width)))
