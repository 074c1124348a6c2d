"""Chunks are cut at the longest pauses, and the target attends to chunks, to their ends and to the latest behaviors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.errors import ConfigError
from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals.sparse_ctr import BRANCHES, SparseCTR, relative_times, time_chunks

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
        history.age[user, :length] = torch.rand(length, generator=generator).cumsum(0).flip(0)
    return history


def target_of(num_histories: int, num_targets: int) -> Target:
    generator = torch.Generator().manual_seed(7)
    item, category = torch.arange(1, num_targets + 1), torch.ones(num_targets, dtype=torch.long)
    embedding, key = torch.randn(num_targets, D, generator=generator), torch.randn(num_targets, P, generator=generator)
    return Target(*(part.expand(num_histories, *part.shape).clone() for part in (embedding, key, item, category)))


def model_of(**options) -> SparseCTR:
    torch.manual_seed(0)
    model = SparseCTR(SIZES, **{"num_chunks": 3, "num_last": 2, "window": 4, **options})
    with torch.no_grad():
        model.coefficient.copy_(
            torch.tensor([[0.8, -1.2, 0.5], [-0.6, 0.7, 1.1]])[: model.num_heads, : model.num_times]
        )
    return model


def vectors(model: SparseCTR, history: History, target: Target) -> torch.Tensor:
    read = model.read(model.summarise(history), target)
    assert read.scalars.shape == (*target.item.shape, 0)
    return read.vectors[:, :, 0]


def slow_chunks(age: list[float], num_chunks: int) -> list[int]:
    """Sort the pauses, longest first and of equals the latest first; cut before the first num_chunks - 1."""
    pauses = sorted(((age[i - 1] - age[i], i) for i in range(1, len(age))), reverse=True)
    cuts = [i for pause, i in pauses[: num_chunks - 1] if pause > 0]
    return [sum(cut <= i for cut in cuts) for i in range(len(age))]


# --- chunks ------------------------------------------------------------------------------------------------


def test_cut_at_the_longest_pauses():
    """Pauses of 1, 10, 2, 7 and 1 days: two cuts are at 10 and 7."""
    age = torch.tensor([[22.0, 21, 11, 9, 2, 1]])
    mask = torch.ones(1, 6, dtype=torch.bool)
    assert time_chunks(age, mask, 3).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert time_chunks(age, mask, 2).tolist() == [[0, 0, 1, 1, 1, 1]]
    assert time_chunks(age, mask, 1).tolist() == [[0] * 6]
    assert time_chunks(age, mask, 99).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_of_equal_pauses_the_latest_is_cut_at_and_a_moment_is_never_torn():
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert time_chunks(torch.tensor([[5.0, 4, 3, 2, 1]]), mask, 2).tolist() == [[0, 0, 0, 0, 1]]
    assert time_chunks(torch.tensor([[3.0, 3, 3, 1, 1]]), mask, 4).tolist() == [[0, 0, 0, 1, 1]]


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_chunks_are_the_plain_loop_whatever_the_padding(pauses, num_chunks, padding):
    ages = [[float(1 + sum(user[i:])) for i in range(len(user))] for user in pauses]
    longest = max(map(len, ages)) + padding
    age = torch.tensor([user + [0.0] * (longest - len(user)) for user in ages])
    mask = torch.arange(longest) < torch.tensor([len(user) for user in ages])[:, None]
    found = time_chunks(age, mask, num_chunks)
    for user, (of_user, label) in enumerate(zip(ages, found.tolist(), strict=True)):
        assert label[: len(of_user)] == slow_chunks(of_user, num_chunks), user


# --- what a target reads -----------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: SparseCTR, history: History, target: Target, user: int, t: int) -> torch.Tensor:
    """Every slot of every branch, head by head."""
    length, size = int(history.mask[user].sum()), D // model.num_heads
    e, age, query = history.embedding[user, :length], history.age[user, :length].tolist(), target.embedding[user, t]
    chunk = slow_chunks(age, model.num_chunks)
    times = [[math.log(1 + a), math.cos(2 * math.pi * a), math.cos(2 * math.pi * a / 7)] for a in age]
    times = torch.tensor(times).view(length, 3)
    slots: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {branch: [] for branch in BRANCHES}
    for c in range(max(chunk, default=-1) + 1):
        members = [i for i in range(length) if chunk[i] == c]
        weight = torch.ones(len(members)) / len(members)
        if model.pool is not None:
            weight = (e[members] @ model.pool.weight[0]).exp()
            weight = weight / weight.sum()
        slots["global"].append((weight @ e[members], weight @ times[members]))
        slots["transition"] += [(e[i], times[i]) for i in members[-model.num_last :]]
    slots["local"] = [(e[i], times[i]) for i in range(max(0, length - model.window), length)]
    heads = []
    for head in range(model.num_heads):
        rows = slice(head * size, (head + 1) * size)
        output = torch.zeros(size)
        for number, branch in enumerate(model.branches):
            logits, values = [], []
            for x, time in slots[branch]:
                logit = (model.W_q.weight[rows] @ query) @ (model.W_k.weight[rows] @ x) / math.sqrt(size)
                logits.append(float(logit + model.coefficient[head] @ time[: model.num_times]))
                values.append(model.W_v.weight[rows] @ x)
            total = sum(map(math.exp, logits))
            gate = 1 / len(model.branches)
            if model.gate is not None:
                row = head * len(model.branches) + number
                gate = 1 / (1 + math.exp(-float(model.gate.weight[row] @ query + model.gate.bias[row])))
            output += gate * sum(
                (math.exp(a) / total * v for a, v in zip(logits, values, strict=True)), torch.zeros(size)
            )
        heads.append(output)
    return model.W_o.weight @ torch.cat(heads)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_heads": 1, "time_bias": "none"},
        {"time_bias": "interval", "gated": False},
        {"pooling": "learned", "num_last": 5},
        {"branches": ("local", "global"), "num_chunks": 30, "window": 30},
        {"branches": ["transition"], "gated": False},
    ],
)
def test_it_is_the_definition(options):
    model = model_of(**options)
    history, target = history_of([11, 1, 0, 7], 12), target_of(4, 3)
    found = vectors(model, history, target)
    for user in range(4):
        for t in range(3):
            expected = by_hand(model, history, target, user, t)
            torch.testing.assert_close(found[user, t], expected, atol=1e-5, rtol=1e-4)


def test_as_many_chunks_as_behaviors_is_full_attention_in_each_branch():
    """Then chunks are behaviors, each is the last of its chunk, and the window holds them all."""
    history, target = history_of([9, 4], 9), target_of(2, 3)
    options = {"num_chunks": 9, "num_last": 1, "window": 9, "gated": False}
    found = [vectors(model_of(**options, branches=(branch,)), history, target) for branch in BRANCHES]
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], found[2], atol=1e-5, rtol=1e-4)


def test_the_state_is_as_large_for_a_long_history():
    for options, slots in (({}, 3 + 3 * 2 + 4), ({"branches": ("global",)}, 3)):
        for length in (2, 500):
            state = model_of(**options).summarise(history_of([length], length))
            assert state.key.shape == (1, 2, slots, D // 2)
            assert state.mask.shape == (1, slots)


def test_relative_times_tell_hours_and_weekdays():
    hour, day = (
        relative_times(torch.tensor([[7.0, 7.5, 3.5]]))[0, :, 1].tolist(),
        relative_times(torch.tensor([[7.0, 3.5]])),
    )
    assert hour == pytest.approx([1, -1, -1], abs=1e-4)
    assert day[0, :, 2].tolist() == pytest.approx([1, -1], abs=1e-4)
    assert day[0, :, 0].tolist() == pytest.approx([math.log(8), math.log(4.5)])


@pytest.mark.parametrize("pooling", ["mean", "learned"])
def test_padding_and_other_users_change_nothing(pooling):
    model = model_of(pooling=pooling)
    alone = vectors(model, history_of([5], 5), target_of(1, 3))
    crowd = vectors(model, history_of([9, 5, 0], 12), target_of(3, 3))
    torch.testing.assert_close(crowd[1:2], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"pooling": "learned", "gated": False}])
@pytest.mark.parametrize(("lengths", "longest"), [([0, 3], 3), ([0, 0], 0)])
def test_an_empty_history_reads_zero_with_finite_gradients(options, lengths, longest):
    model, history, target = model_of(**options), history_of(lengths, longest), target_of(2, 3)
    leaves = [history.embedding.requires_grad_(), target.embedding.requires_grad_(), *model.parameters()]
    found = vectors(model, history, target)
    assert (found[0] == 0).all()
    found.sin().sum().backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert (history.embedding.grad[0] == 0).all()


def test_every_switch_does_something():
    history, target = history_of([11, 8], 11), target_of(2, 4)
    base = vectors(model_of(), history, target)
    changes = [
        {"num_heads": 1},
        {"num_chunks": 2},
        {"num_last": 1},
        {"window": 2},
        *({"branches": tuple(other for other in BRANCHES if other != branch)} for branch in BRANCHES),
        {"pooling": "learned"},
        {"time_bias": "none"},
        {"time_bias": "interval"},
        {"gated": False},
    ]
    for options in changes:
        assert (vectors(model_of(**options), history, target) - base).abs().max() > 1e-3, options


def test_settings_out_of_range_are_refused():
    for options, message in (
        ({"num_heads": 4}, "num_heads is 4, which does not divide embedding_dim 6"),
        ({"num_chunks": 0}, "num_chunks is 0, expected at least 1"),
        ({"num_last": 0}, "num_last is 0"),
        ({"window": 0}, "window is 0"),
        ({"branches": ("globe",)}, "branches is .'globe',., expected some of"),
        ({"branches": ()}, "branches is"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"time_bias": "hour"}, "time_bias is 'hour'"),
    ):
        with pytest.raises(ConfigError, match=message):
            SparseCTR(SIZES, **options)
