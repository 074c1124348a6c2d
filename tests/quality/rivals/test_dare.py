"""DARE finds and weighs behaviors by one table and represents them by another."""

from __future__ import annotations

import math

import pytest
import torch

from encode.errors import ConfigError
from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals.dare import DARE

D, P, V, CATEGORIES, KINDS = 6, 4, 40, 5, 3
SIZES = Sizes(V, CATEGORIES, KINDS, D, P)


def history_of(lengths: list[int], longest: int) -> History:
    """Random histories without ties; a user's do not depend on the other users or on the padding."""
    shape = len(lengths), longest
    history = History(
        torch.zeros(*shape, D),
        torch.zeros(*shape, P),
        torch.arange(longest) < torch.tensor(lengths)[:, None],
        *(torch.zeros(shape, dtype=torch.long) for _ in range(3)),
        torch.zeros(shape),
        torch.zeros(shape, dtype=torch.long),
        torch.tensor(8.0),
    )
    for user, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        history.embedding[user, :length] = torch.randn(length, D, generator=generator)
        history.item[user, :length] = 1 + torch.randperm(V - 1, generator=generator)[:length]
        history.category[user, :length] = 1 + history.item[user, :length] % (CATEGORIES - 1)
        history.kind[user, :length] = torch.randint(KINDS, (length,), generator=generator)
    return history


def target_of(num_histories: int, num_targets: int) -> Target:
    generator = torch.Generator().manual_seed(7)
    item = torch.arange(3, num_targets + 3)
    embedding, key = torch.randn(num_targets, D, generator=generator), torch.randn(num_targets, P, generator=generator)
    parts = embedding, key, item, 1 + item % (CATEGORIES - 1)
    return Target(*(part.expand(num_histories, *part.shape).clone() for part in parts))


def model_of(**options) -> DARE:
    torch.manual_seed(0)
    return DARE(SIZES, **{"num_behaviors": 4, "initial_std": 1.0, **options})


def vectors(model: DARE, history: History, target: Target) -> torch.Tensor:
    read = model.read(model.summarise(history), target)
    assert read.scalars.shape == (*target.item.shape, 0)
    return read.vectors[:, :, 0]


@torch.no_grad()
def by_hand(model: DARE, history: History, target: Target, user: int, t: int) -> torch.Tensor:
    """Search, softmax and sum, behavior by behavior."""
    query = target.embedding[user, t]
    if model.decoupled:
        query = model.item.weight[target.item[user, t]] + model.category.weight[target.category[user, t]]
    scores = []
    for i in range(int(history.mask[user].sum())):
        key = history.embedding[user, i]
        if model.decoupled:
            tables = (model.item, history.item), (model.category, history.category), (model.kind, history.kind)
            key = sum(table.weight[index[user, i]] for table, index in tables)
        scores.append(float(query @ key) / math.sqrt(len(query)))
    top = sorted(range(len(scores)), key=lambda i: -scores[i])[: model.num_behaviors]
    total = sum(math.exp(scores[i]) for i in top)
    pooled = sum((math.exp(scores[i]) / total * history.embedding[user, i] for i in top), torch.zeros(D))
    return pooled * target.embedding[user, t] if model.target_aware else pooled


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("target_aware", [False, True])
@pytest.mark.parametrize("num_behaviors", [1, 4, 100])
def test_it_is_the_definition(decoupled, target_aware, num_behaviors):
    """By k = 100, more than there are, it is attention to the whole history."""
    model = model_of(decoupled=decoupled, target_aware=target_aware, num_behaviors=num_behaviors)
    history, target = history_of([9, 2, 17], 18), target_of(3, 5)
    found = vectors(model, history, target)
    for user in range(3):
        for t in range(5):
            expected = by_hand(model, history, target, user, t)
            torch.testing.assert_close(found[user, t], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoupled", [False, True])
def test_exactly_the_k_best_count(decoupled):
    """Gradients reach k representations and no others."""
    model, history, target = model_of(decoupled=decoupled), history_of([17], 18), target_of(1, 1)
    representation = history.embedding.clone().requires_grad_()
    state = model.summarise(history)._replace(representation=representation)
    model.read(state, target).vectors.sum().backward()
    counted = representation.grad[0].norm(dim=1).nonzero()[:, 0].tolist()
    score = (
        (state.attention[0] @ model.attention_embedding(target.item, target.category)[0, 0])
        if decoupled
        else (history.embedding[0] @ target.embedding[0, 0])
    )
    assert counted == sorted(score[:17].topk(4).indices.tolist())


def test_attention_is_learned_in_its_own_table_alone():
    """The paper's point: representation gives attention no gradient, and the other way around."""
    for decoupled in (True, False):
        model, history, target = model_of(decoupled=decoupled), history_of([9], 9), target_of(1, 2)
        leaf = target.embedding.requires_grad_()
        found = vectors(model, history, target).square().sum()
        if decoupled:
            tables = [model.item.weight, model.category.weight, model.kind.weight]
            *grads, of_representation = torch.autograd.grad(found, [*tables, leaf], allow_unused=True)
            assert of_representation is None
            assert all(grad.abs().max() > 0 for grad in grads)
            # Of the nine behaviors those that were found, and the two targets.
            top = (model.attention_embedding(target.item, target.category) @ model.summarise(history).attention.mT)[0]
            kept = history.item[0][top.topk(4).indices].unique()
            learned = grads[0].norm(dim=1).nonzero()[:, 0].tolist()
            assert learned == sorted({*kept.tolist(), *target.item[0].tolist()})
        else:
            assert torch.autograd.grad(found, leaf)[0].abs().max() > 0


def test_values_are_embeddings_of_the_backbone():
    """Twice the embeddings, twice the vector: weights do not know them."""
    model, history, target = model_of(), history_of([9], 9), target_of(1, 2)
    twice = history._replace(embedding=2 * history.embedding)
    torch.testing.assert_close(vectors(model, twice, target), 2 * vectors(model, history, target))
    coupled = model_of(decoupled=False)
    assert (vectors(coupled, twice, target) - 2 * vectors(coupled, history, target)).abs().max() > 1e-2


@pytest.mark.parametrize("decoupled", [False, True])
def test_padding_and_other_users_change_nothing(decoupled):
    model = model_of(decoupled=decoupled, num_behaviors=6)
    alone = vectors(model, history_of([5], 5), target_of(1, 3))
    crowd = vectors(model, history_of([9, 5, 0], 12), target_of(3, 3))
    torch.testing.assert_close(crowd[1:2], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"decoupled": False}, {"target_aware": True}])
@pytest.mark.parametrize(("lengths", "longest"), [([0, 3], 3), ([0, 0], 0)])
def test_an_empty_history_reads_zero_with_finite_gradients(options, lengths, longest):
    model, history, target = model_of(**options), history_of(lengths, longest), target_of(2, 3)
    leaves = [history.embedding.requires_grad_(), target.embedding.requires_grad_(), *model.parameters()]
    found = vectors(model, history, target)
    assert (found[0] == 0).all()
    found.sin().sum().backward()
    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert longest == 0 or (history.embedding.grad[0] == 0).all()


def test_every_switch_does_something():
    history, target = history_of([9, 8], 9), target_of(2, 4)
    base = vectors(model_of(), history, target)
    changes = (
        {"num_behaviors": 3},
        {"decoupled": False},
        {"target_aware": True},
        {"attention_dim": 2},
        {"initial_std": 2.0},
    )
    for options in changes:
        assert (vectors(model_of(**options), history, target) - base).abs().max() > 1e-3, options


def test_the_attention_table_is_half_as_wide_unless_told():
    assert DARE(SIZES).item.weight.shape == (V, D // 2)
    assert DARE(SIZES, attention_dim=5).category.weight.shape == (CATEGORIES, 5)
    assert list(DARE(SIZES, decoupled=False).parameters()) == []
    assert (DARE(SIZES).item.weight[0] == 0).all()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="num_behaviors is 0, expected at least 1"):
        DARE(SIZES, num_behaviors=0)
    with pytest.raises(ConfigError, match="attention_dim is 0"):
        DARE(SIZES, attention_dim=0)
