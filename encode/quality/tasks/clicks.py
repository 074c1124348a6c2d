"""A log of one's own with real impressions: what was shown, and whether it was clicked. Split by time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from encode.data.histories import Histories, to_histories
from encode.data.impressions import FirstSeen, Impressions
from encode.errors import DataError
from encode.quality.tasks.columns import BEHAVIORS_FILE, IMPRESSIONS_FILE, read_behaviors, read_labelled
from encode.quality.tasks.task import (
    MIN_ITEM_COUNT,
    QUICK_MIN_ITEM_COUNT,
    QUICK_USERS,
    Shown,
    Task,
    make_task,
    only_users,
    quick_splits,
    some_impressions,
    with_users,
)
from encode.schema import BEHAVIORS, SECONDS_PER_DAY


def load_clicks(path: Path, seed: int, quick: bool) -> Task:
    """Load impressions with the labels they have, and the behaviors that came before them.

    The last 10% of the time that the impressions span are the test, the 10% before them the validation, the rest is for
    training. A history is what the user did before the impression's day (UTC).

    Args:
        path: a folder with `impressions.parquet` and, if there is one, `behaviors.parquet`; or the impressions alone.
            Where there are no behaviors, the clicked impressions are the behaviors.
        seed: of the users and impressions of a quick task.
        quick: few users and impressions.

    Raises:
        DataError: a file is missing or breaks the contract, or a split has not both labels.
    """
    file = path / IMPRESSIONS_FILE if path.is_dir() else path
    log = path / BEHAVIORS_FILE  # of a file there is none
    shown = read_labelled(file)
    if not shown["label"].to_numpy().any():
        raise DataError(f"{file}, column label: found no 1, expected clicks among the impressions; export them too")
    histories = to_histories(read_behaviors(log) if log.is_file() else _clicked(shown))
    known_users = np.isin(shown["user_id"].to_numpy(), histories.user_ids)
    if not known_users.any():
        raise DataError(
            f"{file}: none of its users is in {log.name}, expected the same user ids in both; export them together"
        )
    histories = with_users(histories, shown["user_id"].to_numpy())
    rng = np.random.default_rng(seed)
    if quick:
        histories, shown = _fewer_users(histories, shown, rng)
    everything = _shown(histories, shown)
    timestamps = everything.impressions.timestamps
    first, span = int(timestamps.min()), int(timestamps.max() - timestamps.min())
    valid_from, test_from = first + span * 8 // 10, first + span * 9 // 10
    inside = {
        "train": timestamps < valid_from,
        "valid": (timestamps >= valid_from) & (timestamps < test_from),
        "test": timestamps >= test_from,
    }
    splits = {
        split: Shown(some_impressions(everything.impressions, rows), everything.as_of[rows])
        for split, rows in inside.items()
    }
    if quick:
        splits = quick_splits(splits, rng)
    return make_task(
        path.resolve().stem if path.is_file() else path.resolve().name,
        "Is the item that is shown clicked?",
        histories,
        histories.before(valid_from),
        splits,
        QUICK_MIN_ITEM_COUNT if quick else MIN_ITEM_COUNT,
        {
            "split": "by time: last 10% of the impressions' time span test, 10% before valid, the rest train",
            "share_of_impressions_of_users_without_behaviors": float(1 - known_users.mean()),
        },
    )


def _clicked(shown: pa.Table) -> pa.Table:
    """Return the clicked impressions as rows of `schema.BEHAVIORS`."""
    clicked = shown.filter(pa.array(shown["label"].to_numpy() == 1))
    kind = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(clicked), np.int32)), pa.array(["click"]))
    columns = [clicked["user_id"], clicked["item_id"], clicked["category_id"], kind, clicked["timestamp"]]
    return pa.Table.from_arrays(columns, schema=BEHAVIORS)


def _fewer_users(histories: Histories, shown: pa.Table, rng: np.random.Generator) -> tuple[Histories, pa.Table]:
    """Keep some of the users who have impressions."""
    users = np.unique(shown["user_id"].to_numpy())
    if len(users) > QUICK_USERS:
        users = np.sort(rng.choice(users, QUICK_USERS, replace=False))
    kept = only_users(histories, np.isin(histories.user_ids, users))
    return with_users(kept, users), shown.filter(pa.array(np.isin(shown["user_id"].to_numpy(), users)))


def _shown(histories: Histories, table: pa.Table) -> Shown:
    user = np.searchsorted(histories.user_ids, table["user_id"].to_numpy())
    order = np.lexsort((table["timestamp"].to_numpy(), user))
    user = user[order]
    items, categories, labels, timestamps = (
        table[name].to_numpy()[order] for name in ("item_id", "category_id", "label", "timestamp")
    )
    impressions = Impressions(
        user,
        items,
        categories,
        labels.astype(np.int8),
        timestamps,
        FirstSeen(histories).is_first(user, items, timestamps),
    )
    return Shown(impressions, timestamps // SECONDS_PER_DAY * SECONDS_PER_DAY)
