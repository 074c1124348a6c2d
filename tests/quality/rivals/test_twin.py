"""TWIN keeps what its own attention weighs most."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import LENGTHS, SIZES, D, history_of, read, target_of
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History
from encode.quality.rivals.sim import time_gap
from encode.quality.rivals.twin import Twin


def made(**options) -> Twin:
    torch.manual_seed(0)
    model = Twin(SIZES, **{"k": 3, "num_heads": 2, **options})
    for table in (model.kind_bias, model.gap_bias):
        if table is not None:  # as if trained: at first they are zero
            torch.nn.init.normal_(table.weight)
    return model


MODELS = pytest.mark.parametrize(
    "make", [made, lambda: made(per_head=False)], ids=["each head its own", "all heads the same"]
)


def alpha(model: Twin, history: History, user: int, query: torch.Tensor, head: int, i: int) -> float:
    """Logit of one behavior for one head."""
    size = D // model.attention.num_heads
    rows = slice(head * size, (head + 1) * size)
    projected = model.attention.W_k.weight[rows] @ history.embedding[user, i]
    logit = (model.attention.W_q.weight[rows] @ query) @ projected / math.sqrt(size)
    if model.kind_bias is not None:
        logit = logit + model.kind_bias.weight[history.kind[user, i], head]
        logit = logit + model.gap_bias.weight[time_gap(history.age[user : user + 1, i : i + 1]).item(), head]
    return logit.item()


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("k", [2, 5, 30])
def test_search_and_attention_are_one(k, per_head, cross):
    model, history, target = made(k=k, per_head=per_head, cross=cross), history_of(LENGTHS, 14), target_of(4)
    found = read(model)[:, :, 0]
    for user, length in enumerate(LENGTHS):
        for place, query in enumerate(target.embedding[user]):
            logits = [[alpha(model, history, user, query, head, i) for i in range(length)] for head in range(2)]
            mean = [sum(pair) / 2 for pair in zip(*logits, strict=True)]
            heads = []
            for head in range(2):
                score = logits[head] if per_head else mean
                # Repeated items have the same score without cross features, but for rounding.
                best = sorted(range(length), key=lambda i: (round(score[i], 4), i))[-k:]
                total = sum(math.exp(logits[head][i]) for i in best)
                rows = model.attention.W_v.weight[head * D // 2 : (head + 1) * D // 2]
                values = [math.exp(logits[head][i]) / total * (rows @ history.embedding[user, i]) for i in best]
                heads.append(sum(values, torch.zeros(D // 2)))
            expected = model.attention.W_o.weight @ torch.cat(heads)
            torch.testing.assert_close(found[user, place], expected, atol=1e-5, rtol=1e-5)


def test_more_than_there_is_is_full_attention():
    model, history, target = made(k=14), history_of(LENGTHS, 14), target_of(4)
    state = model.summarise(history)
    logits = torch.einsum("gtnd,gld->gtnl", model.attention.fold(target.embedding), history.embedding)
    logits = (logits + state.bias[:, None]).masked_fill(~history.mask[:, None, None], -math.inf)
    weights = F.softmax(logits, 3).nan_to_num()
    expected = model.attention.combine(torch.einsum("gtnl,gld->gtnd", weights, history.embedding))
    torch.testing.assert_close(read(model)[:, :, 0], expected)
    torch.testing.assert_close(read(made(k=1000)), read(model))
    assert not torch.allclose(read(made(k=13)), read(model))


def test_what_is_kept_is_what_weighs_most():
    """Leaving out any kept behavior moves the result; leaving out another does not."""
    model, history, target = made(k=4, per_head=False), history_of([14], 14), target_of(1, 2)
    logits = [sum(alpha(model, history, 0, target.embedding[0, 0], head, i) for head in range(2)) for i in range(14)]
    kept = sorted(range(14), key=lambda i: logits[i])[-4:]
    before = model.read(model.summarise(history), target).vectors[0, 0]
    for place in range(14):
        mask = history.mask.clone()
        mask[0, place] = False
        after = model.read(model.summarise(history._replace(mask=mask)), target).vectors[0, 0]
        assert torch.allclose(after, before) == (place not in kept)


def test_without_training_the_cross_features_do_nothing():
    torch.manual_seed(0)
    fresh = Twin(SIZES, k=3, num_heads=2)
    torch.testing.assert_close(read(fresh), read(made(cross=False)))


def test_each_cross_feature_counts():
    model, history, target = made(), history_of([9], 9), target_of(1)
    before = model.read(model.summarise(history), target).vectors
    for other in (history._replace(kind=2 - history.kind), history._replace(age=history.age * 9)):
        assert not torch.allclose(model.read(model.summarise(other), target).vectors, before)


@pytest.mark.parametrize("options", [{"k": 1}, {"num_heads": 4}, {"cross": False}, {"per_head": False}])
def test_every_switch_does_something(options):
    assert not torch.allclose(read(made()), read(made(**options)))


@pytest.mark.parametrize("options", [{"k": 0}, {"num_heads": 3}])
def test_impossible_options_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} is {options[name]}"):
        made(**options)


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
