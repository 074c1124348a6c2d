"""Training: splits by time, the model trained as it will be served, the best epoch kept.

    V vocabulary   P projected_dim   I impressions
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from encode.config import Config, ModelConfig
from encode.data.histories import Histories
from encode.data.impressions import Impressions, Splits, draw_impressions, split_days
from encode.data.vocabulary import Vocabulary, build_vocabulary
from encode.evaluate.metrics import summary
from encode.evaluate.replay import (
    Batch,
    Replay,
    all_keys,
    assign_clusters,
    batches,
    make_replay,
    predict,
    read_batch,
)
from encode.model.ctr import Reader, Tables
from encode.model.reduction import draw_triplets, dynamic_triplet_loss
from encode.model.space import Space, SpaceConfig, space_of
from encode.schema import Window, day_start

_TRIPLETS_PER_UPDATE = 1024


@dataclass(frozen=True)
class Trained:
    """A trained model: its space, how it reads a user, and what it is worth."""

    space: Space
    reader: Reader
    metrics: dict[str, float]
    """Of the test split; `valid_*` of the validation split."""
    epochs: tuple[dict[str, float], ...]
    """Losses and validation metrics of each epoch."""
    predictions: dict[str, np.ndarray]
    """Of the test split: `label`, `probability`, `history_length`, for plots."""


def train(histories: Histories, window: Window, config: Config, say: Callable[[str], None]) -> Trained:
    """Fit the CTR model and its space on the behaviors of `window`, and measure them on its last days.

    Same behaviors, config and machine give the same bytes. The vocabulary holds what came before the validation days.

    Args:
        histories: all behaviors before the end of the window.
        window: its end is where the splits are counted back from.
        config: model, clustering and training sections are used.
        say: told about progress.

    Raises:
        DataError: there is not enough to train on.
    """
    torch.manual_seed(config.training.seed)
    splits = split_days(window, config.training)
    vocabulary = build_vocabulary(histories.before(day_start(splits.valid.start)), config.training.min_item_count)
    replays = _replays(histories, splits, vocabulary, config)
    say(
        f"vocabulary of {len(vocabulary.item_ids):,} items in {len(vocabulary.category_ids):,} categories; "
        + ", ".join(f"{name} {len(replay.impressions):,}" for name, replay in replays.items())
        + " impressions"
    )
    tables = Tables(config.model, torch.from_numpy(vocabulary.category_index), vocabulary.num_categories)
    reader = Reader(config.model)
    epochs = _fit(tables, reader, replays, config, say)
    probabilities = predict(tables, reader, replays["test"], config.model, config.clustering)
    test = replays["test"].impressions
    metrics = summary(test.user, test.labels, probabilities, test.first_time)
    best = max(epochs, key=lambda epoch: epoch["valid_gauc"])
    metrics |= {name: value for name, value in best.items() if name.startswith("valid_")}
    say("test: " + ", ".join(f"{name} {metrics[name]:.4f}" for name in ("auc", "gauc", "logloss", "calibration")))
    settings = SpaceConfig(config.clustering, config.model.pooling, config.model.recent_length)
    return Trained(
        space_of(tables, reader, vocabulary, settings),
        reader,
        metrics,
        tuple(epochs),
        {"label": test.labels, "probability": probabilities, "history_length": _history_lengths(replays["test"])},
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
        replays[name] = replay_of(histories, impressions, days, vocabulary, config)
    return replays


def replay_of(
    histories: Histories, impressions: Impressions, days: Window, vocabulary: Vocabulary, config: Config
) -> Replay:
    """Replay impressions with the settings of a config."""
    return make_replay(
        histories, impressions, days, vocabulary, config.training.snapshot_days, config.model.recent_length
    )


def _fit(
    tables: Tables, reader: Reader, replays: dict[str, Replay], config: Config, say: Callable[[str], None]
) -> list[dict[str, float]]:
    """Train until the validation GAUC has not risen for `patience` epochs; leave the best epoch's weights in place."""
    training = config.training
    optimizer = torch.optim.AdamW(
        [p for module in (tables, reader) for p in module.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
    )
    rng = np.random.default_rng(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    valid = replays["valid"].impressions
    epochs: list[dict[str, float]] = []
    best = copy.deepcopy((tables.state_dict(), reader.state_dict()))
    for epoch in range(training.num_epochs):
        started = time.monotonic()
        losses = _run_epoch(tables, reader, replays["train"], config, optimizer, rng, generator, say)
        probabilities = predict(tables, reader, replays["valid"], config.model, config.clustering)
        measured = summary(valid.user, valid.labels, probabilities, valid.first_time)
        epochs.append(losses | {f"valid_{name}": value for name, value in measured.items()})
        say(
            f"epoch {epoch + 1} of {training.num_epochs}: loss {losses['loss']:.4f}, triplet {losses['triplet']:.4f}, "
            f"valid auc {measured['auc']:.4f}, gauc {measured['gauc']:.4f} ({time.monotonic() - started:.0f} s)"
        )
        scores = [e["valid_gauc"] for e in epochs]
        if scores[-1] == max(scores):
            best = copy.deepcopy((tables.state_dict(), reader.state_dict()))
        elif len(scores) - 1 - int(np.argmax(scores)) >= training.patience:
            break
    tables.load_state_dict(best[0])
    reader.load_state_dict(best[1])
    return epochs


def _run_epoch(
    tables: Tables,
    reader: Reader,
    replay: Replay,
    config: Config,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Cluster all histories with the keys of the moment, then go once over the impressions."""
    labels = assign_clusters(replay, all_keys(tables), config.clustering)
    tables.train()
    reader.train()
    totals = np.zeros(3)
    said = time.monotonic()
    for batch in batches(replay, labels, config.clustering.num_clusters, config.training.histories_per_batch, rng):
        reading = read_batch(tables, reader, batch, config.model)
        loss = F.binary_cross_entropy_with_logits(reading.logit, batch.label)
        triplet = _triplet_loss(tables, batch, config.model, generator)
        optimizer.zero_grad()
        (loss + config.model.triplet_weight * triplet).backward()
        optimizer.step()
        totals += np.array([loss.item(), triplet.item(), 1.0]) * len(batch.rows)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"  {totals[2] / len(replay.impressions):.0%} of the epoch, loss {totals[0] / totals[2]:.4f}")
    return {"loss": totals[0] / totals[2], "triplet": totals[1] / totals[2]}


def _triplet_loss(tables: Tables, batch: Batch, model: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """The reduction's loss on triplets drawn anew from the batch's histories; only W_h is taught by it."""
    triplets = draw_triplets(batch.history_offsets, _TRIPLETS_PER_UPDATE, generator)
    embedding = tables.embed(batch.items[batch.behavior[triplets]]).detach()
    return dynamic_triplet_loss(embedding, embedding @ tables.projection, model.margin_weight, model.margin)


def _history_lengths(replay: Replay) -> np.ndarray:
    return np.repeat(replay.history_end - replay.history_begin, np.diff(replay.impression_offsets))
