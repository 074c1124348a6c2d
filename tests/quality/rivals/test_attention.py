"""Attention over every behavior: by its definition, however it is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals import attention
from encode.quality.rivals.attention import DinUnit, FullAttention
from encode.schema import UNKNOWN

D, P = 6, 4
SIZES = Sizes(num_items=30, num_categories=5, num_kinds=1, embedding_dim=D, projected_dim=P)
LENGTHS = [9, 0, 14, 1]
SCALE = 8.0


def history_of(lengths: list[int], longest: int) -> History:
    """Random histories; a user's depend on neither the other users nor the padding."""
    shape = len(lengths), longest
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    embedding, key = torch.zeros(*shape, D), torch.zeros(*shape, P)
    for user, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 + length)
        embedding[user, :length] = torch.randn(length, D, generator=generator)
        key[user, :length] = F.normalize(torch.randn(length, P, generator=generator), dim=1)
    none = torch.zeros(shape, dtype=torch.long)
    return History(embedding, key, mask, none, none, none, torch.zeros(shape), none, torch.tensor(SCALE))


def target_of(num_histories: int, num_targets: int = 5) -> Target:
    """The same targets for every history."""
    generator = torch.Generator().manual_seed(7)
    embedding = torch.randn(num_targets, D, generator=generator)
    key = F.normalize(torch.randn(num_targets, P, generator=generator), dim=1)
    none = torch.zeros(num_targets, dtype=torch.long)
    return Target(*(part.expand(num_histories, *part.shape) for part in (embedding, key, none, none)))


def made(kind, **options):
    torch.manual_seed(0)
    model = kind(SIZES, **options)
    if kind is DinUnit and options.get("activation") != "relu":  # as if trained: not its start, which is ReLU's cousin
        torch.nn.init.constant_(model.activation.weight, -0.7)
    return model


def read(model, lengths=LENGTHS, longest=14, num_targets=5):
    return model.read(model.summarise(history_of(lengths, longest)), target_of(len(lengths), num_targets))


KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [(FullAttention, {}), (DinUnit, {}), (DinUnit, {"softmax": True}), (DinUnit, {"activation": "relu"})],
    ids=["full", "din", "din, softmax", "din, relu"],
)


def test_full_attention_is_softmax_over_the_whole_history():
    history, target, found = history_of(LENGTHS, 14), target_of(4), read(made(FullAttention))
    assert found.vectors.shape == (4, 5, FullAttention.num_vectors, D) == (4, 5, 1, D)
    assert found.scalars.shape == (4, 5, made(FullAttention).num_scalars) == (4, 5, 1)
    for user, length in enumerate(LENGTHS):
        for place in range(5):
            weights = [math.exp(SCALE * (target.key[user, place] @ history.key[user, i])) for i in range(length)]
            values = [w / sum(weights) * history.embedding[user, i] for i, w in enumerate(weights)]
            torch.testing.assert_close(found.vectors[user, place, 0], sum(values, torch.zeros(D)), atol=1e-5, rtol=1e-4)
            affinity = math.log(sum(weights) / length) if length else 0
            assert found.scalars[user, place, 0].item() == pytest.approx(affinity, abs=1e-4)


def test_full_attention_with_counts_tells_how_often_a_target_was_had():
    history, target = history_of(LENGTHS, 14), target_of(4)
    target = target._replace(item=history.item[:, :5].clone())
    model = made(FullAttention, counts=True)
    found = model.read(model.summarise(history), target).scalars
    assert found.shape[2] == model.num_scalars == 2
    for user, length in enumerate(LENGTHS):
        for place in range(5):
            item = target.item[user, place]
            times = (history.item[user, :length] == item).sum().item() if item > UNKNOWN else 0
            assert found[user, place, 1].item() == pytest.approx(math.log1p(times))
    for affinity, counts in ((False, True), (True, False), (False, False)):
        some = made(FullAttention, affinity=affinity, counts=counts)
        expected = found[..., [place for place, wanted in enumerate((affinity, counts)) if wanted]]
        torch.testing.assert_close(some.read(some.summarise(history), target).scalars, expected)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["prelu", "relu"])
def test_din_is_an_mlp_of_target_and_behavior(activation, softmax):
    model = made(DinUnit, hidden=7, activation=activation, softmax=softmax)
    slope = 0 if activation == "relu" else -0.7
    history, target, found = history_of(LENGTHS, 14), target_of(4), read(model)
    assert found.scalars.shape == (4, 5, 0)
    for user, length in enumerate(LENGTHS):
        for place, e_t in enumerate(target.embedding[user]):
            weights = []
            for e_i in history.embedding[user, :length]:
                hidden = model.first.weight @ torch.cat([e_t, e_i, e_t - e_i, e_t * e_i]) + model.first.bias
                hidden = torch.tensor([x if x > 0 else slope * x for x in hidden.tolist()])
                weights.append((model.last.weight[0] @ hidden + model.last.bias[0]).item())
            if softmax:
                weights = [math.exp(w) / sum(map(math.exp, weights)) for w in weights]
            expected = sum((w * history.embedding[user, i] for i, w in enumerate(weights)), torch.zeros(D))
            torch.testing.assert_close(found.vectors[user, place, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pairs", [1, 60, 120, 10**9])
def test_targets_taken_in_parts_are_the_same_targets(monkeypatch, pairs):
    """4 x 14 pairs a target: one target at a time, one, two, all; gradients included."""

    def run():
        model = made(DinUnit)
        read(model).vectors.square().sum().backward()
        return [read(model).vectors.detach(), *(p.grad for p in model.parameters())]

    sizes = []
    whole = run()
    monkeypatch.setattr(attention, "_PAIRS_AT_A_TIME", pairs)
    original = DinUnit._read
    monkeypatch.setattr(DinUnit, "_read", lambda self, b, m, t: sizes.append(t.shape[1]) or original(self, b, m, t))
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert max(sizes) == {1: 1, 60: 1, 120: 2, 10**9: 5}[pairs]


@KINDS
def test_padding_and_other_users_change_nothing(kind, options):
    model = made(kind, **options)
    whole = read(model)
    for user, length in enumerate(LENGTHS):
        for longest in {max(length, 1), length + 3}:
            alone = read(model, [length], longest)
            torch.testing.assert_close(alone.vectors[0], whole.vectors[user], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(alone.scalars[0], whole.scalars[user], atol=1e-5, rtol=1e-5)


@KINDS
@pytest.mark.parametrize("longest", [0, 3])
def test_an_empty_history_gives_zeros_and_finite_gradients(kind, options, longest):
    model, history, target = made(kind, **options), history_of([0, 0], longest), target_of(2)
    inputs = [history.embedding.requires_grad_(), history.key.requires_grad_(), target.embedding.clone()]
    inputs[2].requires_grad_()
    found = model.read(model.summarise(history), target._replace(embedding=inputs[2]))
    assert not found.vectors.any()
    assert not found.scalars.any()
    if found.vectors.requires_grad:
        (found.vectors.sum() + found.scalars.sum()).backward()
    for one in (*inputs, *model.parameters()):
        assert one.grad is None or one.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"softmax": True}, {"activation": "relu"}, {"hidden": 5}])
def test_every_switch_counts(options):
    assert not torch.allclose(read(made(DinUnit)).vectors, read(made(DinUnit, **options)).vectors)


def test_softmax_forgets_how_often_an_interest_was_met():
    """The history twice over: twice the sum without softmax, the same mean with it."""
    history, target = history_of([9], 9), target_of(1)
    twice = history._replace(
        embedding=history.embedding.repeat(1, 2, 1), key=history.key.repeat(1, 2, 1), mask=history.mask.repeat(1, 2)
    )
    for softmax, factor in ((False, 2), (True, 1)):
        model = made(DinUnit, softmax=softmax)
        once, again = (model.read(model.summarise(one), target).vectors for one in (history, twice))
        torch.testing.assert_close(again, factor * once)


@KINDS
def test_the_state_is_the_history(kind, options):
    """So nothing of it may be kept instead of the history."""
    model = made(kind, **options)
    assert not model.target_free
    assert model.summarise(history_of(LENGTHS, 14)).embedding.shape == (4, 14, D)
