"""Spherical k-means in PyTorch, for a GPU; kmeans.py says what it computes.

    B users of a batch   L behaviors of the longest   P projected_dim   K num_clusters

It begins from the centers that the compiled kernel would begin from, which are found on the CPU, and runs Lloyd's
algorithm over padded batches of users of similar length. Similarities are rounded otherwise than in the kernel, so a
key that is all but equally similar to two centers may get the other one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from encode.config import ClusteringConfig
from encode.interests.kmeans import Starts, checked, mixed, refuse_not_finite
from encode.interests.lloyd import AT_ITS_CENTER, SHORTEST_SUM, Floats, Ints, Labels
from encode.interests.seeding import start_users

_BATCH = 2**18
"""Behaviors of a batch with its padding, at most, unless one history is longer: similarities take 4 K bytes each."""


def cluster(
    keys: Floats,
    offsets: Ints,
    seeds: Ints,
    config: ClusteringConfig,
    starts: Starts | None = None,
    device: torch.device | str = "cpu",
) -> Labels:
    """Return the cluster of each behavior within its user's history, [N], as `kmeans.cluster` does.

    Raises:
        DataError: a key or a start center is not finite, or lengths do not fit together.
    """
    keys, offsets, given, given_offsets = checked(keys, offsets, seeds, starts)
    refuse_not_finite(keys)
    streams, labels = mixed(seeds, config), np.empty(len(keys), np.uint8)
    for users in _batches(np.diff(offsets)):
        centers = np.zeros((len(users), config.num_clusters, keys.shape[1]), np.float32)
        counts = np.zeros(len(users), np.int64)
        start_users(keys, offsets, users, streams, given, given_offsets, centers, counts)
        column = np.arange(np.diff(offsets)[users].max())
        rows = offsets[users][:, None] + column
        real = rows < offsets[users + 1][:, None]
        padded = np.where(real[..., None], keys[np.where(real, rows, 0)], np.float32(0))
        x, mask, begin, num_begin = (torch.from_numpy(a).to(device) for a in (padded, real, centers, counts))
        found = _lloyd(x, mask, begin, num_begin, config.num_iterations).cpu().numpy()
        labels[rows[real]] = found[real]
    return labels


def _batches(lengths: Ints) -> Iterator[Ints]:
    """Users with a history, in batches of similar lengths."""
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    while len(order):
        size = max(1, _BATCH // int(lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def _lloyd(
    x: Float[Tensor, "B L P"],
    mask: Bool[Tensor, "B L"],
    centers: Float[Tensor, "B K P"],
    counts: Int[Tensor, " B"],
    num_iterations: int,
) -> Int[Tensor, "B L"]:
    B, K, P = centers.shape
    absent = torch.arange(K, device=x.device) >= counts[:, None]
    doubles = x.double().flatten(0, 1)
    first = K * torch.arange(B, device=x.device)[:, None]
    labels = torch.full_like(mask, -1, dtype=torch.long)
    active = torch.ones(B, 1, dtype=torch.bool, device=x.device)
    for iteration in range(num_iterations + 1):
        similarity = torch.bmm(x, centers.transpose(1, 2)).masked_fill_(absent[:, None], -torch.inf)
        found = torch.where(active, similarity.argmax(2), labels)
        active = ((found != labels) & mask).any(1, keepdim=True)
        labels = found
        if iteration == num_iterations or not active.any():
            break
        # What pads a history is counted in a cluster behind the last.
        segment = torch.where(mask, first + labels, B * K).flatten()
        # Not index_add_: on a GPU that adds in any order, and the last bit of a center would be a matter of chance.
        sums = doubles.new_zeros(B * K + 1, P).index_put_((segment,), doubles, accumulate=True)[:-1].view(B, K, P)
        sizes = torch.bincount(segment, minlength=B * K + 1)[:-1].view(B, K)
        empty = (sizes == 0) & ~absent & active
        for user in empty.any(1).nonzero().flatten().tolist():
            inside = mask[user]
            _relocate(x[user, inside], labels[user], centers[user], sums[user], sizes[user], empty[user])
        norm = sums.norm(dim=2, keepdim=True)
        centers = torch.where((norm > SHORTEST_SUM) & (sizes > 0)[..., None], (sums / norm).float(), centers)
    return labels


def _relocate(
    x: Float[Tensor, "n P"],
    labels: Int[Tensor, " L"],
    centers: Float[Tensor, "K P"],
    sums: Float[Tensor, "K P"],
    sizes: Int[Tensor, " K"],
    empty: Bool[Tensor, " K"],
) -> None:
    """Give each empty cluster of one user the key least similar to its center, in place; see lloyd.py."""
    n = len(x)
    similarity = (x.double() * centers[labels[:n]].double()).sum(1).float()
    similarity[(x == 0).all(1)] = 2.0
    for k in empty.nonzero().flatten().tolist():
        alone = sizes[labels[:n]] <= 1
        farthest = int(similarity.masked_fill(alone, 2.0).argmin())
        old = int(labels[farthest])
        if similarity[farthest] >= np.float32(AT_ITS_CENTER) or sizes[old] <= 1:
            return
        labels[farthest] = k
        sizes[old] -= 1
        sizes[k] = 1
        sums[old] -= x[farthest]
        sums[k] = x[farthest]
