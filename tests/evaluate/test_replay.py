"""No leakage: what happens at or after an impression changes nothing about it."""

from __future__ import annotations

import dataclasses
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.config import ClusteringConfig, ModelConfig, TrainingConfig
from encode.data.histories import Histories, to_histories
from encode.data.impressions import Impressions, draw_impressions, snapshot_times, split_days
from encode.data.vocabulary import Vocabulary
from encode.errors import DataError
from encode.evaluate import batches as batching
from encode.evaluate import reading
from encode.evaluate.batches import batches
from encode.evaluate.reading import predict
from encode.evaluate.replay import assign, make_replay
from encode.interests.clustered import Clustered
from encode.model.ctr import Reader, Tables
from encode.schema import BEHAVIORS, PADDING, SECONDS_PER_DAY, UNKNOWN, Window, day_of, day_start

MODEL = ModelConfig(embedding_dim=8, category_dim=2, projected_dim=4, recent_length=5, hidden_dims=(16,))
CLUSTERING = ClusteringConfig(num_clusters=4)
ITEMS = np.arange(10, 50)
VOCABULARY = Vocabulary(np.array([1, 2, 3]), ITEMS, 1 + ITEMS % 3)
START = date(2024, 3, 1)
DAYS = Window(date(2024, 3, 11), date(2024, 3, 21))
SNAPSHOT_DAYS = 4
TRAINING = TrainingConfig(num_negatives=2)


def histories_of(user, item, timestamp):
    item = np.asarray(item)
    columns = [user, item, 1 + item % 3, pa.array(["pv"] * len(item)).dictionary_encode(), timestamp]
    return to_histories(
        pa.table([pa.array(c, f.type) for c, f in zip(columns, BEHAVIORS, strict=True)], schema=BEHAVIORS)
    )


def draw_histories(seed=0, num_users=6, num_rows=400):
    """20 days, on a grid of 6 hours, so that many behaviors of a user share their second."""
    rng = np.random.default_rng(seed)
    grid = day_start(START) + np.arange(80) * SECONDS_PER_DAY // 4
    return histories_of(
        rng.integers(1, num_users + 1, num_rows), rng.choice(ITEMS, num_rows), rng.choice(grid, num_rows)
    )


@pytest.fixture(scope="module")
def model():
    """Tables of the vocabulary and a reader, with weights large enough that a changed history shows."""
    torch.manual_seed(0)
    tables = Tables(MODEL, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories)
    with torch.no_grad():
        tables.item.weight[1:] *= 20
    return tables.all_items(), Reader(MODEL, Clustered(MODEL, CLUSTERING)).eval()


def show(user, item, timestamp):
    """Impressions without clicks."""
    user, item, timestamp = (np.array(column) for column in (user, item, timestamp))
    return Impressions(user, item, 1 + item % 3, np.zeros(len(user), np.int8), timestamp, np.ones(len(user), bool))


def replay_of(histories, impressions, days=DAYS):
    as_of = snapshot_times(impressions, days, SNAPSHOT_DAYS)
    return make_replay(histories, impressions, as_of, VOCABULARY, MODEL.recent_length)


def scores(model, histories, impressions, days=DAYS):
    return predict(*model, replay_of(histories, impressions, days))


def snapshot_start(timestamp, days=DAYS):
    """The day of the last snapshot before the impression's day, by counting."""
    as_of = days.start
    while as_of + timedelta(days=SNAPSHOT_DAYS) <= day_of(int(timestamp)):
        as_of += timedelta(days=SNAPSHOT_DAYS)
    return day_start(as_of)


def spoil(histories: Histories, kept: np.ndarray, seed: int) -> Histories:
    """Give each row that is not `kept` another item, and another time from its own on, then sort again."""
    rng = np.random.default_rng(seed)
    user = np.repeat(histories.user_ids, np.diff(histories.offsets))
    item = np.where(kept, histories.item_ids, rng.choice(ITEMS, len(kept)))
    later = rng.integers(0, 2 * SECONDS_PER_DAY, len(kept))
    return histories_of(user, item, histories.timestamps + np.where(kept, 0, later))


# --- leakage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_nothing_at_or_after_an_impression_changes_its_prediction(model, seed):
    histories = draw_histories(seed)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    before = scores(model, histories, impressions)
    changed_at_all = 0
    for at in np.unique(impressions.timestamps):
        spoiled = spoil(histories, histories.timestamps < at, seed)
        after = scores(model, spoiled, impressions)
        early = impressions.timestamps <= at
        np.testing.assert_allclose(after[early], before[early], atol=1e-6, err_msg=f"impressions up to {at}")
        changed_at_all += (np.abs(after[~early] - before[~early]) > 1e-4).sum()
    assert changed_at_all > 100  # the spoiling does show where it may


def test_rows_removed_or_added_later_change_nothing_either(model):
    histories = draw_histories(1)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    before = scores(model, histories, impressions)
    user = np.repeat(histories.user_ids, np.diff(histories.offsets))
    for at in np.unique(impressions.timestamps)[::3]:
        past = histories.timestamps < at
        early = impressions.timestamps <= at
        without = histories_of(user[past], histories.item_ids[past], histories.timestamps[past])
        more = histories_of(
            np.append(user, np.repeat(histories.user_ids, 50)),
            np.append(histories.item_ids, np.resize(ITEMS, 50 * len(histories))),
            np.append(histories.timestamps, np.full(50 * len(histories), at)),
        )
        for changed in (without, more):
            np.testing.assert_array_equal(changed.user_ids, histories.user_ids)
            after = scores(model, changed, impressions)
            np.testing.assert_allclose(after[early], before[early], atol=1e-6)


def test_interests_hold_nothing_from_the_snapshot_day_on(model):
    """Spoil all from a snapshot's day on: its impressions read the same interests, only their recent branch differs."""
    histories = draw_histories(2)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    snapshots = np.array([snapshot_start(t) for t in impressions.timestamps])

    def interests(of):
        """Multiset of (vocabulary index, cluster) that stands behind each impression."""
        replay = replay_of(of, impressions)
        labels = assign(replay, model[0], model[1].long_term.assign)
        found = {}
        for batch in batches(replay, labels, 3):
            index = batch.items[batch.history].tolist()
            for place, row in zip(batch.place.tolist(), batch.rows, strict=True):
                mine = place // batch.target.shape[1]
                pairs = zip(index[mine], batch.cluster[mine].tolist(), strict=True)
                found[row] = [pair for pair in pairs if pair[0] != PADDING]
        return found

    before = interests(histories)
    for as_of in np.unique(snapshots):
        after = interests(spoil(histories, histories.timestamps < as_of, 3))
        same = np.array([after[row] == before[row] for row in range(len(impressions))])
        assert same[snapshots <= as_of].all()
        assert not same[snapshots > as_of].any()
    assert len(np.unique(snapshots)) == 3


@pytest.mark.parametrize("seed", range(3))
def test_histories_and_recent_branch_are_the_plain_loop(model, seed):
    """Strictly before the snapshot's day, strictly before the impression's second."""
    histories = draw_histories(seed)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    replay = replay_of(histories, impressions)
    index = VOCABULARY.index(histories.item_ids, histories.category_ids)
    labels = assign(replay, model[0], model[1].long_term.assign)
    seen, ties = [], 0
    for batch in batches(replay, labels, 3):
        items = batch.items.numpy()
        assert items[0] == PADDING
        assert (items[batch.target.flatten()[batch.place]] != PADDING).all()
        for place, row in enumerate(batch.rows):
            seen.append(row)
            user, at = impressions.user[row], impressions.timestamps[row]
            own = range(histories.offsets[user], histories.offsets[user + 1])
            past = [index[i] for i in own if histories.timestamps[i] < at]
            ties += sum(histories.timestamps[i] == at for i in own)
            long = [index[i] for i in own if histories.timestamps[i] < snapshot_start(at)]
            mine, width = divmod(int(batch.place[place]), batch.target.shape[1])[0], batch.history.shape[1]
            assert items[batch.history[mine]].tolist() == long + [PADDING] * (width - len(long))
            ages = [(snapshot_start(at) - t) / SECONDS_PER_DAY for t in histories.timestamps[own][: len(long)]]
            assert batch.age[mine].tolist() == pytest.approx(ages + [0] * (width - len(long)))
            assert items[batch.recent[batch.moment[place]]].tolist() == (past[-5:] + [PADDING] * 5)[:5]
            assert items[batch.target.flatten()[batch.place[place]]] == replay.target_index[row]
            assert batch.label[place] == impressions.labels[row]
            assert replay.history_lengths()[row] == len(long)
    assert sorted(seen) == list(range(len(impressions)))
    assert ties > len(impressions)  # each impression's own behavior, and others of its second


def test_behaviors_of_the_same_second_are_not_recent():
    """By hand: at noon of the 12th the user did 20, 21, 22 at once; before it 10 and 11."""
    noon = day_start(date(2024, 3, 12)) + 43_200
    histories = histories_of([1] * 5, [10, 20, 11, 21, 22], [noon - 9, noon, noon - 1, noon, noon])
    shown = show([0, 0], [21, 10], [noon, noon])
    replay = replay_of(histories, shown)
    for row in range(2):
        assert histories.item_ids[replay.recent_begin[row] : replay.recent_end[row]].tolist() == [10, 11]
    assert replay.history_lengths().tolist() == [0, 0]


def test_the_cut_does_not_depend_on_how_far_apart_times_are(model):
    """Rows are found by one number made of user and time: users far apart in time must not run into each other."""
    noon = day_start(date(2024, 3, 12)) + 43_200
    histories = histories_of([1, 1, 2, 2, 3], [10, 11, 12, 13, 14], [1, noon - 1, noon - 2, 2**40, 1])
    shown = show(range(3), [20] * 3, [noon] * 3)
    replay = replay_of(histories, shown)
    found = [
        histories.item_ids[begin:end].tolist()
        for begin, end in zip(replay.recent_begin, replay.recent_end, strict=True)
    ]
    assert found == [[10, 11], [12], [14]]


# --- invariants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batch_size_changes_nothing(model, size, monkeypatch):
    histories = draw_histories(0)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    before = scores(model, histories, impressions)
    monkeypatch.setattr(reading, "HISTORIES_PER_BATCH", size)
    np.testing.assert_allclose(scores(model, histories, impressions), before, atol=1e-6)


def test_shuffled_batches_hold_the_same(model):
    histories = draw_histories(0)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    replay = replay_of(histories, impressions)
    labels = assign(replay, model[0], model[1].long_term.assign)
    found = np.zeros(len(impressions))
    order = []
    for batch in batches(replay, labels, 4, np.random.default_rng(0)):
        with torch.no_grad():
            logit, _ = reading.read_batch(reading.of_batch(model[0], batch), model[1], batch)
        found[batch.rows] = torch.sigmoid(logit)
        order += batch.rows.tolist()
    assert order != sorted(order)
    np.testing.assert_allclose(found, scores(model, histories, impressions), atol=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.3, 0.3), (1.0, 1)])
def test_a_share_of_the_training_targets_is_made_unknown(model, share, expected):
    """In shuffled batches only: what is measured stays as it is."""
    histories = draw_histories(0, num_rows=2000)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    replay = replay_of(histories, impressions)
    labels = assign(replay, model[0], model[1].long_term.assign)

    def unknown(rng):
        made = [
            batch.items[batch.target.flatten()[batch.place]].numpy() == UNKNOWN
            for batch in batches(replay, labels, 4, rng, share)
        ]
        return np.concatenate(made).mean()

    assert unknown(np.random.default_rng(0)) == pytest.approx(expected, abs=0.05)
    assert unknown(None) == 0


def test_who_else_there_is_changes_nothing(model):
    """Users keep their ids, which seed their clusters; their places, neighbors and order change."""
    histories = draw_histories(0)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    before = scores(model, histories, impressions)
    user = np.repeat(histories.user_ids, np.diff(histories.offsets))
    for kept in ([2], [1, 4, 6], [3, 5]):
        rows, shown = np.isin(user, kept), np.isin(histories.user_ids[impressions.user], kept)
        fewer = histories_of(user[rows], histories.item_ids[rows], histories.timestamps[rows])
        place = np.searchsorted(fewer.user_ids, histories.user_ids[impressions.user[shown]])
        some = dataclasses.replace(
            Impressions(*(getattr(impressions, field.name)[shown] for field in dataclasses.fields(impressions))),
            user=place,
        )
        np.testing.assert_allclose(scores(model, fewer, some), before[shown], atol=1e-6)


def test_the_history_matters(model):
    """Else the tests above could not fail."""
    histories = draw_histories(0)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    for kept in (histories.timestamps >= day_start(START + timedelta(days=5)), histories.timestamps < 0):
        off = np.abs(scores(model, spoil(histories, kept, 1), impressions) - scores(model, histories, impressions))
        assert (off > 1e-4).mean() > 0.5


def test_a_history_with_many_impressions_is_read_in_turns(model, monkeypatch):
    histories = draw_histories(0)
    impressions = draw_impressions(histories, DAYS, TRAINING, 10**6)
    before = scores(model, histories, impressions)
    replay = replay_of(histories, impressions)
    monkeypatch.setattr(batching, "_MAX_TARGETS", 7)
    np.testing.assert_allclose(scores(model, histories, impressions), before, atol=1e-6)
    assert np.diff(replay.impression_offsets).max() > 7
    assert max(batch.target.shape[1] for batch in batches(replay, None, 64)) == 7


def test_counts_are_of_all_that_is_in_a_history():
    """By hand: user 1 has three behaviors before the second snapshot, one of them before the first; user 2 has one."""
    at = [day_start(date(2024, 3, day)) for day in (2, 12, 13)]
    histories = histories_of([1, 1, 1, 2], [10, 10, 11, 12], [*at, at[0]])
    noon = day_start(date(2024, 3, 16)) + 43_200
    shown = show([0, 0, 1], [20, 20, 20], [day_start(DAYS.start) + 9, noon, noon])
    counts = replay_of(histories, shown).counts()
    index = VOCABULARY.index(np.array([10, 11, 12]))
    assert counts[index].tolist() == [2, 1, 1]
    assert counts.sum() == 4


# --- impressions -------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from(["popularity", "uniform"]))
@settings(deadline=None, max_examples=20)
def test_negatives_are_never_of_the_users_own_history_up_to_that_day(seed, sampling):
    histories = draw_histories(seed, num_rows=300)
    config = TrainingConfig(num_negatives=3, negative_sampling=sampling, seed=seed)
    impressions = draw_impressions(histories, DAYS, config, 10**6)
    inside = (histories.timestamps >= day_start(DAYS.start)) & (histories.timestamps < day_start(DAYS.end))
    assert impressions.labels.sum() == inside.sum()
    category = dict(zip(histories.item_ids.tolist(), histories.category_ids.tolist(), strict=True))
    for user, item, of, label, at, first in zip(
        impressions.user,
        impressions.item_ids,
        impressions.category_ids,
        impressions.labels,
        impressions.timestamps,
        impressions.first_time,
        strict=True,
    ):
        own = slice(histories.offsets[user], histories.offsets[user + 1])
        times = histories.timestamps[own][histories.item_ids[own] == item]
        assert of == category[item]
        assert day_start(DAYS.start) <= at < day_start(DAYS.end)
        assert first == (not (times < at).any())
        if label:
            assert (times == at).any()
        else:
            # Drawn from what anybody had before the impression's day, and from nothing later.
            assert histories.timestamps[histories.item_ids == item].min() < at // SECONDS_PER_DAY * SECONDS_PER_DAY
            assert (times >= (at // SECONDS_PER_DAY + 1) * SECONDS_PER_DAY).all()


def test_impressions_are_sorted_by_user_then_time():
    impressions = draw_impressions(draw_histories(0), DAYS, TRAINING, 10**6)
    order = np.lexsort((impressions.timestamps, impressions.user))
    np.testing.assert_array_equal(order, np.arange(len(impressions)))


def two_items(*later):
    """User 1 does 10 on the 12th and then what `later` says; user 2 made 10 and 30 known before."""
    noon = day_start(date(2024, 3, 12)) + 43_200
    rows = [(2, 10, 1_000), (2, 30, 1_000), (1, 10, noon), *((1, item, noon + after) for item, after in later)]
    return histories_of(*zip(*rows, strict=True))


def test_an_item_that_the_user_takes_up_later_can_be_a_negative():
    """To leave it out would tell the model what the user will not do. On the same day it is left out."""
    only_the_12th = Window(date(2024, 3, 12), date(2024, 3, 13))

    def negatives(*later):
        shown = draw_impressions(two_items(*later), only_the_12th, TrainingConfig(num_negatives=50), 10)
        return set(shown.item_ids[shown.labels == 0].tolist())

    assert negatives() == {30}
    assert negatives((30, SECONDS_PER_DAY)) == {30}
    assert negatives((30, 3600)) == set()


def test_what_happens_after_the_days_changes_no_impression():
    histories = draw_histories(0)
    before = draw_impressions(histories, DAYS, TRAINING, 10**6)
    cut = Window(DAYS.start, date(2024, 3, 16))
    spoiled = spoil(histories, histories.timestamps < day_start(cut.end), 5)
    found, again = (draw_impressions(one, cut, TRAINING, 10**6) for one in (histories, spoiled))
    for field in dataclasses.fields(found):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(again, field.name))
    assert len(before) > len(found)


def test_impressions_are_drawn_alike_each_time_and_the_seed_matters():
    histories = draw_histories(0)
    drawn = [draw_impressions(histories, DAYS, TRAINING.model_copy(update={"seed": s}), 50) for s in (3, 3, 4)]
    for field in dataclasses.fields(drawn[0]):
        np.testing.assert_array_equal(getattr(drawn[0], field.name), getattr(drawn[1], field.name))
    assert drawn[0].item_ids.tolist() != drawn[2].item_ids.tolist()
    assert drawn[0].labels.sum() == 50


def test_only_some_behaviors_count_as_clicks():
    histories = draw_histories(0)
    buys = dataclasses.replace(
        histories,
        behaviors=(np.arange(len(histories.item_ids)) % 10 == 0).astype(np.int32) ^ 1,
        behavior_names=("buy", "pv"),
    )
    config = TrainingConfig(positive_behaviors=("buy",))
    inside = (
        (buys.timestamps >= day_start(DAYS.start)) & (buys.timestamps < day_start(DAYS.end)) & (buys.behaviors == 0)
    )
    assert draw_impressions(buys, DAYS, config, 10**6).labels.sum() == inside.sum() > 0
    with pytest.raises(DataError, match="no positives: expected click, have buy, pv"):
        draw_impressions(buys, DAYS, TrainingConfig(positive_behaviors=("click",)), 10)


def test_days_without_positives_or_without_a_past_are_refused():
    histories = draw_histories(0)
    with pytest.raises(DataError, match="no positives: expected any behavior"):
        draw_impressions(histories, Window(date(2025, 1, 1), date(2025, 1, 2)), TRAINING, 10)
    with pytest.raises(DataError, match="no behaviors before them to draw negatives from"):
        draw_impressions(histories, Window(START, DAYS.end), TRAINING, 10**6)  # the first day has nothing before it


def test_splits_follow_one_another_up_to_the_end():
    config = TrainingConfig(train_days=5, valid_days=2, test_days=3, snapshot_days=1)
    splits = split_days(Window(date(2024, 3, 1), date(2024, 3, 12)), config)
    assert splits.train == Window(date(2024, 3, 2), date(2024, 3, 7))
    assert splits.valid == Window(date(2024, 3, 7), date(2024, 3, 9))
    assert splits.test == Window(date(2024, 3, 9), date(2024, 3, 12))
    with pytest.raises(
        DataError, match=r"\(10 days\): training needs more than 10 .*train_days 5 \+ valid_days 2 \+ test_days 3"
    ):
        split_days(Window(date(2024, 3, 2), date(2024, 3, 12)), config)
