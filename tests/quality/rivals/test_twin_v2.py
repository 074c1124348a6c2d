"""Clusters of bounded size, virtual items by hand, and the fact that makes ln n the right term."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encode.config import ClusteringConfig
from encode.errors import ConfigError
from encode.interests.kmeans import cluster
from encode.model.long_term import Behaviors, Catalog, History, Sizes, Target
from encode.quality.rivals import twin_v2
from encode.quality.rivals.twin_v2 import TwinV2, divide

D, P, V, CATEGORIES, KINDS = 8, 4, 40, 5, 3
SIZES = Sizes(V, CATEGORIES, KINDS, D, P)


def history_of(lengths: list[int], longest: int, num_clusters: int = 4) -> History:
    """Random histories; a user's do not depend on the other users or on the padding."""
    shape = len(lengths), longest
    whole = [torch.zeros(shape, dtype=torch.long) for _ in range(4)]
    item, category, kind, label = whole
    embedding, age = torch.zeros(*shape, D), torch.zeros(shape)
    for user, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        embedding[user, :length] = torch.randn(length, D, generator=generator)
        age[user, :length] = 40 * torch.rand(length, generator=generator).sort(descending=True).values
        kind[user, :length] = torch.randint(KINDS, (length,), generator=generator)
        label[user, :length] = torch.randint(num_clusters, (length,), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return History(embedding, torch.zeros(*shape, P), mask, item, category, kind, age, label, torch.tensor(8.0))


def target_of(num_histories: int, num_targets: int) -> Target:
    generator = torch.Generator().manual_seed(7)
    embedding, key = (torch.randn(20, dim, generator=generator)[:num_targets] for dim in (D, P))
    index = torch.ones(num_targets, dtype=torch.long)
    return Target(*(part.expand(num_histories, *part.shape).clone() for part in (embedding, key, index, index)))


def model_of(**options) -> TwinV2:
    torch.manual_seed(0)
    model = TwinV2(SIZES, **{"num_heads": 2, **options})
    for table in (model.kind_bias, model.gap_bias):
        if table is not None:
            torch.nn.init.normal_(table.weight)
    return model


def vectors(model: TwinV2, history: History, target: Target) -> torch.Tensor:
    read = model.read(model.summarise(history), target)
    assert read.scalars.shape == (*target.item.shape, 0)
    return read.vectors[:, :, 0]


def virtual_items(model: TwinV2, history: History, user: int) -> list[tuple[torch.Tensor, list[float], float]]:
    """Embedding, bias of each head and ln n of each cluster of a user."""
    found = []
    for label in range(int(history.cluster.max()) + 1):
        members = [
            i for i in range(len(history.mask[user])) if history.mask[user, i] and history.cluster[user, i] == label
        ]
        if not members:
            continue
        mean = torch.stack([history.embedding[user, i] for i in members]).mean(0)
        distance = [float((history.embedding[user, i] - mean).square().sum()) for i in members]
        nearest = members[distance.index(min(distance))]
        minutes = 1440 * sum(float(history.age[user, i]) for i in members) / len(members)
        bias = [0.0] * model.attention.num_heads
        if model.kind_bias is not None:
            gap = model.gap_bias.weight[int(math.log2(1 + minutes))]
            bias = (gap + model.kind_bias.weight[history.kind[user, nearest]]).tolist()
        size = math.log(len(members)) if model.size_term else 0.0
        found.append((history.embedding[user, nearest] if model.nearest else mean, bias, size))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nearest": False},
        {"size_term": False},
        {"cross": False},
        {"k": 2},
        {"k": 2, "per_head": False},
        {"num_heads": 4},
    ],
)
@torch.no_grad()
def test_reading_by_hand(options):
    model, history, target = model_of(**options), history_of([9, 2, 14], 14), target_of(3, 5)
    found = vectors(model, history, target)
    attention = model.attention
    size = D // attention.num_heads
    for user in range(3):
        items = virtual_items(model, history, user)
        for t in range(5):
            alpha = []
            for head in range(attention.num_heads):
                rows = slice(head * size, (head + 1) * size)
                query = attention.W_q.weight[rows] @ target.embedding[user, t]
                alpha.append(
                    [
                        float(query @ (attention.W_k.weight[rows] @ x)) / math.sqrt(size) + bias[head] + log_size
                        for x, bias, log_size in items
                    ]
                )
            heads = []
            for head in range(attention.num_heads):
                score = alpha[head] if model.per_head else [sum(each) for each in zip(*alpha, strict=True)]
                kept = sorted(range(len(items)), key=lambda j: -score[j])[: model.k]
                mass = sum(math.exp(alpha[head][j]) for j in kept)
                rows = slice(head * size, (head + 1) * size)
                heads.append(
                    sum(math.exp(alpha[head][j]) / mass * (attention.W_v.weight[rows] @ items[j][0]) for j in kept)
                )
            torch.testing.assert_close(found[user, t], attention.W_o(torch.cat(heads)), atol=1e-5, rtol=1e-4)


def test_every_switch_does_something():
    history, target = history_of([9, 2, 14], 14), target_of(3, 5)
    usual = vectors(model_of(), history, target)
    for options in (
        {"nearest": False},
        {"size_term": False},
        {"cross": False},
        {"k": 2},
        {"num_heads": 4},
    ):
        assert (vectors(model_of(**options), history, target) - usual).abs().max() > 1e-3, options
    few = vectors(model_of(k=2), history, target)
    assert (vectors(model_of(k=2, per_head=False), history, target) - few).abs().max() > 1e-3


def test_padding_and_other_users_change_nothing():
    model = model_of(k=3)
    together = vectors(model, history_of([9, 2, 14], 14), target_of(3, 5))
    for user, length in enumerate([9, 2, 14]):
        for longest in (length, 23):
            alone = vectors(model, history_of([length], longest), target_of(1, 3))
            torch.testing.assert_close(alone[0], together[user, :3])


def test_an_empty_history_reads_zeros_and_has_finite_gradients():
    model, history, target = model_of(), history_of([0, 5], 6), target_of(2, 3)
    for part in (history.embedding, history.age, target.embedding):
        part.requires_grad_()
    found = vectors(model, history, target)
    assert found[0].abs().max() == 0
    found.square().sum().backward()
    leaves = [*model.parameters(), history.embedding, target.embedding]
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    for longest in (6, 0):
        assert vectors(model, history_of([0], longest), target_of(1, 3)).abs().max() == 0


@pytest.mark.parametrize("nearest", [True, False])
def test_clusters_of_equal_behaviors_read_as_full_attention(nearest):
    """sum_{i in j} exp(alpha_i) = n_j exp(alpha_j): with ln n nothing is lost, without it much is."""
    history = history_of([40], 40, num_clusters=6)
    first = [int((history.cluster[0] == label).nonzero()[0, 0]) for label in history.cluster[0].tolist()]
    history = history._replace(
        embedding=history.embedding[:, first], kind=history.kind[:, first], age=history.age[:, first]
    )
    single = history._replace(cluster=torch.arange(40)[None])
    target = target_of(1, 5)
    full = vectors(model_of(nearest=nearest), single, target)
    torch.testing.assert_close(vectors(model_of(nearest=nearest), history, target), full)
    assert (vectors(model_of(nearest=nearest, size_term=False), history, target) - full).abs().max() > 0.01


# --- assign ------------------------------------------------------------------------------------------------


def vectors_of_items(num_groups: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(num_groups, D, generator=generator)
    return centers[torch.arange(V) % num_groups] + 0.3 * torch.randn(V, D, generator=generator)


def catalog_of(embedding: torch.Tensor) -> Catalog:
    return Catalog(embedding, torch.zeros(len(embedding), P), torch.ones(V, dtype=torch.long), torch.zeros(1, D))


def behaviors_of(lengths: list[int], user_ids: list[int]) -> Behaviors:
    parts = [np.random.default_rng(user).integers(2, V, length) for user, length in zip(user_ids, lengths, strict=True)]
    item = np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)
    offsets = np.append(0, np.cumsum(np.array(lengths, np.int64)))
    return Behaviors(offsets, np.array(user_ids, np.int64), item, np.ones_like(item), np.zeros_like(item), item)


def slow_division(embedding: np.ndarray, item: np.ndarray, user_id: int, max_size: int) -> list[int]:
    """One cluster of one history at a time; all that is shared with `divide` are k-means and the seeds."""
    clusters, level = [list(range(len(item)))], 0
    while any(len(rows) > max_size for rows in clusters):
        parts = []
        for number, rows in enumerate(clusters):
            if len(rows) <= max_size:
                parts.append(rows)
                continue
            config = ClusteringConfig(num_clusters=max(2, math.floor(len(rows) ** 0.3)))
            seed = twin_v2._seeds(np.array([user_id]), np.array([number]), level)
            label = cluster(embedding[item[rows]], np.array([0, len(rows)]), seed, config)
            if len(set(label.tolist())) == 1:
                cuts = math.ceil(len(rows) / max_size)
                label = np.array([place * cuts // len(rows) for place in range(len(rows))])
            parts += [
                [row for row, one in zip(rows, label, strict=True) if one == k] for k in sorted(set(label.tolist()))
            ]
        clusters, level = parts, level + 1
    labels = [0] * len(item)
    for number, rows in enumerate(clusters):
        for row in rows:
            labels[row] = number
    return labels


@pytest.mark.parametrize("max_size", [1, 5, 20])
def test_division_level_by_level_is_recursion(max_size):
    lengths, user_ids = [0, 150, 20, 0, 33, 1], [7, 12345678901, 3, 4, 5, 6]
    embedding = vectors_of_items(5)
    behaviors = behaviors_of(lengths, user_ids)
    found = TwinV2(SIZES, max_size=max_size).assign(catalog_of(embedding), behaviors)
    unit = F.normalize(embedding, dim=1).numpy()
    expected = []
    for user, user_id in enumerate(user_ids):
        item = behaviors.item[behaviors.offsets[user] : behaviors.offsets[user + 1]]
        expected += slow_division(unit, item, user_id, max_size)
    assert found.tolist() == expected


def test_no_cluster_exceeds_gamma_and_labels_have_no_gaps():
    lengths = [400, 90, 21, 20, 3, 0]
    embedding, behaviors = vectors_of_items(6), behaviors_of(lengths, list(range(6)))
    for max_size in (1, 7, 20, 1000):
        labels = TwinV2(SIZES, max_size=max_size).assign(catalog_of(embedding), behaviors)
        for user, length in enumerate(lengths):
            sizes = np.bincount(labels[behaviors.offsets[user] : behaviors.offsets[user + 1]])
            assert sizes.sum() == length
            assert not length or (sizes.min() > 0 and sizes.max() <= max_size)
            assert length > max_size or len(sizes) <= 1


def test_clusters_hold_what_is_alike():
    """Four far apart groups of ten items, each bought at least twelve times: no cluster mixes two groups."""
    groups = 10 * torch.eye(D)[:4]
    embedding = groups[torch.arange(V) % 4] + 0.1 * torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    item = np.random.default_rng(0).permutation(np.repeat(np.arange(4, 16), 16))
    labels = divide(F.normalize(embedding, dim=1).numpy(), item, np.array([len(item)]), np.array([1]), 48)
    assert labels.max() == 3
    assert all(len(set((item[labels == label] % 4).tolist())) == 1 for label in range(4))


def test_a_history_is_divided_alone_and_the_same_each_time(monkeypatch):
    lengths, user_ids = [150, 60, 0, 90], [11, 12, 13, 14]
    catalog, model = catalog_of(vectors_of_items(5)), TwinV2(SIZES, max_size=8)
    together = behaviors_of(lengths, user_ids)
    labels = model.assign(catalog, together)
    for user, (length, user_id) in enumerate(zip(lengths, user_ids, strict=True)):
        alone = model.assign(catalog, behaviors_of([length], [user_id]))
        assert alone.tolist() == labels[together.offsets[user] : together.offsets[user + 1]].tolist()
    for block in (1, 100, 200):
        monkeypatch.setattr(twin_v2, "_BLOCK", block)
        assert model.assign(catalog, together).tolist() == labels.tolist()
    assert model.assign(catalog, behaviors_of([], [])).tolist() == []


def test_what_cannot_be_told_apart_is_cut_by_time(monkeypatch):
    unit = F.normalize(vectors_of_items(5), dim=1).numpy()
    labels = divide(unit, np.full(50, 7), np.array([50]), np.array([1]), 20)
    assert labels.tolist() == [0] * 17 + [1] * 17 + [2] * 16
    assert divide(unit, np.full(40, 7), np.array([40]), np.array([1]), 20).tolist() == [0] * 20 + [1] * 20
    # And so is everything once the levels are used up.
    monkeypatch.setattr(twin_v2, "_NUM_LEVELS", 0)
    item = behaviors_of([50], [1]).item
    assert divide(unit, item, np.array([50]), np.array([1]), 20).tolist() == labels.tolist()


def test_what_would_not_end_is_refused():
    with pytest.raises(ConfigError, match="max_size"):
        TwinV2(SIZES, max_size=0)
