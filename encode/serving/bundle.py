"""A bundle: one model version, its space, and one snapshot, joined only if their ids agree.

The chain of truth is `alias -> model version -> space -> current.json in that space -> snapshot`; a bundle is one
reading of it, loaded beside whatever serves and immutable from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from encode.data.erasures import erased_users
from encode.data.parquet import read_parquet
from encode.errors import ArtifactError
from encode.interests.extract import state_of
from encode.interests.snapshots import folder_of, read_space
from encode.interests.user_rows import UserRow
from encode.model.ctr import Reader
from encode.model.files import ModelCard, UserState, check_mirror, load_model, model_digest
from encode.model.space import Space
from encode.pointers import Pointer, read_current
from encode.schema import PADDING, UNKNOWN, digest
from encode.serving.engine import Engine
from encode.serving.local_snapshot import LocalSnapshot, fetch_snapshot
from encode.serving.shard import ALL_USERS, Shard
from encode.storage import Storage

Chain = tuple[str, Pointer]
"""A model version and what its space points at: what decides a bundle."""
_Ids = Sequence[int] | Int64[np.ndarray, " B"]


@dataclass(frozen=True)
class Behavior:
    """A recent behavior that comes with a request, because it is newer than the snapshot."""

    item_id: int
    category_id: int
    timestamp: int


@dataclass(frozen=True, eq=False)
class Asked:
    """What the candidates of a user are scored by."""

    user_id: int
    item_ids: Int64[np.ndarray, " B"]
    category_ids: Int64[np.ndarray, " B"] | None = None
    """For those candidates that the space may not know."""
    recent: Sequence[Behavior] = ()
    """Since the snapshot, in any order; they go before those that the snapshot holds."""


class Found(NamedTuple):
    """What a bundle knows of a user and the candidates."""

    user: UserState
    target: Int64[np.ndarray, " B"]
    """Vocabulary index of each candidate."""
    row: UserRow | None
    """Of the user in the snapshot."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Probabilities of the candidates of one request, and what had to be assumed."""

    probabilities: Float[np.ndarray, " B"]
    unknown_user: bool
    unknown_items: list[int]


@dataclass(frozen=True)
class Bundle:
    """Everything that scores, consistent and ready."""

    id: str
    model_version: str
    card: ModelCard
    space: Space
    reader: Reader
    engine: Engine
    pointer: Pointer
    snapshot: LocalSnapshot
    names: Mapping[int, str]

    def describe(self) -> dict[str, str]:
        """Return what every response says about where its numbers come from."""
        return {
            "id": self.id,
            "model_version": self.model_version,
            "space": self.space.id,
            "snapshot": self.pointer.snapshot,
            "as_of": str(self.pointer.as_of),
        }

    @property
    def chain(self) -> Chain:
        """What it was loaded from."""
        return self.model_version, self.pointer

    def score(self, asked: Asked) -> Scored:
        """Return the probability of each candidate.

        A user without a row is scored without a history; an item outside the vocabulary as its category's other
        items if a category is given, else as unknown.

        Raises:
            ArtifactError: a probability is not a number.
        """
        found = self.look_up(asked)
        return self.told(asked, found, self.compute(found))

    def look_up(self, asked: Asked) -> Found:
        """Find the user's row and the candidates' indices, with which `score` begins; it needs the GIL."""
        row = self.snapshot.find(asked.user_id)
        user = self._with_recent(state_of(row, self.space), asked.recent)
        return Found(user, self._index(asked.item_ids, asked.category_ids), row)

    def compute(self, found: Found) -> Float[np.ndarray, " B"]:
        """Return the probability of each candidate of what `look_up` found; it hardly needs the GIL."""
        return self.engine.score(found.user, found.target)

    def told(self, asked: Asked, found: Found, probability: Float[np.ndarray, " B"]) -> Scored:
        """Say of computed probabilities what had to be assumed, with which `score` ends.

        Raises:
            ArtifactError: a probability is not a number.
        """
        if not np.isfinite(probability).all():
            raise ArtifactError(f"bundle {self.id}: a probability is not a number")
        unknown = asked.item_ids[~self.space.vocabulary.is_item(found.target)]
        return Scored(probability, found.row is None, unknown.tolist())

    def interests(self, user_id: int) -> list[dict[str, Any]] | None:
        """Return what the system thinks a user likes, largest interest first; None for an unknown user."""
        row = self.snapshot.find(user_id)
        if row is None:
            return None
        sizes = row["size"].tolist()
        return [
            {
                "weight": size / sum(sizes),
                "size": size,
                "newest": newest,
                "top_items": [{"item_id": item, "name": self.names.get(item)} for item in items.tolist()],
                "categories": self._categories(items),
            }
            for size, newest, items in zip(sizes, row["newest"].tolist(), row["top_items"], strict=True)
        ]

    def attention(self, asked: Asked) -> tuple[Float[np.ndarray, "B K"], Float[np.ndarray, " B"]]:
        """Return beta: how much each candidate attends to each interest of `interests`, and to itself.

        The last is 0 for an item that the user never had. An unknown user has no interests.
        """
        found = self.look_up(asked)
        weights, _ = self.engine.attention(found.user, found.target)
        return weights[:, : len(found.row["size"]) if found.row else 0], weights[:, -1]

    def knows(self, item_id: int) -> bool:
        """Tell whether an item has an embedding of its own."""
        return bool(self.space.vocabulary.is_item(self._index([item_id], None))[0])

    def _categories(self, item_ids: Sequence[int]) -> list[int]:
        """Return the categories of those items that the space knows, in the order of the items."""
        vocabulary = self.space.vocabulary
        index = self._index(item_ids, None)
        found = vocabulary.item_category_ids[index[vocabulary.is_item(index)] - vocabulary.num_categories]
        return [category for category in dict.fromkeys(found.tolist()) if category]

    def _index(self, item_ids: _Ids, category_ids: _Ids | None) -> np.ndarray:
        categories = None if category_ids is None else np.asarray(category_ids, np.int64)
        index = self.space.vocabulary.index(np.asarray(item_ids, np.int64), categories)
        return np.where(index == 0, UNKNOWN, index)  # padding is not a candidate

    def _with_recent(self, user: UserState, recent: Sequence[Behavior]) -> UserState:
        if not recent:
            return user
        ordered = sorted(recent, key=lambda behavior: behavior.timestamp)
        added = self._index([b.item_id for b in ordered], [b.category_id for b in ordered])
        held = user.recent[user.recent != PADDING]
        both = np.concatenate([held, added])[-len(user.recent) :]
        return user._replace(recent=np.pad(both, (0, len(user.recent) - len(both))))


def load_bundle(
    storage: Storage, files: Mapping[str, bytes], model_version: str, cache: Path, shard: Shard = ALL_USERS
) -> Bundle:
    """Follow the chain from a model's files to the snapshot that its space points at, verifying each link.

    Args:
        storage: where space and snapshot are.
        files: of the model.
        model_version: its number in the registry.
        cache: folder for what is mapped.
        shard: the users to hold.

    Raises:
        ArtifactError: a link is missing, damaged or belongs to another space, or the mirror test fails, or the list of
            erased users cannot be read.
    """
    where = f"model version {model_version}"
    card, reader = load_model(files, where)
    space = read_space(storage, card.space)
    engine = Engine(space, reader)
    check_mirror(files, reader, space.items, where, engine.score)
    engine.attention(state_of(None, space), np.array([UNKNOWN]))  # compiled now, not when somebody waits for it
    folder = folder_of(card.space)
    current = read_current(storage, folder)
    if current is None:
        raise ArtifactError(f"{folder}/current.json: no snapshot yet in this space; refresh it first")
    pointer, manifest = current
    prefix = f"{folder}/{pointer.snapshot}"
    if manifest.details.get("space") != card.space:
        raise ArtifactError(f"{prefix}: of space {manifest.details.get('space')}, model needs {card.space}")
    snapshot = fetch_snapshot(storage, prefix, manifest, cache, shard)
    snapshot.erased = frozenset(erased_users(storage).tolist())
    return Bundle(
        bundle_id(model_digest(files), pointer.manifest),
        model_version,
        card,
        space,
        reader,
        engine,
        pointer,
        snapshot,
        _names(storage),
    )


def bundle_id(model: str, snapshot: str) -> str:
    """Return the identity of model (which names its space) and snapshot together: 12 hex digits.

    Args:
        model: digest of its files.
        snapshot: digest of its manifest.
    """
    return digest(f"{model}/{snapshot}".encode())[:12]


def _names(storage: Storage) -> dict[int, str]:
    """Names of items for people, where the log brought any."""
    found = storage.get_versioned("items/items.parquet")
    if found is None:
        return {}
    table = read_parquet(found[0], ["item_id", "name"])
    return dict(zip(table["item_id"].to_pylist(), table["name"].to_pylist(), strict=True))
