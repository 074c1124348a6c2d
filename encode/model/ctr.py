"""The CTR model: logit = MLP([v, recent-behavior attention, e_t, their products, user]).

Read it top down: how a behavior becomes e and h, what a history is worth to a target, how a target reads the user.

    B impressions or candidates   G users in the batch   T targets of a user   L behaviors of a history   K clusters
    R recent behaviors   Q moments as of which behaviors are recent   S items of the batch   V vocabulary
    C categories   D embedding_dim   P projected_dim
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from encode.config import ModelConfig
from encode.model.long_term import Catalog, History, LongTerm, Read, Target
from encode.model.reduction import center_loss, linear_decoder, principal_projection, random_projection
from encode.model.relevance import (
    Attention,
    Interests,
    Remembered,
    attend,
    attend_interests,
    pool_interests,
    remember,
    remember_categories,
    times_of,
)
from encode.schema import PADDING


class Tables(nn.Module):
    """Embeddings e and keys h of every item of the vocabulary."""

    def __init__(
        self, config: ModelConfig, item_category: Int64[Tensor, " V"], num_categories: int, num_kinds: int = 1
    ) -> None:
        super().__init__()
        self.reduction = config.reduction
        self.item = nn.Embedding(len(item_category), config.embedding_dim - config.category_dim, PADDING, sparse=True)
        self.category = nn.Embedding(num_categories, config.category_dim, PADDING, sparse=True)
        self.kind = nn.Embedding(num_kinds, config.embedding_dim) if num_kinds > 1 else None
        own = config.reduction == "table"
        P = config.projected_dim
        self.item_key = nn.Embedding(len(item_category), P, PADDING, sparse=True) if own else None
        self.category_key = nn.Embedding(num_categories, P, PADDING, sparse=True) if own else None
        for table in (self.item, self.category, self.kind, self.item_key, self.category_key):
            if table is not None:
                nn.init.normal_(table.weight, std=config.initial_std)
        with torch.no_grad():
            for table in (self.item, self.category, self.item_key, self.category_key):
                if table is not None:
                    table.weight[PADDING] = 0
        self.item_category: Tensor
        self.register_buffer("item_category", item_category)
        generator = torch.Generator().manual_seed(0)
        if config.reduction == "none":
            projection = torch.eye(config.embedding_dim)
        else:
            projection = random_projection(config.embedding_dim, config.projected_dim, generator)
        self.projection = nn.Parameter(projection, requires_grad=config.reduction == "learned")

    def by_id(self) -> list[Tensor]:
        """Return the tables with a row an id, whose gradients hold the rows of a batch only."""
        tables = (self.item, self.category, self.item_key, self.category_key)
        return [table.weight for table in tables if table is not None]

    def embed(self, index: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Return e: the item's part and its category's part side by side."""
        return torch.cat([self.item(index), self.category(self.item_category[index])], -1)

    def items(self, index: Int64[Tensor, " S"]) -> Catalog:
        """Embed and project the items of a batch, or `all_items`."""
        embedding = self.embed(index)
        kind = embedding.new_zeros(1, embedding.shape[-1]) if self.kind is None else self.kind.weight
        return Catalog(embedding, self._key(index, embedding), self.item_category[index], kind)

    def all_items(self) -> Catalog:
        """Embed and project the whole vocabulary, without gradients."""
        with torch.no_grad():
            found = self.items(torch.arange(len(self.item_category)))
        return found._replace(kind=found.kind.detach())

    def _key(self, index: Int64[Tensor, " S"], embedding: Float[Tensor, "S D"]) -> Float[Tensor, "S P"]:
        """Return h = W_h^T e, or what the key tables hold, of unit length (zero for padding)."""
        if self.item_key is not None and self.category_key is not None:
            return F.normalize(self.item_key(index) + self.category_key(self.item_category[index]), dim=-1)
        return F.normalize(embedding @ self.projection, dim=-1)

    def follow(self, count: Float[Tensor, " V"]) -> None:
        """Bring a projection that is not learned by gradients up to the embeddings of the moment: PCA.

        Args:
            count: how often each item occurs, which is what it weighs.
        """
        if self.reduction == "pca":
            with torch.no_grad():
                self.projection.copy_(principal_projection(self.all_items().embedding, count, self.projection.shape[1]))


class Known(NamedTuple):
    """What ENCODE keeps of G users."""

    interests: Interests
    remembered: Remembered
    categories: Remembered
    """Of the remembered items."""


class Encode(LongTerm):
    """ENCODE: a user is K interests, and a target attends to them with the relevance that made them."""

    num_scalars = 3

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.center_weight = config.center_weight
        self.size_prior = config.size_prior
        self.by_relevance = config.pooling == "relevance"
        self.num_remembered = config.num_remembered
        self.decoder: Tensor
        self.register_buffer("decoder", torch.zeros(config.projected_dim, config.embedding_dim))

    def follow(self, catalog: Catalog, count: Float[Tensor, " V"]) -> None:
        """Fit how embeddings change where keys do."""
        self.decoder = linear_decoder(catalog.key, catalog.embedding, count)

    def summarise(self, history: History) -> Known:
        """Pool the clusters of each history: what `interests.extract` does offline, with gradients."""
        num_users, num_clusters = len(history.mask), 1 + int(history.cluster.max()) if history.cluster.numel() else 1
        first = num_clusters * torch.arange(num_users, device=history.mask.device)[:, None]
        segment = (first + history.cluster).masked_fill(~history.mask, num_users * num_clusters)
        interests = pool_interests(
            history.embedding.flatten(0, 1),
            history.key.flatten(0, 1),
            segment.flatten(),
            num_users,
            num_clusters,
            history.scale,
            self.by_relevance,
        )
        remembered = remember(history.item, self.num_remembered)
        categories = remember_categories(history.item, history.category, remembered, self.num_remembered)
        return Known(interests, remembered, categories)

    def profile(self, state: Known, history: History | None = None) -> Float[Tensor, "G D"]:
        """Return the mean of the interests by size: the stored state is all that serving has."""
        size = state.interests.size
        share = size / size.sum(1, keepdim=True).clamp(min=1)
        return (share[:, None] @ state.interests.value).squeeze(1)

    def attention(self, state: Known, target: Target) -> Attention:
        """Return what each target takes from the interests, and how much it attends to each, itself last."""
        return self._attend(state, target, times_of(target.item, state.remembered))

    def read(self, state: Known, target: Target) -> Read:
        """Return v = sum_k beta_k z_k, the affinity to all interests, and log(1 + n) of the target and its category.

        How often the user had something is what clusters, which are many items each, tell least about. Ours, not the
        paper's.
        """
        times = times_of(target.item, state.remembered)
        found = self._attend(state, target, times)
        counts = torch.stack([times, times_of(target.category, state.categories)], 2).to(found.affinity.dtype)
        return Read(found.value[:, :, None], torch.cat([found.affinity[..., None], counts.log1p()], 2))

    def _attend(self, state: Known, target: Target, times: Int64[Tensor, "G T"]) -> Attention:
        return attend_interests(target.key, times, target.embedding, state.interests, self.decoder, self.size_prior)

    def auxiliary_loss(self, state: Known, history: History) -> Float[Tensor, ""]:
        """Return the center loss, weighted."""
        return self.center_weight * center_loss(state.interests.center, state.interests.size, state.interests.scale)


class User(NamedTuple):
    """What is known of G users whatever the target."""

    long_term: Any
    """State of the model of long-term interest."""
    profile: Float[Tensor, "G D"]
    length: Float[Tensor, " G"]
    """Behaviors of the history."""


class Recent(NamedTuple):
    """The last behaviors as of Q moments; impressions of one moment share them."""

    embedding: Float[Tensor, "Q R D"]
    key: Float[Tensor, "Q R P"]
    mask: Bool[Tensor, "Q R"]
    moment: Int64[Tensor, " B"]
    """Of each impression, ascending."""


class Reader(nn.Module):
    """How a target reads a user: the part of the model that is not the space."""

    def __init__(self, config: ModelConfig, long_term: LongTerm) -> None:
        super().__init__()
        self.long_term = long_term
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.initial_scale)))
        vectors = 4 + 2 * long_term.num_vectors
        widths = [vectors * config.embedding_dim + long_term.num_scalars + 2, *config.hidden_dims]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(config.dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    @property
    def scale(self) -> Tensor:
        """The scale of the relevance, positive."""
        return self.log_scale.exp()

    def summarise(self, history: History) -> User:
        """Return what is known of the users whatever the target."""
        state = self.long_term.summarise(history)
        return User(state, self.long_term.profile(state, history), history.mask.sum(1).to(history.embedding.dtype))

    def forward(
        self, user: User, recent: Recent, target: Target, place: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, " B"]:
        """Return the logit of each impression.

        Args:
            user: of the G users of the batch.
            recent: last behaviors strictly before each impression.
            target: of each user, padded.
            place: impressions among the G T targets, one user after the other; None takes all of them.
        """
        read = self.long_term.read(user.long_term, target)
        chosen = torch.arange(target.item.numel(), device=target.item.device) if place is None else place
        user_of = chosen // target.item.shape[1]
        vectors, scalars = _rows(read.vectors, chosen), _rows(read.scalars, chosen)
        embedding, key = _rows(target.embedding, chosen), _rows(target.key, chosen)
        short_term, affinity = self._attend_recent(recent, key)
        features = [
            vectors.flatten(1),
            short_term,
            embedding,
            (vectors * embedding[:, None]).flatten(1),
            short_term * embedding,
            user.profile[user_of],
            scalars,
            torch.stack([affinity, user.length.log1p()[user_of]], 1),
        ]
        logit: Tensor = self.mlp(torch.cat(features, 1)).squeeze(1)
        return logit

    def _attend_recent(
        self, recent: Recent, key: Float[Tensor, "B P"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Return what each impression takes from the recent behaviors, and its affinity to them."""
        count = torch.bincount(recent.moment, minlength=len(recent.mask))
        width = int(count.max()) if len(count) else 0
        first = count.cumsum(0) - count
        seat = recent.moment * width + torch.arange(len(key), device=key.device) - first[recent.moment]
        query = key.new_zeros(len(count) * width, key.shape[1]).index_copy(0, seat, key)
        none = torch.zeros_like(recent.mask, dtype=key.dtype)
        short = attend(query.view(len(count), width, -1), recent.key, recent.embedding, none, recent.mask, self.scale)
        return _rows(short.value, seat), short.affinity.flatten()[seat]


def _rows(table: Float[Tensor, "G T *shape"], place: Int64[Tensor, " B"]) -> Float[Tensor, " B *shape"]:
    """Return some rows of G groups of T, one group after the other."""
    return table.flatten(0, 1).index_select(0, place)
