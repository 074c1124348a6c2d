"""A trained model as files: JSON for settings, safetensors for numbers, nothing that could execute.

model.json           settings, the space it needs, the days it saw, its metrics
reader.safetensors   weights of the `Reader`
mirror.safetensors   a few users and items with the probabilities that they must get, 1e-5
report.json          curves for people
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from encode.config import ModelConfig, Section
from encode.errors import ArtifactError
from encode.model.ctr import Encode, Known, Reader, Recent, User
from encode.model.long_term import Catalog, Target
from encode.model.relevance import NO_ITEM, Interests, Remembered
from encode.schema import MOST_TIMES, PADDING, UNKNOWN, canonical_json, digest

MODEL_FILES = ("model.json", "reader.safetensors", "mirror.safetensors")
MIRROR_TOLERANCE = 1e-5
_STACKED = ("center", "value", "size", "variance", "recent")
"""Of a `UserState`: as long for every user."""


class ModelCard(Section):
    """What `model.json` says."""

    model: ModelConfig
    space: str
    """Id of the space without which the weights mean nothing."""
    as_of: date
    """Nothing at or after this day was used."""
    first_day: date
    test_days: int = Field(gt=0)
    metrics: dict[str, float]


class UserState(NamedTuple):
    """One user as the model sees one: what is cached between requests, free of any target."""

    center: Float[np.ndarray, "K P"]
    """Of each interest."""
    value: Float[np.ndarray, "K D"]
    size: Float[np.ndarray, " K"]
    """Behaviors in each interest, 0 for none."""
    variance: Float[np.ndarray, "K P"]
    """Of the keys of each interest."""
    scale: float
    """Of the relevance."""
    item: Int64[np.ndarray, " M"]
    """Remembered items, vocabulary index, ascending; may be none."""
    times: Int64[np.ndarray, " M"]
    """How many behaviors are with each of them."""
    category: Int64[np.ndarray, " M"]
    """Index of each one's category."""
    recent: Int64[np.ndarray, " R"]
    """Vocabulary index of the last behaviors, oldest first, padded with 0 at the end."""

    @property
    def known(self) -> Known:
        """The same as training batches it, G = 1."""
        has_category = self.category > UNKNOWN
        categories, place = np.unique(self.category[has_category], return_inverse=True)
        in_category = np.bincount(place, self.times[has_category], len(categories))
        stored = (torch.from_numpy(part)[None] for part in (self.center, self.value, self.size, self.variance))
        center, value, size, variance = stored
        return Known(
            Interests(center, value, size, variance, torch.tensor(self.scale)),
            _remembered(self.item, self.times),
            _remembered(categories, np.minimum(in_category, MOST_TIMES).astype(np.int64)),
        )


def read_user(reader: Reader, table: Catalog, user: UserState, target: Int64[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return the logit of each candidate of one user: O(K (P + D)) each, whatever the length of the history.

    Args:
        reader: the model.
        table: e and h of the whole vocabulary.
        user: whom to score for.
        target: vocabulary index of each candidate.
    """
    encode, known, recent_items = cast(Encode, reader.long_term), user.known, torch.from_numpy(user.recent)
    with torch.no_grad():
        of_user = User(known, encode.profile(known), known.interests.size.sum(1))
        recent = Recent(
            table.embedding[recent_items][None],
            table.key[recent_items][None],
            (recent_items != PADDING)[None],
            torch.zeros_like(target),
        )
        logit: Tensor = reader(of_user, recent, _candidates(table, target))
        return logit


def interest_weights(
    reader: Reader, table: Catalog, user: UserState, target: Int64[Tensor, " B"]
) -> Float[Tensor, "B K_plus_1"]:
    """Return beta: the attention of each candidate over the interests, and over what is remembered of itself, last."""
    encode = cast(Encode, reader.long_term)
    with torch.no_grad():
        return encode.attention(user.known, _candidates(table, target)).weights[0]


def _candidates(table: Catalog, target: Int64[Tensor, " B"]) -> Target:
    return Target(table.embedding[target][None], table.key[target][None], target[None], table.category[target][None])


def model_files(
    card: ModelCard,
    reader: Reader,
    table: Catalog,
    users: list[UserState],
    targets: Int64[Tensor, "U T"],
    report: object,
) -> dict[str, bytes]:
    """Return the files of a model; `users` and `targets` become its mirror test."""
    reader.eval()
    expected = torch.stack(
        [torch.sigmoid(read_user(reader, table, user, target)) for user, target in zip(users, targets, strict=True)]
    )
    mirror = {
        **{name: np.stack([getattr(user, name) for user in users]) for name in _STACKED},
        "item": _padded([user.item for user in users], NO_ITEM),
        "times": _padded([user.times for user in users], 0),
        "target": targets.numpy(),
        "probability": expected.numpy(),
    }
    return {
        "model.json": canonical_json(card.model_dump(mode="json")),
        "reader.safetensors": _save({name: value.detach().numpy() for name, value in reader.state_dict().items()}),
        "mirror.safetensors": _save(mirror),
        "report.json": canonical_json(report),
    }


def model_digest(files: Mapping[str, bytes]) -> str:
    """Return the identity of a model: the digest of the files that decide its scores."""
    return digest_of_parts({name: digest(files[name]) for name in MODEL_FILES})


def digest_of_parts(parts: Mapping[str, str]) -> str:
    """Return the same from the digests of the files."""
    return digest("".join(parts[name] for name in MODEL_FILES).encode())


def load_model(files: Mapping[str, bytes], where: str) -> tuple[ModelCard, Reader]:
    """Read a model from its files.

    Raises:
        ArtifactError: a file is missing or not what it should be; `where` names the place.
    """
    try:
        card = ModelCard.model_validate_json(files["model.json"])
        reader = Reader(card.model, Encode(card.model))
        weights = {name: torch.from_numpy(value) for name, value in load(files["reader.safetensors"]).items()}
        reader.load_state_dict(weights)
    except (KeyError, ValidationError, SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{where}: not a model ({type(error).__name__}: {error}); train it again") from None
    return card, reader.eval()


Score = Callable[[UserState, Int64[np.ndarray, " B"]], Float[np.ndarray, " B"]]
"""Gives the probability of each candidate."""


def check_mirror(
    files: Mapping[str, bytes], reader: Reader, table: Catalog, where: str, score: Score | None = None
) -> None:
    """Score the mirror test's users again and compare with what training wrote down.

    Args:
        files: of the model.
        reader: the model.
        table: e and h of the whole vocabulary.
        where: named in errors.
        score: what will score; by default `read_user`.

    Raises:
        ArtifactError: a probability is off by more than 1e-5: model and space are not the ones trained together,
            or this machine computes something else.
    """

    def by_reader(user: UserState, target: Int64[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
        return torch.sigmoid(read_user(reader, table, user, torch.from_numpy(target))).numpy()

    try:
        mirror, worst = load(files["mirror.safetensors"]), 0.0
        for place, (target, expected) in enumerate(zip(mirror["target"], mirror["probability"], strict=True)):
            item, times = (mirror[name][place][mirror["times"][place] > 0] for name in ("item", "times"))
            category = table.category.numpy()[item]
            stacked = {name: mirror[name][place] for name in _STACKED}
            user = UserState(**stacked, scale=reader.scale.item(), item=item, times=times, category=category)
            found = (score or by_reader)(user, target)
            worst = max(worst, float(np.nan_to_num(np.abs(found - expected).max(), nan=1.0)))
    except (KeyError, SafetensorError, RuntimeError, IndexError, ValueError) as error:
        raise ArtifactError(f"{where}: mirror test cannot run ({type(error).__name__}: {error})") from None
    if worst > MIRROR_TOLERANCE:
        raise ArtifactError(
            f"{where}: mirror test: a probability is off by {worst:.2e}, expected at most {MIRROR_TOLERANCE:.0e}; "
            "model and space do not belong together, or this machine computes differently"
        )


def _remembered(item: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> Remembered:
    """Return what is remembered of one user, with an empty place at the end, so that there is one at least."""
    return Remembered(torch.from_numpy(np.append(item, NO_ITEM))[None], torch.from_numpy(np.append(times, 0))[None])


def _padded(rows: Sequence[npt.NDArray[np.int64]], filler: int) -> npt.NDArray[np.int64]:
    """Return rows of different lengths as one array, with an empty place at the end of the longest."""
    padded = np.full((len(rows), 1 + max(map(len, rows))), filler)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def _save(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def read_report(files: Mapping[str, bytes]) -> dict[str, object]:
    """Return the curves of a model."""
    return dict(json.loads(files["report.json"]))
