"""Spaces and models as files: their identity, what damage does, and that reading executes nothing."""

from __future__ import annotations

import dataclasses
import json
import pickle
from datetime import date

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from encode.config import ClusteringConfig, ModelConfig
from encode.data.vocabulary import Vocabulary
from encode.errors import ArtifactError
from encode.model.ctr import Encode, Reader, Tables
from encode.model.files import (
    MODEL_FILES,
    ModelCard,
    UserState,
    check_mirror,
    interest_weights,
    load_model,
    model_digest,
    model_files,
    read_user,
)
from encode.model.relevance import NO_ITEM
from encode.model.space import SPACE_FILES, SpaceConfig, load_space, space_of

MODEL = ModelConfig(embedding_dim=6, category_dim=2, projected_dim=3, recent_length=4, hidden_dims=(8,))
REMEMBERED = np.array([4, 6]), np.array([2, 1])
SETTINGS = SpaceConfig(ClusteringConfig(num_clusters=3), "relevance", 4, 2)
VOCABULARY = Vocabulary(np.array([5, 9]), np.array([100, 101, 107]), np.array([5, 9, 5]))


class Touch:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def space_and_reader():
    torch.manual_seed(0)
    tables = Tables(MODEL, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories)
    with torch.no_grad():
        tables.item.weight[1:] *= 20
    reader = Reader(MODEL, Encode(MODEL)).eval()
    return space_of(tables, reader, VOCABULARY, SETTINGS), reader


@pytest.fixture
def space(space_and_reader):
    return space_and_reader[0]


@pytest.fixture
def files(space_and_reader):
    space, reader = space_and_reader
    generator = torch.Generator().manual_seed(1)
    rows = torch.tensor([2, 4, 6])
    sizes = [3.0, 2.0, 1.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    remembered = REMEMBERED, (np.zeros(0, np.int64), np.zeros(0, np.int64)), (np.arange(2, 7), np.arange(1, 6))
    interests, recent = (space.items.key[rows].numpy(), space.items.embedding[rows].numpy()), np.array([6, 5, 0, 0])
    users = [
        UserState(
            *interests,
            np.array(size, np.float32),
            np.full_like(interests[0], 0.01),
            space.scale,
            *items,
            space.vocabulary.category_index[items[0]],
            recent,
        )
        for size, items in zip(sizes, remembered, strict=True)
    ]
    card = ModelCard(
        model=MODEL,
        space=space.id,
        as_of=date(2024, 3, 1),
        first_day=date(2024, 1, 1),
        test_days=7,
        metrics={"auc": 0.7},
    )
    targets = torch.randint(1, len(VOCABULARY), (3, 5), generator=generator)
    return model_files(card, reader, space.items, users, targets, {"epochs": []})


# --- identity ----------------------------------------------------------------------------------------------


def test_space_id_changes_with_each_ingredient(space):
    def but(array, place=(0,)):
        changed = array.copy()
        changed[place] = np.nextafter(changed[place], np.float32(9)) if changed.dtype.kind == "f" else 1
        return changed

    clustering = SETTINGS.clustering
    words = VOCABULARY
    changed = {
        "embedding": dataclasses.replace(space, embedding=but(space.embedding, (3, 1))),
        "key": dataclasses.replace(space, key=but(space.key, (3, 1))),
        "projection": dataclasses.replace(space, projection=but(space.projection, (3, 1))),
        "scale": dataclasses.replace(space, scale=space.scale * 1.001),
        "items": dataclasses.replace(space, vocabulary=dataclasses.replace(words, item_ids=but(words.item_ids))),
        "item categories": dataclasses.replace(
            space, vocabulary=dataclasses.replace(words, item_category_ids=but(words.item_category_ids))
        ),
        "categories": dataclasses.replace(
            space, vocabulary=dataclasses.replace(words, category_ids=but(words.category_ids))
        ),
    }
    for name, value in {
        "clusters": dataclasses.replace(SETTINGS, clustering=clustering.model_copy(update={"num_clusters": 4})),
        "iterations": dataclasses.replace(SETTINGS, clustering=clustering.model_copy(update={"num_iterations": 4})),
        "seed": dataclasses.replace(SETTINGS, clustering=clustering.model_copy(update={"seed": 4})),
        "pooling": dataclasses.replace(SETTINGS, pooling="mean"),
        "recent length": dataclasses.replace(SETTINGS, recent_length=5),
    }.items():
        changed[name] = dataclasses.replace(space, config=value)
    ids = {name: one.id for name, one in changed.items()} | {"unchanged": space.id}
    assert len(set(ids.values())) == len(ids), ids


def test_space_id_changes_with_nothing_else(space):
    copies = [np.asfortranarray(space.embedding), space.embedding.copy(order="C")]
    assert {dataclasses.replace(space, embedding=copy).id for copy in copies} == {space.id}
    assert len(space.id) == 16


def test_space_makes_the_round_trip(space):
    again = load_space(dict(space.files), "here")
    assert again.id == space.id
    assert again.files == space.files
    assert again.config == space.config
    for name in ("embedding", "key", "projection"):
        np.testing.assert_array_equal(getattr(again, name), getattr(space, name))
    for name in ("category_ids", "item_ids", "item_category_ids"):
        np.testing.assert_array_equal(getattr(again.vocabulary, name), getattr(space.vocabulary, name))


def test_the_key_of_every_real_index_is_a_unit_vector(space):
    norms = np.linalg.norm(space.key, axis=1)
    assert norms[0] == 0
    assert norms[1:] == pytest.approx(1, abs=1e-6)


def test_model_makes_the_round_trip(space_and_reader, files):
    space, reader = space_and_reader
    card, again = load_model(files, "here")
    assert (card.space, card.as_of, card.metrics) == (space.id, date(2024, 3, 1), {"auc": 0.7})
    assert not again.training
    for name, weight in reader.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    check_mirror(files, again, space.items, "here")


def test_model_digest_is_of_the_files_that_decide_scores(files):
    for name in MODEL_FILES:
        assert model_digest(files | {name: files[name] + b" "}) != model_digest(files)
    assert model_digest(files | {"report.json": b"{}"}) == model_digest(files)


# --- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACE_FILES)
def test_a_space_without_a_file_is_refused(space, name):
    with pytest.raises(ArtifactError, match=r"^over here: not a space") as caught:
        load_space({key: data for key, data in space.files.items() if key != name}, "over here")
    assert name in str(caught.value)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_model_without_a_file_is_refused(space_and_reader, files, name):
    space, _ = space_and_reader
    left = {key: data for key, data in files.items() if key != name}
    with pytest.raises(ArtifactError, match=f"^over here: .*{name}"):
        check_mirror(left, load_model(left, "over here")[1], space.items, "over here")


def flips(data, count):
    """The data with one bit flipped, at `count` places."""
    rng = np.random.default_rng(0)
    for place, bit in zip(rng.integers(len(data), size=count), rng.integers(8, size=count), strict=True):
        yield data[:place] + bytes([data[place] ^ (1 << int(bit))]) + data[place + 1 :]


def outcome(load, *arguments):
    """What it returns, or the message with which it refuses; anything else is an error of ours."""
    try:
        return load(*arguments, "over here")
    except ArtifactError as error:
        return str(error)


def test_no_flipped_bit_passes_for_the_same_space(space):
    """Most flips still parse; then the id says it. The rest is refused, with the place, not with a traceback."""
    refused = 0
    for name in SPACE_FILES:
        for damaged in flips(space.files[name], 100):
            found = outcome(load_space, space.files | {name: damaged})
            if isinstance(found, str):
                assert found.startswith("over here: ")
                refused += 1
            else:
                assert found.id != space.id
    assert 20 < refused < 180


def test_no_flipped_bit_of_a_model_goes_unseen(space_and_reader, files):
    space, _ = space_and_reader
    refused = 0
    for name in MODEL_FILES:
        for damaged in flips(files[name], 60):
            held = files | {name: damaged}
            assert model_digest(held) != model_digest(files)
            found = outcome(load_model, held)
            if not isinstance(found, str):
                found = outcome(check_mirror, held, found[1], space.items)
            if found is not None:
                assert found.startswith("over here: ")
                refused += 1
    assert refused > 60


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"\x80\x04", b"\xff" * 64])
def test_what_is_no_space_or_model_is_refused(space, files, data):
    for name in SPACE_FILES:
        with pytest.raises(ArtifactError, match=r"^over here: "):
            load_space(space.files | {name: data}, "over here")
    for name in ("model.json", "reader.safetensors"):
        with pytest.raises(ArtifactError, match=r"^over here: "):
            load_model(files | {name: data}, "over here")


def test_pickles_are_refused_and_never_opened(space_and_reader, files, tmp_path, monkeypatch):
    space, _ = space_and_reader
    opened = tmp_path / "opened"
    bomb = pickle.dumps(Touch(opened))

    def forbidden(*_args, **_options):
        raise AssertionError("a loader that can execute code was called")

    for place in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(place, forbidden)
    for name in SPACE_FILES:
        with pytest.raises(ArtifactError):
            load_space(space.files | {name: bomb}, "over here")
    for name in MODEL_FILES:
        held = files | {name: bomb}
        with pytest.raises(ArtifactError):
            check_mirror(held, load_model(held, "over here")[1], space.items, "over here")
    assert not opened.exists()
    check_mirror(files, load_model(files, "here")[1], load_space(dict(space.files), "here").items, "here")


def test_unknown_settings_are_refused(space, files):
    settings = json.loads(space.files["space.json"]) | {"metric": "dot"}
    with pytest.raises(ArtifactError, match="metric"):
        load_space(space.files | {"space.json": json.dumps(settings).encode()}, "over here")
    card = json.loads(files["model.json"]) | {"code": "x"}
    with pytest.raises(ArtifactError, match="code"):
        load_model(files | {"model.json": json.dumps(card).encode()}, "over here")


@pytest.mark.parametrize("table", ["embedding", "key"])
def test_tables_of_another_length_are_refused(space, table):
    short = dataclasses.replace(space, **{table: getattr(space, table)[:-1]})
    with pytest.raises(ArtifactError, match=r"over here: \d embeddings for a vocabulary of 7"):
        load_space(short.files, "over here")


def test_weights_of_another_shape_are_refused(files):
    weights = load(files["reader.safetensors"])
    weights["mlp.0.weight"] = weights["mlp.0.weight"][:, 1:].copy()
    with pytest.raises(ArtifactError, match=r"(?s)over here: not a model .*mlp\.0\.weight"):
        load_model(files | {"reader.safetensors": save(weights)}, "over here")


# --- the mirror test ---------------------------------------------------------------------------------------


def test_mirror_fails_when_any_weight_changes(space_and_reader, files):
    space, reader = space_and_reader
    for name, weight in reader.state_dict().items():
        kept = weight.clone()
        weight += 0.1
        with pytest.raises(
            ArtifactError, match=r"over here: mirror test: a probability is off by .*expected at most 1e-05"
        ):
            check_mirror(files, reader, space.items, "over here")
        weight.copy_(kept)
        check_mirror(files, reader, space.items, name)


@pytest.mark.parametrize("table", ["embedding", "key"])
def test_mirror_fails_in_another_space(space_and_reader, files, table):
    space, reader = space_and_reader
    other = dataclasses.replace(space, **{table: -getattr(space, table)})
    with pytest.raises(ArtifactError, match="do not belong together"):
        check_mirror(files, reader, other.items, "over here")


def test_mirror_fails_on_a_probability_that_is_no_number(space_and_reader, files):
    space, reader = space_and_reader
    with torch.no_grad():
        reader.log_scale.fill_(float("nan"))
    with pytest.raises(ArtifactError, match="mirror test"):
        check_mirror(files, reader, space.items, "over here")


def test_the_mirror_holds_what_each_user_remembers(files):
    """Rows are of different lengths, and stay ascending: a candidate is looked up in them."""
    mirror = load(files["mirror.safetensors"])
    assert mirror["item"].shape == (3, 6)
    assert (np.diff(mirror["item"]) >= 0).all()
    assert mirror["item"][0].tolist() == [4, 6, *[NO_ITEM] * 4]
    assert mirror["times"].tolist() == [[2, 1, *[0] * 4], [0] * 6, [1, 2, 3, 4, 5, 0]]


def test_mirror_holds_whatever_scores_to_what_training_wrote_down(space_and_reader, files):
    space, reader = space_and_reader

    def score(user, target):
        return torch.sigmoid(read_user(reader, space.items, user, torch.from_numpy(target))).numpy()

    check_mirror(files, reader, space.items, "over here", score)
    with pytest.raises(ArtifactError, match="over here: mirror test: a probability is off by 1"):
        check_mirror(files, reader, space.items, "over here", lambda user, target: score(user, target) + 1)


def test_mirror_fails_in_a_smaller_space(space_and_reader, files):
    space, reader = space_and_reader
    other = dataclasses.replace(space, embedding=space.embedding[:2], key=space.key[:2])
    with pytest.raises(ArtifactError, match="over here: mirror test cannot run"):
        check_mirror(files, reader, other.items, "over here")


def test_a_candidate_is_scored_alone(space_and_reader):
    """The other candidates of a request change nothing."""
    space, reader = space_and_reader
    rows = torch.tensor([2, 4, 6])
    user = UserState(
        space.items.key[rows].numpy(),
        space.items.embedding[rows].numpy(),
        np.array([5, 2, 1], np.float32),
        np.full((3, MODEL.projected_dim), 0.01, np.float32),
        space.scale,
        *REMEMBERED,
        space.vocabulary.category_index[REMEMBERED[0]],
        np.array([4, 5, 0, 0]),
    )
    candidates = torch.arange(1, 7)
    together, weights = (read(reader, space.items, user, candidates) for read in (read_user, interest_weights))
    for place in range(6):
        one = torch.tensor([place + 1])
        alone, own_weights = (read(reader, space.items, user, one) for read in (read_user, interest_weights))
        torch.testing.assert_close(alone[0], together[place], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(own_weights[0], weights[place], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


def test_what_is_remembered_of_categories_is_that_of_its_items(space):
    """As training counts them: unknown categories do not count."""
    item, times, category = np.array([2, 3, 5, 6]), np.array([4, 1, 2, 70_000]), np.array([3, 2, 3, 1])
    nothing = [np.zeros(shape, np.float32) for shape in ((1, MODEL.projected_dim), (1, MODEL.embedding_dim), 1)]
    user = UserState(*nothing, nothing[0], space.scale, item, times, category, np.zeros(4, np.int64))
    assert user.known.categories.item[0].tolist() == [2, 3, NO_ITEM]
    assert user.known.categories.times[0].tolist() == [1, 6, 0]
