"""The CTR model: logit = MLP([v, recent-behavior attention, e_t, their products, user]).

Read it top down: how a behavior becomes e and h, what a user is to the model, how a target reads the user.

    B impressions or candidates   G users in the batch   K clusters   R recent behaviors
    S items of the batch   V vocabulary   D embedding_dim   P projected_dim
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encode.config import ModelConfig
from encode.model.reduction import random_projection
from encode.model.relevance import Interests, attend
from encode.schema import PADDING


class Items(NamedTuple):
    """The items that a batch speaks of, embedded once."""

    embedding: Float[Tensor, "S D"]
    key: Float[Tensor, "S P"]


class Reading(NamedTuple):
    """A target's reading of a user."""

    logit: Float[Tensor, " B"]
    interest_weights: Float[Tensor, "B K"]
    """beta: the attention of the target over the user's interests."""


class Tables(nn.Module):
    """Embeddings e and keys h of every item of the vocabulary."""

    def __init__(self, config: ModelConfig, item_category: Int64[Tensor, " V"], num_categories: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.item = nn.Embedding(len(item_category), config.embedding_dim - config.category_dim, PADDING)
        self.category = nn.Embedding(num_categories, config.category_dim, PADDING)
        for table in (self.item, self.category):
            nn.init.normal_(table.weight, std=config.initial_std)
            with torch.no_grad():
                table.weight[PADDING] = 0
        self.item_category: Tensor
        self.register_buffer("item_category", item_category)
        projection = random_projection(config.embedding_dim, config.projected_dim, generator)
        self.projection = nn.Parameter(projection, requires_grad=config.reduction == "learned")

    def embed(self, index: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Return e: the item's part and its category's part side by side."""
        return torch.cat([self.item(index), self.category(self.item_category[index])], -1)

    def items(self, index: Int64[Tensor, " S"]) -> Items:
        """Embed and project the items of a batch, or `all_items`."""
        embedding = self.embed(index)
        return Items(embedding, self.project(embedding))

    def all_items(self) -> Items:
        """Embed and project the whole vocabulary, without gradients."""
        with torch.no_grad():
            return self.items(torch.arange(len(self.item_category)))

    def project(self, embedding: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape P"]:
        """Return h = W_h^T e, of unit length (zero for padding)."""
        return F.normalize(embedding @ self.projection, dim=-1)


class Reader(nn.Module):
    """How a target reads a user: the part of the model that is not the space."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size_prior = config.size_prior
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.initial_scale)))
        widths = [6 * config.embedding_dim + 3, *config.hidden_dims]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(config.dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    @property
    def scale(self) -> Tensor:
        """The scale of the relevance, positive."""
        return self.log_scale.exp()

    def forward(
        self,
        interests: Interests,
        items: Items,
        user_of: Int64[Tensor, " B"],
        recent: Int64[Tensor, "B R"],
        target: Int64[Tensor, " B"],
    ) -> Reading:
        """Score targets against their users.

        Args:
            interests: of the G users of the batch.
            items: row 0 is padding; all that `recent` and `target` point into.
            user_of: the user of each target.
            recent: last behaviors before each impression as rows of `items`, 0 where there are fewer than R.
            target: rows of `items`.
        """
        num_clusters = interests.size.shape[1]
        key, embedding = F.embedding(target, items.key), F.embedding(target, items.embedding)
        size = interests.size[user_of]
        long_term = attend(
            key,
            interests.center.flatten(0, 1),
            interests.value.flatten(0, 1),
            user_of[:, None] * num_clusters + torch.arange(num_clusters),
            self.size_prior * size.clamp(min=1).log(),
            size > 0,
            self.scale,
        )
        none = torch.zeros_like(recent, dtype=key.dtype)
        short_term = attend(key, items.key, items.embedding, recent, none, recent != PADDING, self.scale)
        length = interests.size.sum(1)
        share = interests.size / length.clamp(min=1)[:, None]
        user = torch.einsum("gk,gkd->gd", share, interests.value)[user_of]
        features = [
            long_term.value,
            short_term.value,
            embedding,
            long_term.value * embedding,
            short_term.value * embedding,
            user,
            torch.stack([long_term.affinity, short_term.affinity, length.log1p()[user_of]], 1),
        ]
        return Reading(self.mlp(torch.cat(features, 1)).squeeze(1), long_term.weights)
