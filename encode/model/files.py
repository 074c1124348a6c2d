"""A trained model as files: JSON for settings, safetensors for numbers, nothing that could execute.

model.json           settings, the space it needs, the days it saw, its metrics
reader.safetensors   weights of the `Reader`
mirror.safetensors   a few users and items with the probabilities that they must get, 1e-5
report.json          curves for people
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import cast

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


@dataclass(frozen=True)
class UserState:
    """One user as the model sees one: what is cached between requests, free of any target."""

    known: Known
    """Of a single user, G = 1."""
    recent: Int64[Tensor, " R"]
    """Vocabulary index of the last behaviors, oldest first, padded with 0 at the end."""


def read_user(reader: Reader, table: Catalog, user: UserState, target: Int64[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return the logit of each candidate of one user: O(K (P + D)) each, whatever the length of the history.

    Args:
        reader: the model.
        table: e and h of the whole vocabulary.
        user: whom to score for.
        target: vocabulary index of each candidate.
    """
    encode = cast(Encode, reader.long_term)
    with torch.no_grad():
        of_user = User(user.known, encode.profile(user.known), user.known.interests.size.sum(1))
        recent = Recent(
            table.embedding[user.recent][None],
            table.key[user.recent][None],
            (user.recent != PADDING)[None],
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
        "center": torch.cat([user.known.interests.center for user in users]),
        "value": torch.cat([user.known.interests.value for user in users]),
        "size": torch.cat([user.known.interests.size for user in users]),
        "variance": torch.cat([user.known.interests.variance for user in users]),
        "item": _padded([user.known.remembered.item[0] for user in users], NO_ITEM),
        "times": _padded([user.known.remembered.times[0] for user in users], 0),
        "recent": torch.stack([user.recent for user in users]),
        "target": targets,
        "probability": expected,
    }
    return {
        "model.json": canonical_json(card.model_dump(mode="json")),
        "reader.safetensors": _save(reader.state_dict()),
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


Score = Callable[[UserState, Int64[Tensor, " B"]], Float[Tensor, " B"]]
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
    score = score or (lambda user, target: torch.sigmoid(read_user(reader, table, user, target)))
    try:
        mirror = {name: torch.from_numpy(value) for name, value in load(files["mirror.safetensors"]).items()}
        worst, scale = 0.0, reader.scale.item()
        for place in range(len(mirror["target"])):
            center, value, size, variance = (mirror[name][place] for name in ("center", "value", "size", "variance"))
            item, times = (mirror[name][place][mirror["times"][place] > 0].numpy() for name in ("item", "times"))
            category = table.category.numpy()[item]
            recent = mirror["recent"][place].numpy()
            user = user_state(center, value, size, variance, scale, item, times, category, recent)
            found = score(user, mirror["target"][place])
            off = (found - mirror["probability"][place]).abs().max()
            worst = max(worst, float(off.nan_to_num(nan=1.0)))
    except (KeyError, SafetensorError, RuntimeError, IndexError) as error:
        raise ArtifactError(f"{where}: mirror test cannot run ({type(error).__name__}: {error})") from None
    if worst > MIRROR_TOLERANCE:
        raise ArtifactError(
            f"{where}: mirror test: a probability is off by {worst:.2e}, expected at most {MIRROR_TOLERANCE:.0e}; "
            "model and space do not belong together, or this machine computes differently"
        )


def user_state(
    center: Float[Tensor, "K P"],
    value: Float[Tensor, "K D"],
    size: Float[Tensor, " K"],
    variance: Float[Tensor, "K P"],
    scale: float,
    item: npt.NDArray[np.int64],
    times: npt.NDArray[np.int64],
    category: npt.NDArray[np.int64],
    recent: npt.NDArray[np.int64],
) -> UserState:
    """Make a user's state from the user's own interests, remembered items and recent behaviors (vocabulary index).

    Args:
        center: of each interest.
        value: of each interest.
        size: behaviors in each interest, 0 for none.
        variance: of the keys of each interest.
        scale: of the relevance.
        item: remembered items, ascending; may be none.
        times: how many behaviors are with each of them.
        category: index of each one's category.
        recent: padded.
    """
    known = category > UNKNOWN
    categories, place = np.unique(category[known], return_inverse=True)
    in_category = np.minimum(np.bincount(place, times[known], len(categories)), MOST_TIMES).astype(np.int64)
    interests = Interests(center[None], value[None], size[None], variance[None], torch.tensor(scale))
    return UserState(
        Known(interests, _remembered(item, times), _remembered(categories, in_category)), torch.from_numpy(recent)
    )


def _remembered(item: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> Remembered:
    """Return what is remembered of one user, with an empty place at the end, so that there is one at least."""
    return Remembered(torch.from_numpy(np.append(item, NO_ITEM))[None], torch.from_numpy(np.append(times, 0))[None])


def _padded(rows: Sequence[Tensor], filler: int) -> Tensor:
    """Return rows of different lengths as one tensor, [U, longest].

    torch's `pad_sequence` passes the filler through a float, which the largest int64 does not survive.
    """
    padded = torch.full((len(rows), max(map(len, rows))), filler)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def _save(tensors: Mapping[str, Tensor]) -> bytes:
    return bytes(save({name: np.ascontiguousarray(value.detach().numpy()) for name, value in tensors.items()}))


def read_report(files: Mapping[str, bytes]) -> dict[str, object]:
    """Return the curves of a model."""
    return dict(json.loads(files["report.json"]))
