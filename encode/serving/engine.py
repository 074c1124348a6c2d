"""The scoring engine: the numbers of `encode.model.files.read_user`, thousands of candidates of a user at a time.

What it computes is in `encode.serving.kernels`; here is what it keeps of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from encode.compiled import read_only
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
        first, *others = (layer for layer in reader.mlp if isinstance(layer, nn.Linear))
        encode, D = cast(Encode, reader.long_term), space.embedding.shape[1]
        parts = np.cumsum([5 * D, D, encode.num_scalars + 1])
        of_vectors, of_profile, of_numbers, of_length = np.split(_numbers(first.weight.T), parts)
        flat = [_numbers(part).ravel() for layer in others for part in (layer.weight.T, layer.bias)]
        self._model = kernels.Model(
            read_only(space.embedding),
            read_only(space.key),
            read_only(space.items.category.numpy()),
            np.float32(reader.scale.item()),
            np.float32(encode.size_prior),
            read_only(_numbers(encode.decoder)),
            read_only(of_vectors.reshape(5, D, -1)),
            read_only(of_numbers),
            read_only(np.concatenate([of_profile, of_length, _numbers(first.bias)[None]])),
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
        """
        probability = np.empty(len(target), np.float32)
        kernels.score(self._model, _as_compiled_for(user), read_only(target), probability)
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
        """
        interests, recent = kernels.attend(self._model, _as_compiled_for(user), read_only(target))
        to_interests = np.zeros((len(target), len(user.size) + 1), np.float32)
        to_interests[:, np.append(np.flatnonzero(user.size > 0), len(user.size))] = interests.T
        to_recent = np.zeros((len(target), len(user.recent)), np.float32)
        to_recent[:, user.recent != PADDING] = recent.T
        return to_interests, to_recent


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


def _as_compiled_for(user: UserState) -> UserState:
    """Return a user with arrays of the one kind that the kernels are compiled for."""
    return UserState._make(part if isinstance(part, float) else read_only(part) for part in user)


def _numbers(weight: Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = weight.detach().numpy()
    return found
