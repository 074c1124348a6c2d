"""What every model of long-term interest is: summarise a history once a user, read it once a target.

    G histories   L behaviors of the longest   T targets of the history that has most   D embedding_dim
    P projected_dim   V vocabulary   J kinds of behavior   M vectors   E scalars   H all histories   N all behaviors

ENCODE is one of them (`encode.model.ctr.Encode`), and the models that it is held against are the others
(`encode.quality`). Embeddings, recent branch, MLP and loop are the same for all, so that a difference is the method's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

Ints = npt.NDArray[np.int64]


class History(NamedTuple):
    """G histories, oldest behavior first, padded at the end."""

    embedding: Float[Tensor, "G L D"]
    """e_i: of item, category and kind of behavior; zero where padded."""
    key: Float[Tensor, "G L P"]
    """h_i: of the item alone, in the space that the backbone compares in; unit length, zero where padded."""
    mask: Bool[Tensor, "G L"]
    """True where there is a behavior."""
    item: Int64[Tensor, "G L"]
    """Vocabulary index, 0 where padded, 1 for unknown."""
    category: Int64[Tensor, "G L"]
    """Category index, 0 where padded, 1 for unknown."""
    kind: Int64[Tensor, "G L"]
    """Kind of behavior (click, cart, ...), from 0 on; 0 where padded."""
    age: Float[Tensor, "G L"]
    """Days between the behavior and the moment as of which the history is; positive, 0 where padded."""
    cluster: Int64[Tensor, "G L"]
    """What `LongTerm.assign` gave, 0 where padded and where nothing is assigned."""
    scale: Float[Tensor, ""]
    """Of the backbone's relevance."""


class Target(NamedTuple):
    """T targets of each history, padded at the end; what padded ones read is never looked at, but must be finite."""

    embedding: Float[Tensor, "G T D"]
    """e_t: of item and category; the kind of behavior is what is asked for."""
    key: Float[Tensor, "G T P"]
    """h_t, unit length."""
    item: Int64[Tensor, "G T"]
    category: Int64[Tensor, "G T"]


class Read(NamedTuple):
    """What targets take from their histories. Zero, not NaN, where a history is empty."""

    vectors: Float[Tensor, "G T M D"]
    """The MLP gets each of them, and its product with e_t."""
    scalars: Float[Tensor, "G T E"]
    """The MLP gets them as they are."""


class Behaviors(NamedTuple):
    """All behaviors of H histories, one history after the other, each history's oldest first: what is assigned."""

    offsets: Ints
    """Start of each history, then the end of the last, [H + 1]."""
    user_ids: Ints
    """Whose history it is, for seeds, [H]."""
    item: Ints
    """Vocabulary index, [N]."""
    category: Ints
    """Category index, [N]."""
    kind: Ints
    """Kind of behavior, [N]."""
    timestamps: Ints
    """Seconds, [N]."""


class Catalog(NamedTuple):
    """Items as the backbone embeds them at the moment: the whole vocabulary, or those of a batch."""

    embedding: Float[Tensor, "V D"]
    key: Float[Tensor, "V P"]
    category: Int64[Tensor, " V"]
    """Category index of each."""
    kind: Float[Tensor, "J D"]
    """What a kind of behavior adds to the embedding of an item; zeros where there is one kind, J = 1."""


@dataclass(frozen=True)
class Sizes:
    """What a model of long-term interest must know before it can be made."""

    num_items: int
    """V, padding and unknown included."""
    num_categories: int
    """Category indices, padding and unknown included."""
    num_kinds: int
    embedding_dim: int
    """D"""
    projected_dim: int
    """P"""


class LongTerm(nn.Module):
    """A model of long-term interest, with the parts that most of them do not have."""

    num_vectors = 1
    """M of `Read`."""
    num_scalars = 0
    """E of `Read`."""
    target_free = True
    """Whether the state is smaller than the history and may be stored; False where it is the history itself."""

    def assign(self, catalog: Catalog, behaviors: Behaviors) -> Ints | None:
        """Offline stage, before each epoch and each evaluation: a label from 0 on for each behavior, [N], or None."""
        return None

    def follow(self, catalog: Catalog, count: Float[Tensor, " V"]) -> None:
        """Before each epoch and each evaluation: bring what is not learned by gradients up to the tables of the moment.

        Args:
            catalog: the whole vocabulary.
            count: how often each item occurs in the histories of training.
        """

    def summarise(self, history: History) -> Any:
        """Return the state of each user, without knowing any target."""
        raise NotImplementedError

    def profile(self, state: Any, history: History) -> Float[Tensor, "G D"]:
        """Return what the MLP gets of the user whatever the target: the mean of the history's embeddings."""
        return history.embedding.sum(1) / history.mask.sum(1, keepdim=True).clamp(min=1)

    def read(self, state: Any, target: Target) -> Read:
        """Return what each target takes from its user's state."""
        raise NotImplementedError

    def auxiliary_loss(self, state: Any, history: History) -> Float[Tensor, ""]:
        """Return what is added to the log loss in training, weighted; 0 for most."""
        return history.embedding.new_zeros(())


def only_vector(vector: Float[Tensor, "G T D"]) -> Read:
    """Return what is read by a model with one vector and no scalars."""
    return Read(vector[:, :, None], vector.new_zeros(*vector.shape[:2], 0))
