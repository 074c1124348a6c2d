"""SparseCTR: the target attends to chunks of the history, to the ends of chunks, and to the latest behaviors.

G histories   L behaviors   T targets   D embedding_dim   N num_heads   E = D / N dimensions of a head   C num_chunks
M slots of all branches   R kinds of relative time (3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.retrieved import gather_behaviors

BRANCHES = ("global", "transition", "local")


class Slots(NamedTuple):
    """What targets may attend to, branch after branch: M (2 D + 3) floats a user."""

    key: Float[Tensor, "G N M E"]
    value: Float[Tensor, "G N M E"]
    time: Float[Tensor, "G M R"]
    """Of `relative_times`, averaged over a chunk as its keys are."""
    mask: Bool[Tensor, "G M"]
    """True where there is a chunk or a behavior."""


def time_chunks(age: Float[Tensor, "G L"], mask: Bool[Tensor, "G L"], num_chunks: int) -> Int64[Tensor, "G L"]:
    """Return the chunk of each behavior, from 0 on, oldest first: cut before the num_chunks - 1 longest pauses.

    Of pauses of the same length the latest are cut at. Behaviors of the same moment are never cut apart, so there may
    be fewer chunks; an empty history has none. What padding gets means nothing.
    """
    gap = (age.roll(1, 1) - age).masked_fill(~mask, 0)  # negative before the oldest, which follows the latest here
    order = gap.flip(1).argsort(dim=1, descending=True, stable=True)  # a top-k does not say which of equals it takes
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(age.shape[1], device=age.device).expand_as(order))
    return ((rank.flip(1) < num_chunks - 1) & (gap > 0)).long().cumsum(1)


def relative_times(age: Float[Tensor, "G L"]) -> Float[Tensor, "G L R"]:
    """Return log(1 + days passed), then how near the hours of the day and the days of the week are, from -1 to 1."""
    return torch.stack([age.log1p(), torch.cos(2 * math.pi * age), torch.cos(2 * math.pi / 7 * age)], 2)


class SparseCTR(LongTerm):
    r"""Three sparse attentions over chunks cut at pauses (arXiv 2601.17836).

    A history is cut into C chunks at its C - 1 longest pauses, so that no chunk tears a session. The target t attends,
    in N heads, to three sets of slots:

        global       the C chunks, each the mean of its behaviors
        transition   the last m behaviors of each chunk: what one interest looked like before the next
        local        the latest w behaviors

        o_b^n = sum_j softmax_{j in branch b}( (W_q^n e_t)^T W_k^n x_j / sqrt(E) + sum_r c_r^n time_r(j) ) W_v^n x_j
        v = W_o [sum_b g_b^n o_b^n]_n,   g = sigmoid(W_g e_t + b_g)

    x_j is the embedding of a behavior, or a chunk's mean of them; time_r(j) is how long before the target it was and
    where in the day and week (`relative_times`), c_r^n a learned number of head n. Only the gate has a bias, so that
    an empty history reads zero; all projections keep the width D and are shared by the branches.

    The full text could not be had. Known from abstract and summaries: chunks by pauses, the three branches, a gate, a
    bias by relative time (interval, hour, weekend) for each head. We differ in: one block, and of that what the target
    reads. In a single block the target attends to raw behaviors, so what behaviors take from each other would be read
    by nobody; norms, residual and feed-forward are left to the backbone's MLP. A history knows ages, not the clock, so
    hour and weekday are cosines of the age. How a chunk is summed up (`pooling`), ties between pauses, one mean time a
    chunk, projections shared by the branches, and coefficients that start at 0 are ours.

    Args:
        sizes: of the backbone.
        num_heads: N, a divisor of D.
        num_chunks: C.
        num_last: m.
        window: w.
        branches: those of `BRANCHES` to use.
        pooling: mean, or learned: softmax over a chunk of <w_p, e_i>.
        time_bias: none; interval, time passed alone; composite, all of it.
        gated: False takes the mean of the branches, g = 1 / their number.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        num_heads: int = 2,
        num_chunks: int = 16,
        num_last: int = 4,
        window: int = 50,
        branches: Sequence[str] = BRANCHES,
        pooling: str = "mean",
        time_bias: str = "composite",
        gated: bool = True,
    ) -> None:
        super().__init__()
        width = sizes.embedding_dim
        if width % num_heads:
            raise ConfigError(f"SparseCTR: num_heads is {num_heads}, which does not divide embedding_dim {width}")
        for name, number in (("num_chunks", num_chunks), ("num_last", num_last), ("window", window)):
            if number < 1:
                raise ConfigError(f"SparseCTR: {name} is {number}, expected at least 1")
        if not branches or not set(branches) <= set(BRANCHES):
            raise ConfigError(f"SparseCTR: branches is {tuple(branches)}, expected some of {BRANCHES}")
        if pooling not in ("mean", "learned"):
            raise ConfigError(f"SparseCTR: pooling is {pooling!r}, expected mean or learned")
        if time_bias not in ("none", "interval", "composite"):
            raise ConfigError(f"SparseCTR: time_bias is {time_bias!r}, expected none, interval or composite")
        self.num_heads, self.num_chunks, self.num_last, self.window = num_heads, num_chunks, num_last, window
        self.branches = tuple(branch for branch in BRANCHES if branch in branches)
        slots = {"global": num_chunks, "transition": num_chunks * num_last, "local": window}
        self.sizes = [slots[branch] for branch in self.branches]
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.pool = nn.Linear(width, 1, bias=False) if pooling == "learned" else None
        self.num_times = {"none": 0, "interval": 1, "composite": 3}[time_bias]
        self.coefficient = nn.Parameter(torch.zeros(num_heads, self.num_times))
        self.gate = nn.Linear(width, len(self.branches) * num_heads) if gated else None

    def _heads(self, x: Float[Tensor, "G M D"]) -> Float[Tensor, "G N M E"]:
        return x.view(*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def summarise(self, history: History) -> Slots:
        """Return the slots of each branch, keys and values ready."""
        rows = torch.cat([history.embedding, relative_times(history.age)], 2)
        chunk = time_chunks(history.age, history.mask, self.num_chunks)
        chunks = torch.arange(self.num_chunks, device=chunk.device)
        member = (chunk[:, None] == chunks[:, None]) & history.mask[:, None]
        size = member.sum(2)
        found = []
        if "global" in self.branches:
            found.append((self._pooled(rows, history, member), size > 0))
        if "transition" in self.branches:
            back = torch.arange(self.num_last, device=chunk.device)
            places = (size.cumsum(1)[:, :, None] - 1 - back).flatten(1)
            found.append(_slots(rows, places, (back < size[:, :, None]).flatten(1)))
        if "local" in self.branches:
            places = history.mask.sum(1, keepdim=True) - 1 - torch.arange(self.window, device=chunk.device)
            found.append(_slots(rows, places, places >= 0))
        slots, mask = torch.cat([row for row, _ in found], 1), torch.cat([real for _, real in found], 1)
        embedding, time = torch.split(slots, [history.embedding.shape[2], 3], 2)
        return Slots(self._heads(self.W_k(embedding)), self._heads(self.W_v(embedding)), time, mask)

    def _pooled(
        self, rows: Float[Tensor, "G L S"], history: History, member: Bool[Tensor, "G C L"]
    ) -> Float[Tensor, "G C S"]:
        logits = rows.new_zeros(member.shape[0], 1, member.shape[2])
        if self.pool is not None:
            logits = self.pool(history.embedding).transpose(1, 2)
        return _masked_softmax(logits, member) @ rows

    def read(self, state: Slots, target: Target) -> Read:
        """Return v of each target."""
        logits = self._heads(self.W_q(target.embedding)) @ state.key.transpose(2, 3) / state.key.shape[3] ** 0.5
        logits = logits + (state.time[:, :, : self.num_times] @ self.coefficient.T).transpose(1, 2)[:, :, None]
        count = len(self.branches)
        if self.gate is None:
            gate = logits.new_full((1, self.num_heads, 1, count), 1 / count)
        else:
            gate = self.gate(target.embedding).sigmoid()
            gate = gate.view(*gate.shape[:2], self.num_heads, count).transpose(1, 2)
        of_branches = torch.split(logits, self.sizes, 3), torch.split(state.mask[:, None, None], self.sizes, 3)
        shares = torch.cat(list(map(_masked_softmax, *of_branches)), 3)
        weights = shares * gate.repeat_interleave(
            torch.tensor(self.sizes, device=gate.device), 3, output_size=sum(self.sizes)
        )
        return only_vector(self.W_o((weights @ state.value).transpose(1, 2).flatten(2)))


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax over what is real in the last dimension, or zeros where nothing is."""
    return F.softmax(logits.masked_fill(~mask, torch.finfo(logits.dtype).min), -1) * mask


def _slots(
    rows: Float[Tensor, "G L S"], places: Int64[Tensor, "G M"], real: Bool[Tensor, "G M"]
) -> tuple[Float[Tensor, "G M S"], Bool[Tensor, "G M"]]:
    """Return the rows at each history's places; those that are not real hold anything."""
    return gather_behaviors(rows, places.where(real, 0)[:, None])[:, 0], real
