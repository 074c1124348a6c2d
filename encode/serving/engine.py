"""The scoring engine: the numbers of `encode.model.files.read_user`, thousands of candidates at a time on one thread.

What does not depend on the candidate is computed once a user, each attention takes its exponentials once, and what a
candidate looks up is gathered from the space's own tables: nothing is kept a second time. Slots are rows and candidates
columns wherever slots are summed over: of rows that long the sums are vectorized. The first layer is added up from the
parts of its input, which need not be put side by side. What is small is left to NumPy, whose calls cost less than
PyTorch's, and what takes a look-up or a branch for each candidate is compiled.

    B candidates   K interests   R recent behaviors   M slots that are attended to   D embedding_dim   P projected_dim
    N remembered items   V vocabulary   H width of the first hidden layer, or 1
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encode.compiled import compiled, hash_slot, read_only
from encode.model.ctr import Encode, Reader
from encode.model.files import UserState
from encode.model.space import Space
from encode.schema import MOST_TIMES, PADDING, UNKNOWN

_LOWEST = torch.finfo(torch.float32).min
"""Logit of a slot that is empty; not -inf, so that a candidate without any slot gives no NaN."""
_AFFINITY, _TIMES, _IN_CATEGORY, _RECENT_AFFINITY, _ONE = range(5)
"""Rows of the numbers of a candidate: affinity, log(1 + n_t), the same of its category, recent affinity, and 1."""
Floats = npt.NDArray[np.float32]


class Slots(NamedTuple):
    """What the candidates of one user attend to."""

    key: Float[Tensor, "M C"]
    """Times what is asked of a candidate, C numbers, it gives the relevance."""
    log_prior: Float[Tensor, "M 1"]
    """The lowest number where a slot is empty."""
    log_mass: float
    """log sum_m exp(prior_m); the lowest number where all are empty."""
    is_empty: bool
    """All of them are."""
    value: Float[Tensor, "M E"]


class PreparedUser(NamedTuple):
    """What scoring needs of one user, whatever the candidates."""

    interests: Slots
    """C = 2 P: asked with [h_t, h_t^2]. E = D + P: the value, and how far attention moves the mean key."""
    recent: Slots
    """C = P, E = D."""
    remembered: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
    """Items, how often each was had, and its category, [N] each."""
    of_scalars: Float[Tensor, "5 H"]
    """What the numbers of a candidate add to the first layer: weights, and the part that the user alone decides."""


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
        self._category = read_only(space.items.category.numpy())
        self._scale = reader.scale.item()
        self._of_user = torch.cat([weight[:, 5 * D : 6 * D], weight[:, -1:]], 1).numpy()
        self._bias = first.bias.detach().numpy()
        self._of_vectors = [weight[:, place * D : (place + 1) * D].T.contiguous() for place in range(5)]
        self._of_scalars = weight[:, 6 * D : -1].T.numpy()
        rest = [layer for layer in list(reader.mlp)[1:] if isinstance(layer, nn.Linear)]
        self._rest = [(layer.weight.detach().T.contiguous(), layer.bias.detach()) for layer in rest]

    def prepare(self, user: UserState) -> PreparedUser:
        """Return what scoring needs of a user."""
        total = user.size.sum()
        spread = user.scale * user.variance
        is_interest, is_recent = user.size > 0, user.recent != PADDING
        interests = _slots(
            np.concatenate([user.scale * user.center, 0.5 * user.scale * spread], 1),
            self._encode.size_prior * np.log(np.maximum(user.size, 1)),
            is_interest,
            np.concatenate([user.value, spread], 1),
        )
        recent = _slots(
            self._scale * self._items.key.numpy()[user.recent],
            np.zeros(len(is_recent), np.float32),
            is_recent,
            self._items.embedding.numpy()[user.recent],
        )
        profile = (user.size / max(total, 1)) @ user.value
        bias = self._bias + self._of_user @ np.append(profile, np.log1p(total))
        of_scalars = torch.from_numpy(np.concatenate([self._of_scalars, bias[None]]))
        return PreparedUser(interests, recent, (user.item, user.times, user.category), of_scalars)

    @torch.inference_mode()
    def score(self, user: PreparedUser, target: Int64[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return the probability of each candidate, which no other candidate changes by more than rounding.

        Args:
            user: whom to score for.
            target: vocabulary index of each candidate.
        """
        embedding = self._items.embedding.index_select(0, target)
        key = self._items.key.index_select(0, target)
        scalars = embedding.new_empty(5, len(target))
        weights = self._attend_interests(user, key, target, scalars)
        pooled, D = weights[:-1].T @ user.interests.value, embedding.shape[1]
        long_term = torch.addmm(pooled[:, :D], key * pooled[:, D:], self._encode.decoder)
        long_term.addcmul_(weights[-1][:, None], embedding)
        short_term = _attend_recent(user.recent, key, scalars[_RECENT_AFFINITY]).T @ user.recent.value
        hidden = scalars.T @ user.of_scalars
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
        scalars = key.new_empty(5, len(target))
        recent = _attend_recent(user.recent, key, scalars[_RECENT_AFFINITY])
        return self._attend_interests(user, key, target, scalars).T, recent.T

    def _attend_interests(
        self,
        user: PreparedUser,
        key: Float[Tensor, "B P"],
        target: Int64[Tensor, " B"],
        scalars: Float[Tensor, "5 B"],
    ) -> Float[Tensor, "K_plus_1 B"]:
        """Return the weights that `relevance.attend_interests` does; `scalars` gets all but recent affinity."""
        slots, square = user.interests, key.square()
        prior, mass = (np.empty(len(target), np.float32) for _ in range(2))
        _of_candidates(
            read_only(target.numpy()),
            self._category,
            *(read_only(part) for part in user.remembered),
            self._encode.size_prior,
            slots.log_mass,
            prior,
            mass,
            scalars.numpy(),
        )
        logits = key.new_empty(len(slots.key) + 1, len(target))
        torch.addmm(slots.log_prior, slots.key, torch.cat([key, square], 1).T, out=logits[:-1])
        torch.add(torch.from_numpy(prior), square.sum(1), alpha=self._scale, out=logits[-1])
        weights, total = _softmax(logits)
        if slots.is_empty:
            weights.mul_(scalars[_TIMES] > 0)
        torch.sub(total, torch.from_numpy(mass), out=scalars[_AFFINITY])
        return weights


def _slots(key: Floats, log_prior: Floats, is_filled: npt.NDArray[np.bool_], value: Floats) -> Slots:
    prior = np.where(is_filled, log_prior, np.float32(_LOWEST))
    is_empty = not is_filled.any()
    log_mass = _LOWEST if is_empty else float(np.logaddexp.reduce(prior))
    return Slots(torch.from_numpy(key), torch.from_numpy(prior)[:, None], log_mass, is_empty, torch.from_numpy(value))


def _attend_recent(slots: Slots, key: Float[Tensor, "B P"], affinity: Float[Tensor, " B"]) -> Float[Tensor, "R B"]:
    """Return the weights of the recent behaviors; `affinity` gets that to all of them."""
    weights, total = _softmax(torch.addmm(slots.log_prior, slots.key, key.T))
    if slots.is_empty:
        weights.zero_()
    torch.sub(total, slots.log_mass, out=affinity)
    return weights


def _softmax(logits: Float[Tensor, "M B"]) -> tuple[Float[Tensor, "M B"], Float[Tensor, " B"]]:
    """Return the softmax over slots, in the place of the logits, and log sum_m exp(logit_m)."""
    highest = logits.amax(0)
    weights = logits.sub_(highest).exp_()
    total = weights.sum(0)
    return weights.mul_(total.reciprocal()), total.log_().add_(highest)


# --- compiled ----------------------------------------------------------------------------------------------


@compiled
def _of_candidates(
    target: Any,
    category_of: Any,
    item: Any,
    times: Any,
    category: Any,
    size_prior: float,
    log_mass: float,
    prior: Any,
    mass: Any,
    scalars: Any,
) -> None:
    """Write of each candidate what depends on how often the user had it, n, and its category.

    Args:
        target: vocabulary index, [B].
        category_of: category index of each vocabulary index, [V].
        item: remembered, [N].
        times: how often each was had, [N].
        category: of each, [N].
        size_prior: factor of log n in the prior of a candidate's own past.
        log_mass: of the interests.
        prior: gets that prior, the lowest number where n is 0, [B].
        mass: gets log(exp(log_mass) + exp(prior)), [B].
        scalars: its rows _TIMES, _IN_CATEGORY and _ONE are written, [5, B].
    """
    bits = 1
    while (1 << bits) < 2 * len(item):
        bits += 1
    items, categories = np.full(1 << bits, -1, np.int64), np.full(1 << bits, -1, np.int64)
    counts, sums = np.empty(1 << bits, np.int64), np.zeros(1 << bits, np.int64)
    for i in range(len(item)):
        slot = _slot_of(items, item[i], bits)
        items[slot] = item[i]
        counts[slot] = times[i]
        if category[i] > UNKNOWN:
            slot = _slot_of(categories, category[i], bits)
            categories[slot] = category[i]
            sums[slot] += times[i]
    for b in range(len(target)):
        slot = _slot_of(items, target[b], bits)
        n = counts[slot] if items[slot] >= 0 else 0
        slot = _slot_of(categories, category_of[target[b]], bits)
        prior[b], mass[b] = _LOWEST, log_mass
        if n > 0:
            own = size_prior * np.log(float(n))
            high = max(own, log_mass)
            prior[b], mass[b] = own, high + np.log(np.exp(own - high) + np.exp(log_mass - high))
        scalars[_TIMES, b] = np.log1p(float(n))
        scalars[_IN_CATEGORY, b] = np.log1p(float(min(sums[slot], MOST_TIMES)))
        scalars[_ONE, b] = 1.0


@compiled
def _slot_of(table: Any, key: int, bits: int) -> Any:
    """Return where a table of 2^bits places, -1 where empty, holds a key or could."""
    slot = hash_slot(key, bits)
    while table[slot] >= 0 and table[slot] != key:
        slot = (slot + 1) & (len(table) - 1)
    return slot
