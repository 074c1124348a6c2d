"""Metric learning: W_h is trained to keep relative distances of behaviors, and the keys to lie close to centers.

T triplets   G histories   K clusters   D embedding_dim   P projected_dim
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

_SAME = 1e-6
"""Differences of cosines below this are rounding, not an order."""


def random_projection(embedding_dim: int, projected_dim: int, generator: torch.Generator) -> Float[Tensor, "D P"]:
    """Return a Gaussian random projection with E ||W^T e||^2 = ||e||^2 (Johnson-Lindenstrauss), the start of W_h."""
    projection: Tensor = torch.randn(embedding_dim, projected_dim, generator=generator) / projected_dim**0.5
    return projection


def principal_projection(
    embedding: Float[Tensor, "V D"], count: Float[Tensor, " V"], projected_dim: int
) -> Float[Tensor, "D P"]:
    """Return the P directions along which the embeddings vary most, items weighted by how often they occur.

    Embeddings are not centered: relevance is a cosine, which shifting would change.
    """
    moment = embedding.T @ (embedding * (count / count.sum().clamp(min=1))[:, None])
    directions: Tensor = torch.linalg.eigh(moment).eigenvectors[:, -projected_dim:]
    return directions.flip(1)


def linear_decoder(
    key: Float[Tensor, "V P"], embedding: Float[Tensor, "V D"], count: Float[Tensor, " V"]
) -> Float[Tensor, "P D"]:
    """Return B of the least squares fit e - E[e] = B^T (h - E[h]), items weighted by how often they occur.

    It tells how embeddings change on average where keys do.
    """
    share = (count / count.sum().clamp(min=1)).double()[:, None]
    h, e = key.double(), embedding.double()
    h, e = h - (share * h).sum(0), e - (share * e).sum(0)
    moment = h.T @ (share * h) + 1e-6 * torch.eye(key.shape[1], dtype=h.dtype)  # keys may span less than P directions
    decoder: Tensor = torch.linalg.solve(moment, h.T @ (share * e))
    return decoder.to(key.dtype)


def draw_triplets(lengths: Int64[Tensor, " U"], num_triplets: int, generator: torch.Generator) -> Int64[Tensor, "T 4"]:
    """Draw (user, anchor, other, another), the last three uniformly from the places of that user's history.

    Args:
        lengths: number of behaviors of each user.
        num_triplets: T at most: users with fewer than 3 behaviors give none.
        generator: drawn anew at every update, from one seeded stream.
    """
    users = torch.nonzero(lengths >= 3).squeeze(1)
    if len(users) == 0:
        return lengths.new_zeros(0, 4)
    user = users[torch.randint(len(users), (num_triplets,), generator=generator)]
    place = (torch.rand(num_triplets, 3, generator=generator) * lengths[user, None]).long()
    return torch.cat([user[:, None], place], 1)


def dynamic_triplet_loss(
    original: Float[Tensor, "T 3 D"],
    projected: Float[Tensor, "T 3 P"],
    margin_weight: float,
    margin: Literal["dynamic", "fixed"],
    semi_hard: bool = False,
    category: Int64[Tensor, "T 3"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean of L = [D_h(a, p) - D_h(a, n) + alpha]_+ with D = 1 - cos.

    Of the two other behaviors the one more relevant to the anchor in the *original* space is the positive. The
    dynamic margin alpha = lambda (D_e(a, n) - D_e(a, p)) asks the projection to keep *how much* closer, too; a
    fixed one, alpha = lambda, keeps order only. `original` is detached: the reduction follows the embeddings, not
    the other way round. Known of the paper: a "dynamic triplet loss" over (anchor, positive, negative); the
    selection rule and the form of the margin are ours.

    Args:
        original: e of anchor and two others; triplets of equal others (distance difference 0) add no loss.
        projected: h of the same behaviors, of any length.
        margin_weight: lambda, or the margin itself when `margin` is "fixed".
        margin: which of the two.
        semi_hard: only triplets whose order the projection keeps already, though not by the margin, add loss.
        category: of the three; then only triplets add loss of which one other is of the anchor's category. That one is
            the positive.
    """
    if len(original) == 0:
        return projected.sum() * 0
    gap = _distance_gap(original.detach())
    order = torch.sign(gap) * (gap.abs() > _SAME)
    if category is not None:
        same = (category[:, :1] == category[:, 1:]).to(gap.dtype)
        order = same[:, 0] - same[:, 1]
    kept = order * _distance_gap(projected)
    alpha = margin_weight * (gap.abs() if margin == "dynamic" else torch.ones_like(gap))
    counts = (order != 0) & (kept > 0 if semi_hard else True)
    return (F.relu(alpha - kept) * counts).mean()


def center_loss(center: Float[Tensor, "G K P"], size: Float[Tensor, "G K"], scale: Tensor) -> Float[Tensor, ""]:
    """Return the mean of L = s^2 sum_i |h_i - c_k(i)|^2 / (n P) over histories: what clustering leaves out.

    Center loss (Wen et al., ECCV 2016) of the keys, with the centers that the history has at the moment. For a target
    in a random direction, s^2 |h_i - c_k|^2 / P is the variance of its relevance to the behaviors of a cluster, which
    attention to the center alone does not see. Centers are means of unit vectors, for which the sum over a cluster is
    n_k (1 - |c_k|^2): nothing but the interests is needed. The scale is detached, or it would be lowered instead of the
    keys being moved. Ours, not the paper's.

    Args:
        center: means of the keys of each cluster.
        size: n_k; a history without behaviors adds no loss, but counts in the mean.
        scale: s, of the relevance.
    """
    within = (size * (1 - center.square().sum(2))).sum(1) / size.sum(1).clamp(min=1)
    return scale.detach().square() * within.sum() / (center.shape[2] * max(1, len(within)))


def _distance_gap(triplet: Float[Tensor, "T 3 C"]) -> Float[Tensor, " T"]:
    """D(anchor, third) - D(anchor, second), positive where the second is closer."""
    cosine = F.cosine_similarity(triplet[:, :1], triplet[:, 1:], dim=2)
    return cosine[:, 0] - cosine[:, 1]
