"""Histories and targets that the tests of several rivals read."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from encode.model.long_term import History, Sizes, Target

D, P = 8, 4
SIZES = Sizes(num_items=30, num_categories=5, num_kinds=3, embedding_dim=D, projected_dim=P)
LENGTHS = [9, 0, 14, 1]


def history_of(lengths: list[int], longest: int) -> History:
    """Random histories with repeated items; a user's depend on neither the other users nor the padding."""
    shape = len(lengths), longest
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    embedding, key, age = torch.zeros(*shape, D), torch.zeros(*shape, P), torch.zeros(shape)
    item, category, kind = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for user, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 + length)
        items = torch.randint(1, 8, (length,), generator=generator)
        embedding[user, :length] = torch.randn(8, D, generator=generator)[items]
        key[user, :length] = F.normalize(torch.randn(length, P, generator=generator), dim=1)
        age[user, :length] = (0.001 + 50 * torch.rand(length, generator=generator) ** 3).sort(descending=True).values
        item[user, :length], category[user, :length] = items, 1 + items % 4
        kind[user, :length] = torch.randint(3, (length,), generator=generator)
    return History(embedding, key, mask, item, category, kind, age, torch.zeros_like(item), torch.tensor(8.0))


def target_of(num_histories: int, num_targets: int = 6) -> Target:
    """The same targets for every history; the last one is padding, which has category 0, and the first is unknown."""
    generator = torch.Generator().manual_seed(7)
    item = torch.arange(1, num_targets + 1)
    category = 1 + torch.arange(num_targets) % 4
    item[-1] = category[-1] = 0
    embedding, key = torch.randn(num_targets, D, generator=generator), torch.randn(num_targets, P, generator=generator)
    return Target(*(part.expand(num_histories, *part.shape).clone() for part in (embedding, key, item, category)))


def read(model, lengths=LENGTHS, longest=14) -> torch.Tensor:
    found = model.read(model.summarise(history_of(lengths, longest)), target_of(len(lengths)))
    assert found.vectors.shape == (len(lengths), 6, model.num_vectors, D)
    assert found.scalars.shape == (len(lengths), 6, model.num_scalars)
    return found.vectors


def slow_attention(attention, query, values, chosen=None):
    """Multi-head target attention of one target, head by head; `chosen` gives each head behaviors of its own."""
    size, heads = attention.head_dim, []
    for head in range(attention.num_heads):
        rows = slice(head * size, (head + 1) * size)
        own = values if chosen is None else values[chosen[head]]
        logits = torch.stack([(attention.W_q.weight[rows] @ query) @ (attention.W_k.weight[rows] @ x) for x in own])
        weights = F.softmax(logits / size**0.5, 0)
        heads.append(sum(weight * (attention.W_v.weight[rows] @ x) for weight, x in zip(weights, own, strict=True)))
    return attention.W_o.weight @ torch.cat(heads)
