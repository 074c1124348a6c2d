"""Erased users: a list in the store that every later step and the serving process obey. An id once in it stays out."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from encode.errors import ArtifactError, ConfigError
from encode.schema import canonical_json
from encode.storage import LostRace, Storage

ERASURES = "erasures.json"
_TRIES = 20


def erased_users(storage: Storage) -> npt.NDArray[np.int64]:
    """Return the users who must not be in anything that is made from now on, ascending.

    Raises:
        ArtifactError: the list cannot be read; nothing may be made without it.
    """
    found = storage.get_versioned(ERASURES)
    return np.zeros(0, np.int64) if found is None else _parse(storage, found[0])


def erase_users(storage: Storage, user_ids: Iterable[int]) -> int:
    """Add users to the list, and return how many are in it. They are gone from what the next refresh publishes.

    Raises:
        ConfigError: an id is not a user's.
        ArtifactError: the list cannot be read, or others keep changing it.
    """
    added = check_users(user_ids)
    for _ in range(_TRIES):
        found = storage.get_versioned(ERASURES)
        users = np.union1d(_parse(storage, found[0]) if found else np.zeros(0, np.int64), np.array(added, np.int64))
        data = canonical_json({"users": users.tolist()})
        try:
            if found is None:
                storage.create(ERASURES, data)
            else:
                storage.replace(ERASURES, data, found[1])
        except LostRace:
            continue
        return len(users)
    raise ArtifactError(f"{storage.uri}/{ERASURES}: changed by others {_TRIES} times; try again")


def check_users(user_ids: Iterable[int]) -> list[int]:
    """Return ids of users, ascending, each once.

    Raises:
        ConfigError: an id is not a user's.
    """
    users = sorted(set(user_ids))
    if wrong := [user for user in users if not 0 < user < 2**63]:
        raise ConfigError(f"erase: {wrong[0]} is not a user id, expected 1 to 2^63 - 1")
    return users


def _parse(storage: Storage, data: bytes) -> npt.NDArray[np.int64]:
    try:
        users = list(json.loads(data)["users"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f'{storage.uri}/{ERASURES}: not {{"users": [ids]}} ({error}); mend it') from None
    if wrong := [user for user in users if type(user) is not int or not 0 < user < 2**63]:
        raise ArtifactError(
            f'{storage.uri}/{ERASURES}: not {{"users": [ids]}} (found {wrong[0]!r}, expected 1 to 2^63 - 1); mend it'
        )
    return np.unique(np.array(users, np.int64))
