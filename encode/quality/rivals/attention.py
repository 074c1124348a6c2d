"""Ceilings: attention of the target over every behavior of the history.

G histories   L behaviors of the longest   T targets   D embedding_dim   P projected_dim   H hidden units
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.model.relevance import attend
from encode.schema import UNKNOWN

_PAIRS_AT_A_TIME = 1 << 20
"""Pairs of target and behavior for which the hidden layer of `DinUnit` is held at a time."""


class Whole(NamedTuple):
    """State of models that read the history itself."""

    embedding: Float[Tensor, "G L D"]
    key: Float[Tensor, "G L P"]
    mask: Bool[Tensor, "G L"]
    item: Int64[Tensor, "G L"]
    scale: Float[Tensor, ""]


class FullAttention(LongTerm):
    """Full target attention: v = sum_i softmax_i(rho(h_t, h_i)) e_i over the whole history.

    The relevance rho is the backbone's, the same that ENCODE clusters and reads by, so what ENCODE loses against this
    is what clustering costs. Like ENCODE it also gives the affinity of the target to the history as a whole.

    Args:
        sizes: of the backbone.
        affinity: whether it gives that.
        counts: whether it gives, as ENCODE does, how often the target is in the history, log(1 + n_t).
    """

    target_free = False

    def __init__(self, sizes: Sizes, *, affinity: bool = True, counts: bool = False) -> None:
        super().__init__()
        self.affinity, self.counts = affinity, counts
        self.num_scalars = affinity + counts

    def summarise(self, history: History) -> Whole:
        """Return the history itself."""
        return Whole(history.embedding, history.key, history.mask, history.item, history.scale)

    def read(self, state: Whole, target: Target) -> Read:
        """Return the attention's vector, and what else is asked for: affinity, how often the target was had."""
        none = torch.zeros_like(state.mask, dtype=target.key.dtype)
        found = attend(target.key, state.key, state.embedding, none, state.mask, state.scale)
        scalars = [found.affinity] if self.affinity else []
        if self.counts:
            same = (state.item[:, None] == target.item[..., None]) & (target.item > UNKNOWN)[..., None]
            scalars.append(same.sum(2).to(found.affinity.dtype).log1p())
        return Read(found.value[:, :, None], torch.stack(scalars, 2) if scalars else found.value[..., :0])


class DinUnit(LongTerm):
    """DIN's activation unit over the whole history (arXiv 1706.06978, section 4.3).

    a_i = w^T act(W [e_t, e_i, e_t - e_i, e_t * e_i] + b) + b', v = sum_i a_i e_i: the weights are not normalized, so
    that their sum tells how strong the interest is. The difference and the product stand for the paper's outer product.
    The first layer is taken apart, W = [W_t, W_i, W_d, W_p], so that only (e_t * e_i) W_p is computed a pair.

    Args:
        sizes: of the backbone.
        hidden: H, units of the hidden layer; 36 in the paper.
        activation: PReLU as in the paper, or ReLU. Dice, the paper's own, needs statistics over all pairs of a batch.
        softmax: normalize the weights.
    """

    target_free = False

    def __init__(
        self,
        sizes: Sizes,
        *,
        hidden: int = 36,
        activation: Literal["prelu", "relu"] = "prelu",
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.first = nn.Linear(4 * sizes.embedding_dim, hidden)
        self.activation = nn.PReLU() if activation == "prelu" else nn.ReLU()
        self.last = nn.Linear(hidden, 1)

    def summarise(self, history: History) -> Whole:
        """Return the history itself."""
        return Whole(history.embedding, history.key, history.mask, history.item, history.scale)

    def read(self, state: Whole, target: Target) -> Read:
        """Return the weighted sum of the history; targets are taken in parts that bound the memory."""
        pairs = max(1, state.mask.numel())
        parts = torch.split(target.embedding, max(1, _PAIRS_AT_A_TIME // pairs), 1)
        read = [checkpoint(self._read, state.embedding, state.mask, part, use_reentrant=False) for part in parts]
        return only_vector(torch.cat(read, 1))

    def _read(
        self, behavior: Float[Tensor, "G L D"], mask: Bool[Tensor, "G L"], target: Float[Tensor, "G T D"]
    ) -> Float[Tensor, "G T D"]:
        of_target, of_behavior, of_difference, of_product = self.first.weight.chunk(4, 1)
        ours = target @ (of_target + of_difference).T + self.first.bias
        theirs = behavior @ (of_behavior - of_difference).T
        scaled = (target[:, :, None] * of_product).flatten(1, 2)
        shape = (*target.shape[:2], len(of_product), behavior.shape[1])
        hidden = (scaled @ behavior.transpose(1, 2)).view(shape) + ours[..., None] + theirs.transpose(1, 2)[:, None]
        weight = torch.einsum("gthl,h->gtl", self.activation(hidden), self.last.weight[0]) + self.last.bias
        if self.softmax:
            weight = weight.masked_fill(~mask[:, None], torch.finfo(weight.dtype).min).softmax(2)
        return (weight * mask[:, None]) @ behavior
