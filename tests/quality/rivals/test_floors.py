"""What is had without asking the target, or without a long history."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from encode.config import ModelConfig
from encode.model.ctr import Reader, Recent
from encode.model.long_term import History, Sizes, Target
from encode.quality.rivals.floors import MeanPooling, RecentOnly

D, P = 6, 4
SIZES = Sizes(num_items=30, num_categories=5, num_kinds=1, embedding_dim=D, projected_dim=P)
CONFIG = ModelConfig(embedding_dim=D, category_dim=2, projected_dim=P, hidden_dims=(8,))


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
    return History(embedding, key, mask, none, none, none, torch.zeros(shape), none, torch.tensor(8.0))


def target_of(num_histories: int, num_targets: int = 3) -> Target:
    generator = torch.Generator().manual_seed(7)
    embedding = torch.randn(num_histories, num_targets, D, generator=generator)
    key = F.normalize(torch.randn(num_histories, num_targets, P, generator=generator), dim=2)
    none = torch.zeros(num_histories, num_targets, dtype=torch.long)
    return Target(embedding, key, none, none)


def test_the_mean_by_hand():
    embedding = torch.tensor([[[1.0, 2, 0, 0, 0, 6], [3, 4, 0, 0, 0, 0], [0] * 6], [[0] * 6] * 3])
    history = history_of([2, 0], 3)._replace(embedding=embedding)
    model = MeanPooling(SIZES)
    read = model.read(model.summarise(history), target_of(2))
    assert read.vectors.shape == (2, 3, 1, D)
    assert read.scalars.shape == (2, 3, 0)
    for target in range(3):
        assert read.vectors[0, target, 0].tolist() == [2, 3, 0, 0, 0, 3]
        assert read.vectors[1, target, 0].tolist() == [0] * 6  # an empty history


def test_padding_and_other_users_change_no_mean():
    model = MeanPooling(SIZES)
    short, long = model.summarise(history_of([4], 4)), model.summarise(history_of([9, 4, 0], 20))
    torch.testing.assert_close(short.mean[0], long.mean[1])


def test_recent_only_reads_nothing():
    model, history = RecentOnly(SIZES), history_of([4, 0], 5)
    state = model.summarise(history)
    assert state is None
    read = model.read(state, target_of(2))
    assert read.vectors.shape == (2, 3, 0, D)
    assert read.scalars.shape == (2, 3, 0)
    assert model.profile(state, history).tolist() == [[0] * D] * 2


def logits_of(reader: Reader, history: History) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    key = F.normalize(torch.randn(6, 2, P, generator=generator), dim=2)
    recent = Recent(torch.randn(6, 2, D, generator=generator), key, torch.ones(6, 2, dtype=torch.bool), torch.arange(6))
    return reader(reader.summarise(history), recent, target_of(2))


@pytest.mark.parametrize(("kind", "counts"), [(RecentOnly, False), (MeanPooling, True)])
def test_what_was_long_ago_counts_for_the_mean_alone(kind, counts):
    torch.manual_seed(0)
    reader = Reader(CONFIG, kind(SIZES)).eval()
    history = history_of([4, 3], 5)
    other = history._replace(embedding=history.embedding.flip(2) * history.mask[..., None])
    assert torch.allclose(logits_of(reader, history), logits_of(reader, other)) != counts


@pytest.mark.parametrize("kind", [RecentOnly, MeanPooling])
def test_an_empty_history_has_finite_gradients(kind):
    reader = Reader(CONFIG, kind(SIZES))
    history = history_of([0, 0], 2)
    history.embedding.requires_grad_()
    logits_of(reader, history).sum().backward()
    found = [history.embedding.grad, *(p.grad for p in reader.parameters())]
    assert all(grad is None or grad.isfinite().all() for grad in found)
