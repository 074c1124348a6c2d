"""The one relevance metric, and the one attention built on it.

ENCODE's point (arXiv 2508.13567, R2) is that training, reduction, clustering, pooling and serving agree on what
"relevant" means. Each of them calls `relevance`; none has a metric of its own.

    G groups: users, or single impressions   T targets of each   M slots that they attend to, or items
    N behaviors   L behaviors of a history   K clusters a user   D embedding_dim   P projected_dim
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from encode.schema import MOST_TIMES, PADDING, UNKNOWN


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
    prior = prior[:, None]
    weights, affinity = weigh(relevance_of_all(query, keys, scale) + prior, prior)
    return Attention(weights @ values, affinity, weights)


def weigh(
    logits: Float[Tensor, "G T M"], log_prior: Float[Tensor, "G _ M"]
) -> tuple[Float[Tensor, "G T M"], Float[Tensor, "G T"]]:
    """Return the softmax over slots, and the affinity to all of them; see `Attention`.

    Args:
        logits: relevance plus prior.
        log_prior: of each target or of all, in nats; the lowest number, in the logits too, where there is no slot.

    Returns:
        Weights and affinity; 0 where there is no slot at all.
    """
    some = (log_prior > torch.finfo(logits.dtype).min).any(2)
    affinity = (torch.logsumexp(logits, 2) - torch.logsumexp(log_prior, 2)).where(some, 0)
    return F.softmax(logits, 2) * some[..., None], affinity


class Interests(NamedTuple):
    """K interests of each of G users, ready to be attended to."""

    center: Float[Tensor, "G K P"]
    """c_k: mean of the cluster's keys, the shorter the wider the cluster; zero where it is empty."""
    value: Float[Tensor, "G K D"]
    """z_k: pooled embeddings of the cluster's behaviors; zero where it is empty."""
    size: Float[Tensor, "G K"]
    """n_k: behaviors in the cluster."""
    variance: Float[Tensor, "G K P"]
    """lambda_k: variance of the cluster's keys, by coordinate."""
    scale: Float[Tensor, ""]
    """Of the relevance by which they were pooled and are attended to."""


class Remembered(NamedTuple):
    """The most frequent items of each of G users, kept by themselves beside the interests; or their categories."""

    item: Int64[Tensor, "G M"]
    """Vocabulary or category index, ascending; the largest int64 where there are fewer than M."""
    times: Int64[Tensor, "G M"]
    """How many behaviors are with it, at most 65,535; 0 where there is none."""


NO_ITEM = torch.iinfo(torch.int64).max


def remember(item: Int64[Tensor, "G L"], num_items: int) -> Remembered:
    """Return the most frequent items of each history, the smaller index first among equals.

    Args:
        item: vocabulary (or category) index of each behavior; padding and what is unknown are not remembered.
        num_items: M at most.
    """
    if num_items == 0:
        return Remembered(item.new_full((len(item), 1), NO_ITEM), item.new_zeros(len(item), 1))
    known = F.pad(item, (0, 1)).masked_fill(F.pad(item, (0, 1)) <= UNKNOWN, NO_ITEM)
    ordered = torch.from_numpy(np.sort(known.numpy(force=True), 1)).to(item.device)  # many times faster than torch's
    # Where a run of one item begins; rows follow one another, and each begins a run.
    start = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True).flatten().nonzero().squeeze(1)
    times = start.diff(append=start.new_tensor([ordered.numel()]))
    found, owner = ordered.flatten()[start], start // ordered.shape[1]
    real = found != NO_ITEM
    found, owner, times = found[real], owner[real], times[real]
    distinct = torch.bincount(owner, minlength=len(item))
    place = torch.arange(len(owner), device=item.device) - (distinct.cumsum(0) - distinct)[owner]
    shape = (len(item), max(1, int(distinct.max())) if len(item) else 1)
    remembered = Remembered(item.new_full(shape, NO_ITEM), item.new_zeros(shape))
    remembered.item[owner, place], remembered.times[owner, place] = found, times
    if shape[1] > num_items:
        kept = remembered.times.sort(dim=1, descending=True, stable=True).indices[:, :num_items].sort(1).values
        remembered = Remembered(remembered.item.gather(1, kept), remembered.times.gather(1, kept))
    return remembered._replace(times=remembered.times.clamp(max=MOST_TIMES))


def remember_categories(
    item: Int64[Tensor, "G L"], category: Int64[Tensor, "G L"], remembered: Remembered, num_categories: int
) -> Remembered:
    """Return the most frequent categories of each history's remembered items; what is not remembered does not count.

    Args:
        item: vocabulary index of each behavior.
        category: category index of each behavior.
        remembered: items.
        num_categories: at most.
    """
    return remember(category.masked_fill(times_of(item, remembered) == 0, PADDING), num_categories)


def attend_interests(
    query: Float[Tensor, "G T P"],
    times: Int64[Tensor, "G T"],
    embedding: Float[Tensor, "G T D"],
    interests: Interests,
    decoder: Float[Tensor, "P D"],
    size_prior: float,
) -> Attention:
    """Return what targets take from interests, and from what is remembered of themselves.

    A cluster is wide, so its behaviors are not all as relevant as its center. To the second order in their spread
    sum_i exp(s <h_t, h_i>) = n_k exp(s <h_t, c_k> + s^2 <h_t^2, lambda_k> / 2), and within the cluster attention moves
    the mean key by s lambda_k h_t, and with it the value by the `decoder`: z_k + B^T (s lambda_k h_t). Exact for keys
    that are Gaussian with independent coordinates and embeddings linear in them. Ours, not the paper's.

    A target that is remembered attends to its own n_t behaviors as to one more interest, with center h_t and value
    e_t. That term of full attention, n_t exp(rho(h_t, h_t)), is the largest that there can be, and the one that a
    cluster renders worst; where people repeat themselves it is most of the answer. Ours, not the paper's.

    Args:
        query: h_t, unit vectors.
        times: n_t, how many behaviors are with each target itself; see `times_of`.
        embedding: e_t.
        interests: of each user.
        decoder: B, how embeddings change where keys do; see `reduction.linear_decoder`.
        size_prior: eta, weight of log n_k and of log n_t.

    Returns:
        Weights [G, T, K + 1], that of the target itself last; 0 there for one that is not remembered.
    """
    lowest = torch.finfo(query.dtype).min
    prior = (size_prior * interests.size.clamp(min=1).log()).masked_fill(interests.size == 0, lowest)[:, None]
    own, own_prior = attend_itself(query, times, interests.scale, size_prior)
    spread = 0.5 * interests.scale.square() * (query.square() @ interests.variance.transpose(1, 2))
    logits = torch.cat([relevance_of_all(query, interests.center, interests.scale) + spread + prior, own], 2)
    prior = torch.cat([prior.expand(-1, times.shape[1], -1), own_prior], 2)
    weights, affinity = weigh(logits, prior)
    moved = interests.scale * query * (weights[..., :-1] @ interests.variance)
    value = weights[..., :-1] @ interests.value + moved @ decoder + weights[..., -1:] * embedding
    return Attention(value, affinity, weights)


def attend_itself(
    query: Float[Tensor, "G T P"],
    times: Int64[Tensor, "G T"],
    scale: Float[Tensor, ""],
    size_prior: float,
) -> tuple[Float[Tensor, "G T 1"], Float[Tensor, "G T 1"]]:
    """Return logit rho(h_t, h_t) + prior and prior eta log n_t of what is remembered of each target itself.

    Both are the lowest number where a target is not remembered.
    """
    prior = size_prior * times.clamp(min=1).to(query.dtype).log()
    prior = prior.masked_fill(times == 0, torch.finfo(query.dtype).min)[..., None]
    return prior + relevance(query, query, scale)[..., None], prior


def times_of(item: Int64[Tensor, "G T"], remembered: Remembered) -> Int64[Tensor, "G T"]:
    """Return how many behaviors are with each item; 0 for one that is not remembered."""
    place = torch.searchsorted(remembered.item, item.contiguous()).clamp(max=remembered.item.shape[1] - 1)
    return remembered.times.gather(1, place).where(remembered.item.gather(1, place) == item, 0)


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

    c_k and z_k are the means of the cluster's keys and embeddings: so sum_i exp(rho(h_t, h_i)) and the sum weighted by
    it are right to the first order in the cluster's spread. Or z_k = sum_i w_i e_i with w_i = softmax over the cluster
    of rho(c_k / |c_k|, h_i), from the same relevance that the target will use. Both are ours: the paper's summaries do
    not say how values are pooled, and centers that are unit vectors, as in spherical k-means, overstate wide clusters.

    Args:
        embedding: e_i of all behaviors of all users, in any order.
        key: h_i, unit vectors.
        segment: user * num_clusters + cluster of each behavior; num_users * num_clusters for what counts nowhere.
        num_users: G; users without behaviors get empty clusters.
        num_clusters: K.
        scale: of the relevance.
        by_relevance: False pools by the mean.
    """
    total = num_users * num_clusters

    def summed(rows: Float[Tensor, "N C"]) -> Float[Tensor, "S C"]:
        return rows.new_zeros(total + 1, rows.shape[1]).index_add(0, segment, rows)[:total]

    size = torch.bincount(segment, minlength=total + 1)[:total].to(key.dtype)
    center = summed(key) / size.clamp(min=1)[:, None]
    variance = (summed(key.square()) / size.clamp(min=1)[:, None] - center.square()).clamp(min=0)
    if by_relevance:
        direction = F.pad(F.normalize(center, dim=1), (0, 0, 0, 1))
        # rho(c, h) is at most the scale, so subtracting it keeps exp in range without a maximum per segment.
        weight = torch.exp(relevance(direction[segment], key, scale) - scale)[:, None]
        value = summed(weight * embedding) / summed(weight).where(size[:, None] > 0, 1)
    else:
        value = summed(embedding) / size.clamp(min=1)[:, None]
    shape = (num_users, num_clusters)
    # Not -1: with no users it would be ambiguous.
    return Interests(
        center.view(*shape, key.shape[1]),
        value.view(*shape, embedding.shape[1]),
        size.view(shape),
        variance.view(*shape, key.shape[1]),
        scale,
    )
