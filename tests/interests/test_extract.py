"""Extraction against a plain loop, and that a user's row depends on that user alone."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.config import ClusteringConfig, ModelConfig
from encode.data.vocabulary import Vocabulary
from encode.interests.extract import extract, state_of
from encode.interests.kmeans import Starts, cluster
from encode.interests.user_rows import UserRows
from encode.model.ctr import Encode, Reader, Tables
from encode.model.relevance import NO_ITEM
from encode.model.space import SpaceConfig, space_of
from encode.schema import HISTORIES, UNKNOWN, interests_schema

MODEL = ModelConfig(embedding_dim=8, category_dim=3, projected_dim=4, hidden_dims=(8,))
VOCABULARY = Vocabulary(np.arange(1, 5), np.arange(10, 40), 1 + np.arange(30) % 4)
NUM_CLUSTERS, RECENT, NUM_REMEMBERED = 4, 5, 7


def make_space(pooling="relevance", num_clusters=NUM_CLUSTERS):
    torch.manual_seed(0)
    tables = Tables(MODEL, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories)
    settings = SpaceConfig(ClusteringConfig(num_clusters=num_clusters), pooling, RECENT, NUM_REMEMBERED)
    return space_of(tables, Reader(MODEL, Encode(MODEL)), VOCABULARY, settings)


SPACE = make_space()


def to_batch(histories):
    """Rows of `schema.HISTORIES` from (user, [(item, category, timestamp), ...])."""
    columns = [[[event[field] for event in events] for _, events in histories] for field in range(3)]
    arrays = [
        pa.array([user for user, _ in histories], pa.int64()),
        *(pa.array(c, pa.list_(pa.int64())) for c in columns),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=HISTORIES)


def draw_histories(seed, num_users, longest=60):
    """Users with histories of 0 to `longest` behaviors; items from 1 to 50, of which 10 to 39 are known."""
    rng = np.random.default_rng(seed)
    histories = []
    for user in rng.choice(10**9, num_users, replace=False) + 1:
        length = int(rng.integers(0, longest))
        items, times = rng.integers(1, 51, length), np.sort(rng.integers(1, 10**9, length))
        events = [(int(i), int(i) % 6, int(t)) for i, t in zip(items, times, strict=True)]
        histories.append((int(user), events))
    return histories


def starts_of(found, places):
    """The centers of some rows of an extraction, to start another from."""
    centers = [np.reshape(found.column("center")[place].as_py(), (-1, MODEL.projected_dim)) for place in places]
    offsets = np.append(0, np.cumsum([len(own) for own in centers]))
    return Starts(np.concatenate(centers).astype(np.float32), offsets.astype(np.int64))


def rows_of_table(events, space):
    """The index of each event's item, else of its category's others, else unknown."""
    words, row_of = space.vocabulary, {}
    for place, item in enumerate(words.item_ids.tolist()):
        row_of[item] = 2 + len(words.category_ids) + place
    others = {category: 2 + place for place, category in enumerate(words.category_ids.tolist())}
    return [row_of.get(item, others.get(category, 1)) for item, category, _ in events]


def slow_row(user, events, space, starts=None):
    """One user by plain loops, in doubles; only the clustering is the library's."""
    rows = rows_of_table(events, space)
    keys, values = space.key[rows].astype(float), space.embedding[rows].astype(float)
    labels = cluster(space.key[rows], np.array([0, len(rows)]), np.array([user]), space.config.clustering, starts)
    found = []
    for k in sorted(set(labels.tolist())):
        members = [i for i in range(len(rows)) if labels[i] == k]
        center = sum(keys[i] for i in members) / len(members)
        unit = center / np.linalg.norm(center)
        weights = [np.exp(space.scale * keys[i] @ unit) if space.config.pooling == "relevance" else 1 for i in members]
        counts = Counter(events[i][0] for i in members)
        found.append(
            {
                "center": center,
                "variance": sum((keys[i] - center) ** 2 for i in members) / len(members),
                "value": sum(w * values[i] for w, i in zip(weights, members, strict=True)) / sum(weights),
                "size": len(members),
                "newest": max(events[i][2] for i in members),
                "top_items": sorted(counts, key=lambda item: (-counts[item], item))[:5],
                "cluster": k,
            }
        )
    return sorted(found, key=lambda one: (-one["size"], one["cluster"]))


def assert_is_the_plain_loop(row, user, events, space, starts=None):
    expected = slow_row(user, events, space, starts)
    assert row["user_id"] == user
    assert row["num_behaviors"] == len(events) == sum(row["size"])
    for name in ("size", "newest", "top_items"):
        assert row[name] == [one[name] for one in expected]
    for name in ("center", "variance", "value"):
        np.testing.assert_allclose(np.ravel(row[name]), np.ravel([one[name] for one in expected]), atol=1e-6)
    assert row["size"] == sorted(row["size"], reverse=True)
    counts = Counter(rows_of_table(events, space))
    kept = sorted((item for item in counts if item > UNKNOWN), key=lambda item: (-counts[item], item))[:NUM_REMEMBERED]
    remembered = list(zip(row["item_index"], row["item_times"], strict=True))
    assert remembered == [(item, counts[item]) for item in sorted(kept)]
    recent = zip(row["recent_item_id"], row["recent_category_id"], row["recent_timestamp"], strict=True)
    assert list(recent) == events[-RECENT:]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from(["relevance", "mean"]))
@settings(deadline=None, max_examples=40)
def test_extraction_is_the_plain_loop(seed, num_users, pooling):
    space = make_space(pooling)
    histories = draw_histories(seed, num_users)
    found = extract(to_batch(histories), space)
    assert found.schema == interests_schema(MODEL.projected_dim, MODEL.embedding_dim)
    for (user, events), row in zip(histories, found.to_pylist(), strict=True):
        assert_is_the_plain_loop(row, user, events, space)


def test_a_history_of_100_000_behaviors_is_the_plain_loop():
    rng = np.random.default_rng(2)
    times = np.sort(rng.integers(1, 10**9, 100_000)).tolist()
    events = [(item, item % 6, time) for item, time in zip(rng.integers(1, 51, 100_000).tolist(), times, strict=True)]
    found = extract(to_batch([(2, []), (7, events), (9, events[:1])]), SPACE).to_pylist()
    assert_is_the_plain_loop(found[1], 7, events, SPACE)
    assert_is_the_plain_loop(found[2], 9, events[:1], SPACE)


def test_clustering_starts_from_the_centers_that_are_given():
    """Each user from its own, whoever else is in the batch; and they make a difference."""
    histories = draw_histories(6, 20)
    cold = extract(to_batch(histories), SPACE)
    starts = starts_of(cold.take(pa.array([*range(1, 20), 0])), range(20))  # those of the next user
    warm = extract(to_batch(histories), SPACE, starts)
    assert not warm.equals(cold)
    for place, (user, events) in enumerate(histories):
        own = Starts(
            starts.centers[slice(*starts.offsets[place : place + 2])], np.diff(starts.offsets)[place] * np.arange(2)
        )
        assert_is_the_plain_loop(warm.slice(place, 1).to_pylist()[0], user, events, SPACE, own)
        assert extract(to_batch([histories[place]]), SPACE, own).equals(warm.slice(place, 1)), f"user {place} alone"


def test_threads_change_nothing():
    """Threads of one extraction, and extractions in several threads."""
    batch = to_batch(draw_histories(8, 40))
    space = make_space()
    with ThreadPoolExecutor(3) as pool:
        kernels = [partial(cluster, num_threads=num_threads) for num_threads in (1, 2, 5, None, 1)]
        found = list(pool.map(lambda kernel: extract(batch, space, None, kernel), kernels))
    assert all(one.equals(extract(batch, SPACE)) for one in found)


def test_top_items_by_hand():
    """Six items in one cluster: by count, the smaller id first among equals, at most five."""
    items = [30, 12, 12, 30, 30, 11, 25, 14, 39]
    events = [(item, 1, 100 + place) for place, item in enumerate(items)]
    row = extract(to_batch([(7, events)]), make_space(num_clusters=1)).to_pylist()[0]
    assert row["top_items"] == [[30, 12, 11, 14, 25]]
    assert row["newest"] == [108]
    assert row["size"] == [9]


def test_a_users_row_depends_on_that_user_alone():
    """To the bit: alone, in any order, in batches of any size."""
    histories = draw_histories(0, 60)
    together = extract(to_batch(histories), SPACE)
    for place, history in enumerate(histories):
        assert extract(to_batch([history]), SPACE).equals(together.slice(place, 1)), f"user {place} alone"
    order = np.random.default_rng(1).permutation(len(histories))
    shuffled = extract(to_batch([histories[place] for place in order]), SPACE)
    assert pa.Table.from_batches([shuffled]).equals(pa.Table.from_batches([together]).take(pa.array(order)))
    for size in (7, 31):
        parts = [extract(to_batch(histories[at : at + size]), SPACE) for at in range(0, len(histories), size)]
        assert pa.Table.from_batches(parts).combine_chunks().to_batches()[0].equals(together)


def test_a_slice_of_a_batch_is_read_as_a_batch():
    whole = to_batch(draw_histories(3, 9))
    assert extract(whole.slice(2, 4), SPACE).equals(extract(whole, SPACE).slice(2, 4))


def test_a_user_without_behaviors_has_no_interests():
    busy = draw_histories(5, 1)[0]
    found = extract(to_batch([(3, []), busy, (4, [])]), SPACE).to_pylist()
    for row in (found[0], found[2]):
        assert row["num_behaviors"] == 0
        assert all(row[name] == [] for name in row if name not in ("user_id", "num_behaviors"))
    assert found[1]["num_behaviors"] == len(busy[1])
    assert extract(to_batch([]), SPACE).num_rows == 0


def test_state_is_the_row_padded():
    histories = [(8, []), (9, [(12, 3, 1), (50, 2, 2), (999, 9, 3)])]
    rows = extract(to_batch(histories), SPACE)
    empty, state = (state_of(row, SPACE) for row in UserRows(rows))
    assert state.recent.tolist() == [*VOCABULARY.index(np.array([12, 50, 999]), np.array([3, 2, 9])), 0, 0]
    assert state.known.interests.size.sum() == 3
    assert state.known.interests.center.shape == (1, NUM_CLUSTERS, MODEL.projected_dim)
    count = len(rows.column("size")[1])
    assert (state.known.interests.center[0, count:] == 0).all()
    assert state.known.interests.value[0, 0].tolist() == rows.column("value")[1].as_py()[0]
    nobody = state_of(None, SPACE)
    for one, other in zip(parts(empty), parts(nobody), strict=True):
        assert torch.equal(one, other)
    assert not any(one.any() for one in (*empty.known.interests[:3], empty.recent))
    assert empty.known.interests.scale == SPACE.scale
    assert [item for item in state.known.remembered.item[0].tolist() if item != NO_ITEM] == sorted(
        VOCABULARY.index(np.array([12, 50]), np.array([3, 2])).tolist()
    )


def parts(state):
    return [*state.known.interests, *state.known.remembered, torch.from_numpy(state.recent)]
