"""Segments, memory and gate against plain loops, and which loss teaches what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals.dman import Attention, Dman

D, P, V, CATEGORIES, KINDS = 8, 4, 40, 5, 3
SIZES = Sizes(V, CATEGORIES, KINDS, D, P)


def history_of(lengths: list[int], longest: int) -> History:
    """Random histories; a user's do not depend on the other users or on the padding."""
    shape = len(lengths), longest
    index = torch.zeros(shape, dtype=torch.long)
    embedding = torch.zeros(*shape, D)
    for user, length in enumerate(lengths):
        embedding[user, :length] = torch.randn(length, D, generator=torch.Generator().manual_seed(length))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    age = torch.zeros(shape)
    return History(embedding, torch.zeros(*shape, P), mask, index, index, index, age, index, torch.tensor(8.0))


def target_of(num_histories: int, num_targets: int) -> Target:
    generator = torch.Generator().manual_seed(7)
    embedding, key = (torch.randn(20, dim, generator=generator)[:num_targets] for dim in (D, P))
    index = torch.ones(num_targets, dtype=torch.long)
    return Target(*(part.expand(num_histories, *part.shape).clone() for part in (embedding, key, index, index)))


def model_of(**options) -> Dman:
    torch.manual_seed(0)
    model = Dman(SIZES, **{"segment_length": 4, "num_segments": 5, "num_slots": 3, **options})
    nn.init.normal_(model.place.weight)
    nn.init.normal_(model.norm.weight)
    return model


def vectors(model: Dman, history: History, target: Target) -> Tensor:
    read = model.read(model.summarise(history), target)
    assert read.scalars.shape == (*target.item.shape, 0)
    return read.vectors[:, :, 0]


def attend(layer: Attention, query: Tensor, keys: list[Tensor]) -> Tensor:
    size, heads = D // layer.num_heads, []
    if not keys:
        return torch.zeros(D)
    for head in range(layer.num_heads):
        rows = slice(head * size, (head + 1) * size)
        asked = layer.W_q.weight[rows] @ query
        logits = [float(asked @ (layer.W_k.weight[rows] @ key)) / math.sqrt(size) for key in keys]
        mass = sum(math.exp(logit) for logit in logits)
        heads.append(
            sum(math.exp(one) / mass * (layer.W_v.weight[rows] @ key) for one, key in zip(logits, keys, strict=True))
        )
    return layer.W_o.weight @ torch.cat(heads)


def route(model: Dman, capsules: list[Tensor]) -> list[Tensor]:
    layer = model.abstract
    sent = [layer.W.weight @ (x * math.sqrt(D) / x.norm()) for x in capsules]
    b = [[float(x @ r) for r in layer.reference] for x in sent]
    slots = []
    for _ in range(layer.num_rounds):
        c = [[math.exp(one) / sum(math.exp(other) for other in row) for one in row] for row in b]
        slots = []
        for j in range(layer.num_slots):
            s = sum(c[i][j] * sent[i] for i in range(len(sent)))
            slots.append(s * s.norm() / (1 + s.norm() ** 2))
        b = [[b[i][j] + float(sent[i] @ slots[j]) for j in range(layer.num_slots)] for i in range(len(sent))]
    return slots


def slow(model: Dman, history: list[Tensor]) -> tuple[list[Tensor], list[Tensor], float]:
    """Memory, hidden states of the latest segment, and mean loss of the updates of one user."""
    own = max(model.segment_length, math.ceil(len(history) / model.num_segments))
    segments = []
    while history:
        segments.insert(0, history[-own:])
        history = history[:-own]
    memory: list[Tensor] = []
    past: list[Tensor] = []
    losses = []

    def update(asking: list[Tensor]) -> list[Tensor]:
        old = memory + past
        new = route(model, old)
        errors = [(attend(model.within, h, old) - attend(model.within, h, new)).square().mean() for h in asking]
        losses.append(float(sum(errors)) / len(errors))
        return new

    for segment in segments:
        queries = []
        for place, x in enumerate(segment):
            from_end = len(segment) - 1 - place
            queries.append(x + model.place.weight[from_end * model.segment_length // own])
        hidden = []
        for place, query in enumerate(queries):
            taken = attend(model.within, query, (past if model.link else []) + queries[: place + 1])
            hidden.append(F.layer_norm(query + taken, (D,), model.norm.weight, model.norm.bias))
        if past:
            memory = update(hidden)
        past = hidden
    if not model.short_term and past:
        memory = update(past)
    return memory, past, sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"short_term": False},
        {"link": False},
        {"end_to_end": True},
        {"num_segments": 2},
        {"num_slots": 1},
        {"num_heads": 4, "num_rounds": 1},
    ],
)
@torch.no_grad()
def test_reading_by_hand(options):
    lengths = [11, 3, 20, 4]
    model, history, target = model_of(**options), history_of(lengths, 20), target_of(4, 5)
    state, found = model.summarise(history), vectors(model, history, target)
    updated = [float(loss) for loss in state.reconstruction if loss]
    assert float(model.auxiliary_loss(state, history)) == pytest.approx(sum(updated) / len(updated))
    for user, length in enumerate(lengths):
        memory, recent, loss = slow(model, list(history.embedding[user, :length]))
        assert float(state.reconstruction[user]) == pytest.approx(loss, rel=1e-4, abs=1e-7)
        for t in range(5):
            asked = target.embedding[user, t]
            expected = attend(model.ask_memory, asked, memory)
            if model.short_term:
                long, short = expected, attend(model.ask_recent, asked, recent)
                gate = torch.sigmoid(model.gate(torch.cat([short, long])))
                expected = gate * short + (1 - gate) * long
            torch.testing.assert_close(found[user, t], expected, atol=1e-5, rtol=1e-4)


def test_every_switch_does_something():
    history, target = history_of([11, 3, 20], 20), target_of(3, 5)
    usual = vectors(model_of(), history, target)
    for options in (
        {"segment_length": 5},
        {"num_segments": 2},
        {"num_slots": 2},
        {"num_heads": 4},
        {"num_rounds": 1},
        {"short_term": False},
        {"link": False},
    ):
        assert (vectors(model_of(**options), history, target) - usual).abs().max() > 1e-3, options
    # These change what is learned, not what is read.
    for options in ({"end_to_end": True}, {"reconstruction_weight": 0.0}):
        torch.testing.assert_close(vectors(model_of(**options), history, target), usual)
    losses = []
    for weight in (0.0, 1.0, 3.0):
        model = model_of(reconstruction_weight=weight)
        losses.append(float(model.auxiliary_loss(model.summarise(history), history).detach()))
    assert losses[0] == 0 < losses[1]
    assert losses[2] == pytest.approx(3 * losses[1])


def test_padding_and_other_users_change_nothing():
    model = model_of()
    lengths = [11, 3, 20]
    together, state = vectors(model, history_of(lengths, 20), target_of(3, 5)), model.summarise(history_of(lengths, 20))
    for user, length in enumerate(lengths):
        for longest in (length, 57):
            history = history_of([length], longest)
            torch.testing.assert_close(vectors(model, history, target_of(1, 3))[0], together[user, :3])
            alone = model.summarise(history)
            torch.testing.assert_close(alone.slots[0], state.slots[user])
            torch.testing.assert_close(alone.reconstruction[0], state.reconstruction[user])


@pytest.mark.parametrize("options", [{}, {"end_to_end": True}, {"short_term": False}])
def test_an_empty_history_reads_zeros_and_has_finite_gradients(options):
    for lengths in ([0, 11], [0, 0]):
        model, history, target = model_of(**options), history_of(lengths, 11), target_of(2, 3)
        history.embedding.requires_grad_()
        target.embedding.requires_grad_()
        state = model.summarise(history)
        found = model.read(state, target).vectors
        assert found[0].abs().max() == 0
        (found.square().sum() + model.auxiliary_loss(state, history)).backward()
        leaves = [*model.parameters(), history.embedding, target.embedding]
        assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert model.auxiliary_loss(state, history) == 0
    assert target.embedding.grad.abs().max() == 0
    assert vectors(model, history_of([0], 0), target_of(1, 3)).abs().max() == 0


def gradients(model: Dman, of_loss: str) -> tuple[dict[str, float], Tensor]:
    """Largest gradient of each part of the model, and of each behavior, for one of the two losses."""
    history, target = history_of([11], 11), target_of(1, 3)
    history.embedding.requires_grad_()
    state = model.summarise(history)
    loss = model.auxiliary_loss(state, history) if of_loss == "L" else model.read(state, target).vectors.square().sum()
    loss.backward()
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        part = name.partition(".")[0]
        found[part] = max(found.get(part, 0.0), size)
    behaviors = history.embedding.grad
    return found, torch.zeros(11) if behaviors is None else behaviors[0].abs().amax(1)


def test_the_reconstruction_trains_the_abstraction_alone_and_no_other_loss_does():
    rest = {"place", "within", "norm", "ask_memory", "ask_recent", "gate"}
    for end_to_end in (False, True):
        parts, behaviors = gradients(model_of(end_to_end=end_to_end), "L")
        assert {part for part, size in parts.items() if size} == {"abstract"}
        assert behaviors.max() == 0
    parts, behaviors = gradients(model_of(), "log loss")
    assert {part for part, size in parts.items() if size} == rest
    # Segments are behaviors 0-2, 3-6 and 7-10: the link to those before the latest is stopped.
    assert (behaviors[7:] > 0).all()
    assert (behaviors[:7] == 0).all()
    parts, behaviors = gradients(model_of(end_to_end=True), "log loss")
    assert {part for part, size in parts.items() if size} == rest | {"abstract"}
    assert (behaviors > 0).all()


def test_the_link_reaches_back_a_segment():
    history, target = history_of([8], 8), target_of(1, 3)
    moved = history._replace(embedding=history.embedding.clone())
    moved.embedding[0, 0] += 1
    for link in (True, False):
        model = model_of(link=link)
        change = model.summarise(moved).recent - model.summarise(history).recent
        assert (change.abs().max() > 1e-4) == link
    # What is older than the segment before is in the memory, too.
    assert (vectors(model, moved, target) - vectors(model, history, target)).abs().max() > 1e-4


def test_memory_becomes_faithful():
    """Training on the reconstruction loss alone must lower it by much, for histories not trained on, too."""
    model = model_of(num_slots=6)
    train, held_out = history_of(list(range(12, 30)), 30), history_of(list(range(40, 50)), 50)

    def loss(history: History) -> Tensor:
        return model.auxiliary_loss(model.summarise(history), history)

    with torch.no_grad():
        before = float(loss(held_out))
    optimizer = torch.optim.Adam(model.abstract.parameters(), lr=0.03)
    for _ in range(25):
        optimizer.zero_grad()
        loss(train).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(loss(held_out)) < 0.6 * before


def test_the_loss_is_not_computed_outside_of_training():
    model, history = model_of().eval(), history_of([11, 20], 20)
    state = model.summarise(history)
    assert state.reconstruction.tolist() == [0, 0]
    torch.testing.assert_close(state.slots, model.train().summarise(history).slots)


def test_long_histories_make_long_segments_and_none_is_dropped():
    """100 behaviors in 5 segments at most: moving the oldest moves the memory."""
    model, history = model_of(), history_of([100], 100)
    assert len(list(model._segments(history))) == 5
    assert [int(segment.mask.sum()) for segment in model._segments(history)] == [20] * 5
    assert [int(segment.mask.sum()) for segment in model._segments(history_of([11], 100))] == [0, 0, 3, 4, 4]
    moved = history._replace(embedding=history.embedding.clone())
    moved.embedding[0, 0] += 3
    assert (model.summarise(moved).slots - model.summarise(history).slots).abs().max() > 0
    rows = torch.cat([segment.embedding[0] for segment in model._segments(history)])
    torch.testing.assert_close(rows, history.embedding[0])


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="8 is not divisible by num_heads 3"):
        Dman(SIZES, num_heads=3)
