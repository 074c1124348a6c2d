"""TWIN-V2: a life of behaviors as clusters of bounded size, searched and read by one attention (arXiv 2407.16357).

    G histories   T targets   L behaviors   C clusters of the history that has most   D embedding_dim   H num_heads
    V vocabulary   N behaviors of all histories

Si et al., CIKM 2024.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encode.config import ClusteringConfig
from encode.interests.kmeans import cluster
from encode.model.long_term import Behaviors, Catalog, History, Ints, LongTerm, Read, Sizes, Target, only_vector
from encode.quality.rivals.retrieved import (
    MultiHeadTargetAttention,
    check_counts,
    gather_behaviors,
    softmax_over,
    top_behaviors,
)
from encode.quality.rivals.sim import NUM_GAPS, time_gap

_EXPONENT = 0.3
"""A cluster of n behaviors is split into floor(n^0.3), the paper's delta."""
_NUM_LEVELS = 24
"""What is still too large then, k-means peels off behavior by behavior: it is cut by time."""
_BLOCK = 1 << 18
"""Behaviors clustered at a time, about: their vectors are copied for it."""


class VirtualItems(NamedTuple):
    """State of `TwinV2`: the clusters of each history as if each were one behavior."""

    embedding: Float[Tensor, "G C D"]
    """x, whatever it may be where there is no such cluster."""
    bias: Float[Tensor, "G H C"]
    """What cluster size, age and kind add to the logit, whatever the target."""
    size: Float[Tensor, "G C"]
    """n: members; 0 where there is no such cluster."""


class TwinV2(LongTerm):
    r"""Hierarchical k-means, virtual items, and attention that knows how many behaviors stand behind each.

    Offline, recursively: a cluster c of more than gamma behaviors is split by k-means into floor(|c|^0.3). Cluster j
    becomes a virtual item x_j: numbers are averaged, categories are those of the member nearest to the centroid, whose
    embedding it therefore has. The one attention that both searches and reads is, for each head,

        alpha_j = (W_q e_t)^T (W_k x_j) / sqrt(D / H) + beta_j + ln n_j
        v = W_o [ sum_j a_j W_v x_j of each head ],  a = softmax over the k largest alpha

    with n_j the cluster's size. beta_j, which TWIN gives to what is known of user and item together, is as in `Twin`:
    a learned number for each time gap (here of the members' mean age) and kind of behavior (the nearest member's).

    We differ in: k-means runs on unit vectors (spherical), of the item's embedding as the backbone has it at the
    moment, not on those of another model; the paper first groups by how much of a video was played, which nothing
    here tells; at least two parts are made, so that gamma < 10 ends; behaviors that k-means cannot tell apart (the
    same item again and again) are cut into equal parts by time.

    Args:
        sizes: of the backbone; the attention is D wide.
        max_size: gamma, behaviors of a cluster at most; 20 makes about 35 clusters of 400 behaviors.
        nearest: take the embedding of the member nearest to the centroid; False takes the mean of the members'.
        size_term: whether ln n_j counts.
        cross: whether beta_j counts.
        k: clusters kept.
        num_heads: H.
        per_head: each head keeps its own largest; False keeps those with the largest mean of alpha, as in `Twin`.
        num_iterations: of each k-means at most.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        max_size: int = 20,
        nearest: bool = True,
        size_term: bool = True,
        cross: bool = True,
        k: int = 100,
        num_heads: int = 4,
        per_head: bool = True,
        num_iterations: int = 10,
    ) -> None:
        super().__init__()
        check_counts("TwinV2", max_size=max_size, k=k, num_iterations=num_iterations)
        self.max_size, self.num_iterations = max_size, num_iterations
        self.nearest, self.size_term, self.k, self.per_head = nearest, size_term, k, per_head
        width = sizes.embedding_dim
        self.attention = MultiHeadTargetAttention(width, width, num_heads, width)
        self.kind_bias = nn.Embedding(sizes.num_kinds, num_heads) if cross else None
        self.gap_bias = nn.Embedding(NUM_GAPS, num_heads) if cross else None
        for table in (self.kind_bias, self.gap_bias):
            if table is not None:
                nn.init.zeros_(table.weight)

    def assign(self, catalog: Catalog, behaviors: Behaviors) -> Ints:
        """Return each behavior's cluster in its history, [N], from 0 on; at most `max_size` behaviors in each."""
        vectors = F.normalize(catalog.embedding.float(), dim=1).cpu().numpy()
        offsets, num_histories = behaviors.offsets, len(behaviors.user_ids)
        labels = np.empty(len(behaviors.item), np.int64)
        edges = np.searchsorted(offsets[:-1], np.arange(0, len(labels), _BLOCK))
        for first, last in pairwise(np.unique(np.append(edges, num_histories))):
            part = slice(offsets[first], offsets[last])
            lengths, user_ids = np.diff(offsets[first : last + 1]), behaviors.user_ids[first:last]
            labels[part] = divide(vectors, behaviors.item[part], lengths, user_ids, self.max_size, self.num_iterations)
        return labels

    def summarise(self, history: History) -> VirtualItems:
        """Return the virtual items that `history.cluster` makes."""
        label, embedding = history.cluster, history.embedding
        num_clusters = int(label.max()) + 1 if label.numel() else 1
        size = _sums(history.mask[:, :, None].to(embedding.dtype), label, num_clusters)[:, :, 0]
        mean = _sums(embedding, label, num_clusters) / size.clamp(min=1)[:, :, None]
        nearest = _nearest_member(embedding, history.mask, label, mean)
        if self.nearest:
            mean = gather_behaviors(embedding, nearest[:, None])[:, 0]
        bias = torch.zeros_like(size)[:, :, None].expand(-1, -1, self.attention.num_heads)
        if self.size_term:
            bias = bias + size.clamp(min=1).log()[:, :, None]
        if self.kind_bias is not None and self.gap_bias is not None:
            age = _sums(history.age[:, :, None], label, num_clusters)[:, :, 0] / size.clamp(min=1)
            of_kind = gather_behaviors(self.kind_bias(history.kind), nearest[:, None])[:, 0]
            bias = bias + self.gap_bias(time_gap(age)) + of_kind
        return VirtualItems(mean, bias.transpose(1, 2), size)

    def read(self, state: VirtualItems, target: Target) -> Read:
        """Return v of each target."""
        # Heads beside targets: one product a user, and every head of every target chooses on its own.
        folded = self.attention.fold(target.embedding)
        logits = folded.flatten(1, 2) @ state.embedding.transpose(1, 2)
        logits = logits.view(*folded.shape[:3], logits.shape[2]) + state.bias[:, None]
        score = logits if self.per_head else logits.mean(2, keepdim=True).expand_as(logits)
        score, logits = score.flatten(1, 2), logits.flatten(1, 2)
        places, kept = top_behaviors(score, state.size > 0, min(self.k, logits.shape[2]))
        share = softmax_over(logits.gather(2, places), kept)
        # Clusters are few: weights of all of them, most zero, need no gathering of what they weigh.
        pooled = torch.zeros_like(logits).scatter_add(2, places, share) @ state.embedding
        return only_vector(self.attention.combine(pooled.view_as(folded)))


def _sums(values: Float[Tensor, "G L S"], label: Int64[Tensor, "G L"], num_clusters: int) -> Float[Tensor, "G C S"]:
    """Sum of each cluster's values."""
    zeros = values.new_zeros(len(values), num_clusters, values.shape[2])
    return zeros.scatter_add(1, label[:, :, None].expand_as(values), values)


@torch.no_grad()
def _nearest_member(
    embedding: Float[Tensor, "G L D"],
    mask: Bool[Tensor, "G L"],
    label: Int64[Tensor, "G L"],
    centroid: Float[Tensor, "G C D"],
) -> Int64[Tensor, "G C"]:
    """Place of the member nearest to each centroid, the first of equals; 0 where there is no member."""
    own = centroid.gather(1, label[:, :, None].expand_as(embedding))
    distance = (embedding - own).square().sum(2).masked_fill(~mask, float("inf"))
    least = distance.new_full(centroid.shape[:2], float("inf")).scatter_reduce(1, label, distance, "amin")
    length = label.shape[1]
    places = torch.arange(length, device=label.device).expand_as(label)
    places = places.masked_fill(~mask | (distance > least.gather(1, label)), length)
    first = places.new_full(centroid.shape[:2], length).scatter_reduce(1, label, places, "amin")
    return first.masked_fill(first == length, 0)


def divide(
    vectors: npt.NDArray[np.float32],
    item: Ints,
    lengths: Ints,
    user_ids: Ints,
    max_size: int,
    num_iterations: int = 10,
) -> Ints:
    """Return each behavior's cluster in its history, [N]: k-means on k-means, until none has more than `max_size`.

    Levels of all histories are split together. A history's clusters depend on its own behaviors and user id alone.

    Args:
        vectors: unit vectors of the vocabulary, [V, D].
        item: row of `vectors` of each behavior, [N].
        lengths: behaviors of each history, in the order of `item`, [number of histories].
        user_ids: for seeds, in step with `lengths`.
        max_size: gamma.
        num_iterations: of each k-means at most.
    """
    group = history = np.repeat(np.arange(len(lengths)), lengths)
    level = 0
    while True:
        # Clusters are numbered from history to history, those of one history in the order of how they came about.
        _, group, counts = np.unique(group, return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        owner = history[order[np.cumsum(counts) - counts]]
        number: Ints = np.arange(len(counts)) - np.searchsorted(owner, owner)
        if counts.max(initial=0) <= max_size:
            return number[group]
        seeds = _seeds(user_ids[owner], number, level)
        parts = np.where(counts > max_size, np.clip(np.floor(counts**_EXPONENT + 1e-9), 2, 255), 0).astype(np.int64)
        child = np.zeros(len(item), np.int64)
        for num_parts in np.unique(parts[parts > 0]):
            chosen = parts == num_parts
            rows, sizes = order[chosen[group[order]]], counts[chosen]
            offsets = np.append(0, np.cumsum(sizes))
            config = ClusteringConfig(num_clusters=int(num_parts), num_iterations=num_iterations)
            label = cluster(vectors[item[rows]], offsets, seeds[chosen], config).astype(np.int64)
            start = offsets[:-1]
            whole = np.maximum.reduceat(label, start) == np.minimum.reduceat(label, start)
            by_time = np.repeat(whole | (level == _NUM_LEVELS), sizes)
            child[rows] = np.where(by_time, _equal_parts(sizes, max_size), label)
        group = group * (child.max() + 1) + child
        level += 1


def _equal_parts(sizes: Ints, max_size: int) -> Ints:
    """Cut each cluster into as few parts of at most `max_size` as will do, in the order of its behaviors."""
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    parts: Ints = place * np.repeat(-(-sizes // max_size), sizes) // np.repeat(sizes, sizes)
    return parts


def _seeds(user_ids: Ints, number: Ints, level: int) -> Ints:
    """A seed for each cluster that is split, from whose it is and which of the history's it is at this level."""
    mixed = user_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= (number.astype(np.uint64) * np.uint64(_NUM_LEVELS + 1) + np.uint64(level)) * np.uint64(0xD1B54A32D192ED03)
    seeds: Ints = mixed.view(np.int64)
    return seeds
