"""A release to time: users with histories of several lengths, their snapshot, a model of the same space, registered.

Space and model are of the default size, with weights that nobody trained, which changes no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.behaviors import FIRST_DAY, LAST_DAY, Log, make_log, make_space
from encode.config import Config, ModelConfig, Places
from encode.data.histories import to_batch
from encode.interests.extract import extract, schema_of, state_of
from encode.interests.snapshots import folder_of, snapshot_bytes, snapshot_file, write_space
from encode.model.ctr import Encode, Reader
from encode.model.files import ModelCard, model_files
from encode.model.space import Space
from encode.outputs import write_output
from encode.pointers import publish
from encode.registry import CHAMPION, Registry
from encode.serving.local_snapshot import LocalSnapshot, fetch_snapshot
from encode.storage import open_storage

MODEL = ModelConfig()
USERS = 8
"""Of each length."""
SHARE_HAD = 0.1
"""Of the candidates, drawn from the user's own history."""
_NO_REPORT = {
    "epochs": [],
    "reliability": [{"predicted": 0.5, "observed": 0.5}],
    "auc_by_history_length": [{"up_to": 1, "auc": 0.5}],
}


@dataclass(frozen=True)
class Served:
    """A space, a model of it, and a mapped snapshot of users with histories of several lengths."""

    space: Space
    reader: Reader
    snapshot: LocalSnapshot
    histories: dict[int, list[np.ndarray]]
    """Item ids of USERS users by length of the history; user ids count up, length after length."""

    def user_id(self, length: int, place: int) -> int:
        """Return the id of a user with a history of this length; ids start at 1."""
        return 1 + USERS * list(self.histories).index(length) + place

    def candidates(self, length: int, place: int, count: int, draw: int = 0) -> np.ndarray:
        """Draw the vocabulary indices of candidates, some of them from the user's history."""
        random = np.random.default_rng([length, place, count, draw])
        index = random.integers(self.space.vocabulary.num_categories, len(self.space.vocabulary), count)
        had = random.choice(self.histories[length][place], round(SHARE_HAD * count))
        index[: len(had)] = self.space.vocabulary.index(had)
        return random.permutation(index)


def draw_histories(log: Log, lengths: Sequence[int]) -> dict[int, list[np.ndarray]]:
    """Draw histories from ten categories each, popular items of them more often."""
    random = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        own = log.items[random.integers(0, len(log.items), 10)]
        rank = np.exp(random.random(length) * np.log(own.shape[1])).astype(np.int64) - 1
        drawn: np.ndarray = own[random.integers(0, len(own), length), rank]
        return drawn

    return {length: [draw(length) for _ in range(USERS)] for length in lengths}


def make_served(folder: Path, lengths: Sequence[int], num_clusters: int) -> Served:
    """Extract, publish and map the interests of users with these lengths."""
    log = make_log(2_000)
    space = make_space(log)
    clustering = space.config.clustering.model_copy(update={"num_clusters": num_clusters})
    space = replace(space, config=replace(space.config, clustering=clustering))
    torch.manual_seed(0)
    reader = Reader(MODEL, Encode(MODEL)).eval()
    reader.long_term.decoder = 0.1 * torch.randn(MODEL.projected_dim, MODEL.embedding_dim)
    histories = draw_histories(log, lengths)
    items = [one for group in histories.values() for one in group]
    offsets = np.append(0, np.cumsum([len(one) for one in items]))
    joined = np.concatenate(items)
    batch = to_batch(np.arange(len(items)) + 1, offsets, [joined, log.category_of[joined], np.arange(len(joined))])
    storage = open_storage(Places.in_folder(folder))
    write_space(storage, space, {})
    name = f"{LAST_DAY:%Y%m%d}-{len(items)}"
    manifest = write_output(
        storage,
        f"{folder_of(space.id)}/{name}",
        {snapshot_file(0): snapshot_bytes(schema_of(space), [extract(batch, space)])},
        kind="interests",
        fingerprint="benchmark",
        config={"num_buckets": 1},
        inputs={},
        counts={"users": len(items)},
        details={"as_of": str(LAST_DAY), "space": space.id},
    )
    publish(storage, folder_of(space.id), name, manifest)
    snapshot = fetch_snapshot(storage, f"{folder_of(space.id)}/{name}", manifest, folder / "cache")
    return Served(space, reader, snapshot, histories)


def card_of(served: Served) -> ModelCard:
    """Return the card of the model."""
    return ModelCard(model=MODEL, space=served.space.id, as_of=LAST_DAY, first_day=FIRST_DAY, test_days=1, metrics={})


def files_of(served: Served) -> dict[str, bytes]:
    """Return the model as files; its mirror test is of a user without a history."""
    users, targets = [state_of(None, served.space)], torch.arange(2, 10)[None]
    return model_files(card_of(served), served.reader, served.space.items, users, targets, _NO_REPORT)


class Releases:
    """The registry of a folder, in which what is served is registered and becomes champion."""

    def __init__(self, folder: Path) -> None:
        """Make the registry, which takes seconds."""
        self.config = Config(name="benchmark", model=MODEL)
        self._registry = Registry(Places.in_folder(folder), self.config.registry)

    def release(self, served: Served) -> str:
        """Let a model serve, and return its version; at first it is registered, as training does."""
        version = self._registry.register(self.config, card_of(served), files_of(served), {}, "models/benchmark")
        self._registry.point(CHAMPION, version)
        return version.number
