"""DARE: one embedding to find and weigh behaviors with, another to represent them.

G histories   L behaviors   T targets   k behaviors kept   D embedding_dim   A width of the attention embedding
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.retrieved import gather_behaviors, top_behaviors
from encode.schema import PADDING


class Decoupled(NamedTuple):
    """The whole history, embedded twice: L (A + D) floats a user."""

    attention: Float[Tensor, "G L A"]
    """a_i; rows of padding are never looked at."""
    representation: Float[Tensor, "G L D"]
    """e_i of the backbone."""
    mask: Bool[Tensor, "G L"]


class DARE(LongTerm):
    r"""Decoupled Attention and Representation Embeddings (arXiv 2410.02604, ICLR 2025).

    a_i is the attention embedding of behavior i and a_t that of the target, from tables of this model's own; e_i and
    e_t come from the backbone's table, which attention then gives no gradient.

        top = the k behaviors with the highest a_i^T a_t
        w = softmax over top of a_i^T a_t / sqrt(A),   p = sum_{i in top} w_i e_i,   v = p, or e_t * p if target-aware

    `e_t * p` is the paper's target-aware representation, sum_i w_i (e_i * e_t), with the factor e_t pulled out of the
    sum. The authors' released code (github.com/thuml/DARE) gives its MLP both p and e_t * p. The backbone's MLP gets
    every model's vector v and e_t * v, so `target_aware=False`, the default, gives it what the released MLP gets;
    `target_aware=True` gives it e_t * p and e_t * e_t * p, without p.

    We differ in: a is the sum of the embeddings of item, category and (of a behavior) kind, where the paper sets them
    side by side, so that a narrow a serves each of them in full; there is no time in a, where the paper has an
    embedding of it; no auxiliary loss from a second MLP over the whole history, since no rival has a second MLP.
    k is 50 by default; the released scripts keep 20 of 200 behaviors.

    Args:
        sizes: of the backbone.
        num_behaviors: k.
        decoupled: False searches and weighs by the backbone's embedding, a = e and A = D.
        target_aware: whether v is e_t * p instead of p.
        attention_dim: A, used if decoupled; None is half of D.
        initial_std: of the attention tables; that of the backbone by default.
    """

    target_free = False

    def __init__(
        self,
        sizes: Sizes,
        *,
        num_behaviors: int = 50,
        decoupled: bool = True,
        target_aware: bool = False,
        attention_dim: int | None = None,
        initial_std: float = 0.05,
    ) -> None:
        super().__init__()
        width = max(1, sizes.embedding_dim // 2) if attention_dim is None else attention_dim
        for name, number in (("num_behaviors", num_behaviors), ("attention_dim", width)):
            if number < 1:
                raise ConfigError(f"DARE: {name} is {number}, expected at least 1")
        self.num_behaviors, self.decoupled, self.target_aware = num_behaviors, decoupled, target_aware
        if decoupled:
            self.item = nn.Embedding(sizes.num_items, width, PADDING)
            self.category = nn.Embedding(sizes.num_categories, width, PADDING)
            self.kind = nn.Embedding(sizes.num_kinds, width)
            for table in (self.item, self.category, self.kind):
                nn.init.normal_(table.weight, std=initial_std)
            with torch.no_grad():
                self.item.weight[PADDING] = self.category.weight[PADDING] = 0

    def attention_embedding(self, item: Int64[Tensor, "G M"], category: Int64[Tensor, "G M"]) -> Float[Tensor, "G M A"]:
        """Return a without the kind of behavior, which a target does not have."""
        embedding: Tensor = self.item(item) + self.category(category)
        return embedding

    def summarise(self, history: History) -> Decoupled:
        """Return the history, embedded for attention and for representation."""
        attention = history.embedding
        if self.decoupled:
            attention = self.attention_embedding(history.item, history.category) + self.kind(history.kind)
        return Decoupled(attention, history.embedding, history.mask)

    def read(self, state: Decoupled, target: Target) -> Read:
        """Return p of each target, or e_t * p."""
        query = self.attention_embedding(target.item, target.category) if self.decoupled else target.embedding
        with torch.no_grad():
            score = query @ state.attention.transpose(1, 2)
        places, real = top_behaviors(score, state.mask, self.num_behaviors)
        logits = (gather_behaviors(state.attention, places) @ query[..., None])[..., 0] / query.shape[2] ** 0.5
        weights = F.softmax(logits.masked_fill(~real, torch.finfo(logits.dtype).min), 2) * real
        vector = (weights[:, :, None] @ gather_behaviors(state.representation, places))[:, :, 0]
        return only_vector(vector * target.embedding if self.target_aware else vector)
