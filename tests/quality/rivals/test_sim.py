"""SIM finds what it says it finds, and attends to nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import LENGTHS, SIZES, D, history_of, read, slow_attention, target_of

from encode.errors import ConfigError
from encode.model.long_term import History
from encode.quality.rivals.retrieved import MultiHeadTargetAttention, gather_behaviors, softmax_over, top_behaviors
from encode.quality.rivals.sim import NUM_GAPS, SimHard, SimSoft, time_gap


def made(kind, **options):
    torch.manual_seed(0)
    model = kind(SIZES, **options)
    if model.exact.gap is not None:  # as if trained: at first they are too small to tell
        torch.nn.init.normal_(model.exact.gap.weight)
    if getattr(model, "W_a", None) is not None:  # at first it is W_b
        torch.nn.init.normal_(model.W_a.weight)
    return model


MODELS = pytest.mark.parametrize("make", [lambda: made(SimHard, k=3), lambda: made(SimSoft, k=3)], ids=["hard", "soft"])


def behaviors_of(model, history: History, user: int) -> list[torch.Tensor]:
    """z of each behavior, with the gap worked out in logarithms."""
    ages = history.age[user, history.mask[user]].tolist()
    gaps = [min(int(math.log2(1 + 1440 * age)), NUM_GAPS - 1) for age in ages]
    pairs = zip(history.embedding[user], gaps, strict=False)
    return [torch.cat([embedding, model.exact.gap.weight[gap]]) for embedding, gap in pairs]


# --- the search by itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 12, 40])
def test_the_k_largest_in_time_order_the_latest_of_equals(k):
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(-3, 4, (4, 5, 14), generator=generator).float()
    score[2, 1, :5] = float("-inf")
    mask = history_of(LENGTHS, 14).mask
    places, kept = top_behaviors(score, mask, k)
    assert places.shape == kept.shape == (4, 5, k)
    for user, length in enumerate(LENGTHS):
        for target in range(5):
            row = score[user, target].tolist()
            ranked = sorted((place for place in range(length) if row[place] > -math.inf), key=lambda i: (row[i], i))
            expected = sorted(ranked[-k:])
            assert places[user, target].tolist() == expected + [0] * (k - len(expected))
            assert kept[user, target].tolist() == [True] * len(expected) + [False] * (k - len(expected))


def test_gathering_is_indexing():
    values, places = torch.randn(2, 5, 3), torch.tensor([[[4, 0], [1, 1]], [[2, 3], [0, 4]]])
    expected = torch.stack([values[user][places[user]] for user in range(2)])
    assert torch.equal(gather_behaviors(values, places), expected)


def test_softmax_over_what_is_real():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    found = softmax_over(torch.tensor([[0.0, 99.0, math.log(3)], [1.0, 2.0, 3.0]]), mask)
    assert found.flatten().tolist() == pytest.approx([0.25, 0, 0.75, 0, 0, 0])


def test_attention_ignores_what_is_masked():
    torch.manual_seed(0)
    attention = MultiHeadTargetAttention(5, 3, 2, 6)
    query, values = torch.randn(1, 2, 5), torch.randn(1, 2, 4, 3)
    mask = torch.tensor([[[True, True, True, False], [False, False, True, True]]])
    expected = torch.stack([slow_attention(attention, query[0, t], values[0, t, mask[0, t]]) for t in range(2)])
    torch.testing.assert_close(attention(query, values, mask)[0], expected)


# --- both search units --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5, 30])
def test_hard_search_is_the_latest_of_the_category(k):
    model, history, target = made(SimHard, k=k), history_of(LENGTHS, 14), target_of(4)
    found = read(model)[:, :, 0]
    hits = 0
    for user, length in enumerate(LENGTHS):
        z = behaviors_of(model, history, user)
        for place, category in enumerate(target.category[user].tolist()):
            same = [i for i in range(length) if history.category[user, i] == category and category > 1][-k:]
            expected = torch.zeros(D)
            if same:
                hits += 1
                query = target.embedding[user, place]
                expected = slow_attention(model.exact.attention, query, torch.stack([z[i] for i in same]))
            torch.testing.assert_close(found[user, place], expected, atol=1e-6, rtol=1e-5)
    assert 5 < hits < 24


@pytest.mark.parametrize("trains_search", [True, False])
@pytest.mark.parametrize("k", [2, 5, 30])
def test_soft_search_is_the_largest_inner_product(k, trains_search):
    model, history, target = made(SimSoft, k=k, trains_search=trains_search), history_of(LENGTHS, 14), target_of(4)
    found = read(model)
    W_a = model.W_a if trains_search else model.W_b
    for user, length in enumerate(LENGTHS):
        z = behaviors_of(model, history, user)
        for place, query in enumerate(target.embedding[user]):
            keys = [model.W_b.weight @ history.embedding[user, i] for i in range(length)]
            scores = [(key @ (W_a.weight @ query)).item() for key in keys]
            # Repeated items have the same score, but for rounding.
            best = sorted(range(length), key=lambda i: (round(scores[i], 4), i))[-k:]
            expected = torch.zeros(2, D)
            if best:
                expected[0] = slow_attention(model.exact.attention, query, torch.stack([z[i] for i in sorted(best)]))
                expected[1] = sum(scores[i] * history.embedding[user, i] for i in range(length)) / length
            torch.testing.assert_close(found[user, place], expected[: model.num_vectors], atol=1e-5, rtol=1e-5)


def test_time_gaps_by_hand():
    minutes = torch.tensor([[0, 0.5, 1, 1.5, 3, 6.5, 1440, 1440 * 365, 1e9]])
    assert time_gap(minutes / 1440).tolist() == [[0, 0, 1, 1, 2, 2, 10, 19, 23]]


def test_what_is_not_found_changes_nothing():
    for kind in (SimHard, SimSoft):
        model, history, target = made(kind, k=1), history_of([9], 9), target_of(1, 2)
        target.embedding[:, 1], target.category[:] = target.embedding[:, 0], 3
        before = model.read(model.summarise(history), target).vectors[:, :, 0]
        chosen = [place for place in range(9) if not torch.equal(changed_at(model, history, target, place), before)]
        assert len(chosen) == 1


def changed_at(model, history, target, place):
    """The first vector after the behavior at a place has become slightly different."""
    embedding = history.embedding.clone()
    embedding[0, place] *= 0.999
    return model.read(model.summarise(history._replace(embedding=embedding)), target).vectors[:, :, 0]


def test_more_than_there_is_is_full_attention():
    torch.testing.assert_close(read(made(SimSoft, k=14)), read(made(SimSoft, k=1000)))
    assert not torch.allclose(read(made(SimSoft, k=13)), read(made(SimSoft, k=14)))


@pytest.mark.parametrize("kind", [SimHard, SimSoft])
@pytest.mark.parametrize("options", [{"k": 1}, {"num_heads": 4}, {"gap_dim": 0}, {"gap_dim": 3}])
def test_every_switch_does_something(kind, options):
    assert not torch.allclose(read(made(kind, k=3)), read(made(kind, **{"k": 3, **options})))


def test_switches_of_the_soft_search():
    assert not torch.allclose(read(made(SimSoft, k=3)), read(made(SimSoft, k=3, search_dim=7)))
    frozen = made(SimSoft, k=3, trains_search=False)
    assert read(frozen).shape[2] == 1
    names = [name for name, parameter in frozen.named_parameters() if not parameter.requires_grad]
    assert names == ["W_b.weight"]


def test_before_training_the_search_projects_both_sides_alike():
    model = SimSoft(SIZES)
    assert torch.equal(model.W_a.weight, model.W_b.weight)
    assert model.W_a.weight is not model.W_b.weight


def test_the_time_of_a_behavior_matters_only_with_time_gaps():
    for gap_dim in (0, 8):
        model, history, target = made(SimSoft, k=3, gap_dim=gap_dim), history_of([9], 9), target_of(1)
        later = history._replace(age=history.age + 100)
        first, second = (model.read(model.summarise(one), target).vectors for one in (history, later))
        assert torch.equal(first, second) == (gap_dim == 0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SimHard, {"k": 0}, "SimHard: k is 0"),
        (SimSoft, {"search_dim": 0}, "SimSoft: search_dim is 0"),
        (SimSoft, {"gap_dim": -1}, "gap_dim is -1"),
        (SimHard, {"num_heads": 3}, "num_heads is 3, which does not divide 8"),
    ],
)
def test_impossible_options_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(SIZES, **options)


# --- what holds for every model of this file ----------------------------------------------------------------


@MODELS
def test_neither_padding_nor_other_users_change_anything(make):
    model = make()
    together = read(model)
    torch.testing.assert_close(read(model, longest=70), together, atol=1e-6, rtol=1e-5)
    alone = torch.cat([read(model, [length], max(length, 1)) for length in LENGTHS])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)


@MODELS
@pytest.mark.parametrize("longest", [0, 3])
def test_an_empty_history_reads_zero_with_finite_gradients(make, longest):
    model, history, target = make(), history_of([0, 0], longest), target_of(2)
    leaves = [history.embedding.requires_grad_(), target.embedding.requires_grad_()]
    found = model.read(model.summarise(history), target)
    assert (found.vectors == 0).all()
    (found.vectors * torch.randn(found.vectors.shape)).sum().backward()
    grads = [leaf.grad for leaf in [*leaves, *model.parameters()] if leaf.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


@MODELS
def test_gradients_reach_every_parameter_and_are_finite_beside_an_empty_history(make):
    model, history, target = make(), history_of(LENGTHS, 14), target_of(4)
    leaves = [history.embedding.requires_grad_(), target.embedding.requires_grad_()]
    found = model.read(model.summarise(history), target)
    (found.vectors * torch.randn(found.vectors.shape)).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.isfinite(leaf.grad).all() for leaf in [*leaves, *trained])
    assert all((leaf.grad != 0).any() for leaf in [*leaves, *trained])
    assert (history.embedding.grad[~history.mask] == 0).all()
