"""The scoring engine: the numbers of `encode.model.files.read_user`, thousands of candidates at a time on one thread.

What does not depend on the candidate is computed once a user, each attention takes its exponentials once, and what a
candidate looks up is gathered from the space's own tables: nothing is kept a second time. Slots are rows and candidates
columns wherever slots are summed over: of rows that long the sums are vectorized. The first layer is added up from the
parts of its input, which need not be put side by side.

    B candidates   K interests   R recent behaviors   M slots that are attended to   D embedding_dim   P projected_dim
    H width of the first hidden layer, or 1
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encode.model.ctr import Encode, Reader
from encode.model.files import UserState
from encode.model.relevance import Remembered, times_of
from encode.model.space import Space
from encode.schema import PADDING

_LOWEST = torch.finfo(torch.float32).min
"""Logit of a slot that is empty; not -inf, so that a candidate without any slot gives no NaN."""


class Slots(NamedTuple):
    """What the candidates of one user attend to."""

    key: Float[Tensor, "M C"]
    """Times what is asked of a candidate, C numbers, it gives the relevance."""
    log_prior: Float[Tensor, "M 1"]
    """The lowest number where a slot is empty."""
    log_mass: Float[Tensor, ""]
    """log sum_m exp(prior_m); the lowest number where all are empty."""
    is_empty: bool
    """All of them are."""
    value: Float[Tensor, "M E"]


class PreparedUser(NamedTuple):
    """What scoring needs of one user, whatever the candidates."""

    interests: Slots
    """C = 2 P: asked with [h_t, h_t^2]. E = D + P: the value, and how far attention moves the mean key."""
    remembered: Remembered
    """Of a single user, G = 1."""
    categories: Remembered
    """Of the same user."""
    recent: Slots
    """C = P, E = D."""
    bias: Float[Tensor, " H"]
    """The part of the first layer that depends on the user alone."""


class Engine:
    """Scores the candidates of one user; any number of threads may use it at once.

    It computes on as many threads as PyTorch is told to: `torch.set_num_threads(1)` where requests come in parallel.

    Args:
        space: e and h of the vocabulary.
        reader: a model of that space.
    """

    def __init__(self, space: Space, reader: Reader) -> None:
        first = cast(nn.Linear, reader.mlp[0])
        weight, D = first.weight.detach(), space.embedding.shape[1]
        self._encode = cast(Encode, reader.long_term)
        self._items = space.items
        self._scale = reader.scale.item()
        self._of_user = torch.cat([weight[:, 5 * D : 6 * D], weight[:, -1:]], 1)
        self._bias = first.bias.detach()
        self._of_vectors = [weight[:, place * D : (place + 1) * D].T.contiguous() for place in range(5)]
        self._of_scalars = weight[:, 6 * D : -1].T.contiguous()
        rest = [layer for layer in list(reader.mlp)[1:] if isinstance(layer, nn.Linear)]
        self._rest = [(layer.weight.detach().T.contiguous(), layer.bias.detach()) for layer in rest]

    @torch.inference_mode()
    def prepare(self, user: UserState) -> PreparedUser:
        """Return what scoring needs of a user."""
        interests = user.known.interests
        center, value, size, variance = (part[0] for part in interests[:4])
        scale = interests.scale
        slots = _slots(
            torch.cat([scale * center, 0.5 * scale.square() * variance], 1),
            (self._encode.size_prior * size.clamp(min=1).log()).masked_fill(size == 0, _LOWEST),
            torch.cat([value, scale * variance], 1),
        )
        recent = _slots(
            self._scale * self._items.key[user.recent],
            torch.zeros(len(user.recent)).masked_fill(user.recent == PADDING, _LOWEST),
            self._items.embedding[user.recent],
        )
        of_user = torch.cat([self._encode.profile(user.known)[0], size.sum().log1p()[None]])
        bias = torch.addmv(self._bias, self._of_user, of_user)
        return PreparedUser(slots, user.known.remembered, user.known.categories, recent, bias)

    @torch.inference_mode()
    def score(self, user: PreparedUser, target: Int64[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return the probability of each candidate, which no other candidate changes by more than rounding.

        Args:
            user: whom to score for.
            target: vocabulary index of each candidate.
        """
        embedding = self._items.embedding.index_select(0, target)
        key = self._items.key.index_select(0, target)
        weights, affinity, times = self._attend_interests(user, key, target)
        pooled, D = weights[:-1].T @ user.interests.value, embedding.shape[1]
        long_term = torch.addmm(pooled[:, :D], key * pooled[:, D:], self._encode.decoder)
        long_term.addcmul_(weights[-1][:, None], embedding)
        weights, recent_affinity = _attend_recent(user.recent, key)
        short_term = weights.T @ user.recent.value
        in_category = times_of(self._items.category.index_select(0, target)[None], user.categories)[0]
        scalars = torch.stack([affinity, times.log1p(), in_category.log1p(), recent_affinity], 1)
        hidden = torch.addmm(user.bias, scalars, self._of_scalars)
        vectors = long_term, short_term, embedding, long_term * embedding, short_term * embedding
        for vector, weight in zip(vectors, self._of_vectors, strict=True):
            hidden.addmm_(vector, weight)
        for weight, bias in self._rest:
            hidden = torch.addmm(bias, hidden.relu_(), weight)
        return hidden.squeeze(1).sigmoid_()

    def score_user(self, user: UserState, target: Int64[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return the probability of each candidate of a user who is asked for once."""
        return self.score(self.prepare(user), target)

    @torch.inference_mode()
    def attention(
        self, user: PreparedUser, target: Int64[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B K_plus_1"], Float[Tensor, "B R"]]:
        """Return how much each candidate attends to what; zeros where it finds nothing to attend to.

        Returns:
            Weights of the interests, and of what is remembered of the candidate itself, last; and weights of the
            recent behaviors, in the order of `UserState.recent`.
        """
        key = self._items.key.index_select(0, target)
        return self._attend_interests(user, key, target)[0].T, _attend_recent(user.recent, key)[0].T

    def _attend_interests(
        self, user: PreparedUser, key: Float[Tensor, "B P"], target: Int64[Tensor, " B"]
    ) -> tuple[Float[Tensor, "K_plus_1 B"], Float[Tensor, " B"], Int64[Tensor, " B"]]:
        """Return what `relevance.attend_interests` does but the value: weights and affinity; and n_t."""
        slots, square = user.interests, key.square()
        times = times_of(target[None], user.remembered)[0]
        prior = (self._encode.size_prior * times.clamp(min=1).log()).masked_fill(times == 0, _LOWEST)
        logits = key.new_empty(len(slots.key) + 1, len(target))
        torch.addmm(slots.log_prior, slots.key, torch.cat([key, square], 1).T, out=logits[:-1])
        torch.add(prior, square.sum(1), alpha=self._scale, out=logits[-1])
        weights, total = _softmax(logits)
        if slots.is_empty:
            weights.mul_(times > 0)
        return weights, total - torch.logaddexp(slots.log_mass, prior), times


def _slots(key: Float[Tensor, "M C"], log_prior: Float[Tensor, " M"], value: Float[Tensor, "M E"]) -> Slots:
    log_mass = log_prior.logsumexp(0)
    return Slots(key, log_prior[:, None], log_mass, log_mass.item() == _LOWEST, value)


def _attend_recent(slots: Slots, key: Float[Tensor, "B P"]) -> tuple[Float[Tensor, "R B"], Float[Tensor, " B"]]:
    """Return the weights of the recent behaviors, and the affinity to them."""
    weights, total = _softmax(torch.addmm(slots.log_prior, slots.key, key.T))
    if slots.is_empty:
        weights.zero_()
    return weights, total - slots.log_mass


def _softmax(logits: Float[Tensor, "M B"]) -> tuple[Float[Tensor, "M B"], Float[Tensor, " B"]]:
    """Return the softmax over slots, in the place of the logits, and log sum_m exp(logit_m)."""
    highest = logits.amax(0)
    weights = logits.sub_(highest).exp_()
    total = weights.sum(0)
    return weights.mul_(total.reciprocal()), total.log_().add_(highest)
