"""Training: splits by time, the model trained as it will be served, the best epoch kept.

V vocabulary   P projected_dim   I impressions
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from encode.config import Config, ModelConfig, TrainingConfig
from encode.data.histories import Histories, to_batch
from encode.data.impressions import Splits, draw_impressions, snapshot_times, split_days
from encode.data.vocabulary import Vocabulary, build_vocabulary
from encode.distributed import place, sum_arrays, sum_gradients
from encode.errors import ConfigError, DataError
from encode.evaluate.batches import Batch, batches
from encode.evaluate.metrics import curves, summary
from encode.evaluate.reading import predict, read_batch
from encode.evaluate.replay import Replay, assign, make_replay
from encode.interests.clustered import Clustered
from encode.interests.extract import extract, state_of
from encode.interests.user_rows import UserRows
from encode.model.ctr import Reader, Tables
from encode.model.files import ModelCard, model_files
from encode.model.long_term import Catalog
from encode.model.reduction import draw_triplets, dynamic_triplet_loss
from encode.model.space import Space, SpaceConfig, space_of
from encode.outputs import recipe
from encode.schema import UNKNOWN, Window, day_of, day_start

_TRIPLETS_PER_UPDATE = 1024
_MIRROR_USERS = 4
_MIRROR_TARGETS = 16


@dataclass(frozen=True)
class Trained:
    """A trained model: its space, how it reads a user, and what it is worth."""

    space: Space
    reader: Reader
    metrics: dict[str, float]
    """Of the test split; `valid_*` of the validation split."""
    report: dict[str, Any]
    """For people to look at: `encode.evaluate.metrics.curves`, and losses and validation metrics of each epoch."""


def train(histories: Histories, as_of: date, config: Config, say: Callable[[str], None]) -> Trained:
    """Fit the CTR model and its space on all behaviors before `as_of`, and measure them on the last days.

    Same behaviors, config and machine give the same bytes. The vocabulary holds what came before the validation days.

    Args:
        histories: all behaviors before `as_of`.
        as_of: the day from which the splits are counted back.
        config: model, clustering and training sections are used.
        say: told about progress.

    Raises:
        DataError: there is not enough to train on.
        ConfigError: training diverged.
    """
    torch.manual_seed(config.training.seed)
    splits = split_days(Window(day_of(int(histories.timestamps.min())), as_of), config.training)
    vocabulary = build_vocabulary(histories.before(day_start(splits.valid.start)), config.training.min_item_count)
    replays = _replays(histories, splits, vocabulary, config)
    say(
        f"vocabulary of {len(vocabulary.item_ids):,} items in {len(vocabulary.category_ids):,} categories; "
        + ", ".join(f"{name} {len(replay.impressions):,}" for name, replay in replays.items())
        + " impressions"
    )
    tables = Tables(config.model, torch.from_numpy(vocabulary.category_index), vocabulary.num_categories)
    reader = Reader(config.model, Clustered(config.model, config.clustering))
    epochs = fit(tables, reader, replays["train"], replays["valid"], config.model, config.training, say)
    probabilities = predict(tables.all_items(), reader, replays["test"])
    test = replays["test"].impressions
    metrics = summary(test.user, test.labels, probabilities, test.first_time)
    lengths = replays["test"].history_lengths()
    metrics |= {name: value for name, value in epochs[best_epoch(epochs)].items() if name.startswith("valid_")}
    say("test: " + ", ".join(f"{name} {metrics[name]:.4f}" for name in ("auc", "gauc", "logloss", "calibration")))
    model = config.model
    settings = SpaceConfig(config.clustering, model.pooling, model.recent_length, model.num_remembered)
    return Trained(
        space_of(tables, reader, vocabulary, settings),
        reader,
        metrics,
        {**curves(test.labels, probabilities, lengths), "epochs": epochs},
    )


def _replays(histories: Histories, splits: Splits, vocabulary: Vocabulary, config: Config) -> dict[str, Replay]:
    training = config.training
    wanted = (
        ("train", splits.train, training.max_positives),
        ("valid", splits.valid, training.max_eval_positives),
        ("test", splits.test, training.max_eval_positives),
    )
    replays = {}
    for name, days, limit in wanted:
        impressions = draw_impressions(histories, days, training, limit)
        as_of = snapshot_times(impressions, days, training.snapshot_days)
        replays[name] = make_replay(histories, impressions, as_of, vocabulary, config.model.recent_length)
    return replays


def fit(
    tables: Tables,
    reader: Reader,
    train: Replay,
    valid: Replay,
    model: ModelConfig,
    training: TrainingConfig,
    say: Callable[[str], None],
) -> list[dict[str, float]]:
    """Train until the validation GAUC has not risen for `patience` epochs; leave the best epoch's weights in place.

    Returns:
        Losses and validation metrics of each epoch.

    Raises:
        DataError: no user of the validation days has both classes.
        ConfigError: the loss or the embeddings became infinite or no number.
    """
    optimizers = optimizers_of(tables, reader, training)
    torch.manual_seed(training.seed + place()[0])  # of dropout, which each process draws for itself
    rng = np.random.default_rng(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    shown = valid.impressions
    epochs: list[dict[str, float]] = []
    best = copy.deepcopy((tables.state_dict(), reader.state_dict()))
    for epoch in range(training.num_epochs):
        started = time.monotonic()
        losses = run_epoch(tables, reader, train, model, training, optimizers, rng, generator, say)
        _refuse_diverged(epoch, losses, tables, training)
        reader.eval()
        items = _follow(tables, reader, train)
        measured = summary(shown.user, shown.labels, predict(items, reader, valid), shown.first_time)
        epochs.append(losses | {f"valid_{name}": value for name, value in measured.items()})
        say(
            f"epoch {epoch + 1} of {training.num_epochs}: loss {losses['loss']:.4f}, triplet {losses['triplet']:.4f}, "
            f"valid auc {measured['auc']:.4f}, gauc {measured['gauc']:.4f} ({time.monotonic() - started:.0f} s)"
        )
        if np.isnan(measured["gauc"]):
            raise DataError("validation days: no user has both positives and negatives; give more days or users")
        leading = best_epoch(epochs)
        if leading == epoch:
            best = copy.deepcopy((tables.state_dict(), reader.state_dict()))
        elif epoch - leading >= training.patience:
            say(f"no better GAUC since epoch {leading + 1}: training stops, and that epoch is kept")
            break
    tables.load_state_dict(best[0])
    reader.load_state_dict(best[1])
    return epochs


def _refuse_diverged(epoch: int, losses: Mapping[str, float], tables: Tables, training: TrainingConfig) -> None:
    if all(map(math.isfinite, losses.values())) and all(bool(p.isfinite().all()) for p in tables.parameters()):
        return
    raise ConfigError(
        f"training diverged in epoch {epoch + 1} (loss {losses['loss']:g}); lower training.learning_rate, "
        f"found {training.learning_rate:g}"
    )


def optimizers_of(tables: Tables, reader: Reader, training: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return Adam for the tables by id, which touches the rows of a batch only, and AdamW for all else."""
    by_id = tables.by_id()
    known = {id(parameter) for parameter in by_id}
    others = [p for module in (tables, reader) for p in module.parameters() if p.requires_grad and id(p) not in known]
    rate = training.learning_rate
    return [
        torch.optim.SparseAdam(by_id, lr=rate),
        torch.optim.AdamW(others, lr=rate, weight_decay=training.weight_decay),
    ]


def best_epoch(epochs: list[dict[str, float]]) -> int:
    """Return the epoch with the highest validation GAUC, the first among equals."""
    return int(np.argmax([epoch["valid_gauc"] for epoch in epochs]))


def run_epoch(
    tables: Tables,
    reader: Reader,
    replay: Replay,
    model: ModelConfig,
    training: TrainingConfig,
    optimizers: Sequence[torch.optim.Optimizer],
    rng: np.random.Generator,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Run the offline stage with the embeddings of the moment, then go once over the impressions."""
    tables.train()
    reader.train()
    labels = assign(replay, _follow(tables, reader, replay), reader.long_term.assign)
    parameters = [
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    ]
    totals = np.zeros(4)
    said = time.monotonic()
    for batch in batches(replay, labels, training.histories_per_batch, rng, training.unknown_share):
        logit, auxiliary = read_batch(tables.items(batch.items), reader, batch)
        loss = F.binary_cross_entropy_with_logits(logit, batch.label)
        triplet = _triplet_loss(tables, batch, model, generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = batch.weight * loss + batch.share * auxiliary + model.triplet_weight * triplet
        total.backward()  # type: ignore[no-untyped-call]
        sum_gradients(parameters)
        for optimizer in optimizers:
            optimizer.step()
        own = len(batch.rows) if batch.weight > 0 else 0
        whole = own / batch.weight if own else 0  # of the triplets' loss each process has its part
        totals += np.array([own * loss.item(), whole * triplet.item(), own * auxiliary.item(), own])
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"  {totals[3] / len(replay.impressions):.0%} of the epoch, loss {totals[0] / totals[3]:.4f}")
    totals = sum_arrays(totals)
    names = ("loss", "triplet", "auxiliary")
    return {name: float(total) for name, total in zip(names, totals / totals[3], strict=False)}


def _follow(tables: Tables, reader: Reader, replay: Replay) -> Catalog:
    """Bring what is not learned by gradients up to the embeddings of the moment; return the whole vocabulary."""
    counts = replay.counts()
    tables.follow(counts)
    items = tables.all_items()
    reader.long_term.follow(items, counts)
    return items


def _triplet_loss(tables: Tables, batch: Batch, model: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """The reduction's loss on triplets drawn anew from the batch's histories; only W_h is taught by it."""
    if model.triplet_weight == 0 or model.reduction != "learned":
        return tables.projection.new_zeros(())
    triplets = draw_triplets(batch.lengths, _TRIPLETS_PER_UPDATE, generator)
    rank, world = place()
    own = triplets[triplets[:, 0] % world == rank] if batch.weight > 0 else triplets[:0]
    behavior = batch.history[own[:, :1] // world, own[:, 1:]]
    items = batch.items[behavior]
    embedding = tables.embed(items).detach()
    loss = dynamic_triplet_loss(
        embedding,
        embedding @ tables.projection,
        model.margin_weight,
        model.margin,
        semi_hard=model.selection == "semi-hard",
        category=tables.item_category[items] if model.selection == "category" else None,
    )
    return loss * (len(own) / max(1, len(triplets)))


def recipe_of(config: Config, as_of: date, inputs: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the settings that decide about a model, and the fingerprint of the one that they make of `inputs`."""
    settings = config.model_dump(mode="json", include={"model", "clustering", "training"}) | {"as_of": str(as_of)}
    return settings, recipe("model", settings, inputs, config.training.seed)


def _made_up(histories: Histories, rng: np.random.Generator) -> pa.RecordBatch:
    """Return histories as long as the longest, each behavior drawn from all users': a model holds nobody's history."""
    lengths = np.sort(np.diff(histories.offsets))[-_MIRROR_USERS:]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = rng.integers(len(histories.item_ids), size=len(owner))
    columns = [column[rows] for column in (histories.item_ids, histories.category_ids, histories.timestamps)]
    order = np.lexsort((columns[1], columns[0], columns[2], owner))
    return to_batch(np.arange(len(lengths)), np.append(0, np.cumsum(lengths)), [column[order] for column in columns])


def package(trained: Trained, histories: Histories, as_of: date, config: Config) -> tuple[ModelCard, dict[str, bytes]]:
    """Return a trained model as files, with a mirror test of made-up users with long histories and one unknown."""
    space, rng = trained.space, np.random.default_rng(0)
    rows = UserRows(extract(_made_up(histories, rng), space))
    users = [state_of(row, space) for row in (*rows, None)]
    targets = rng.integers(UNKNOWN, len(space.vocabulary), size=(len(users), _MIRROR_TARGETS))
    card = ModelCard(
        model=config.model,
        space=space.id,
        as_of=as_of,
        first_day=day_of(int(histories.timestamps.min())),
        test_days=config.training.test_days,
        metrics={name: value for name, value in trained.metrics.items() if math.isfinite(value)},  # JSON has no NaN
    )
    files = model_files(card, trained.reader, space.items, users, torch.from_numpy(targets), trained.report)
    return card, files
