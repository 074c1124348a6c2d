"""The space: what gives interests their meaning, and the id that says so.

Interests only mean something to the embeddings and the reducer that made them. A space is immutable, and its id is
the digest of its content, so a snapshot and a model can be joined by comparing two strings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError
from safetensors.numpy import load, save

from encode.config import ClusteringConfig
from encode.data.vocabulary import Vocabulary
from encode.errors import ArtifactError
from encode.model.ctr import Reader, Tables
from encode.model.long_term import Catalog
from encode.schema import canonical_json, digest

SPACE_FILES = ("space.json", "space.safetensors")


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SpaceConfig:
    """What shapes interests beside the tables."""

    clustering: ClusteringConfig
    pooling: str
    recent_length: int
    num_remembered: int


@dataclass(frozen=True)
class Space:
    """Embeddings e, keys h, the relevance's scale, the vocabulary, and the clustering settings."""

    config: SpaceConfig
    vocabulary: Vocabulary
    embedding: npt.NDArray[np.float32]
    """e of each index, [V, D]."""
    key: npt.NDArray[np.float32]
    """h of each index, unit vectors, [V, P]."""
    projection: npt.NDArray[np.float32]
    """W_h, [D, P]."""
    scale: float

    @cached_property
    def items(self) -> Catalog:
        """The tables as the model reads them, sharing memory."""
        no_kinds = np.zeros((1, self.embedding.shape[1]), np.float32)
        arrays = (self.embedding, self.key, self.vocabulary.category_index, no_kinds)
        return Catalog(*(torch.from_numpy(array) for array in arrays))

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The two files of the space: settings as JSON, numbers as safetensors. No code in either."""
        tensors = {
            "embedding": self.embedding,
            "key": self.key,
            "projection": self.projection,
            "scale": np.array([self.scale], np.float32),
            "item_ids": self.vocabulary.item_ids,
            "item_category_ids": self.vocabulary.item_category_ids,
            "category_ids": self.vocabulary.category_ids,
        }
        settings = {
            "clustering": self.config.clustering.model_dump(),
            "pooling": self.config.pooling,
            "recent_length": self.config.recent_length,
            "num_remembered": self.config.num_remembered,
        }
        return {
            "space.json": canonical_json(settings),
            "space.safetensors": save({name: np.ascontiguousarray(value) for name, value in tensors.items()}),
        }

    @cached_property
    def id(self) -> str:
        """Digest of settings, tables and vocabulary: 16 hex digits."""
        return digest("".join(digest(self.files[name]) for name in SPACE_FILES).encode())[:16]


def space_of(tables: Tables, reader: Reader, vocabulary: Vocabulary, config: SpaceConfig) -> Space:
    """Freeze a trained model's tables into a space."""
    items = tables.all_items()
    projection = tables.projection.detach()
    scale = reader.scale.item()
    return Space(config, vocabulary, items.embedding.numpy(), items.key.numpy(), projection.numpy(), scale)


def load_space(files: dict[str, bytes], where: str) -> Space:
    """Read a space from its two files.

    Raises:
        ArtifactError: a file is missing or not what it should be; `where` names the place.
    """
    try:
        settings: dict[str, Any] = json.loads(files["space.json"])
        tensors = load(files["space.safetensors"])
        vocabulary = Vocabulary(tensors["category_ids"], tensors["item_ids"], tensors["item_category_ids"])
        config = SpaceConfig(**settings)
        space = Space(
            config,
            vocabulary,
            tensors["embedding"],
            tensors["key"],
            tensors["projection"],
            float(tensors["scale"][0]),
        )
    except (KeyError, TypeError, ValueError, ValidationError, SafetensorError) as error:
        raise ArtifactError(f"{where}: not a space ({type(error).__name__}: {error}); train it again") from None
    if len(space.embedding) != len(vocabulary) or len(space.key) != len(vocabulary):
        raise ArtifactError(f"{where}: {len(space.embedding)} embeddings for a vocabulary of {len(vocabulary)}")
    shapes = {name: getattr(space, name).shape for name in ("embedding", "key", "projection")}
    V, D, P = (len(vocabulary), *shapes["projection"], 0, 0)[:3]
    expected = {"embedding": (V, D), "key": (V, P), "projection": (D, P)}
    if shapes != expected or 0 in (D, P):
        raise ArtifactError(f"{where}: found {shapes}, expected {expected}, no width of 0; train it again")
    if bad := [name for name in (*expected, "scale") if not np.isfinite(getattr(space, name)).all()]:
        raise ArtifactError(f"{where}: {', '.join(bad)}: found a number that is not finite; train it again")
    return space
