"""Weights of attention are multiplied by rates, and a point process says what the rates should be."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals.self_modulating import SelfModulatingAttention

D, P, V, CATEGORIES, KINDS = 6, 4, 20, 5, 3
SIZES = Sizes(V, CATEGORIES, KINDS, D, P)


def history_of(lengths: list[int], longest: int) -> History:
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
        generator = torch.Generator().manual_seed(length)
        history.embedding[user, :length] = torch.randn(length, D, generator=generator)
        history.category[user, :length] = torch.randint(1, CATEGORIES, (length,), generator=generator)
        history.kind[user, :length] = torch.randint(KINDS, (length,), generator=generator)
        history.age[user, :length] = (3 * torch.rand(length, generator=generator)).cumsum(0).flip(0)
    return history


def target_of(num_histories: int, num_targets: int) -> Target:
    generator = torch.Generator().manual_seed(7)
    item, category = torch.arange(1, num_targets + 1), torch.ones(num_targets, dtype=torch.long)
    embedding, key = torch.randn(num_targets, D, generator=generator), torch.randn(num_targets, P, generator=generator)
    return Target(*(part.expand(num_histories, *part.shape).clone() for part in (embedding, key, item, category)))


def model_of(**options) -> SelfModulatingAttention:
    torch.manual_seed(0)
    model = SelfModulatingAttention(SIZES, **{"length": 6, "regulariser": 1.0, **options})
    if model.intensity is not None:
        with torch.no_grad():
            model.intensity.log_scale.copy_(torch.linspace(-0.7, 0.7, model.num_types))
    return model


def vectors(model: SelfModulatingAttention, history: History, target: Target) -> torch.Tensor:
    read = model.read(model.summarise(history), target)
    assert read.scalars.shape == (*target.item.shape, 0)
    return read.vectors[:, :, 0]


def loss_of(model: SelfModulatingAttention, history: History) -> torch.Tensor:
    return model.auxiliary_loss(model.summarise(history), history)


# --- by the formulas, behavior by behavior -----------------------------------------------------------------


def rate(model: SelfModulatingAttention, summary: torch.Tensor, wait: float, event: int) -> float:
    """s log(1 + exp(w^T sigma(W [S; log(1 + dt)] + b) / s))."""
    hidden = model.intensity.hidden
    x = hidden.weight @ torch.cat([summary, torch.tensor([math.log(1 + wait)])]) + hidden.bias
    scale = math.exp(model.intensity.log_scale[event])
    return scale * math.log(1 + math.exp(float(model.intensity.weight[event] @ (1 / (1 + (-x).exp()))) / scale))


def slow_attention(model, layer, query, rows, events, wait):
    """One query over rows: the output, and S of each head."""
    size, outputs, summaries = D // layer.num_heads, [], []
    for head in range(layer.num_heads):
        part = slice(head * size, (head + 1) * size)
        logits = [
            float((layer.Q.weight[part] @ query) @ (layer.K.weight[part] @ row)) / math.sqrt(size) for row in rows
        ]
        total = sum(map(math.exp, logits))
        shares = [math.exp(logit) / total for logit in logits]
        summary = sum(
            (a * (layer.T.weight[part] @ row) for a, row in zip(shares, rows, strict=True)), torch.zeros(size)
        )
        if model.intensity is not None:
            shares = [a * rate(model, summary, wait, event) for a, event in zip(shares, events, strict=True)]
        outputs.append(
            sum((a * (layer.V.weight[part] @ x) for a, x in zip(shares, rows, strict=True)), torch.zeros(size))
        )
        summaries.append(summary)
    return torch.cat(outputs), summaries


def slow_states(model, history, user):
    """States, summaries, types and waits of the latest behaviors."""
    length = int(history.mask[user].sum())
    first = max(0, length - model.length)
    rows, age = history.embedding[user, first:length], [*history.age[user, first:length].tolist(), 0.0]
    labels = history.category if model.event_type == "category" else history.kind
    events = [event % model.num_types for event in labels[user, first:length].tolist()]
    waits = [(age[i] - age[i + 1]) / model.time_unit for i in range(length - first)]
    states, summaries = [], []
    for i, row in enumerate(rows):
        query = F.layer_norm(row, (D,), model.norm_query.weight, model.norm_query.bias)
        moved, summary = slow_attention(model, model.among, query, rows[: i + 1], events[: i + 1], waits[i])
        moved = row + moved
        states.append(moved + model.feed_forward(model.norm_forward(moved)))
        summaries.append(summary)
    return states, summaries, events, waits


OPTIONS = [
    {},
    {"num_heads": 1, "modulated": False},
    {"num_heads": 3, "event_type": "kind", "time_unit": 0.2},
    {"num_types": 2, "length": 30},
]


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_it_is_the_definition(options):
    model = model_of(**options)
    history, target = history_of([9, 1, 0, 5], 10), target_of(4, 3)
    found = vectors(model, history, target)
    for user in range(4):
        states, _, events, waits = slow_states(model, history, user)
        for t in range(3):
            query, wait = target.embedding[user, t], waits[-1] if waits else 0.0
            output, _ = slow_attention(model, model.asking, query, states, events, wait)
            torch.testing.assert_close(found[user, t], model.W_o.weight @ output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_the_regulariser_is_the_loss_of_a_point_process(options):
    """- log of the rate of what came next, plus the trapezoid of all rates until then."""
    model, history = model_of(**options, regulariser=0.3), history_of([9, 1, 0, 5], 10)
    losses = []
    for user in range(4 if model.intensity is not None else 0):
        _, summaries, events, waits = slow_states(model, history, user)
        for i in range(len(events) - 1):
            for summary in summaries[i]:
                ends = [rate(model, summary, wait, y) for wait in (0.0, waits[i]) for y in range(model.num_types)]
                happened = math.log(rate(model, summary, waits[i], events[i + 1]))
                losses.append(waits[i] * sum(ends) / 2 - happened)
    expected = 0.3 * sum(losses) / len(losses) if losses else 0.0
    assert loss_of(model, history).item() == pytest.approx(expected, rel=1e-4)


# --- what it promises --------------------------------------------------------------------------------------


def test_without_modulation_and_without_differences_the_target_reads_the_mean():
    """If no key stands out, weights are 1 / K."""
    model, history, target = model_of(modulated=False), history_of([5], 5), target_of(1, 2)
    torch.nn.init.zeros_(model.asking.K.weight)
    state = model.summarise(history)
    expected = model.W_o(state.value.mean(2).flatten())
    torch.testing.assert_close(vectors(model, history, target)[0], expected.expand(2, D))


def test_a_rate_tells_how_long_ago_the_latest_behavior_was():
    """Only the moment of asking moves: every behavior is 30 days older."""
    history, target = history_of([5], 5), target_of(1, 2)
    later = history._replace(age=history.age + 30)
    assert (vectors(model_of(), history, target) - vectors(model_of(), later, target)).abs().max() > 1e-3
    same = model_of(modulated=False)
    torch.testing.assert_close(vectors(same, history, target), vectors(same, later, target))


def test_a_state_knows_only_what_came_before_it():
    """Another latest behavior leaves the states of the others as they were."""
    model, history = model_of(), history_of([5], 5)
    other = history._replace(embedding=history.embedding.clone(), category=history.category.clone())
    other.embedding[0, 4] = 1.0
    other.category[0, 4] = history.category[0, 4] % (CATEGORIES - 1) + 1
    before, after = model.summarise(history), model.summarise(other)
    for name in ("key", "value", "evidence", "summary"):
        torch.testing.assert_close(getattr(before, name)[:, :, :4], getattr(after, name)[:, :, :4])
        assert (getattr(before, name)[:, :, 4] - getattr(after, name)[:, :, 4]).abs().max() > 1e-3


def test_only_the_latest_behaviors_count():
    model, target = model_of(length=6), target_of(1, 3)
    whole = history_of([11], 12)
    latest = History(*(part[:, 5:] if part.dim() > 1 else part for part in whole))
    torch.testing.assert_close(vectors(model, whole, target), vectors(model, latest, target))
    assert model.summarise(history_of([11], 12)).mask.shape == (1, 6)
    assert model.summarise(history_of([500], 500)).mask.shape == (1, 6)


def test_training_on_the_regulariser_finds_the_rate():
    """Behaviors of one type at random moments, two a day."""
    history, generator = history_of([100], 100), torch.Generator().manual_seed(0)
    history.age[0] = torch.empty(100).exponential_(2, generator=generator).cumsum(0).flip(0)
    torch.manual_seed(0)
    model = SelfModulatingAttention(Sizes(V, 1, 1, D, P), regulariser=1.0)
    optimizer = torch.optim.Adam(model.intensity.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, history).backward()
        optimizer.step()
    state = model.summarise(history)
    rates = model.intensity.of_all(state.summary[:, :, :-1], state.wait[:, :-1])
    assert 1.5 < rates.mean().item() < 2.5


@pytest.mark.parametrize("event_type", ["category", "kind"])
def test_padding_and_other_users_change_nothing(event_type):
    model = model_of(event_type=event_type)
    for length in (4, 9):
        alone = vectors(model, history_of([length], length), target_of(1, 3))
        crowd = vectors(model, history_of([11, length, 0], 12), target_of(3, 3))
        torch.testing.assert_close(crowd[1:2], alone, atol=1e-6, rtol=1e-5)
        losses = [loss_of(model, history_of(*shape)) for shape in (([length], length), ([length, 0, 1], 12))]
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"modulated": False}])
@pytest.mark.parametrize(("lengths", "longest"), [([0, 3], 3), ([0, 0], 2), ([0, 0], 0)])
def test_an_empty_history_reads_zero_with_finite_gradients(options, lengths, longest):
    model, history, target = model_of(**options), history_of(lengths, longest), target_of(2, 3)
    leaves = [history.embedding.requires_grad_(), target.embedding.requires_grad_(), *model.parameters()]
    found = vectors(model, history, target)
    assert (found[0] == 0).all()
    loss = loss_of(model, history)
    assert loss == 0 or sum(lengths)
    (found.sin().sum() + loss).backward()
    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert longest == 0 or (history.embedding.grad[0] == 0).all()


def test_a_rate_that_vanishes_has_a_finite_loss():
    model, history = model_of(), history_of([5], 5)
    with torch.no_grad():
        model.intensity.weight.fill_(-1000)
    loss = loss_of(model, history)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(model.intensity.weight.grad).all()


def test_every_switch_does_something():
    history, target = history_of([9, 8], 9), target_of(2, 4)
    base = vectors(model_of(), history, target)
    changes = [
        {"num_heads": 3},
        {"length": 3},
        {"modulated": False},
        {"event_type": "kind"},
        {"num_types": 2},
        {"time_unit": 0.01},
    ]
    for options in changes:
        assert (vectors(model_of(**options), history, target) - base).abs().max() > 1e-4, options
    assert loss_of(model_of(regulariser=2.0), history) == 2 * loss_of(model_of(), history) != 0
    assert loss_of(model_of(regulariser=0.0), history) == 0


def test_settings_out_of_range_are_refused():
    for options, message in (
        ({"num_heads": 4}, "num_heads is 4, which does not divide embedding_dim 6"),
        ({"event_type": "item"}, "event_type is 'item', expected category or kind"),
        ({"length": 0}, "length is 0, expected more than 0"),
        ({"num_types": 0}, "num_types is 0"),
        ({"time_unit": 0.0}, "time_unit is 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            SelfModulatingAttention(SIZES, **options)
