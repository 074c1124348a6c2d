"""What a request is made of, compiled: a user read once, each candidate's attention, and the MLP, without the GIL.

One call scores thousands of candidates while other threads read and answer other requests. Candidates come in blocks,
so that a block stays in the caches from its embeddings to its probabilities, and its products of matrices are of a size
that BLAS multiplies as they are, without packing them first. Slots are rows and candidates columns wherever slots are
summed over: sums, and exponentials, are vectorized over candidates then.

    B candidates   b of a block   K interests that are not empty   R recent behaviors   V vocabulary
    D embedding_dim   P projected_dim   H width of the first layer
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  what `np.dot` is in a kernel: loaded here, its threads can be limited

from encode.compiled import compiled, hash_slot, table_bits
from encode.schema import MOST_TIMES, PADDING, UNKNOWN

BLOCK = 120
"""Candidates: 120 x 64 x 128 is below the 10^6 up to which OpenBLAS does not pack where it has AVX-512."""
LOWEST = np.finfo(np.float32).min
"""Log of nothing; not -inf, so that a candidate without any slot gives no NaN."""
_AFFINITY, _TIMES, _IN_CATEGORY, _RECENT_AFFINITY = range(4)
"""Features of a candidate: affinity, log(1 + n_t), the same of its category, recent affinity."""
_LONG_TERM, _SHORT_TERM, _EMBEDDING, _LONG_TERM_PRODUCT, _SHORT_TERM_PRODUCT = range(5)
"""Vectors of a candidate: what it takes from interests and from recent behaviors, its own, and products with that."""


class Model(NamedTuple):
    """What kernels need of a model and its space."""

    embedding: Any
    """e, [V, D]."""
    key: Any
    """h, [V, P]."""
    category: Any
    """Index of the category of each item, [V]."""
    scale: Any
    """Of the relevance to recent behaviors."""
    size_prior: Any
    decoder: Any
    """B, how embeddings change where keys do, [P, D]."""
    of_vectors: Any
    """Weights of the first layer, of the vectors of a candidate, [5, D, H]."""
    of_features: Any
    """Of its features, [4, H]."""
    of_user: Any
    """Of the user's profile and of log(1 + behaviors), and the bias, [D + 2, H]."""
    layers: Any
    """Weights and biases of the other layers, one after another."""
    widths: Any
    """Of all layers."""


class Interests(NamedTuple):
    """What the candidates of a user attend to."""

    key: Any
    """Times [h_t, h_t^2] it gives the relevance, [K, 2 P]."""
    log_prior: Any
    """eta log n_k, [K]."""
    log_mass: Any
    """log sum_k n_k^eta."""
    value: Any
    """z_k, [K, D]."""
    spread: Any
    """s lambda_k: times h_t, how far attention moves the mean key, [K, P]."""


class Past(NamedTuple):
    """What the user had of each candidate."""

    log_prior: Any
    """eta log n_t, the lowest number where n_t is 0, [B]."""
    log_mass: Any
    """Of the interests and that, [B]."""


@compiled
def within(index: Any, size: int) -> Any:
    """Tell whether all of some indices are of a table of that size: kernels themselves look up without a check."""
    outside = 0
    for i in range(len(index)):
        outside += index[i] < 0 or index[i] >= size
    return outside == 0


@compiled
def score(model: Any, user: Any, target: Any, probability: Any) -> None:
    """Write the probability of each candidate.

    Args:
        model: a `Model`.
        user: a `UserState`.
        target: vocabulary index, [B].
        probability: is written, [B].
    """
    interests, (recent_key, recent_value) = _interests(user, model.size_prior), _recent(model, user)
    bias = _of_user(model, user)
    features = np.empty((4, len(target)), np.float32)
    past = _past(target, model, user, interests.log_mass, features)
    for start in range(0, len(target), BLOCK):
        block = slice(start, min(start + BLOCK, len(target)))
        of_block = Past(past.log_prior[block], past.log_mass[block])
        vectors, key = _gather(model, target[block])
        weights = _attend_interests(interests, of_block, key, user.scale, features[:, block])
        _read_interests(interests, model.decoder, weights, key, vectors)
        recent_weights = _attend_recent(recent_key, key, features[_RECENT_AFFINITY, block])
        vectors[_SHORT_TERM] = 0
        if len(recent_weights):
            np.dot(recent_weights.T, recent_value, vectors[_SHORT_TERM])
        _multiply(vectors[_LONG_TERM], vectors[_EMBEDDING], vectors[_LONG_TERM_PRODUCT])
        _multiply(vectors[_SHORT_TERM], vectors[_EMBEDDING], vectors[_SHORT_TERM_PRODUCT])
        _mlp(model, bias, vectors, features[:, block], probability[block])


@compiled
def attend(model: Any, user: Any, target: Any) -> Any:
    """Return how much each candidate attends to what.

    Args:
        model: a `Model`.
        user: a `UserState`.
        target: vocabulary index, [B].

    Returns:
        Weights of the interests that are not empty and, last, of what is remembered of the candidate itself,
        [K + 1, B], and of the recent behaviors, [R, B]; zeros where there is nothing to attend to.
    """
    interests, (recent_key, _) = _interests(user, model.size_prior), _recent(model, user)
    features = np.empty((4, len(target)), np.float32)
    past = _past(target, model, user, interests.log_mass, features)
    _, key = _gather(model, target)
    weights = _attend_interests(interests, past, key, user.scale, features)
    return weights, _attend_recent(recent_key, key, features[_RECENT_AFFINITY])


# --- a user, once ------------------------------------------------------------------------------------------


@compiled
def _interests(user: Any, size_prior: Any) -> Any:
    held, P = np.flatnonzero(user.size > 0), user.center.shape[1]
    key, spread = np.empty((len(held), 2 * P), np.float32), np.empty((len(held), P), np.float32)
    value, log_prior = np.empty((len(held), user.value.shape[1]), np.float32), np.empty(len(held), np.float32)
    highest, mass = LOWEST, 0.0
    for k in range(len(held)):
        log_prior[k] = size_prior * np.log(max(user.size[held[k]], 1))
        highest = max(highest, log_prior[k])
        for d in range(value.shape[1]):
            value[k, d] = user.value[held[k], d]
        for p in range(P):
            spread[k, p] = user.scale * user.variance[held[k], p]
            key[k, p] = user.scale * user.center[held[k], p]
            key[k, P + p] = 0.5 * user.scale * spread[k, p]
    for k in range(len(held)):
        mass += np.exp(log_prior[k] - highest)
    return Interests(key, log_prior, np.float32(highest + np.log(mass)) if mass else LOWEST, value, spread)


@compiled
def _recent(model: Any, user: Any) -> Any:
    """Return keys, times their scale, [R, P], and embeddings, [R, D]."""
    held = np.flatnonzero(user.recent != PADDING)
    key = np.empty((len(held), model.key.shape[1]), np.float32)
    value = np.empty((len(held), model.embedding.shape[1]), np.float32)
    for r in range(len(held)):
        item = user.recent[held[r]]
        for d in range(value.shape[1]):
            value[r, d] = model.embedding[item, d]
        for p in range(key.shape[1]):
            key[r, p] = model.scale * model.key[item, p]
    return key, value


@compiled
def _of_user(model: Any, user: Any) -> Any:
    """Return what the user alone, and the bias, add to the first layer, [H]."""
    D, total = user.value.shape[1], user.size.sum()
    found = model.of_user[D + 1] + np.float32(np.log1p(total)) * model.of_user[D]
    for d in range(D):
        mean = 0.0
        for k in range(len(user.size)):
            mean += user.size[k] * user.value[k, d]
        mean /= max(total, 1)
        for h in range(len(found)):
            found[h] += mean * model.of_user[d, h]
    return found


@compiled
def _past(target: Any, model: Any, user: Any, log_mass: Any, features: Any) -> Any:
    """Look up how often the user had each candidate, n, and its category; `features` gets both."""
    bits = table_bits(len(user.item))
    items, categories = np.full(1 << bits, -1, np.int64), np.full(1 << bits, -1, np.int64)
    times, sums = np.empty(1 << bits, np.int64), np.zeros(1 << bits, np.int64)
    for i in range(len(user.item)):
        slot = _slot_of(items, user.item[i], bits)
        items[slot], times[slot] = user.item[i], user.times[i]
        if user.category[i] > UNKNOWN:
            slot = _slot_of(categories, user.category[i], bits)
            categories[slot] = user.category[i]
            sums[slot] += user.times[i]
    prior, mass = np.full(len(target), LOWEST, np.float32), np.full(len(target), log_mass, np.float32)
    features[_TIMES] = 0
    features[_IN_CATEGORY] = 0
    for b in range(len(target)):
        slot = _slot_of(items, target[b], bits)
        if items[slot] >= 0 and times[slot] > 0:
            n = float(times[slot])
            prior[b] = model.size_prior * np.log(n)
            high = max(prior[b], log_mass)
            mass[b] = high + np.log(np.exp(prior[b] - high) + np.exp(log_mass - high))
            features[_TIMES, b] = np.log1p(n)
        slot = _slot_of(categories, model.category[target[b]], bits)
        if sums[slot]:
            features[_IN_CATEGORY, b] = np.log1p(float(min(sums[slot], MOST_TIMES)))
    return Past(prior, mass)


@compiled
def _slot_of(table: Any, key: int, bits: int) -> Any:
    """Return where a table of 2^bits places, -1 where empty, holds a key or could."""
    slot = hash_slot(key, bits)
    while table[slot] >= 0 and table[slot] != key:
        slot = (slot + 1) & (len(table) - 1)
    return slot


# --- a block of candidates ---------------------------------------------------------------------------------


@compiled
def _gather(model: Any, target: Any) -> Any:
    """Return room for the vectors of candidates, [5, b, D], their embeddings in place, and [h_t, h_t^2], [b, 2 P]."""
    D, P = model.embedding.shape[1], model.key.shape[1]
    vectors = np.empty((5, len(target), D), np.float32)
    embedding, key = vectors[_EMBEDDING], np.empty((len(target), 2 * P), np.float32)
    for b in range(len(target)):
        row, to = model.embedding[target[b]], embedding[b]
        for d in range(D):
            to[d] = row[d]
    for b in range(len(target)):
        for p in range(P):
            key[b, p] = model.key[target[b], p]
            key[b, P + p] = key[b, p] * key[b, p]
    return vectors, key


@compiled
def _attend_interests(interests: Any, past: Any, key: Any, scale: float, features: Any) -> Any:
    """Return the weights that `relevance.attend_interests` does, [K + 1, b]; `features` gets the affinity."""
    K, P = len(interests.key), key.shape[1] // 2
    weights, total = np.empty((K + 1, len(key)), np.float32), np.empty(len(key), np.float32)
    np.dot(interests.key, key.T, weights[:K])
    for k in range(K):
        for b in range(len(key)):
            weights[k, b] += interests.log_prior[k]
    for b in range(len(key)):
        weights[K, b] = past.log_prior[b] + scale * key[b, P:].sum()
    _softmax(weights, total)
    for b in range(len(key)):
        features[_AFFINITY, b] = total[b] - past.log_mass[b]
        if past.log_prior[b] == LOWEST:
            weights[K, b] = 0
    return weights


@compiled
def _attend_recent(recent_key: Any, key: Any, affinity: Any) -> Any:
    """Return the weights of the recent behaviors, [R, b]; `affinity` gets that to all, 0 where there is none."""
    P, total = recent_key.shape[1], np.empty(len(key), np.float32)
    weights = np.dot(recent_key, key[:, :P].copy().T)
    if len(weights):
        _softmax(weights, total)
    for b in range(len(key)):
        affinity[b] = total[b] - np.log(len(weights)) if len(weights) else 0
    return weights


@compiled
def _softmax(logits: Any, total: Any) -> None:
    """Put the softmax over slots in the place of the logits, [M, b]; `total` gets log sum_m exp(logit_m), [b]."""
    highest = logits[0].copy()
    for m in range(1, len(logits)):
        for b in range(len(total)):
            highest[b] = logits[m, b] if logits[m, b] > highest[b] else highest[b]
    total[:] = 0
    power = np.empty(len(total), np.int32)
    for m in range(len(logits)):
        _exp(logits[m], highest, power)
        for b in range(len(total)):
            total[b] += logits[m, b]
    for m in range(len(logits)):
        for b in range(len(total)):
            logits[m, b] /= total[b]
    for b in range(len(total)):
        total[b] = highest[b] + np.log(total[b])


@compiled
def _exp(x: Any, highest: Any, power: Any) -> None:
    """Put exp(x - highest) in the place of x, vectorized as the C library's is not; `power` is room for integers, [b].

    exp(x) = 2^n exp(r) with |r| <= log(2) / 2, and a polynomial for exp(r), Cephes' `expf`: to 2e-7, where x - highest
    is at most 0. 2^n is put together from its bits, and 0 below 2^-126.
    """
    for b in range(len(x)):
        below = x[b] - highest[b]
        below = _NOTHING if below < _NOTHING else below  # NaN stays NaN
        n = np.floor(below * _PER_LOG_2 + _HALF)
        r = below - n * _LOG_2 - n * _LOG_2_REST
        found = ((((_C[0] * r + _C[1]) * r + _C[2]) * r + _C[3]) * r + _C[4]) * r + _HALF
        x[b] = found * (r * r) + r + _ONE
        power[b] = (np.int32(n) + np.int32(127)) << np.int32(23)
    factor = power.view(np.float32)
    for b in range(len(x)):
        x[b] *= factor[b]


_NOTHING, _HALF, _ONE = np.float32(-88), np.float32(0.5), np.float32(1)
_PER_LOG_2, _LOG_2, _LOG_2_REST = np.float32(1.442695), np.float32(0.693359375), np.float32(-2.12194440e-4)
_C = tuple(np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1))


@compiled
def _read_interests(interests: Any, decoder: Any, weights: Any, key: Any, vectors: Any) -> None:
    """Put v = sum_k beta_k z_k + B^T (s lambda h_t) + beta_t e_t in its place among the vectors of candidates."""
    K, P = len(interests.key), decoder.shape[0]
    value, embedding = vectors[_LONG_TERM], vectors[_EMBEDDING]
    np.dot(weights[:K].T, interests.value, value)
    moved = np.dot(weights[:K].T, interests.spread)
    for b in range(len(key)):
        for p in range(P):
            moved[b, p] *= key[b, p]
    decoded = np.dot(moved, decoder)
    for b in range(len(key)):
        for d in range(value.shape[1]):
            value[b, d] += decoded[b, d] + weights[K, b] * embedding[b, d]


@compiled
def _multiply(x: Any, y: Any, product: Any) -> None:
    for b in range(len(x)):
        for d in range(x.shape[1]):
            product[b, d] = x[b, d] * y[b, d]


@compiled
def _mlp(model: Any, bias: Any, vectors: Any, features: Any, probability: Any) -> None:
    hidden = np.dot(vectors[0], model.of_vectors[0])
    part = np.empty_like(hidden)
    for v in range(1, len(vectors)):
        np.dot(vectors[v], model.of_vectors[v], part)
        _add(hidden, part)
    weight = model.of_features
    for b in range(len(hidden)):
        one, two, three, four = features[0, b], features[1, b], features[2, b], features[3, b]
        for h in range(hidden.shape[1]):
            of_features = one * weight[0, h] + two * weight[1, h] + three * weight[2, h] + four * weight[3, h]
            hidden[b, h] += bias[h] + of_features
    begin = 0
    for layer in range(len(model.widths) - 1):
        before, after = model.widths[layer], model.widths[layer + 1]
        end = begin + before * after
        hidden = np.dot(_relu(hidden), model.layers[begin:end].reshape(before, after))
        begin = end + after
        for b in range(len(hidden)):
            for h in range(after):
                hidden[b, h] += model.layers[end + h]
    for b in range(len(hidden)):
        probability[b] = 1 / (1 + np.exp(-hidden[b, 0]))


@compiled
def _add(x: Any, y: Any) -> None:
    for b in range(len(x)):
        for h in range(x.shape[1]):
            x[b, h] += y[b, h]


@compiled
def _relu(x: Any) -> Any:
    for b in range(len(x)):
        for h in range(x.shape[1]):
            x[b, h] = np.float32(0) if x[b, h] < 0 else x[b, h]  # NaN stays NaN
    return x
