"""What a request costs: what is counted, and what is not done again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encode.config import ModelConfig
from encode.model.ctr import Reader, Tables
from encode.model.long_term import Sizes
from encode.quality import cost
from encode.quality.cost import LENGTHS, measure_cost
from encode.quality.rivals.attention import DinUnit, FullAttention
from encode.quality.rivals.floors import MeanPooling, RecentOnly
from encode.quality.variants import Variant

D, P, V = 8, 4, 50
CONFIG = ModelConfig(embedding_dim=D, category_dim=2, projected_dim=P, recent_length=3, hidden_dims=(8,))


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Few candidates: here it does not matter how long anything takes."""
    monkeypatch.setattr(cost, "_CANDIDATES", 7)
    monkeypatch.setattr(cost, "_REPEATS", 3)
    monkeypatch.setattr(cost, "LENGTHS", (20, 1_000))


def reader_of(kind, num_kinds=1, **options):
    category = torch.cat([torch.arange(4), torch.arange(V - 4) % 2 + 2])
    tables = Tables(CONFIG, category, 4, num_kinds)
    return tables.all_items(), Reader(CONFIG, kind(Sizes(V, 4, num_kinds, D, P), **options))


def count_calls(monkeypatch, reader):
    calls = {"assign": 0, "summarise": 0, "read": 0}

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(reader.long_term, name, counted(name, getattr(reader.long_term, name)))
    return calls


@pytest.mark.parametrize("num_kinds", [1, 3])
@pytest.mark.parametrize(
    ("kind", "options", "in_request"),
    [
        (MeanPooling, {}, 0),
        (Variant, {"num_clusters": 4}, 0),
        (RecentOnly, {}, 0),
        (FullAttention, {}, 1),
        (DinUnit, {}, 1),
    ],
)
def test_a_state_that_may_be_kept_is_not_made_again(monkeypatch, kind, options, in_request, num_kinds):
    """Once beforehand; of a request, one that warms up and three that are timed, only what it must."""
    table, reader = reader_of(kind, num_kinds, **options)
    calls = count_calls(monkeypatch, reader)
    measure_cost(table, reader)
    for_each_length = {"assign": 1, "summarise": 1 + in_request * 4, "read": 4}
    assert calls == {name: 2 * count for name, count in for_each_length.items()}


def test_what_is_kept_by_hand():
    """A float has 4 bytes, an id 8; with each state the profile of D floats."""
    found = {
        "mean": measure_cost(*reader_of(MeanPooling)).state_bytes,
        "recent": measure_cost(*reader_of(RecentOnly)).state_bytes,
        "variant": measure_cost(*reader_of(Variant, num_clusters=5)).state_bytes,
        "moments": measure_cost(*reader_of(Variant, num_clusters=5, moments="values")).state_bytes,
        "full": measure_cost(*reader_of(FullAttention)).state_bytes,
    }
    variant = 5 * (2 * P + D + 2) + 1  # center, variance, value, size and log prior of each, and the scale
    # Index and count of every item but padding and unknown, there are fewer than M, and of the two categories.
    remembered = 2 * 8 * (V - 2) + 2 * 8 * 2
    assert found == {
        "mean": 4 * (D + D),
        "recent": 4 * D,
        "variant": 4 * (variant + D) + remembered,
        "moments": 4 * (variant + 5 * P * D + D) + remembered,
        "full": 8 * 1_000 * 2,  # the item and the kind of each behavior
    }


def test_figures_are_those_of_the_lengths(monkeypatch):
    """With a clock that only the request moves: a millisecond a behavior, and the best of several counts."""
    table, reader = reader_of(FullAttention)
    now, extra = [0.0], iter([5.0, 0.0, 9.0] * 2)
    original = reader.long_term.summarise

    def slow(history):
        now[0] += history.mask.sum().item() / 1e3
        return original(history)

    def clock():
        now[0] += next(extra) if clock.calls % 2 else 0
        clock.calls += 1
        return now[0]

    clock.calls = 0
    monkeypatch.setattr(reader.long_term, "summarise", slow)
    monkeypatch.setattr(cost.time, "perf_counter", clock)
    found = measure_cost(table, reader)
    assert found.ms_by_length == {"20": pytest.approx(20), "1000": pytest.approx(1_000)}
    assert found.ms_per_1000 == found.ms_by_length["1000"]


def test_the_length_that_is_reported_is_among_those_measured():
    assert 1_000 in LENGTHS


def test_nothing_is_learned_and_nothing_is_drawn(monkeypatch):
    """The reader is put into evaluation, gradients are off, and torch's generator is left alone."""
    table, reader = reader_of(Variant, num_clusters=4)
    reader.train()
    seen = []
    original = reader.long_term.read
    monkeypatch.setattr(
        reader.long_term, "read", lambda *a: seen.append((torch.is_grad_enabled(), reader.training)) or original(*a)
    )
    before, weights = torch.random.get_rng_state(), [p.clone() for p in reader.parameters()]
    measure_cost(table, reader)
    assert set(seen) == {(False, False)}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, old) for p, old in zip(reader.parameters(), weights, strict=True))


def test_behaviors_are_told_with_their_kinds_and_times(monkeypatch):
    table, reader = reader_of(Variant, num_kinds=3, num_clusters=4)
    seen = []
    original = reader.long_term.assign
    monkeypatch.setattr(reader.long_term, "assign", lambda c, b: seen.append(b) or original(c, b))
    measure_cost(table, reader)
    assert [len(behaviors.item) for behaviors in seen] == [20, 1_000]
    for behaviors in seen:
        assert (behaviors.item > 0).all()
        assert set(behaviors.kind.tolist()) == {0, 1, 2}
        assert (np.diff(behaviors.timestamps) >= 0).all()
        np.testing.assert_array_equal(behaviors.category, table.category[behaviors.item].numpy())
