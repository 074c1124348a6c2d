"""Each part of ENCODE that can be exchanged: what it is instead, in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from encode.config import ClusteringConfig, ModelConfig
from encode.interests.clustered import Clustered
from encode.model.long_term import Behaviors, Catalog, History, Sizes, Target
from encode.quality.models import MODELS
from encode.quality.rivals.attention import FullAttention
from encode.quality.variants import Variant
from encode.schema import UNKNOWN

D, P, K = 6, 4, 3
NUM_ITEMS, NUM_CATEGORIES = 12, 5
SIZES = Sizes(num_items=NUM_ITEMS, num_categories=NUM_CATEGORIES, num_kinds=1, embedding_dim=D, projected_dim=P)
CONFIG = ModelConfig(embedding_dim=D, category_dim=2, projected_dim=P)
LENGTHS = [9, 0, 14, 1]
SCALE = 8.0
PAPER = MODELS["encode-paper"].options
"""What is changed here is changed from the paper's ENCODE."""
seeds = st.integers(0, 2**32 - 1)


def paper(**options) -> Variant:
    return Variant(SIZES, **{**PAPER, **options})


def catalog_of(seed: int = 0, num_items: int = NUM_ITEMS) -> Catalog:
    """Random items; index 0 is padding."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(num_items, D, generator=generator)
    embedding[0] = 0
    key = F.normalize(embedding @ torch.randn(D, P, generator=generator), dim=1)
    category = torch.randint(1, NUM_CATEGORIES, (num_items,), generator=generator)
    return Catalog(embedding, key, category, torch.zeros(1, D))


def behaviors_of(catalog: Catalog, lengths: list[int], seed: int = 0) -> Behaviors:
    """Random behaviors; a user's depend on no other user."""
    drawn = [np.random.default_rng([seed, n]).integers(1, len(catalog.key), n) for n in lengths]
    item = np.concatenate([*drawn, np.zeros(0, np.int64)])
    return Behaviors(
        offsets=np.append(0, np.cumsum(lengths)),
        user_ids=np.array(lengths) + 100,
        item=item,
        category=catalog.category.numpy()[item],
        kind=np.zeros(len(item), np.int64),
        timestamps=np.arange(len(item)),
    )


def history_of(catalog: Catalog, behaviors: Behaviors, labels: np.ndarray, longest: int) -> History:
    """Padded to `longest`; the latest behavior is a day old, each one before it two days older."""
    num_users = len(behaviors.user_ids)
    item, cluster = torch.zeros(num_users, longest, dtype=torch.long), torch.zeros(num_users, longest, dtype=torch.long)
    age, mask = torch.zeros(num_users, longest), torch.zeros(num_users, longest, dtype=torch.bool)
    for user, (begin, end) in enumerate(zip(behaviors.offsets, behaviors.offsets[1:], strict=False)):
        length = end - begin
        item[user, :length] = torch.from_numpy(behaviors.item[begin:end])
        cluster[user, :length] = torch.from_numpy(labels[begin:end].astype(np.int64))
        age[user, :length] = 1 + 2 * torch.arange(length).flip(0)
        mask[user, :length] = True
    none, scale = torch.zeros_like(item), torch.tensor(SCALE)
    category = catalog.category[item] * mask
    return History(catalog.embedding[item], catalog.key[item], mask, item, category, none, age, cluster, scale)


def target_of(catalog: Catalog, num_histories: int) -> Target:
    """Every item of the catalog, for every history."""
    item = torch.arange(len(catalog.key)).repeat(num_histories, 1)
    return Target(catalog.embedding[item], catalog.key[item], item, catalog.category[item])


def case_of(model, lengths=LENGTHS, longest=14, seed=0):
    """Catalog, history with the model's own clusters, and targets."""
    catalog = catalog_of(seed)
    behaviors = behaviors_of(catalog, lengths, seed)
    history = history_of(catalog, behaviors, model.assign(catalog, behaviors), longest)
    return catalog, history, target_of(catalog, len(lengths))


def vectors(model, *case, **changed):
    _, history, target = case_of(model, *case, **changed)
    return model.read(model.summarise(history), target).vectors[:, :, 0]


def members(history: History, user: int, cluster: int) -> list[int]:
    """Places of a cluster's behaviors."""
    return [i for i in range(history.mask.shape[1]) if history.mask[user, i] and history.cluster[user, i] == cluster]


# --- the model itself --------------------------------------------------------------------------------------


@given(seeds, st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_as_it_is_it_is_what_the_platform_trains(seed, lengths, padding, num_clusters):
    ours = Variant(SIZES, num_clusters=num_clusters)
    theirs = Clustered(CONFIG, ClusteringConfig(num_clusters=num_clusters))
    catalog, history, target = case_of(ours, lengths, max(lengths) + padding, seed)
    for model in (ours, theirs):
        model.follow(catalog, torch.ones(NUM_ITEMS))
    assert ours.decoder.abs().sum() > 0
    behaviors = behaviors_of(catalog, lengths, seed)
    np.testing.assert_array_equal(ours.assign(catalog, behaviors), theirs.assign(catalog, behaviors))
    found, expected = ours.summarise(history), theirs.summarise(history)
    used = expected.interests.size.shape[1]
    assert not found.size[:, used:].any()
    for name in ("center", "value", "size", "variance"):
        one, other = getattr(found, name)[:, :used], getattr(expected.interests, name)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for one, other in (
        (ours.profile(found, history), theirs.profile(expected, history)),
        (ours.read(found, target).vectors, theirs.read(expected, target).vectors),
        (ours.read(found, target).scalars, theirs.read(expected, target).scalars),
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    loss = ours.auxiliary_loss(found, history)
    torch.testing.assert_close(loss, theirs.auxiliary_loss(expected, history), atol=1e-6, rtol=1e-4)
    assert (ours.num_vectors, ours.num_scalars) == (theirs.num_vectors, theirs.num_scalars)


@pytest.mark.parametrize(
    "options", [{}, {"center": "mean", "pooling": "mean", "moments": "values"}, {"sharpness": 50.0}]
)
def test_as_many_clusters_as_distinct_items_is_full_attention(options):
    model, full = paper(num_clusters=NUM_ITEMS, **options), FullAttention(SIZES)
    _, history, target = case_of(model)
    expected = full.read(full.summarise(history), target)
    found = model.read(model.summarise(history), target)
    tolerance = {"atol": 1e-2, "rtol": 0} if "sharpness" in options else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(found.vectors, expected.vectors, **tolerance)
    torch.testing.assert_close(found.scalars, expected.scalars, **tolerance)
    assert not torch.allclose(vectors(paper(num_clusters=2, **options)), expected.vectors[:, :, 0], atol=0.05)


ALL = [
    {},
    {"num_clusters": 2},
    {"grouping": "time"},
    {"grouping": "category"},
    {"grouping": "random"},
    {"metric": "embedding"},
    {"metric": "random"},
    {"pooling": "mean"},
    {"center": "mean"},
    {"size_prior": 0.0},
    {"decay": 0.1},
    {"moments": "keys"},
    {"moments": "decoded"},
    {"moments": "values"},
    {"sharpness": 1.0},
    {"affinity": False},
]
EACH = pytest.mark.parametrize("options", ALL, ids=[",".join(f"{k}={v}" for k, v in one.items()) or "-" for one in ALL])


def made(**options) -> Variant:
    return paper(**{"num_clusters": K, **options})


@pytest.mark.parametrize("options", [one for one in ALL[1:] if one != {"affinity": False}])
def test_each_switch_changes_what_is_read(options):
    assert not torch.allclose(vectors(made()), vectors(made(**options)), atol=1e-3)


def test_the_decoder_follows_the_tables():
    model = made(moments="decoded")
    before = vectors(model)
    model.follow(catalog_of(), torch.ones(NUM_ITEMS))
    assert not torch.allclose(vectors(model), before, atol=1e-3)


def test_counts_are_how_often_a_target_was_had():
    model = made(counts=True, remembered=NUM_ITEMS)
    _, history, target = case_of(model)
    found = model.read(model.summarise(history), target).scalars
    assert found.shape[2] == model.num_scalars == 2
    for user in range(len(LENGTHS)):
        times = [
            (item > UNKNOWN) * (history.item[user][history.mask[user]] == item).sum() for item in target.item[user]
        ]
        torch.testing.assert_close(found[user, :, 1].expm1(), torch.stack(times).float(), atol=1e-4, rtol=1e-5)
    forgetful = made(counts=True, remembered=0, affinity=False)
    assert not forgetful.read(forgetful.summarise(history), target).scalars.any()


def test_affinity_is_all_that_goes_without_it():
    with_it, without = made(), made(affinity=False)
    _, history, target = case_of(with_it)
    one, other = (model.read(model.summarise(history), target) for model in (with_it, without))
    torch.testing.assert_close(one.vectors, other.vectors)
    assert (with_it.num_scalars, one.scalars.shape[2]) == (1, 1)
    assert (without.num_scalars, other.scalars.shape[2]) == (0, 0)


@EACH
def test_padding_and_other_users_change_nothing(options):
    model = made(**options)
    _, history, target = case_of(model)
    whole = model.read(model.summarise(history), target)
    for user, length in enumerate(LENGTHS):
        for longest in (length, length + 5):
            alone = History(
                *(F.pad(part[user : user + 1].transpose(1, -1), (0, 5)).transpose(1, -1) for part in history[:2]),
                *(F.pad(part[user : user + 1], (0, 5)) for part in history[2:-1]),
                history.scale,
            )
            alone = History(*(part[:, :longest] for part in alone[:-1]), history.scale)
            found = model.read(model.summarise(alone), Target(*(part[:1] for part in target)))
            torch.testing.assert_close(found.vectors[0], whole.vectors[user], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.scalars[0], whole.scalars[user], atol=1e-5, rtol=1e-4)


@EACH
@pytest.mark.parametrize("longest", [0, 4])
def test_an_empty_history_gives_zeros(options, longest):
    model = made(**options)
    _, history, target = case_of(model, [0, 0], longest)
    state = model.summarise(history)
    read = model.read(state, target)
    assert not read.vectors.any()
    assert not read.scalars.any()
    assert not model.profile(state, history).any()


@EACH
def test_gradients_are_finite_with_empty_histories(options):
    model = made(**options)
    _, history, target = case_of(model, [0, 7, 0, 1], 9)
    inputs = [history.embedding.clone(), history.key.clone(), history.scale.clone()]
    inputs += [target.key.clone()]
    for one in inputs:
        one.requires_grad_()
    history = history._replace(embedding=inputs[0], key=inputs[1], scale=inputs[2])
    state = model.summarise(history)
    read = model.read(state, target._replace(key=inputs[3]))
    (read.vectors.square().sum() + read.scalars.sum() + model.profile(state, history).sum()).backward()
    for one in inputs:
        assert one.grad.isfinite().all()
        assert one.grad.any()


def test_histories_are_clustered_anew_after_so_many_epochs():
    """Each epoch has other tables: it is clustered by those of epoch 0, 0, 2, 2; evaluation by those of the moment."""
    model = made(reclustering=2)
    tables = [catalog_of(seed) for seed in range(4)]
    behaviors = behaviors_of(tables[0], [40])
    fresh = [made().eval().assign(table, behaviors).tolist() for table in tables]
    assert len({tuple(labels) for labels in fresh}) == 4
    found = []
    for table in tables:
        model.train().follow(table, torch.ones(NUM_ITEMS))
        found.append(model.assign(table, behaviors).tolist())
        model.eval().follow(table, torch.ones(NUM_ITEMS))
        assert model.assign(table, behaviors).tolist() == fresh[len(found) - 1]
    assert found == [fresh[0], fresh[0], fresh[2], fresh[2]]


# --- grouping ----------------------------------------------------------------------------------------------


def labels_by_hand(grouping, item, category, lengths, num_clusters=3):
    item = np.array(item)
    behaviors = Behaviors(
        offsets=np.append(0, np.cumsum(lengths)),
        user_ids=np.arange(1, 1 + len(lengths)),
        item=item,
        category=np.array(category),
        kind=np.zeros(len(item), np.int64),
        timestamps=np.arange(len(item)),
    )
    return made(grouping=grouping, num_clusters=num_clusters).assign(catalog_of(), behaviors).tolist()


def test_chunks_of_time_by_hand():
    found = labels_by_hand("time", [1] * 12, [1] * 12, [7, 0, 2, 3])
    assert found == [0, 0, 0, 1, 1, 2, 2, 0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("num_clusters", "expected"), [(3, [2, 1, 1, 0, 0, 0, 2, 1, 0, 0, 1, 2]), (2, [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1])]
)
def test_categories_by_hand(num_clusters, expected):
    """The most frequent of each user, the lower one first among equals, and the others."""
    category = [4, 2, 2, 3, 3, 3, 1, 3, 1, 1, 3, 2]
    assert labels_by_hand("category", range(12), category, [7, 0, 5], num_clusters) == expected


def test_chance_is_the_same_chance_again_and_takes_every_cluster():
    found = labels_by_hand("random", [1] * 300, [1] * 300, [300])
    assert found == labels_by_hand("random", [5] * 300, [2] * 300, [300])
    counts = np.bincount(found)
    assert len(counts) == 3
    assert counts.min() > 70


@pytest.mark.parametrize("grouping", ["kmeans", "time", "category"])
def test_a_users_groups_are_no_other_users_business(grouping):
    model, catalog = made(grouping=grouping), catalog_of()
    together = np.split(model.assign(catalog, behaviors_of(catalog, LENGTHS)), np.cumsum(LENGTHS)[:-1])
    for length, found in zip(LENGTHS, together, strict=True):
        np.testing.assert_array_equal(model.assign(catalog, behaviors_of(catalog, [length])), found)


def test_the_metric_is_what_kmeans_compares():
    """Two groups of items: apart by embedding, apart the other way by key, apart by neither."""
    embedding = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), dim=1)
    embedding, key = F.pad(embedding, (0, D - 2)), F.pad(embedding[[0, 2, 1, 3]], (0, P - 2))
    catalog = Catalog(embedding, key, torch.ones(4, dtype=torch.long), torch.zeros(1, D))
    none = np.zeros(4, np.int64)
    behaviors = Behaviors(np.array([0, 4]), np.array([1]), np.arange(4), none, none, none)
    by_key = paper(num_clusters=2).assign(catalog, behaviors)
    by_embedding = paper(num_clusters=2, metric="embedding").assign(catalog, behaviors)
    assert by_key[0] == by_key[2] != by_key[1] == by_key[3]
    assert by_embedding[0] == by_embedding[1] != by_embedding[2] == by_embedding[3]


# --- pooling and reading, in plain loops -------------------------------------------------------------------


def spread_out(**options):
    """A model with few clusters of many different behaviors, its history, and its state."""
    model = made(grouping="time", **options)
    _, history, target = case_of(model, [14, 9], 14)
    return model, history, target, model.summarise(history)


def test_pooling_by_mean_in_loops():
    _, history, _, state = spread_out(pooling="mean")
    for user in range(2):
        for k in range(K):
            expected = sum(history.embedding[user, i] for i in members(history, user, k))
            torch.testing.assert_close(state.value[user, k], expected / len(members(history, user, k)))


def test_pooling_by_relevance_in_loops():
    _, history, _, state = spread_out()
    for user in range(2):
        for k in range(K):
            own = members(history, user, k)
            center = F.normalize(sum(history.key[user, i] for i in own), dim=0)
            weight = [math.exp(SCALE * (center @ history.key[user, i])) for i in own]
            expected = sum(w * history.embedding[user, i] for w, i in zip(weight, own, strict=True)) / sum(weight)
            torch.testing.assert_close(state.value[user, k], expected, atol=1e-5, rtol=1e-4)


def test_a_mean_center_is_the_mean_key():
    _, history, _, state = spread_out(center="mean")
    for user in range(2):
        for k in range(K):
            own = members(history, user, k)
            torch.testing.assert_close(state.center[user, k], sum(history.key[user, i] for i in own) / len(own))
    assert (state.center.norm(dim=2) < 0.99).all()


@pytest.mark.parametrize("size_prior", [1.0, 0.5])
def test_decay_in_loops(size_prior):
    decay = 0.07
    _, history, _, state = spread_out(decay=decay, size_prior=size_prior)
    for user in range(2):
        for k in range(K):
            mass = sum(math.exp(-decay * history.age[user, i].item()) for i in members(history, user, k))
            assert state.log_prior[user, k].item() == pytest.approx(size_prior * math.log(mass), abs=1e-5)


def test_decay_turns_to_what_is_new():
    """Chunks of time: without decay they weigh the same, with it the latest weighs most."""
    for decay, expected in ((0.0, [1.0, 1, 1]), (0.2, [math.exp(-3.2), math.exp(-1.6), 1])):
        model = made(grouping="time", decay=decay)
        catalog = catalog_of()
        behaviors = behaviors_of(catalog, [12])
        history = history_of(catalog, behaviors, model.assign(catalog, behaviors), 12)
        prior = model.summarise(history).log_prior[0].exp()
        torch.testing.assert_close(prior / prior[2], torch.tensor(expected))


def test_the_size_prior_is_a_power_of_the_size():
    _, history, _, state = spread_out(size_prior=0.5)
    for user in range(2):
        for k in range(K):
            expected = 0.5 * math.log(len(members(history, user, k)))
            assert state.log_prior[user, k].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("moments", ["keys", "decoded", "values"])
def test_moments_in_loops(moments):
    model, history, target, state = spread_out(moments=moments, center="mean", pooling="mean")
    model.decoder = torch.randn(P, D, generator=torch.Generator().manual_seed(5))
    found = model.read(state, target)
    for user in range(2):
        for place, q in enumerate(target.key[user]):
            logits, tilted = [], []
            for k in range(K):
                own = members(history, user, k)
                key, value = history.key[user, own], history.embedding[user, own]
                mean, middle = key.mean(0), value.mean(0)
                variance = sum((h - mean) ** 2 for h in key) / len(own)
                covariance = sum(torch.outer(h - mean, e - middle) for h, e in zip(key, value, strict=True)) / len(own)
                logits.append(SCALE * (q @ mean) + math.log(len(own)) + SCALE**2 * (q * variance) @ q / 2)
                moved = {"values": covariance.T, "decoded": model.decoder.T * variance, "keys": torch.zeros(D, P)}
                tilted.append(middle + SCALE * moved[moments] @ q)
            logit = torch.stack(logits)
            expected = sum(w * z for w, z in zip(logit.softmax(0), tilted, strict=True))
            torch.testing.assert_close(found.vectors[user, place, 0], expected, atol=2e-4, rtol=2e-3)
            affinity = logit.logsumexp(0) - math.log(history.mask[user].sum())
            torch.testing.assert_close(found.scalars[user, place, 0], affinity, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("goes_along", [False, True])
def test_with_moments_gaussian_clusters_are_all_but_full_attention(goes_along):
    """Clusters of 4,000 keys with different spreads; values that are the cluster's, or go along with the keys, too."""
    generator = torch.Generator().manual_seed(0)
    size = 4_000
    mean = F.normalize(torch.randn(K, P, generator=generator), dim=1)
    spread = torch.tensor([[0.02] * P, [0.1, 0.4, 0.1, 0.3], [0.2] * P])
    key = mean[:, None] + spread[:, None] * torch.randn(K, size, P, generator=generator)
    slope = torch.randn(P, D, generator=generator) * goes_along
    value = torch.randn(K, 1, D, generator=generator) + (key - mean[:, None]) @ slope
    shape, scale = (1, K * size), torch.tensor(4.0)
    none, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
    cluster = torch.arange(K).repeat_interleave(size)[None]
    value, key = value.view(*shape, D), key.view(*shape, P)
    history = History(value, key, mask, none, none, none, torch.ones(shape), cluster, scale)
    query, item = F.normalize(torch.randn(1, 20, P, generator=generator), dim=2), torch.zeros(1, 20, dtype=torch.long)
    target = Target(torch.zeros(1, 20, D), query, item, item)
    full = FullAttention(SIZES)
    exact = full.read(full.summarise(history), target)
    error, affinity = {}, {}
    for moments in ("none", "keys", "decoded", "values"):
        model = made(center="mean", pooling="mean", moments=moments)
        model.decoder = slope
        found = model.read(model.summarise(history), target)
        error[moments] = ((found.vectors - exact.vectors).norm() / exact.vectors.norm()).item()
        affinity[moments] = (found.scalars - exact.scalars).abs().max().item()
    assert affinity["keys"] < 0.1 * affinity["none"]
    if goes_along:
        assert max(error["values"], error["decoded"]) < 0.1 * min(error["none"], error["keys"])
    else:
        assert error["keys"] < 0.1 * error["none"]
        assert error["values"] == pytest.approx(error["keys"], abs=0.01)
        assert error["decoded"] == error["keys"]


def test_covariance_by_hand():
    """One cluster, keys (1, 0) and (0, 1), values 0 and 2: Sigma is [-1/2, 1/2], so q = (0, 1) adds s / 2 to 1."""
    sizes = Sizes(3, 3, 1, 1, 2)
    changed = {"num_clusters": 1, "center": "mean", "pooling": "mean", "moments": "values"}
    model = Variant(sizes, **{**PAPER, **changed})
    none, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    history = History(
        *(torch.tensor([[[0.0], [2.0]]]), torch.eye(2)[None], mask, none, none, none),
        *(torch.ones(1, 2), none, torch.tensor(3.0)),
    )
    state = model.summarise(history)
    assert state.covariance[0, 0, :, 0].tolist() == pytest.approx([-0.5, 0.5])
    assert state.variance[0, 0].tolist() == pytest.approx([0.25, 0.25])
    target = Target(torch.zeros(1, 2, 1), torch.eye(2)[None], none, none)
    assert model.read(state, target).vectors.flatten().tolist() == pytest.approx([1 - 3 / 2, 1 + 3 / 2])


# --- soft assignment ---------------------------------------------------------------------------------------


def test_soft_assignment_in_loops():
    sharpness = 0.6
    _, history, _, state = spread_out(sharpness=sharpness, pooling="mean")
    for user, length in enumerate([14, 9]):
        own = [members(history, user, k) for k in range(K)]
        center = [F.normalize(sum(history.key[user, i] for i in places), dim=0) for places in own]
        share = []
        for i in range(length):
            weight = [math.exp(sharpness * SCALE * (c @ history.key[user, i])) for c in center]
            share.append([w / sum(weight) for w in weight])
        for k in range(K):
            size = sum(one[k] for one in share)
            total = sum(one[k] * history.key[user, i] for i, one in enumerate(share))
            value = sum(one[k] * history.embedding[user, i] for i, one in enumerate(share)) / size
            assert state.size[user, k].item() == pytest.approx(size, rel=1e-4)
            torch.testing.assert_close(state.center[user, k], total / size, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(state.value[user, k], value, atol=1e-4, rtol=1e-3)


def test_sharp_enough_it_is_hard():
    """For clusters that lie apart, as those are that k-means finds; a cluster without members stays empty."""
    hard, sharp, soft = made(num_clusters=4), made(num_clusters=4, sharpness=1e4), made(num_clusters=4, sharpness=0.5)
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(12)[None] % 3
    key = F.normalize(torch.eye(P)[label] + 0.1 * torch.randn(1, 12, P, generator=generator), dim=2)
    none, mask = torch.zeros(1, 12, dtype=torch.long), torch.ones(1, 12, dtype=torch.bool)
    value = torch.randn(1, 12, D, generator=generator)
    history = History(value, key, mask, none, none, none, torch.ones(1, 12), label, torch.tensor(SCALE))
    states = [model.summarise(history) for model in (hard, sharp, soft)]
    for name in ("center", "value", "size", "log_prior"):
        torch.testing.assert_close(getattr(states[1], name), getattr(states[0], name))
    assert states[1].size[0].tolist() == [4, 4, 4, 0]
    assert not torch.allclose(states[2].value, states[0].value)
    assert states[2].size.sum().item() == pytest.approx(12)
    assert states[2].size[0, 3] == 0
