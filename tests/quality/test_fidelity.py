"""How near a model's vectors are to full attention's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from encode.config import ClusteringConfig, ModelConfig
from encode.data.histories import Histories
from encode.data.impressions import Impressions
from encode.data.vocabulary import Vocabulary
from encode.evaluate.replay import make_replay
from encode.interests.clustered import Clustered
from encode.model.ctr import Reader, Tables
from encode.model.long_term import Sizes
from encode.quality import fidelity
from encode.quality.fidelity import compare, measure_fidelity
from encode.quality.rivals.attention import FullAttention
from encode.quality.rivals.floors import MeanPooling, RecentOnly
from encode.quality.variants import Variant

D, P = 8, 4
CONFIG = ModelConfig(embedding_dim=D, category_dim=2, projected_dim=P, recent_length=3, hidden_dims=(8,))
ITEMS = np.arange(10, 30)
VOCABULARY = Vocabulary(np.array([1, 2, 3]), ITEMS, 1 + ITEMS % 3)
SIZES = Sizes(len(VOCABULARY), VOCABULARY.num_categories, 1, D, P)


def replay_of(num_users=30, num_rows=900, num_shown=200):
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, num_users - 1, num_rows))  # the last one has no history
    item = rng.choice(ITEMS, num_rows)
    offsets = np.searchsorted(user, np.arange(num_users + 1))
    none = np.zeros(num_rows, np.int32)
    when = np.arange(num_rows)
    histories = Histories(np.arange(1, num_users + 1), offsets, item, 1 + item % 3, when, none, ("view",))
    shown = np.sort(rng.integers(0, num_users, num_shown))
    target, as_of = rng.choice(ITEMS, num_shown), np.full(num_shown, num_rows)
    labels = rng.integers(0, 2, num_shown).astype(np.int8)
    impressions = Impressions(shown, target, 1 + target % 3, labels, as_of, np.ones(num_shown, bool))
    return make_replay(histories, impressions, as_of, VOCABULARY, 3)


def measured(model, replay=None):
    torch.manual_seed(0)
    tables = Tables(CONFIG, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories)
    with torch.no_grad():
        tables.item.weight *= 20
    return measure_fidelity(tables.all_items(), Reader(CONFIG, model), replay or replay_of())


def test_compare_by_hand():
    """Centered: (-1, 0), (1, 0) against (-3, 1), (3, -1): 6 / sqrt(2 * 20)."""
    found = compare(np.array([[0, 5], [2, 5]], np.float32), np.array([[1, 3], [7, 1]], np.float32))
    assert found.correlation == pytest.approx(6 / math.sqrt(40))
    assert found.max_error == 5
    assert found.relative_error == pytest.approx(math.sqrt((1 + 4 + 25 + 16) / (1 + 9 + 49 + 1)))


def test_compare_equal_and_scaled():
    vectors = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    assert compare(vectors, vectors) == (pytest.approx(1), 0, 0)
    scaled = compare(3 * vectors, vectors)
    assert scaled.correlation == pytest.approx(1)
    assert scaled.relative_error == pytest.approx(2)
    assert compare(-vectors, vectors).correlation == pytest.approx(-1)


def test_where_nothing_varies_there_is_no_correlation():
    found = compare(np.ones((3, 2), np.float32), np.ones((3, 2), np.float32))
    assert math.isnan(found.correlation)
    assert (found.max_error, found.relative_error) == (0, 0)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Variant(SIZES, num_clusters=40, remembered=0),
        lambda: Clustered(CONFIG.model_copy(update={"num_remembered": 0}), ClusteringConfig(num_clusters=40)),
    ],
    ids=["variant", "platform"],
)
def test_as_many_clusters_as_distinct_items_is_faithful(model):
    """Impressions without a history among them."""
    found = measured(model())
    assert found.correlation == pytest.approx(1, abs=1e-5)
    assert found.max_error < 1e-3
    assert found.relative_error < 1e-4


def test_fewer_clusters_are_less_faithful():
    found = [measured(Variant(SIZES, num_clusters=k, remembered=0)) for k in (1, 4, 12)]
    assert found[0].correlation < found[1].correlation < found[2].correlation < 0.9999
    assert found[0].relative_error > found[1].relative_error > found[2].relative_error > 0.001


def test_it_is_asked_of_models_with_the_same_relevance_only():
    assert measured(MeanPooling(SIZES)) is None
    assert measured(RecentOnly(SIZES)) is None
    assert measured(FullAttention(SIZES)) is None


def test_of_many_impressions_some_batches_are_taken(monkeypatch):
    taken = []
    original = fidelity.history_of
    monkeypatch.setattr(fidelity, "history_of", lambda *a: taken.append(len(a[1].rows)) or original(*a))
    replay = replay_of(num_users=300, num_shown=3_000)
    measured(Variant(SIZES, num_clusters=2), replay)
    whole = len(taken)
    assert sum(taken) == 3_000
    taken.clear()
    monkeypatch.setattr(fidelity, "_IMPRESSIONS", 1_500)
    measured(Variant(SIZES, num_clusters=2), replay)
    assert len(taken) == math.ceil(whole / 2)
