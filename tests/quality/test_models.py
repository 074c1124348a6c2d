"""Every model of the bench by its name: it runs, it trains, and it keeps what the bench promises of it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encode.config import ModelConfig, TrainingConfig
from encode.data.histories import Histories
from encode.data.impressions import Impressions
from encode.data.vocabulary import Vocabulary
from encode.errors import ConfigError
from encode.evaluate.batches import batches
from encode.evaluate.reading import history_of, of_batch, read_batch, targets_of
from encode.evaluate.replay import assign, make_replay
from encode.model.ctr import Reader, Tables
from encode.model.long_term import Sizes
from encode.quality.bench import SETUP
from encode.quality.cells import Setup, backbone_of, check_model
from encode.quality.models import ABLATIONS, COUNTED, GROUPS, MODELS, choose, named
from encode.quality.rivals.attention import DinUnit, FullAttention
from encode.quality.rivals.sparse_ctr import SparseCTR
from encode.quality.variants import Variant
from encode.schema import SECONDS_PER_DAY

ITEMS = np.arange(10, 40)
VOCABULARY = Vocabulary(np.array([1, 2, 3]), ITEMS, 1 + ITEMS % 3)
KINDS = ("click", "buy")
LENGTHS = (70, 0, 25, 1)
"""Behaviors of each user; the impressions come after them."""
SHOWN = (3, 2, 5, 1)
"""Impressions of each user."""
SMALL = Setup(SETUP.backbone.model_copy(update={"hidden_dims": (16,), "recent_length": 4}), SETUP.training)
ALL = pytest.mark.parametrize("name", dict.fromkeys([*MODELS, *COUNTED, *ABLATIONS]))


def replay_of(lengths=LENGTHS, shown=SHOWN):
    rng = np.random.default_rng(0)
    num_users, num_rows = len(lengths), sum(lengths)
    item = rng.choice(ITEMS, num_rows)
    offsets = np.append(0, np.cumsum(lengths))
    when = np.concatenate([np.sort(rng.integers(1, 100 * SECONDS_PER_DAY, n)) for n in lengths])
    kinds = rng.integers(0, 2, num_rows).astype(np.int32)
    histories = Histories(np.arange(1, num_users + 1), offsets, item, 1 + item % 3, when, kinds, KINDS)
    user = np.repeat(np.arange(num_users), shown)
    target = rng.choice(ITEMS, len(user))
    labels = rng.integers(0, 2, len(user)).astype(np.int8)
    as_of = np.full(len(user), 101 * SECONDS_PER_DAY)
    impressions = Impressions(user, target, 1 + target % 3, labels, as_of, np.ones(len(user), bool))
    return make_replay(histories, impressions, as_of, VOCABULARY, SMALL.backbone.recent_length)


def made(name: str) -> tuple[ModelConfig, Tables, Reader]:
    """A model that tells behaviors apart as a trained one does: embeddings are large."""
    chosen = choose(name)
    config = backbone_of(SMALL, chosen)
    sizes = Sizes(len(VOCABULARY), VOCABULARY.num_categories, len(KINDS), config.embedding_dim, config.projected_dim)
    torch.manual_seed(0)
    tables = Tables(config, torch.from_numpy(VOCABULARY.category_index), VOCABULARY.num_categories, len(KINDS))
    with torch.no_grad():
        for table in (tables.item, tables.category, tables.kind):
            table.weight *= 10
    return config, tables, Reader(config, chosen.make(sizes))


def tensors(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [one for part in state for one in tensors(part)] if isinstance(state, tuple | list) else []


@ALL
def test_every_model_trains_and_minds_its_own_user(name):
    _, tables, reader = made(name)
    replay = replay_of()
    tables.follow(replay.counts())
    labels = assign(replay, tables.all_items(), reader.long_term.assign)

    # It trains: every gradient is finite, an empty history among the others or not.
    (batch,) = batches(replay, labels, 64, np.random.default_rng(0))
    logit, auxiliary = read_batch(tables.items(batch.items), reader.train(), batch)
    (F.binary_cross_entropy_with_logits(logit, batch.label) + auxiliary).backward()
    gradients = [p.grad.to_dense() for p in (*tables.parameters(), *reader.parameters()) if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert tables.item.weight.grad.to_dense().any()

    # An impression's logit does not depend on who else is in the batch, nor on padding.
    reader.eval()
    table = tables.all_items()
    with torch.no_grad():
        (batch,) = batches(replay, labels, 64)
        whole = torch.empty(len(batch.rows))
        whole[batch.rows] = read_batch(of_batch(table, batch), reader, batch)[0]
        assert len(whole) == sum(SHOWN)
        assert whole.isfinite().all()
        for alone in batches(replay, labels, 1):
            num_targets = alone.target.shape[1]
            wider = {part: F.pad(getattr(alone, part), (0, 7)) for part in ("history", "kind", "age", "cluster")}
            place = alone.place // num_targets * (num_targets + 2) + alone.place % num_targets
            padded = alone._replace(**wider, target=F.pad(alone.target, (0, 2)), place=place)
            for one in (alone, padded):
                found = read_batch(of_batch(table, one), reader, one)[0]
                torch.testing.assert_close(found, whole[one.rows], atol=2e-5, rtol=1e-4)

        # What is known of a user has nothing to do with targets.
        items = of_batch(table, batch)
        history, target = history_of(items, batch, reader.scale), targets_of(items, batch)
        before = reader.summarise(history)
        kept = [one.clone() for one in tensors(before)]
        read = reader.long_term.read(before.long_term, target)
        other = reader.long_term.read(before.long_term, target._replace(embedding=target.embedding.flip(2)))
        for state in (before, reader.summarise(history)):
            for one, expected in zip(tensors(state), kept, strict=True):
                torch.testing.assert_close(one, expected, atol=0, rtol=0)
        for found in (read, other):
            assert found.vectors.shape[2:] == (reader.long_term.num_vectors, history.embedding.shape[2])
            assert found.scalars.shape[2:] == (reader.long_term.num_scalars,)


@ALL
def test_what_may_be_kept_is_smaller_than_the_history(name):
    """`target_free` says that the state may be stored instead of 2,000 behaviors; otherwise it holds them."""
    _, tables, reader = made(name)
    replay, table = replay_of((2_000,), (1,)), tables.all_items()
    (batch,) = batches(replay, assign(replay, table, reader.eval().long_term.assign), 64)
    with torch.no_grad():
        history = history_of(of_batch(table, batch), batch, reader.scale)
        state = reader.long_term.summarise(history)
    size = sum(one.nbytes for one in tensors(state))
    if reader.long_term.target_free:
        assert size < history.embedding.nbytes / 2
    else:
        assert size >= history.embedding.nbytes


@ALL
def test_a_batch_of_empty_histories_is_read(name):
    _, tables, reader = made(name)
    replay, table = replay_of((0, 0, 5), (2, 1, 0)), tables.all_items()
    (batch,) = batches(replay, assign(replay, table, reader.eval().long_term.assign), 64)
    logit, _ = read_batch(of_batch(table, batch), reader, batch)
    assert logit.isfinite().all()


# --- names -------------------------------------------------------------------------------------------------


def test_a_name_alone_is_the_model_as_it_is():
    chosen = choose("din")
    assert (chosen.name, chosen.model, chosen.options) == ("din", MODELS["din"], {})
    assert isinstance(chosen.make(Sizes(3, 3, 1, 8, 4)), DinUnit)


def test_only_where_keys_are_what_it_is_about_the_triplet_loss_teaches():
    assert {name for name in MODELS if backbone_of(SETUP, choose(name)).triplet_weight > 0} == {
        name for name, model in MODELS.items() if model.kind in (FullAttention, Variant)
    }
    assert backbone_of(SETUP, choose("din:triplet_weight=0.3")).triplet_weight == 0.3


def test_switches_are_read_by_their_type():
    chosen = choose("encode:num_clusters=16,grouping=time,decay=1,sharpness=0.5,affinity=false")
    expected = {"num_clusters": 16, "grouping": "time", "decay": 1.0, "sharpness": 0.5, "affinity": False}
    assert chosen.options == {**MODELS["encode"].options, **expected}
    assert {key: type(chosen.options[key]) for key in expected} == {key: type(one) for key, one in expected.items()}
    assert choose("sparse-ctr:branches=local+global").options == {"branches": ["local", "global"]}


def test_switches_of_the_backbone_are_told_from_those_of_the_model():
    chosen = choose("encode:projected_dim=4,reduction=pca,hidden_dims=32+8,size_prior=0.5,pooling=relevance,dropout=0")
    assert chosen.options == {**MODELS["encode"].options, "size_prior": 0.5, "pooling": "relevance"}
    assert chosen.backbone == {"projected_dim": 4, "reduction": "pca", "hidden_dims": (32, 8), "dropout": 0.0}
    config = backbone_of(SETUP, chosen)
    assert (config.projected_dim, config.hidden_dims) == (4, (32, 8))
    assert config.embedding_dim == SETUP.backbone.embedding_dim


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoed", r"model 'encoed': unknown; have recent, mean, .*encode, and groups all, counted, ablations$"),
        ("encode:k=3", r"'encode:k=3': unknown switch 'k'; have num_clusters, .*embedding_dim"),
        ("full:size_prior=0", r"unknown switch 'size_prior'"),  # full attention has no sizes
        ("twin:num_remembered=9", r"unknown switch .num_remembered."),
        ("sim-hard:pooling=mean", r"unknown switch 'pooling'; have k, num_heads"),
        ("encode:grouping", r"switch grouping has no value; write grouping=VALUE"),
        ("encode:grouping=tim", r"grouping: Input should be 'kmeans', 'time', .*found 'tim'"),
        ("encode:num_clusters=many", r"num_clusters: Input should be a valid integer.*found 'many'"),
        ("encode:affinity=2", r"affinity: Input should be a valid boolean.*found '2'"),
        ("twin:margin=no", r"margin: Input should be 'dynamic' or 'fixed', found 'no'"),
    ],
)
def test_what_is_unknown_is_refused_with_what_there_is(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        choose(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encode:num_clusters=1000", r"model 'encode:num_clusters=1000': num_clusters: .*less than or equal to 255"),
        ("encode:projected_dim=99", r"model 'encode:projected_dim=99': Value error, projected_dim 99 must not exceed"),
        ("encode:dropout=1", r"dropout: Input should be less than 1"),
        ("sim-soft:num_heads=5", r"model 'sim-soft:num_heads=5': .*num_heads is 5, which does not divide"),
        ("eta:k=0", r"model 'eta:k=0': .*k is 0, expected at least 1"),
        ("sparse-ctr:branches=none", r"branches is .*none.*, expected some of"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(name, SETUP)
    assert "\n" not in str(caught.value)


def test_every_switch_of_every_model_can_be_named():
    for name, model in MODELS.items():
        for one in inspect.signature(model.kind.__init__).parameters.values():
            if one.kind is inspect.Parameter.KEYWORD_ONLY and one.default is not None:
                many = isinstance(one.default, tuple | list)
                text = "+".join(one.default) if many else str(one.default)
                chosen = choose(f"{name}:{one.name}={text}")
                found = chosen.options[one.name]
                assert (tuple(found) if many else found) == one.default
                check_model(chosen.name, SETUP)


def test_groups_stand_for_their_models_each_once():
    assert named(["all"]) == tuple(MODELS)
    assert named(["ablations"]) == ABLATIONS
    assert named(["encode", "all", "twin:k=5"]) == (
        "encode",
        *(name for name in MODELS if name != "encode"),
        "twin:k=5",
    )
    assert not set(GROUPS) & set(MODELS)


def test_a_model_is_told_how_often_the_target_and_its_category_were_had():
    """The counts are the last scalars, whatever the model reads beside them, and nothing else of it changes."""
    name = "dman:counts=true,categories=true"
    plain, (_, tables, reader) = made("dman")[2].long_term, made(name)
    counted = reader.long_term
    assert counted.num_scalars == plain.num_scalars + 2
    replay, table = replay_of((40,), (6,)), tables.all_items()
    (batch,) = batches(replay, assign(replay, table, reader.eval().long_term.assign), 64)
    with torch.no_grad():
        items = of_batch(table, batch)
        history, target = history_of(items, batch, reader.scale), targets_of(items, batch)
        told = counted.read(counted.summarise(history), target)
        counted.own.load_state_dict(plain.state_dict())
        own = plain.read(plain.summarise(history), target)
    for place, part in ((-2, "item"), (-1, "category")):
        times = (getattr(history, part)[:, None] == getattr(target, part)[..., None]).sum(2)
        assert times.max() > 1
        torch.testing.assert_close(told.scalars[..., place], times.float().log1p())
    torch.testing.assert_close(told.vectors, own.vectors)
    torch.testing.assert_close(told.scalars[..., :-2], own.scalars)
    assert made("dman:categories=true")[2].long_term.num_scalars == plain.num_scalars + 1


def test_all_are_told_the_counts_or_none():
    assert named(["counted"]) == COUNTED
    plain = {name: made(name)[2].long_term.num_scalars for name in MODELS}
    for name in COUNTED:
        model = name.partition(":")[0]
        assert made(name)[2].long_term.num_scalars == plain[model] + 2 * (name != "encode")


def test_an_ablation_is_encode_with_something_changed():
    """Each switch that it names is one that ENCODE has otherwise."""
    assert len(set(ABLATIONS)) == len(ABLATIONS)
    defaults = {key: one.default for key, one in inspect.signature(Variant.__init__).parameters.items()}

    def switches(name):
        chosen = choose(name)
        return {**backbone_of(SETUP, chosen).model_dump(), **defaults, **chosen.options}

    plain = switches("encode")
    for name in ABLATIONS:
        model, _, text = name.partition(":")
        assert model == "encode"
        changed = {key for key, value in switches(name).items() if plain[key] != value}
        assert changed == {switch.partition("=")[0] for switch in text.split(",")}, name


def test_training_is_the_same_for_all():
    assert isinstance(SETUP.training, TrainingConfig)
    for name in MODELS:
        differing = {
            key
            for key, value in backbone_of(SETUP, choose(name)).model_dump().items()
            if value != SETUP.backbone.model_dump()[key]
        }
        assert differing <= {"triplet_weight"}
    assert issubclass(MODELS["sparse-ctr"].kind, SparseCTR)
