"""What the search models share: pick the k behaviors that a target scores highest, then attend to these alone.

    G histories   T targets   L behaviors   k behaviors kept   N num_heads   Q query_dim   S key_dim   W width

Scores are [G, T, L] and what is gathered is [G, T, k, S]: nothing here is as large as [G, T, L, S].
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encode.errors import ConfigError


def check_counts(model: str, **counts: int) -> None:
    """Raise `ConfigError` where an option that counts something is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{model}: {name} is {count}, expected at least 1")


@torch.no_grad()
def top_behaviors(
    score: Float[Tensor, "G T L"], mask: Bool[Tensor, "G L"], k: int
) -> tuple[Int64[Tensor, "G T k"], Bool[Tensor, "G T k"]]:
    """Return where the k highest scores are, oldest first, and which of these places are real.

    Of behaviors with the same score the latest are kept, on every device and whatever the padding. A score of -inf
    is never kept. Where fewer than k are kept the rest is padding, at the end: place 0, mask False. No gradient
    passes: a place has none.

    Args:
        score: of each behavior for each target; not NaN.
        mask: True where there is a behavior.
        k: behaviors to keep, at least 1; it may exceed L, and k places are returned all the same.
    """
    length, nothing = score.shape[2], float("-inf")
    score = score.masked_fill(~mask[:, None], nothing)
    best, places = score.topk(min(k + 1, length), dim=2)
    if length > k:
        # Where the first to be left out scores as much as the last to be kept, `topk` may have taken either. Sorting
        # them all, which is slower, takes the latest.
        tied = (best[..., k - 1] == best[..., k]) & (best[..., k] > nothing)
        places[tied] = length - 1 - score[tied].flip(1).sort(dim=1, descending=True, stable=True).indices[:, : k + 1]
        best, places = best[..., :k], places[..., :k]
    # What is padding gets a place after all others, so that it sorts last.
    places = places.masked_fill(best == nothing, length).sort(dim=2).values
    places = F.pad(places, (0, k - places.shape[2]), value=length)
    kept = places < length
    return places * kept, kept


def gather_behaviors(values: Float[Tensor, "G L S"], places: Int64[Tensor, "G T k"]) -> Float[Tensor, "G T k S"]:
    """Return what each target's places point at; padded places point at the first behavior, or at zero if L is 0."""
    num_histories, length, width = values.shape
    if length == 0:
        return values.new_zeros(*places.shape, width)
    offset = length * torch.arange(num_histories, device=places.device)
    return F.embedding(places + offset[:, None, None], values.flatten(0, 1))


class MultiHeadTargetAttention(nn.Module):
    r"""Attention of each target to its own k behaviors, with N heads, as in SIM, ETA, TWIN and MIRRN.

    head_n = sum_j a_nj W_v^n x_j with a_n = softmax_j( (W_q^n q)^T W_k^n x_j / sqrt(W / N) ), and what is returned is
    W_o [head_1; ...; head_N]. q is the target and x_j a behavior; each head works in W / N dimensions. No matrix has a
    bias, so that a target without behaviors takes exactly zero.

    Keys and values are never formed: W_k^n is applied to the query instead and W_v^n to the weighted sum, which gives
    the same by linearity with k times fewer products.
    """

    def __init__(self, query_dim: int, key_dim: int, num_heads: int, width: int) -> None:
        super().__init__()
        check_counts("MultiHeadTargetAttention", num_heads=num_heads)
        if width % num_heads:
            raise ConfigError(f"MultiHeadTargetAttention: num_heads is {num_heads}, which does not divide {width}")
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.W_q = nn.Linear(query_dim, width, bias=False)
        self.W_k = nn.Linear(key_dim, width, bias=False)
        self.W_v = nn.Linear(key_dim, width, bias=False)
        self.W_o = nn.Linear(width, width, bias=False)

    def fold(self, query: Float[Tensor, "G T Q"]) -> Float[Tensor, "G T N S"]:
        """Return r_n = (W_k^n)^T W_q^n q / sqrt(W / N), so that the logit of x for head n is r_n^T x."""
        by_head = self.W_q(query).view(*query.shape[:2], self.num_heads, self.head_dim) / self.head_dim**0.5
        return torch.einsum("gtne,nes->gtns", by_head, self.W_k.weight.view(self.num_heads, self.head_dim, -1))

    def combine(self, pooled: Float[Tensor, "G T N S"]) -> Float[Tensor, "G T W"]:
        """Return W_o [W_v^1 p_1; ...; W_v^N p_N] of the weighted sums p_n = sum_j a_nj x_j."""
        heads = torch.einsum("gtns,nes->gtne", pooled, self.W_v.weight.view(self.num_heads, self.head_dim, -1))
        output: Tensor = self.W_o(heads.flatten(2))
        return output

    def forward(
        self, query: Float[Tensor, "G T Q"], values: Float[Tensor, "G T k S"], mask: Bool[Tensor, "G T k"]
    ) -> Float[Tensor, "G T W"]:
        """Return what each target takes from its behaviors; zero where it has none.

        Args:
            query: q of each target.
            values: x_j, each target's own; any finite number where padded.
            mask: True where there is a behavior.
        """
        return self.combine(softmax_over(self.fold(query) @ values.transpose(2, 3), mask[:, :, None]) @ values)


def softmax_over(logits: Float[Tensor, "... k"], mask: Bool[Tensor, ...]) -> Float[Tensor, "... k"]:
    """Return the softmax over what is real along the last axis; zeros, with finite gradients, where nothing is."""
    return F.softmax(logits.masked_fill(~mask, torch.finfo(logits.dtype).min), -1) * mask
