"""The scoring engine: the numbers of `encode.model.files.read_user`, thousands of candidates of a user at a time.

What it computes is in `encode.serving.kernels`; here is what it keeps of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from encode.compiled import read_only
from encode.errors import ArtifactError
from encode.model.ctr import Encode, Reader
from encode.model.files import UserState
from encode.model.space import Space
from encode.schema import PADDING
from encode.serving import kernels


class Engine:
    """Scores the candidates of one user; any number of threads may use it at once, and nearly all of it needs no GIL.

        B candidates   K interests   R recent behaviors

    Args:
        space: e and h of the vocabulary.
        reader: a model of that space.
    """

    def __init__(self, space: Space, reader: Reader) -> None:
        """Take from both what scoring needs.

        Raises:
            ArtifactError: they are not of the same widths.
        """
        first, *others = (layer for layer in reader.mlp if isinstance(layer, nn.Linear))
        encode, (D, P) = cast(Encode, reader.long_term), (space.embedding.shape[1], space.key.shape[1])
        if encode.decoder.shape != (P, D) or first.in_features != 6 * D + encode.num_scalars + 2:
            raise ArtifactError(f"model and space do not belong together: the space has vectors of {D} and keys of {P}")
        parts = np.cumsum([5 * D, D, encode.num_scalars + 1])
        of_vectors, of_profile, of_features, of_length = np.split(_array(first.weight.T), parts)
        flat = [_array(part).ravel() for layer in others for part in (layer.weight.T, layer.bias)]
        self._model = kernels.Model(
            _checked(space.embedding, (len(space.vocabulary), D), np.float32),
            _checked(space.key, (len(space.vocabulary), P), np.float32),
            read_only(space.items.category.numpy()),
            np.float32(reader.scale.item()),
            np.float32(encode.size_prior),
            read_only(_array(encode.decoder)),
            read_only(of_vectors.reshape(5, D, -1)),
            read_only(of_features),
            read_only(np.concatenate([of_profile, of_length, _array(first.bias)[None]])),
            read_only(np.concatenate([np.zeros(0, np.float32), *flat])),
            read_only(np.array([layer.out_features for layer in (first, *others)])),
        )

    def score(self, user: UserState, target: Int64[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
        """Return the probability of each candidate, which no other candidate changes by more than rounding.

        Args:
            user: whom to score for.
            target: vocabulary index of each candidate.

        Raises:
            IndexError: an index is outside the vocabulary.
            ValueError: an array is not of the type or shape that it should be.
        """
        probability = np.empty(len(target), np.float32)
        kernels.score(self._model, *self._compilable(user, target), probability)
        return probability

    def attention(
        self, user: UserState, target: Int64[np.ndarray, " B"]
    ) -> tuple[Float[np.ndarray, "B K_plus_1"], Float[np.ndarray, "B R"]]:
        """Return how much each candidate attends to what; zeros where it finds nothing to attend to.

        Returns:
            Weights of the interests, and of what is remembered of the candidate itself, last; and weights of the
            recent behaviors, in the order of `UserState.recent`.

        Raises:
            IndexError: an index is outside the vocabulary.
            ValueError: an array is not of the type or shape that it should be.
        """
        interests, recent = kernels.attend(self._model, *self._compilable(user, target))
        to_interests = np.zeros((len(target), len(user.size) + 1), np.float32)
        to_interests[:, np.append(np.flatnonzero(user.size > 0), len(user.size))] = interests.T
        to_recent = np.zeros((len(target), len(user.recent)), np.float32)
        to_recent[:, user.recent != PADDING] = recent.T
        return to_interests, to_recent

    def _compilable(self, user: UserState, target: npt.NDArray[np.int64]) -> tuple[UserState, npt.NDArray[np.int64]]:
        """Return both as the kernels know them, after a look at every type, shape and index."""
        (V, D), P = self._model.embedding.shape, self._model.key.shape[1]
        (B,), (K,), (N,), (R,) = target.shape, user.size.shape, user.item.shape, user.recent.shape
        checked = UserState(
            _checked(user.center, (K, P), np.float32),
            _checked(user.value, (K, D), np.float32),
            _checked(user.size, (K,), np.float32),
            _checked(user.variance, (K, P), np.float32),
            float(user.scale),
            _checked(user.item, (N,), np.int64),
            _checked(user.times, (N,), np.int64),
            _checked(user.category, (N,), np.int64),
            _checked(user.recent, (R,), np.int64),
        )
        found = _checked(target, (B,), np.int64)
        if not (kernels.within(found, V) and kernels.within(checked.recent, V)):
            raise IndexError(f"an item is outside the vocabulary of {V:,}")
        return checked, found


@contextmanager
def one_thread() -> Iterator[None]:
    """Let engines, and PyTorch, compute on the calling thread alone, as serving does: requests are what is parallel.

    It holds for all threads of the process until the block ends.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, "blas"):
            yield
    finally:
        torch.set_num_threads(before)


def _checked(array: npt.NDArray[Any], shape: tuple[int, ...], dtype: type) -> npt.NDArray[Any]:
    """Return an array as the kernels know it, which read beyond the end of one that is of another shape."""
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"expected {np.dtype(dtype)} of {shape}, found {array.dtype} of {array.shape}")
    return read_only(array)


def _array(weight: Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = weight.detach().numpy()
    return found
