"""Linear attention is attention to every behavior, whatever the order of its sums."""

from __future__ import annotations

import math

import pytest
import torch

from encode.errors import ConfigError
from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals.ifa import IFA

D, P, V, CATEGORIES, KINDS = 6, 4, 20, 5, 3
SIZES = Sizes(V, CATEGORIES, KINDS, D, P)


def history_of(lengths: list[int], longest: int, seed: int = 0) -> History:
    """Random histories; a user's do not depend on the other users or on the padding."""
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
        generator = torch.Generator().manual_seed(1000 * seed + length)
        history.embedding[user, :length] = torch.randn(length, D, generator=generator)
        history.age[user, :length] = 1 + torch.rand(length, generator=generator).cumsum(0).flip(0)
    return history


def target_of(num_histories: int, num_targets: int) -> Target:
    generator = torch.Generator().manual_seed(7)
    item, category = torch.arange(1, num_targets + 1), torch.ones(num_targets, dtype=torch.long)
    embedding, key = torch.randn(num_targets, D, generator=generator), torch.randn(num_targets, P, generator=generator)
    return Target(*(part.expand(num_histories, *part.shape).clone() for part in (embedding, key, item, category)))


def model_of(**options) -> IFA:
    torch.manual_seed(0)
    return IFA(SIZES, **options)


def vectors(model: IFA, history: History, target: Target) -> torch.Tensor:
    read = model.read(model.summarise(history), target)
    assert read.scalars.shape == (*target.item.shape, 0)
    return read.vectors[:, :, 0]


def phi(features: str, x: list[float]) -> list[float]:
    if features == "elu":
        return [value + 1 if value > 0 else math.exp(value) for value in x]
    if features == "relu":
        return [max(value, 0.0) for value in x]
    total = sum(math.exp(value) for value in x)
    return [math.exp(value) / total for value in x]


@pytest.mark.parametrize("features", ["elu", "relu", "softmax"])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_it_is_attention_with_weights_from_features(features, num_heads):
    """a_i = phi(q)^T phi(k_i) / sum_j phi(q)^T phi(k_j), behavior by behavior."""
    model = model_of(features=features, num_heads=num_heads)
    history, target = history_of([5, 1, 8], 9), target_of(3, 4)
    found = vectors(model, history, target)
    size = D // num_heads
    for user in range(3):
        for t in range(4):
            heads = []
            for head in range(num_heads):
                rows = slice(head * size, (head + 1) * size)
                query = phi(features, (model.W_q.weight[rows] @ target.embedding[user, t]).tolist())
                weights, values = [], []
                for i in range(int(history.mask[user].sum())):
                    key = phi(features, (model.W_k.weight[rows] @ history.embedding[user, i]).tolist())
                    weights.append(sum(a * b for a, b in zip(query, key, strict=True)))
                    values.append(model.W_v.weight[rows] @ history.embedding[user, i])
                total = sum(weights)
                share = [weight / total if total else 0.0 for weight in weights]
                heads.append(sum(a * value for a, value in zip(share, values, strict=True)))
            torch.testing.assert_close(found[user, t], model.W_o.weight @ torch.cat(heads), atol=1e-5, rtol=1e-4)


def test_weights_sum_to_one():
    """A history of one behavior over and over reads as that behavior, however long it is."""
    model, target = model_of(), target_of(1, 3)
    history = history_of([50], 50)
    history.embedding[:] = history.embedding[:, :1].clone()
    expected = model.W_o(model.W_v(history.embedding[0, 0]))
    torch.testing.assert_close(vectors(model, history, target)[0], expected.expand(3, D), atol=1e-5, rtol=1e-4)


def test_states_of_two_parts_of_a_history_add_up():
    """So a stored state can take in a new day without the old ones, and is as large for 300 behaviors as for 3."""
    model, whole = model_of(), history_of([300], 300)
    parts = [whole._replace(embedding=whole.embedding[:, s], mask=whole.mask[:, s]) for s in (slice(3), slice(3, 300))]
    first, second = (model.summarise(part) for part in parts)
    for name in ("products", "keys"):
        together = getattr(model.summarise(whole), name)
        assert together.shape == getattr(first, name).shape
        torch.testing.assert_close(getattr(first, name) + getattr(second, name), together, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("among_candidates", [False, True])
def test_padding_and_other_users_change_nothing(among_candidates):
    model = model_of(among_candidates=among_candidates)
    alone = vectors(model, history_of([4], 4), target_of(1, 3))
    crowd = vectors(model, history_of([9, 4, 0], 12), target_of(3, 3))
    torch.testing.assert_close(crowd[1:2], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("features", ["elu", "relu", "softmax"])
@pytest.mark.parametrize(("lengths", "longest"), [([0, 3], 3), ([0, 0], 0)])
def test_an_empty_history_reads_zero_with_finite_gradients(features, lengths, longest):
    model, history, target = (
        model_of(features=features, among_candidates=True),
        history_of(lengths, longest),
        target_of(2, 3),
    )
    leaves = [history.embedding.requires_grad_(), target.embedding.requires_grad_(), *model.parameters()]
    found = vectors(model, history, target)
    assert (found[0] == 0).all()
    found.sin().sum().backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert (history.embedding.grad[0] == 0).all()


def test_every_switch_does_something():
    history, target = history_of([5, 8], 9), target_of(2, 4)
    base = vectors(model_of(), history, target)
    for options in ({"num_heads": 3}, {"features": "relu"}, {"features": "softmax"}, {"among_candidates": True}):
        assert (vectors(model_of(**options), history, target) - base).abs().max() > 1e-3, options


def test_candidates_attend_to_each_other_and_not_to_padding():
    """v_t + sum_u softmax_u((A_q e_t)^T A_k e_u / sqrt(D)) A_v v_u, candidate by candidate."""
    model, history, target = model_of(among_candidates=True), history_of([5], 5), target_of(1, 4)
    target.item[0, 3] = 0
    found = vectors(model, history, target)[0]
    A_q, A_k, A_v = (linear.weight.detach() for linear in model.candidates)
    model.candidates = torch.nn.ModuleList()
    own, embedding = vectors(model, history, target)[0], target.embedding[0]
    for t in range(3):
        logits = [float((A_q @ embedding[t]) @ (A_k @ embedding[u])) / math.sqrt(D) for u in range(3)]
        total = sum(map(math.exp, logits))
        mixed = sum(math.exp(logit) / total * (A_v @ own[u]) for u, logit in enumerate(logits))
        torch.testing.assert_close(found[t], own[t] + mixed, atol=1e-5, rtol=1e-4)


def test_without_attention_among_them_a_candidate_does_not_know_the_others():
    history, target = history_of([5], 5), target_of(1, 4)
    first = Target(*(part[:, :1] for part in target))
    torch.testing.assert_close(vectors(model_of(), history, target)[:, :1], vectors(model_of(), history, first))
    mixed = model_of(among_candidates=True)
    assert (vectors(mixed, history, target)[:, :1] - vectors(mixed, history, first)).abs().max() > 1e-3


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="num_heads is 4, which does not divide embedding_dim 6"):
        IFA(SIZES, num_heads=4)
    with pytest.raises(ConfigError, match="features is 'exp'"):
        IFA(SIZES, features="exp")
