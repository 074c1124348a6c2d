"""Three retrievals and a Fourier filter, by hand."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from encode.errors import ConfigError
from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals.mirrn import FourierFilter, Mirrn

D, P, V, CATEGORIES, KINDS = 8, 4, 40, 5, 3
SIZES = Sizes(V, CATEGORIES, KINDS, D, P)
QUERIES = ("target", "local", "global")


def history_of(lengths: list[int], longest: int) -> History:
    """Random histories; a user's do not depend on the other users or on the padding."""
    shape = len(lengths), longest
    index = torch.zeros(shape, dtype=torch.long)
    embedding, age = torch.zeros(*shape, D), torch.zeros(shape)
    for user, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        embedding[user, :length] = torch.randn(length, D, generator=generator) + torch.randn(D, generator=generator)
        age[user, :length] = 1.0
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return History(embedding, torch.zeros(*shape, P), mask, index, index, index, age, index, torch.tensor(8.0))


def target_of(num_histories: int, num_targets: int) -> Target:
    generator = torch.Generator().manual_seed(7)
    embedding, key = (torch.randn(20, dim, generator=generator)[:num_targets] for dim in (D, P))
    index = torch.ones(num_targets, dtype=torch.long)
    return Target(*(part.expand(num_histories, *part.shape).clone() for part in (embedding, key, index, index)))


def model_of(**options) -> Mirrn:
    torch.manual_seed(0)
    model = Mirrn(SIZES, **{"k": 5, "num_local": 3, "num_blocks": 2, **options})
    if model.position is not None:
        nn.init.normal_(model.position.weight)
    for one in model.filters.values():
        if isinstance(one, FourierFilter):
            nn.init.normal_(one.weight)
            nn.init.normal_(one.norm.weight)
            nn.init.normal_(one.norm.bias)
    return model


def vectors(model: Mirrn, history: History, target: Target) -> torch.Tensor:
    read = model.read(model.summarise(history), target)
    assert read.scalars.shape == (*target.item.shape, 0)
    return read.vectors[:, :, 0]


def retrieved(query: torch.Tensor, behaviors: torch.Tensor, planes: torch.Tensor, k: int) -> list[int]:
    """The k places with the fewest bits unlike the query's, the latest of equals, in the order of time."""

    def bits(x: torch.Tensor) -> list[bool]:
        return [float(x @ planes[:, b]) > 0 for b in range(planes.shape[1])]

    own = bits(query)
    unlike = [sum(a != b for a, b in zip(own, bits(behavior), strict=True)) for behavior in behaviors]
    return sorted(sorted(range(len(behaviors)), key=lambda i: (unlike[i], -i))[:k])


def transform(rows: list[list[complex]], sign: int) -> list[list[complex]]:
    """The Fourier transform along time, term by term."""
    k = len(rows)
    return [
        [
            sum(rows[n][d] * cmath.exp(sign * 2j * math.pi * f * n / k) for n in range(k)) / math.sqrt(k)
            for d in range(D)
        ]
        for f in range(k)
    ]


def filtered(rows: torch.Tensor, layer: FourierFilter) -> torch.Tensor:
    """LN(X + F^-1(F(X) W)). Frequencies f and k - f are each other's conjugates, so W is conjugate there, too."""
    k, width = len(rows), D // layer.num_blocks
    spectrum = transform(rows.tolist(), -1)
    mixed = [[0j] * D for _ in range(k)]
    for f in range(k):
        for e in range(D):
            block = e // width
            for d in range(block * width, (block + 1) * width):
                real, imaginary = (float(part[block, d % width, e % width]) for part in layer.weight)
                weight = complex(real, imaginary if 2 * f < k else -imaginary)
                if 2 * f in (0, k):  # what is real stays real
                    mixed[f][e] += (spectrum[f][d] * weight).real
                else:
                    mixed[f][e] += spectrum[f][d] * weight
    back = torch.tensor([[value.real for value in row] for row in transform(mixed, 1)])
    return F.layer_norm(rows + back, (D,), layer.norm.weight, layer.norm.bias)


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("num_blocks", [1, 2, 8])
@torch.no_grad()
def test_the_filter_by_hand(length, num_blocks):
    layer = model_of(num_blocks=num_blocks).filters["global"]
    rows = torch.randn(1, 2, length, D, generator=torch.Generator().manual_seed(1))
    found = layer(rows)
    for q in range(2):
        torch.testing.assert_close(found[0, q], filtered(rows[0, q], layer), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_filter_uses_whole_blocks_and_mixes_time():
    """Not only the diagonal of each block, and not each place for itself."""
    layer = model_of().filters["global"]
    layer.norm = nn.Identity()
    rows = torch.randn(1, 1, 5, D, generator=torch.Generator().manual_seed(1))
    moved = rows.clone()
    moved[0, 0, 2, 1] += 1
    change = (layer(moved) - layer(rows) - (moved - rows)).abs()[0, 0]
    assert (change[:, : D // 2] > 1e-4).all()
    assert (change[:, D // 2 :] < 1e-5).all()
    whole = layer(rows)
    layer.weight *= torch.eye(D // 2)
    assert (layer(rows) - whole).abs().max() > 0.1


@pytest.mark.parametrize(
    "options", [{}, {"fourier": False}, {"positions": False}, {"num_positions": 3}, {"num_heads": 4}]
)
@torch.no_grad()
def test_reading_by_hand(options):
    model, history, target = model_of(**options), history_of([9, 2, 14], 14), target_of(3, 5)
    found = vectors(model, history, target)
    attention = model.attention
    size = D // attention.num_heads
    for user, length in enumerate([9, 2, 14]):
        x = history.embedding[user, :length]
        rows = [x[i] for i in range(length)]
        if model.position is not None:
            last = model.position.num_embeddings - 1
            rows = [x[i] + model.position.weight[min(length - 1 - i, last)] for i in range(length)]
        for t in range(5):
            questions = {"target": target.embedding[user, t], "local": x[-3:].mean(0), "global": x.mean(0)}
            interests = []
            for name in QUERIES:
                places = retrieved(questions[name], x, model.planes, 5)
                kept = torch.zeros(5, D)
                for slot, place in enumerate(places):
                    kept[slot] = rows[place]
                if isinstance(model.filters[name], FourierFilter):
                    kept = filtered(kept, model.filters[name])
                interests.append(kept[: len(places)].mean(0))
            heads = []
            for head in range(attention.num_heads):
                part = slice(head * size, (head + 1) * size)
                query = attention.W_q.weight[part] @ target.embedding[user, t]
                logits = [float(query @ (attention.W_k.weight[part] @ u)) / math.sqrt(size) for u in interests]
                mass = sum(math.exp(logit) for logit in logits)
                heads.append(
                    sum(
                        math.exp(logit) / mass * (attention.W_v.weight[part] @ u)
                        for logit, u in zip(logits, interests, strict=True)
                    )
                )
            torch.testing.assert_close(found[user, t], attention.W_o(torch.cat(heads)), atol=1e-4, rtol=1e-3)


def test_every_switch_does_something():
    history, target = history_of([9, 2, 14], 14), target_of(3, 5)
    usual = vectors(model_of(), history, target)
    for options in (
        {"k": 6},
        {"by_target": False},
        {"by_local": False},
        {"by_global": False},
        {"fourier": False},
        {"num_blocks": 4},
        {"positions": False},
        {"num_positions": 3},
        {"num_local": 1},
        {"num_bits": 4},
        {"num_heads": 4},
        {"seed": 1},
    ):
        assert (vectors(model_of(**options), history, target) - usual).abs().max() > 1e-3, options


def test_one_query_alone_is_the_only_thing_attended_to():
    """With one interest attention has no choice: v = W_o W_v u, and without the target it is the same for all."""
    history, target = history_of([9, 14], 14), target_of(2, 5)
    for name in QUERIES:
        model = model_of(**{f"by_{one}": one == name for one in QUERIES})
        found = vectors(model, history, target)
        same = (found - found[:, :1]).abs().max() < 1e-6
        assert same == (name != "target")
        assert model.target_free == (name != "target")
        if name != "target":
            interest = model.summarise(history).interests[:, 0]
            expected = interest @ model.attention.W_v.weight.T @ model.attention.W_o.weight.T
            torch.testing.assert_close(found[:, 0], expected)


def test_without_the_query_of_the_target_the_state_has_no_history():
    state = model_of(by_target=False).summarise(history_of([9, 14], 14))
    assert state.embedding.shape == (2, 0, D)
    assert state.interests.shape == (2, 2, D)
    assert not Mirrn(SIZES).target_free


def test_as_many_as_there_are_behaviors_makes_all_queries_alike():
    """With k >= L each query retrieves the whole history, so one filter for all gives one interest."""
    history, target = history_of([5, 3], 6), target_of(2, 4)
    model = model_of(k=6, fourier=False)
    state = model.summarise(history)
    torch.testing.assert_close(state.interests[:, 0], state.interests[:, 1])
    expected = state.interests[:, :1] @ model.attention.W_v.weight.T @ model.attention.W_o.weight.T
    torch.testing.assert_close(vectors(model, history, target), expected.expand(-1, 4, -1))


def test_padding_and_other_users_change_nothing():
    model = model_of()
    together = vectors(model, history_of([9, 2, 14], 14), target_of(3, 5))
    for user, length in enumerate([9, 2, 14]):
        for longest in (length, 23):
            alone = vectors(model, history_of([length], longest), target_of(1, 3))
            torch.testing.assert_close(alone[0], together[user, :3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fourier", [True, False])
def test_an_empty_history_reads_zeros_and_has_finite_gradients(fourier):
    for lengths in ([0, 5], [0, 0]):
        model, history, target = model_of(fourier=fourier), history_of(lengths, 6), target_of(2, 3)
        leaves = [*model.parameters(), history.embedding.requires_grad_(), target.embedding.requires_grad_()]
        found = vectors(model, history, target)
        assert found[0].abs().max() == 0
        found.square().sum().backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert history.embedding.grad.abs().max() == 0
    assert vectors(model, history_of([0], 0), target_of(1, 3)).abs().max() == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="8 is not divisible by num_blocks 3"):
        Mirrn(SIZES, num_blocks=3)
    with pytest.raises(ConfigError, match="expected at least one"):
        Mirrn(SIZES, by_target=False, by_local=False, by_global=False)
