"""Tables: how items become embeddings and keys, whatever the reduction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encode.config import ModelConfig
from encode.model.ctr import Tables
from encode.schema import PADDING

CATEGORY = torch.tensor([0, 1, 2, 3, 2, 3, 2])
BASE = {"embedding_dim": 12, "category_dim": 4, "projected_dim": 5}


def made(reduction: str) -> Tables:
    torch.manual_seed(0)
    sizes = BASE | ({"projected_dim": 12} if reduction == "none" else {})
    return Tables(ModelConfig(**sizes, reduction=reduction), CATEGORY, 4)


@pytest.mark.parametrize("reduction", ["learned", "random", "pca", "none", "table"])
def test_keys_are_unit_vectors_and_padding_has_none(reduction):
    tables = made(reduction)
    tables.follow(torch.ones(len(CATEGORY)))
    found = tables.all_items()
    length = found.key.norm(dim=1)
    assert length[PADDING] == found.embedding[PADDING].norm() == 0
    torch.testing.assert_close(length[1:], torch.ones(len(CATEGORY) - 1))


@pytest.mark.parametrize(
    ("reduction", "learns"),
    [("learned", {"item", "category", "projection"}), ("random", {"item", "category"}), ("none", {"item", "category"})],
)
def test_keys_are_projected_embeddings(reduction, learns):
    tables = made(reduction)
    items = tables.items(torch.arange(len(CATEGORY)))
    torch.testing.assert_close(items.key, F.normalize(items.embedding @ tables.projection, dim=1))
    items.key[:, 0].sum().backward()
    taught = {name.removesuffix(".weight") for name, one in tables.named_parameters() if one.grad is not None}
    assert taught == learns


def test_keys_of_tables_know_nothing_of_the_embeddings():
    """An item's key is its own part and its category's; what teaches one table does not teach the other."""
    tables = made("table")
    items = tables.items(torch.tensor([4, 6]))
    own, shared = tables.item_key.weight[torch.tensor([4, 6])], tables.category_key.weight[torch.tensor([2, 2])]
    torch.testing.assert_close(items.key, F.normalize(own + shared, dim=1))
    items.key[:, 0].sum().backward(retain_graph=True)
    assert tables.item.weight.grad is None
    items.embedding.sum().backward()
    assert len(tables.by_id()) == 4
    for table, rows in zip(tables.by_id(), ([4, 6], [2], [4, 6], [2]), strict=True):
        assert table.grad.is_sparse
        assert np.unique(table.grad._indices()).tolist() == rows
