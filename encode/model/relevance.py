"""The one relevance metric, and the one attention built on it.

ENCODE's point (arXiv 2508.13567, R2) is that training, reduction, clustering, pooling and serving agree on what
"relevant" means. Each of them calls `relevance`; none has a metric of its own.

    G groups: users, or single impressions   T targets of each   M slots that they attend to: interests or behaviors
    N behaviors   K clusters a user   D embedding_dim   P projected_dim
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F


def relevance(query: Float[Tensor, "... P"], key: Float[Tensor, "... P"], scale: Tensor) -> Float[Tensor, ...]:
    """Return rho(q, k) = scale * <q, k> for unit vectors: the scaled cosine.

    On unit vectors ||q - k||^2 = 2 - 2 <q, k>, so "nearest center" and "most relevant center" are the same
    statement. We differ from scaled dot products in that lengths do not count: an item cannot be relevant to
    everything by having a long vector. `scale` is one learned number for all users and steps.
    """
    return scale * (query * key).sum(-1)


def relevance_of_all(
    query: Float[Tensor, "G T P"], keys: Float[Tensor, "G M P"], scale: Tensor
) -> Float[Tensor, "G T M"]:
    """Return `relevance` of every pair of a group as one product of matrices."""
    return (scale * query) @ keys.transpose(1, 2)


class Attention(NamedTuple):
    """What a target takes from the slots it attends to."""

    value: Float[Tensor, "G T D"]
    """sum_m beta_m z_m; zero where every slot is masked."""
    affinity: Float[Tensor, "G T"]
    """log sum_m exp(rho + prior), less the log of the total prior mass: how relevant the slots are as a whole.
    Softmax alone forgets it. 0 where every slot is masked. Ours, not the paper's."""
    weights: Float[Tensor, "G T M"]
    """beta: softmax over the slots."""


def attend(
    query: Float[Tensor, "G T P"],
    keys: Float[Tensor, "G M P"],
    values: Float[Tensor, "G M D"],
    log_prior: Float[Tensor, "G M"],
    mask: Bool[Tensor, "G M"],
    scale: Tensor,
) -> Attention:
    """Return v = sum_m beta_m z_m with beta = softmax_m(rho(h_t, c_m) + prior_m), arXiv 2508.13567, online stage.

    With a prior of log n_m this is exact full attention when all keys of a cluster coincide with its center:
    sum_{i in m} exp(q k_i) = n_m exp(q c_m). If keys lie within eps of their center, each logit moves by at most
    delta = scale * eps and the result by at most (e^(2 delta) - 1) max |v|, whatever the length of the history, for
    values pooled by the mean; pooled by relevance, the exponent is 2 delta + scale * eps^2 / 2.

    Args:
        query: unit vectors h_t.
        keys: unit vectors.
        values: embeddings, in step with `keys`; finite where masked.
        log_prior: log weight of a slot in nats; 0 for none.
        mask: True where a slot is real.
        scale: of the relevance.
    """
    # The lowest number rather than -inf: a group without any slot gives zeros then, and finite gradients.
    prior = log_prior.masked_fill(~mask, torch.finfo(query.dtype).min)
    logits = relevance_of_all(query, keys, scale) + prior[:, None]
    weights = F.softmax(logits, 2) * mask[:, None]
    mass = torch.logsumexp(prior, 1)[:, None]
    affinity = (torch.logsumexp(logits, 2) - mass).where(mask.any(1)[:, None], 0)
    return Attention(weights @ values, affinity, weights)


class Interests(NamedTuple):
    """K interests of each of G users, ready to be attended to."""

    center: Float[Tensor, "G K P"]
    """c_k: unit vectors; zero where the cluster is empty."""
    value: Float[Tensor, "G K D"]
    """z_k: pooled embeddings of the cluster's behaviors; zero where it is empty."""
    size: Float[Tensor, "G K"]
    """n_k: behaviors in the cluster."""
    scale: Float[Tensor, ""]
    """Of the relevance by which they were pooled and are attended to."""


def pool_interests(
    embedding: Float[Tensor, "N D"],
    key: Float[Tensor, "N P"],
    segment: Int64[Tensor, " N"],
    num_users: int,
    num_clusters: int,
    scale: Tensor,
    by_relevance: bool,
) -> Interests:
    """Pool each cluster's behaviors into an interest; differentiable in embeddings, keys and scale.

    c_k = normalize(sum_i h_i), z_k = sum_i w_i e_i with w_i = softmax over the cluster of rho(c_k, h_i), or the
    plain mean. The weights come from the same relevance that the target will use (ours; the paper's summaries do
    not say how values are pooled).

    Args:
        embedding: e_i of all behaviors of all users, in any order.
        key: h_i, unit vectors.
        segment: user * num_clusters + cluster of each behavior.
        num_users: G; users without behaviors get empty clusters.
        num_clusters: K.
        scale: of the relevance.
        by_relevance: False pools by the mean.
    """
    total = num_users * num_clusters
    center = F.normalize(key.new_zeros(total, key.shape[1]).index_add(0, segment, key), dim=1)
    ones = torch.ones_like(segment, dtype=key.dtype)
    size = key.new_zeros(total).index_add(0, segment, ones)
    # rho(c, h) is at most the scale, so subtracting it keeps exp in range without a maximum per segment.
    weight = torch.exp(relevance(center[segment], key, scale) - scale) if by_relevance else ones
    mass = key.new_zeros(total).index_add(0, segment, weight)
    share = weight / mass[segment]
    value = embedding.new_zeros(total, embedding.shape[1]).index_add(0, segment, embedding * share[:, None])
    shape = (num_users, num_clusters)
    # Not -1: with no users it would be ambiguous.
    return Interests(center.view(*shape, key.shape[1]), value.view(*shape, embedding.shape[1]), size.view(shape), scale)
