"""The facts that make attention over interests stand for attention over the whole history."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from encode.config import ClusteringConfig
from encode.interests.kmeans import cluster
from encode.interests.remembered import most_frequent
from encode.model.relevance import (
    NO_ITEM,
    Interests,
    Remembered,
    attend,
    attend_interests,
    pool_interests,
    relevance,
    relevance_of_all,
    remember,
    times_of,
)
from encode.schema import UNKNOWN

D, P = 6, 4
seeds = st.integers(0, 2**32 - 1)


def unit(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def full_attention(query, keys, values, scale):
    """softmax over every behavior, as in the definition."""
    return F.softmax(scale * query @ keys.T, 1) @ values


def over_interests(query, interests: Interests, size_prior=1.0):
    """Attention of each query, [T, P], over the interests of the only user: value [T, D]."""
    prior = size_prior * interests.size.clamp(min=1).log()
    return attend(query[None], interests.center, interests.value, prior, interests.size > 0, interests.scale).value[0]


def test_relevance_is_the_scaled_cosine():
    found = relevance(torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([[0.8, 0.6], [0.0, 1.0]]), torch.tensor(5.0))
    assert found.tolist() == pytest.approx([5 * 0.96, 0])


def test_relevance_of_all_is_the_relevance_of_each_pair():
    generator = torch.Generator().manual_seed(0)
    query, keys, scale = unit(generator, 2, 3, P), unit(generator, 2, 5, P), torch.tensor(4.0)
    expected = relevance(query[:, :, None], keys[:, None], scale)
    torch.testing.assert_close(relevance_of_all(query, keys, scale), expected)


@given(seeds, st.lists(st.integers(1, 200), min_size=1, max_size=12), st.floats(0.1, 20))
@settings(deadline=None, max_examples=60)
def test_size_prior_is_exact_when_the_keys_of_a_cluster_coincide(seed, sizes, scale):
    generator = torch.Generator().manual_seed(seed)
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    keys, values = unit(generator, len(sizes), P)[label], torch.randn(len(label), D, generator=generator)
    query = unit(generator, 7, P)
    for by_relevance in (True, False):
        interests = pool_interests(values, keys, label, 1, len(sizes), torch.tensor(scale), by_relevance)
        expected = full_attention(query, keys, values, scale)
        torch.testing.assert_close(over_interests(query, interests), expected, atol=1e-5, rtol=1e-5)


def test_without_the_size_prior_it_is_not_exact():
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([0] * 99 + [1])
    keys, values = unit(generator, 2, P)[label], torch.randn(100, D, generator=generator)
    query = unit(generator, 7, P)
    interests = pool_interests(values, keys, label, 1, 2, torch.tensor(2.0), True)
    off = over_interests(query, interests, size_prior=0) - full_attention(query, keys, values, 2.0)
    assert off.abs().max() > 0.1


@given(
    seeds,
    st.integers(1, 3000),
    st.integers(1, 16),
    st.floats(0.001, 0.5),
    st.floats(0.5, 12),
)
@settings(deadline=None, max_examples=60)
def test_the_error_is_bounded_by_the_radius_of_the_clusters_whatever_the_length(
    seed, length, num_clusters, spread, scale
):
    """|v - v'| <= (e^(2 delta) - 1) max |v_i| with delta = scale * eps, eps the largest distance to a center.

    The bound needs values pooled by the mean: then v' = sum_i q_i v_i with q_i proportional to exp(rho(h_t, c_k(i))),
    the true weights with each logit moved by at most delta, so q_i / p_i lies within e^(+-2 delta). Pooling by
    relevance tilts the weights inside a cluster, too. On unit vectors rho(c, h) = scale (1 - |c - h|^2 / 2), so it
    tilts them by at most e^(+-scale eps^2 / 2), and the bound becomes e^(2 delta + scale eps^2 / 2) - 1.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(num_clusters, (length,), generator=generator)
    noise = spread * torch.randn(length, P, generator=generator)
    keys = F.normalize(unit(generator, num_clusters, P)[label] + noise, dim=1)
    values = torch.randn(length, D, generator=generator)
    query = unit(generator, 5, P)
    # Doubles: what is left of the bound at small radii must not drown in rounding.
    keys, values, query = keys.double(), values.double(), query.double()
    keys, query = F.normalize(keys, dim=1), F.normalize(query, dim=1)
    exact = full_attention(query, keys, values, scale)
    for by_relevance in (False, True):
        interests = pool_interests(
            values, keys, label, 1, num_clusters, torch.tensor(scale, dtype=torch.double), by_relevance
        )
        center = interests.center[0][label]
        eps = (keys - center).norm(dim=1).max().item()
        moved = scale * (query @ keys.T - query @ center.T).abs().max().item()
        assert moved <= scale * eps + 1e-9
        from_direction = (keys - F.normalize(center, dim=1)).norm(dim=1).max().item()
        tilt = scale * from_direction**2 / 2 if by_relevance else 0.0
        bound = math.expm1(min(2 * scale * eps + tilt, 700)) * values.norm(dim=1).max().item()
        error = (over_interests(query, interests) - exact).norm(dim=1).max().item()
        assert error <= bound + 1e-9


@pytest.mark.parametrize("length", [100, 100_000])
def test_the_error_does_not_grow_with_the_length(length):
    """At a radius of 0.03 and scale 4 the error stays under e^0.24 - 1 = 27 % of the largest value."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(8, (length,), generator=generator)
    shift = 0.029 * unit(generator, length, P)
    keys = F.normalize(unit(generator, 8, P)[label] + shift, dim=1)
    values = torch.randn(length, D, generator=generator)
    query = unit(generator, 16, P)
    interests = pool_interests(values, keys, label, 1, 8, torch.tensor(4.0), False)
    error = over_interests(query, interests) - full_attention(query, keys, values, 4.0)
    assert (keys - interests.center[0][label]).norm(dim=1).max() < 0.06
    assert error.norm(dim=1).max() <= 0.28 * values.norm(dim=1).max()


@given(seeds, st.integers(1, 300), st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_as_many_clusters_as_distinct_keys_is_full_attention(seed, length, distinct):
    generator = torch.Generator().manual_seed(seed)
    keys = unit(generator, distinct, P)[torch.randint(distinct, (length,), generator=generator)]
    values, query = torch.randn(length, D, generator=generator), unit(generator, 5, P)
    labels = cluster(keys.numpy(), np.array([0, length]), np.array([seed]), ClusteringConfig(num_clusters=12))
    segment = torch.from_numpy(labels.astype(np.int64))
    interests = pool_interests(values, keys, segment, 1, 12, torch.tensor(8.0), True)
    expected = full_attention(query, keys, values, 8.0)
    torch.testing.assert_close(over_interests(query, interests), expected, atol=1e-5, rtol=1e-5)


# --- attend ------------------------------------------------------------------------------------------------


def test_attend_by_hand():
    """Two slots with rho = 2 ln 2 and 0, priors ln 1 and ln 4: weights 4 : 4, affinity ln(8 / 5)."""
    keys, values = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[10.0], [20.0]]])
    prior = torch.tensor([[0.0, math.log(4)]])
    mask, scale = torch.ones(1, 2, dtype=torch.bool), torch.tensor(2 * math.log(2))
    found = attend(torch.tensor([[[1.0, 0.0]]]), keys, values, prior, mask, scale)
    assert found.weights.flatten().tolist() == pytest.approx([0.5, 0.5])
    assert found.value.item() == pytest.approx(15)
    assert found.affinity.item() == pytest.approx(math.log(8 / 5))


@given(seeds, st.integers(1, 8), st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_padding_slots_change_nothing(seed, real, padding):
    generator = torch.Generator().manual_seed(seed)
    keys, values = unit(generator, 2, real, P), torch.randn(2, real, D, generator=generator)
    query, prior = unit(generator, 2, 3, P), torch.randn(2, real, generator=generator)
    mask, scale = torch.ones(2, real, dtype=torch.bool), torch.tensor(5.0)
    alone = attend(query, keys, values, prior, mask, scale)
    padded = attend(
        query,
        F.pad(keys, (0, 0, 0, padding), value=1e3),
        F.pad(values, (0, 0, 0, padding), value=1e6),
        F.pad(prior, (0, padding), value=50.0),
        F.pad(mask, (0, padding)),
        scale,
    )
    torch.testing.assert_close(padded.value, alone.value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(padded.affinity, alone.affinity, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(padded.weights[:, :, :real], alone.weights, atol=1e-6, rtol=1e-6)
    assert (padded.weights[:, :, real:] == 0).all()


def test_all_masked_gives_zeros_and_finite_gradients():
    generator = torch.Generator().manual_seed(0)
    leaves = [unit(generator, 2, 1, P), unit(generator, 2, 2, P), torch.randn(2, 2, D, generator=generator)]
    query, keys, values, scale = (leaf.requires_grad_() for leaf in (*leaves, torch.tensor(8.0)))
    mask = torch.tensor([[False, False], [True, False]])
    found = attend(query, keys, values, torch.zeros(2, 2), mask, scale)
    assert found.value[0].tolist() == [[0] * D]
    assert found.affinity[0] == 0
    assert found.weights.tolist() == [[[0, 0]], [[1, 0]]]
    (found.value.sum() + found.affinity.sum()).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in (query, keys, values, scale))
    assert query.grad[0].tolist() == [[0] * P]
    assert (values.grad[0] == 0).all()
    assert (values.grad[1] == torch.tensor([[1.0], [0.0]])).all()


# --- what is remembered ------------------------------------------------------------------------------------


def slow_remember(items, num_items):
    counts = Counter(item for item in items if item > UNKNOWN)
    kept = sorted(counts, key=lambda item: (-counts[item], item))[:num_items]
    return [(item, counts[item]) for item in sorted(kept)]


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), min_size=1, max_size=4), st.integers(0, 9))
@settings(deadline=None, max_examples=80)
def test_the_most_frequent_items_are_those_of_a_counter(histories, num_items):
    """In training as in the refresh."""
    longest = max(map(len, histories))
    padded = torch.zeros(len(histories), longest, dtype=torch.long)
    for place, history in enumerate(histories):
        padded[place, : len(history)] = torch.tensor(history, dtype=torch.long)
    found = remember(padded, num_items)
    offsets = np.append(0, np.cumsum([len(history) for history in histories])).astype(np.int64)
    kept = most_frequent(np.array([i for h in histories for i in h], np.int64), offsets, num_items)
    for place, history in enumerate(histories):
        expected = slow_remember(history, num_items)
        pairs = zip(found.item[place].tolist(), found.times[place].tolist(), strict=True)
        assert [pair for pair in pairs if pair[0] != NO_ITEM] == expected
        own = slice(*kept.offsets[place : place + 2])
        assert list(zip(kept.item[own].tolist(), kept.times[own].tolist(), strict=True)) == expected
    assert (found.times >= 0).all()
    assert (found.item.diff(dim=1) >= 0).all()


def test_counts_stop_at_what_two_bytes_hold():
    history = np.full(70_000, 5)
    kept = most_frequent(history, np.array([0, 70_000]), 3)
    assert kept.times.tolist() == remember(torch.from_numpy(history)[None], 3).times[0].tolist() == [65_535]


def test_a_target_attends_to_its_own_past_as_to_one_more_interest():
    """By hand: one interest of 4 at rho = 0, and 2 behaviors with the target itself at rho = ln 8: weights 4 : 16."""
    interests = Interests(
        torch.tensor([[[0.0, 1.0]]]),
        torch.tensor([[[10.0]]]),
        torch.tensor([[4.0]]),
        torch.zeros(1, 1, 2),
        torch.tensor(math.log(8)),
    )
    remembered = Remembered(torch.tensor([[5, 7, NO_ITEM]]), torch.tensor([[1, 2, 0]]))
    query, embedding = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[20.0], [20.0]]])
    found = attend_interests(
        query, times_of(torch.tensor([[7, 6]]), remembered), embedding, interests, torch.ones(2, 1), 1.0
    )
    assert found.weights[0, 0].tolist() == pytest.approx([0.2, 0.8])
    assert found.value[0, 0].item() == pytest.approx(18)
    assert found.affinity[0, 0].item() == pytest.approx(math.log(20 / 6))
    assert found.weights[0, 1].tolist() == [1, 0], "item 6 is not remembered"
    assert found.value[0, 1].item() == pytest.approx(10)
    assert found.affinity[0, 1].item() == pytest.approx(0, abs=1e-6)
    assert times_of(torch.tensor([[7, 6, 5, 8]]), remembered).tolist() == [[2, 0, 1, 0]]


def test_nobody_and_nothing_remembered_gives_zeros():
    none = torch.zeros(1, 2, P)
    interests = Interests(none, torch.zeros(1, 2, D), torch.zeros(1, 2), none, torch.tensor(8.0))
    remembered = remember(torch.zeros(1, 0, dtype=torch.long), 4)
    query = unit(torch.Generator().manual_seed(0), 1, 3, P)
    times = times_of(torch.tensor([[2, 3, 4]]), remembered)
    found = attend_interests(query, times, torch.ones(1, 3, D), interests, torch.ones(P, D), 1.0)
    assert found.value.abs().sum() == found.affinity.abs().sum() == found.weights.abs().sum() == 0


def test_remembering_is_nearer_to_full_attention_for_what_was_had_often():
    """200 distinct items in 4 clusters: what a cluster says of one of its items is mostly about the others."""
    generator = torch.Generator().manual_seed(0)
    table, values = unit(generator, 200, P).double(), torch.randn(200, D, generator=generator).double()
    item = torch.cat([torch.arange(200), torch.full((50,), 17)])
    scale = torch.tensor(12.0, dtype=torch.double)
    labels = cluster(
        table[item].float().numpy(), np.array([0, len(item)]), np.array([0]), ClusteringConfig(num_clusters=4)
    )
    interests = pool_interests(values[item], table[item], torch.from_numpy(labels).long(), 1, 4, scale, False)
    query, target = table[17][None, None], torch.tensor([[17 + 2]])
    exact = full_attention(query[0], table[item], values[item], 12.0)
    known, none = remember(item[None] + 2, 300), torch.zeros(P, D).double()
    interests = interests._replace(variance=torch.zeros_like(interests.variance))
    with_it = attend_interests(query, times_of(target, known), values[17][None, None], interests, none, 1.0)
    without = over_interests(query[0], interests)
    assert (with_it.value[0] - exact).norm() < 0.7 * (without - exact).norm()


# --- pooling -----------------------------------------------------------------------------------------------


def slow_pool(embedding, key, segment, num_users, num_clusters, scale, by_relevance):
    center, value = torch.zeros(num_users * num_clusters, P), torch.zeros(num_users * num_clusters, D)
    size = torch.zeros(num_users * num_clusters)
    for slot in segment.unique().tolist():
        rows = torch.nonzero(segment == slot).squeeze(1)
        center[slot] = key[rows].mean(0)
        unit = center[slot] / center[slot].norm()
        weight = F.softmax(scale * (key[rows] @ unit) * by_relevance, 0)
        value[slot] = (weight[:, None] * embedding[rows]).sum(0)
        size[slot] = len(rows)
    return center, value, size


@given(seeds, st.integers(0, 60), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.floats(0.1, 50))
@settings(deadline=None, max_examples=60)
def test_pooling_is_the_plain_loop(seed, length, num_users, num_clusters, by_relevance, scale):
    generator = torch.Generator().manual_seed(seed)
    embedding, key = torch.randn(length, D, generator=generator), unit(generator, length, P)
    segment = torch.randint(num_users * num_clusters, (length,), generator=generator)
    shape = num_users, num_clusters
    found = pool_interests(embedding, key, segment, *shape, torch.tensor(scale), by_relevance)
    center, value, size = slow_pool(embedding, key, segment, *shape, scale, by_relevance)
    # A sum of opposite keys has no direction to speak of: compare where it has one.
    sums = torch.zeros(num_users * num_clusters, P).index_add(0, segment, key).norm(dim=1)
    clear = (sums > 1e-2) | (size == 0)
    torch.testing.assert_close(found.center.flatten(0, 1)[clear], center[clear], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.value.flatten(0, 1)[clear], value[clear], atol=1e-3, rtol=1e-3)
    assert found.size.flatten().tolist() == size.tolist()


def test_gradients_reach_embeddings_keys_and_scale():
    generator = torch.Generator().manual_seed(0)
    embedding, key = torch.randn(6, D, generator=generator), torch.randn(6, P, generator=generator)
    scale = torch.tensor(3.0)
    for leaf in (embedding, key, scale):
        leaf.requires_grad_()
    segment = torch.tensor([0, 0, 0, 2, 2, 3])
    interests = pool_interests(embedding, F.normalize(key, dim=1), segment, 2, 2, scale, True)
    interests.value.square().sum().backward()
    assert (embedding.grad.norm(dim=1) > 0).all()
    assert (key.grad[:5].norm(dim=1) > 0).all()
    assert scale.grad != 0


def test_the_mean_is_the_limit_of_scale_zero():
    generator = torch.Generator().manual_seed(0)
    embedding, key = torch.randn(6, D, generator=generator), unit(generator, 6, P)
    segment = torch.tensor([0, 1, 0, 1, 0, 0])
    mean = pool_interests(embedding, key, segment, 1, 2, torch.tensor(8.0), False).value[0]
    flat = pool_interests(embedding, key, segment, 1, 2, torch.tensor(0.0), True).value[0]
    torch.testing.assert_close(mean, flat)
    torch.testing.assert_close(mean[1], (embedding[1] + embedding[3]) / 2)
