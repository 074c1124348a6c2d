"""The engine: the numbers of the training code, whoever the user is and whichever candidates come together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from encode.compiled import read_only
from encode.config import ClusteringConfig, ModelConfig
from encode.data.vocabulary import Vocabulary
from encode.errors import ArtifactError
from encode.model.ctr import Encode, Reader, Tables
from encode.model.files import UserState, interest_weights, read_user
from encode.model.space import Space, SpaceConfig, space_of
from encode.schema import MOST_TIMES, UNKNOWN
from encode.serving import kernels
from encode.serving.engine import Engine, one_thread

D, P, K, R = 8, 4, 5, 6
VOCABULARY = Vocabulary(np.array([1, 2, 3]), np.arange(10, 50), np.arange(40) % 4)
SIZE_PRIORS = (0.0, 0.5, 1.0, 2.0)


def make_model(**settings):
    """A space and a model of it, with weights large enough that everything shows in a logit."""
    model = ModelConfig(embedding_dim=D, category_dim=2, projected_dim=P, recent_length=R, **settings)
    torch.manual_seed(0)
    tables = Tables(model, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories)
    reader = Reader(model, Encode(model)).eval()
    with torch.no_grad():
        for table in tables.by_id():
            table[1:] *= 20
        reader.long_term.decoder.normal_()
        reader.log_scale -= 0.5
    config = SpaceConfig(ClusteringConfig(num_clusters=K), model.pooling, R, model.num_remembered)
    return space_of(tables, reader, VOCABULARY, config), reader


MODELS = [make_model(size_prior=prior, hidden_dims=(16, 8)) for prior in SIZE_PRIORS]
MODELS.append(make_model(hidden_dims=(), pooling="relevance"))


def make_user(space: Space, sizes, num_remembered: int, num_recent: int, seed: int) -> UserState:
    """A user with interests of these sizes, the others empty."""
    random = np.random.default_rng(seed)
    size = np.zeros(K, np.float32)
    size[: len(sizes)] = sizes
    center, variance = 0.7 * random.normal(size=(K, P)), 0.1 * random.random((K, P))
    parts = (part * (size > 0)[:, None] for part in (center, random.normal(size=(K, D)), variance))
    center, value, variance = (part.astype(np.float32) for part in parts)
    item = np.sort(random.choice(np.arange(2, len(VOCABULARY)), num_remembered, replace=False))
    recent = np.zeros(R, np.int64)
    recent[:num_recent] = random.integers(UNKNOWN, len(VOCABULARY), num_recent)
    times = random.choice([1, 2, 30, 1_000, MOST_TIMES], num_remembered)
    category = VOCABULARY.category_index[item]
    return UserState(center, value, size, variance, space.scale, item, times, category, recent)


def expected_score(model, user: UserState, target):
    space, reader = model
    return torch.sigmoid(read_user(reader, space.items, user, torch.from_numpy(target))).numpy()


def assert_close(found, expected, atol=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


USERS = st.tuples(
    st.lists(st.sampled_from([0, 1, 3, 50_000]), max_size=K),
    st.integers(0, 30),
    st.integers(0, R),
    st.integers(0, 2**32 - 1),
)
NOBODY = [], 0, 0, 0
TARGETS = st.lists(st.integers(UNKNOWN, len(VOCABULARY) - 1), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MODELS), USERS, TARGETS)
@example(MODELS[2], NOBODY, [UNKNOWN, 2, 44])
@example(MODELS[2], ([], 30, 0, 1), list(range(1, 45)))
@example(MODELS[1], ([0, 3], 0, R, 2), [UNKNOWN])
def test_it_scores_and_attends_as_the_training_code_does(model, drawn, targets):
    space, reader = model
    user, target = make_user(space, *drawn), np.array(targets)
    engine = Engine(space, reader)
    assert_close(engine.score(user, target), expected_score(model, user, target))
    interests, recent = engine.attention(user, target)
    assert_close(interests, interest_weights(reader, space.items, user, torch.from_numpy(target)).numpy())
    held = torch.from_numpy(user.recent)
    logits = space.scale * space.items.key[targets] @ space.items.key[held].T
    assert_close(recent, logits.masked_fill(held == 0, -torch.inf).softmax(1).nan_to_num(0).numpy())


@pytest.mark.parametrize("count", [1, 2, kernels.BLOCK - 1, kernels.BLOCK, kernels.BLOCK + 1, 3000])
def test_other_candidates_change_no_score(count):
    space, reader = MODELS[2]
    engine, user = Engine(space, reader), make_user(space, [5, 1, 9], 20, R, 3)
    alone = np.concatenate([engine.score(user, np.array([index])) for index in range(1, len(VOCABULARY))])
    target = np.random.default_rng(0).integers(1, len(VOCABULARY), count)
    assert alone.std() > 0.01
    assert_close(engine.score(user, target), alone[target - 1], 1e-6)


def test_threads_get_the_bits_that_one_gets():
    space, reader = MODELS[2]
    engine = Engine(space, reader)
    users = [make_user(space, [5, 1, 9], 20, R, seed) for seed in range(8)]
    target = np.arange(1000) % (len(VOCABULARY) - 1) + 1
    expected = [engine.score(user, target) for user in users]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.score, users * 20, [target] * 160))
    assert all(np.array_equal(one, expected[place % 8]) for place, one in enumerate(found))
    assert not np.array_equal(expected[0], expected[1])


def poisoned(place, value=np.nan):
    """A model with such a number in e and h of an item, in the weights of a layer, or in an interest of the user."""
    space, reader = make_model(hidden_dims=(16, 8))
    user = make_user(space, [5, 1, 9], 20, R, 3)
    if place == "interest":
        user.value[1, 0] = value
    elif place == "item":
        embedding, key = space.embedding.copy(), space.key.copy()
        embedding[7, 0] = key[7, 0] = value
        space, user = replace(space, embedding=embedding, key=key), user._replace(recent=user.recent * 0)
    else:
        with torch.no_grad():
            reader.mlp[place].weight[:, 0] = value
    return Engine(space, reader).score(user, np.arange(1, len(VOCABULARY)))


@pytest.mark.parametrize("place", ["interest", 0, 3])
def test_what_is_not_a_number_makes_scores_that_are_none(place):
    assert np.isnan(poisoned(place)).all()


def test_an_item_that_is_not_a_number_leaves_the_others_alone():
    assert np.flatnonzero(np.isnan(poisoned("item"))).tolist() == [6]


@pytest.mark.parametrize("index", [-1, len(VOCABULARY)])
def test_what_is_outside_the_vocabulary_is_refused(index):
    space, reader = MODELS[2]
    engine, user = Engine(space, reader), make_user(space, [5, 1], 20, R, 3)
    for one, target in ((user, [2, index]), (user._replace(recent=np.full(R, index)), [2])):
        for ask in (engine.score, engine.attention):
            with pytest.raises(IndexError, match="outside the vocabulary"):
                ask(one, np.array(target))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-200, 200, width=32, allow_subnormal=False), min_size=3, max_size=3), min_size=1, max_size=60
    )
)
def test_softmax_is_that_of_pytorch(logits):
    found, total = np.array(logits, np.float32), np.empty(3, np.float32)
    expected = torch.tensor(logits, dtype=torch.float64)
    kernels._softmax(found, total)
    assert_close(found, expected.softmax(0).numpy(), 1e-6)
    np.testing.assert_allclose(total, expected.logsumexp(0).numpy(), rtol=1e-6, atol=1e-6)


def test_one_thread_is_for_as_long_as_the_block():
    def limits():
        return torch.get_num_threads(), [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]

    before = limits()
    with one_thread():
        threads, of_blas = limits()
        assert threads == 1
        assert set(of_blas) == {1}
    assert limits() == before


def test_nothing_to_score_is_scored():
    space, reader = MODELS[2]
    assert len(Engine(space, reader).score(make_user(space, [5], 20, R, 3), np.zeros(0, np.int64))) == 0


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("size", lambda size: size[:-1]),
        ("size", lambda size: size.astype(np.float64)),
        ("variance", lambda variance: variance[:, :-1]),
        ("value", lambda value: value[:, 1:]),
        ("center", lambda center: center[0]),
        ("center", lambda center: center.T.copy()),
        ("times", lambda times: times[1:]),
        ("category", lambda category: category[1:]),
        ("item", lambda item: item.astype(np.int32)),
        ("recent", lambda recent: recent[None]),
    ],
)
def test_a_user_of_another_shape_or_type_is_refused_before_a_kernel_reads_beyond_it(name, changed):
    space, reader = MODELS[2]
    user = make_user(space, [5, 1], 20, R, 3)
    with pytest.raises(ValueError, match=r"expected|unpack"):
        Engine(space, reader).score(user._replace(**{name: changed(getattr(user, name))}), np.array([2]))


def test_a_model_of_another_width_than_the_space_is_refused():
    space, _ = MODELS[2]
    other = ModelConfig(embedding_dim=2 * D, category_dim=2, projected_dim=P, recent_length=R)
    with pytest.raises(ArtifactError, match=f"do not belong together: the space has vectors of {D} and keys of {P}"):
        Engine(space, Reader(other, Encode(other)))


def test_kernels_are_compiled_once_whatever_arrays_come():
    """A second time would take seconds, and everybody would wait."""
    space, reader = MODELS[2]
    engine, user = Engine(space, reader), make_user(space, [5, 1], 20, R, 3)
    turned = user._replace(center=np.asfortranarray(user.center), scale=np.float32(user.scale))
    for one in (user, turned, UserState._make(read_only(part) if np.ndim(part) else part for part in user)):
        for target in (np.arange(2, 9), read_only(np.arange(2, 9)), np.arange(2, 16)[::2]):
            engine.score(one, target)
            engine.attention(one, target)
    assert len(kernels.score.signatures) == len(kernels.attend.signatures) == 1
