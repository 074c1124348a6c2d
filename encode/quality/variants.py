"""ENCODE with each of its parts exchangeable: one row of the ablation a switch.

With its defaults a `Variant` is `interests.clustered.Clustered`, number for number.

    G histories   L behaviors of the longest   T targets   K clusters   D embedding_dim   P projected_dim
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from encode.config import ClusteringConfig
from encode.interests.kmeans import cluster
from encode.model.long_term import Behaviors, Catalog, History, Ints, LongTerm, Read, Sizes, Target
from encode.model.reduction import center_loss, linear_decoder, random_projection
from encode.model.relevance import (
    Remembered,
    attend_itself,
    relevance_of_all,
    remember,
    remember_categories,
    times_of,
    weigh,
)


class Moments(NamedTuple):
    """State of `Variant`: K interests, with second moments where they are asked for."""

    center: Float[Tensor, "G K P"]
    value: Float[Tensor, "G K D"]
    size: Float[Tensor, "G K"]
    log_prior: Float[Tensor, "G K"]
    scale: Float[Tensor, ""]
    variance: Float[Tensor, "G K P"] | None
    """Lambda_k: of the keys of a cluster, by coordinate."""
    covariance: Float[Tensor, "G K P D"] | None
    """Sigma_k: of keys and values of a cluster."""
    remembered: Remembered
    categories: Remembered


class Variant(LongTerm):
    """ENCODE (arXiv 2508.13567), and what could be had instead of each of its parts.

    beta_k = softmax_k(rho(h_t, c_k) + log prior_k [+ s^2 h_t^T Lambda_k h_t / 2]), v = sum_k beta_k z_k, where z_k may
    become z_k + s Sigma_k^T h_t, or z_k + s B^T Lambda_k h_t. With second moments the attention is exact in expectation
    for clusters that are Gaussian (s is the scale of the relevance): sum_i exp(s q.k_i) = n exp(s q.mu + s^2 q^T Lambda
    q / 2). Of Lambda_k, the covariance of a cluster's keys, the diagonal is kept.

    Args:
        sizes: of the backbone.
        num_clusters: K.
        grouping: k-means; or K equal chunks of time, the K - 1 most frequent categories and the others, or chance.
        metric: what k-means compares: the keys that targets attend by, the embeddings themselves, or a random
            projection of them. Anything but `key` parts offline from online (method R2).
        pooling: how a cluster's value is made.
        center: mean of the cluster's keys, which is shorter the wider the cluster is, or its direction.
        size_prior: eta, weight of log n_k.
        decay: lambda a day: n_k becomes sum_i exp(-lambda age_i).
        moments: second moments: none, of keys, of keys with their linear decoder, or of keys and with values.
        sharpness: of soft assignment, where behavior i counts for cluster k with softmax_k(sharpness rho(c_k, h_i));
            None is hard.
        affinity: whether the MLP gets the affinity to the interests as a whole.
        counts: whether it gets how often the target is remembered, log(1 + n_t).
        categories: whether it gets how often remembered items of its category are.
        center_weight: of the center loss (`reduction.center_loss`).
        reclustering: epochs of training after which histories are clustered anew; evaluation always clusters anew.
        remembered: M, items of a user, the most frequent ones, whose counts are kept by themselves. A target that is
            one of them attends to it as to a cluster of its own, with its own key and embedding: the one term of full
            attention that a cluster renders worst is that of the target itself. Its behaviors stay in their clusters.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        num_clusters: int = 32,
        grouping: Literal["kmeans", "time", "category", "random"] = "kmeans",
        metric: Literal["key", "embedding", "random", "joint"] = "key",
        value_weight: float = 1.0,
        pooling: Literal["mean", "relevance"] = "mean",
        center: Literal["mean", "unit"] = "mean",
        size_prior: float = 1.0,
        decay: float = 0.0,
        moments: Literal["none", "keys", "decoded", "values"] = "decoded",
        rank: int | None = None,
        sharpness: float | None = None,
        affinity: bool = True,
        remembered: int = 4096,
        counts: bool = True,
        categories: bool = True,
        center_weight: float = 0.01,
        reclustering: int = 1,
    ) -> None:
        super().__init__()
        self.num_scalars = affinity + counts + categories
        self.clustering = ClusteringConfig(num_clusters=num_clusters)
        self.grouping, self.metric, self.pooling, self.center = grouping, metric, pooling, center
        self.size_prior, self.decay, self.moments, self.sharpness = size_prior, decay, moments, sharpness
        self.remembered, self.counts, self.categories = remembered, counts, categories
        self.center_weight = center_weight
        if reclustering < 1:
            raise ValueError(f"reclustering: found {reclustering}, expected at least 1")
        self.reclustering, self.epoch = reclustering, 0
        self.clustered_by: Catalog | None = None
        self.affinity, self.value_weight = affinity, value_weight
        narrow = torch.randn(sizes.embedding_dim, rank) / sizes.embedding_dim**0.5 if rank else None
        self.narrow = nn.Parameter(narrow) if narrow is not None else None
        self.decoder: Tensor
        self.register_buffer("decoder", torch.zeros(sizes.projected_dim, sizes.embedding_dim))
        generator = torch.Generator().manual_seed(1)
        self.other: Tensor
        self.register_buffer("other", random_projection(sizes.embedding_dim, sizes.projected_dim, generator))

    def follow(self, catalog: Catalog, count: Float[Tensor, " V"]) -> None:
        """Fit how embeddings change where keys do; before an epoch, take over its tables to cluster by."""
        self.decoder = linear_decoder(catalog.key, catalog.embedding, count)
        if self.training:
            self.clustered_by = catalog if self.epoch % self.reclustering == 0 else self.clustered_by
            self.epoch += 1

    def assign(self, catalog: Catalog, behaviors: Behaviors) -> Ints:
        """Return the cluster of each behavior within its history, [N]."""
        if self.training and self.clustered_by is not None:
            catalog = self.clustered_by
        offsets, num_clusters = behaviors.offsets, self.clustering.num_clusters
        lengths = np.diff(offsets)
        if self.grouping == "time":
            place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
            return np.asarray(place * num_clusters // np.repeat(lengths, lengths))
        if self.grouping == "random":
            drawn: Ints = np.random.default_rng(0).integers(num_clusters, size=offsets[-1])
            return drawn
        if self.grouping == "category":
            rank: Ints = np.minimum(_rank_of_category(behaviors), num_clusters - 1)
            return rank
        if self.metric == "key":
            table = catalog.key
        elif self.metric == "joint":
            value = catalog.embedding[behaviors.item]
            if len(catalog.kind) > 1:
                value = value + catalog.kind[behaviors.kind]
            joint = torch.cat([catalog.key[behaviors.item], self.value_weight * F.normalize(value, dim=1)], 1)
            return cluster(F.normalize(joint, dim=1).numpy(), offsets, behaviors.user_ids, self.clustering).astype(
                np.int64
            )
        else:
            reduced = catalog.embedding if self.metric == "embedding" else catalog.embedding @ self.other
            table = F.normalize(reduced, dim=1)
        keys = table.numpy()[behaviors.item]
        return cluster(keys, offsets, behaviors.user_ids, self.clustering).astype(np.int64)

    def summarise(self, history: History) -> Moments:
        """Pool the clusters of each history."""
        num_clusters = self.clustering.num_clusters
        member = F.one_hot(history.cluster, num_clusters) * history.mask[..., None]
        share = member.to(history.key.dtype).transpose(1, 2)  # G K L
        total = share @ history.key
        if self.sharpness is not None:
            near = self.sharpness * relevance_of_all(F.normalize(total, dim=2), history.key, history.scale)
            near = near.masked_fill(~member.any(1)[..., None], torch.finfo(near.dtype).min)
            share = near.softmax(1) * history.mask[:, None]
            total = share @ history.key
        size = share.sum(2)
        count = size.clamp(min=1e-6)[..., None]
        unit = F.normalize(total, dim=2)
        mean = total / count
        weight = share
        if self.pooling == "relevance":
            # rho(c, h) is at most the scale, so subtracting it keeps exp in range.
            weight = share * torch.exp(relevance_of_all(unit, history.key, history.scale) - history.scale)
        mass = weight.sum(2, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        value = (weight @ history.embedding) / mass
        if self.decay:
            prior = (share * torch.exp(-self.decay * history.age)[:, None]).sum(2)
            log_prior = self.size_prior * prior.clamp(min=1e-6).log()
        else:
            log_prior = self.size_prior * size.clamp(min=1e-6).log()
        variance = covariance = None
        if self.moments != "none":
            variance = (share @ history.key.square()) / count - mean.square()
        if self.moments == "values":
            values = history.embedding if self.narrow is None else history.embedding @ self.narrow
            pairs = history.key[..., None] * values[:, :, None]  # G L P D
            covariance = (share @ pairs.flatten(2)).view(*size.shape, *pairs.shape[2:]) / count[..., None]
            covariance = covariance - mean[..., None] * (share @ values / count)[:, :, None]
        remembered = remember(history.item, self.remembered)
        categories = remember_categories(history.item, history.category, remembered, self.remembered)
        return Moments(mean, value, size, log_prior, history.scale, variance, covariance, remembered, categories)

    def profile(self, state: Moments, history: History) -> Float[Tensor, "G D"]:
        """Return the mean of the interests by size."""
        share = state.size / state.size.sum(1, keepdim=True).clamp(min=1e-6)
        return (share[:, None] @ state.value).squeeze(1)

    def auxiliary_loss(self, state: Moments, history: History) -> Float[Tensor, ""]:
        """Return the center loss, weighted."""
        return self.center_weight * center_loss(state.center, state.size, state.scale)

    def read(self, state: Moments, target: Target) -> Read:
        """Return v, the affinity of the target to the interests as a whole, and how often it and its like are kept."""
        prior = state.log_prior.masked_fill(state.size == 0, torch.finfo(target.key.dtype).min)[:, None]
        center = F.normalize(state.center, dim=2) if self.center == "unit" else state.center
        logits = relevance_of_all(target.key, center, state.scale) + prior
        if state.variance is not None:
            spread = target.key.square() @ state.variance.transpose(1, 2)
            logits = logits + 0.5 * state.scale.square() * spread
        times = times_of(target.item, state.remembered)
        own, own_prior = attend_itself(target.key, times, state.scale, self.size_prior)
        logits = torch.cat([logits, own], 2)
        prior = torch.cat([prior.expand(-1, own.shape[1], -1), own_prior], 2)
        every, affinity = weigh(logits, prior)
        weights = every[..., :-1]
        vector = weights @ state.value + every[..., -1:] * target.embedding
        if self.moments == "decoded" and state.variance is not None:
            vector = vector + (state.scale * target.key * (weights @ state.variance)) @ self.decoder
        if state.covariance is not None:
            tilted = torch.einsum("gtk,gtp,gkpd->gtd", weights, state.scale * target.key, state.covariance)
            vector = vector + (tilted if self.narrow is None else tilted @ self.narrow.T)
        in_category = times_of(target.category, state.categories)
        counts = [*([times] if self.counts else []), *([in_category] if self.categories else [])]
        scalars = [*([affinity] if self.affinity else []), *(count.to(affinity.dtype).log1p() for count in counts)]
        return Read(vector[:, :, None], torch.stack(scalars, 2) if scalars else vector[..., :0])


def _rank_of_category(behaviors: Behaviors) -> Ints:
    """Return for each behavior how many categories are more frequent in its history than its own, [N]."""
    owner = np.repeat(np.arange(len(behaviors.user_ids)), np.diff(behaviors.offsets))
    pair, inverse, count = np.unique(
        owner * (behaviors.category.max(initial=0) + 1) + behaviors.category, return_inverse=True, return_counts=True
    )
    of = pair // (behaviors.category.max(initial=0) + 1)
    order = np.lexsort((pair, -count, of))
    rank = np.empty(len(pair), np.int64)
    first = np.searchsorted(of, of[order])
    rank[order] = np.arange(len(pair)) - first
    return rank[inverse]
