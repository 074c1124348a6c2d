"""One cell of the bench: a model trained and measured on a task with one seed and one learning rate."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from encode import __version__
from encode.config import ModelConfig, TrainingConfig
from encode.data.histories import Histories
from encode.errors import ConfigError
from encode.evaluate.metrics import curves, summary
from encode.evaluate.reading import predict
from encode.evaluate.replay import Replay, make_replay
from encode.model.ctr import Reader, Tables
from encode.model.long_term import LongTerm, Sizes
from encode.outputs import git_commit
from encode.quality.cost import Cost, measure_cost
from encode.quality.fidelity import Fidelity, measure_fidelity
from encode.quality.models import PLATFORM_ONLY, Chosen, choose
from encode.quality.tasks import Shown, Task
from encode.train import best_epoch, fit

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Setup:
    """What all models of a bench have in common."""

    backbone: ModelConfig
    training: TrainingConfig
    """But for learning rate and seed."""


@dataclass(frozen=True)
class Cell:
    """What is trained and measured."""

    model: str
    """Name with switches, as `models.choose` reads it."""
    learning_rate: float
    seed: int
    window: int | None = None
    """The history is cut to its latest behaviors, this many; None leaves it whole."""

    @property
    def name(self) -> str:
        """Return what the cell's file is called."""
        cut = f"+last={self.window}" if self.window else ""
        return f"{self.model}{cut}+lr={self.learning_rate:g}+seed={self.seed}"


def run_cell(task: Task, cell: Cell, setup: Setup, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a model on a task and measure it; return all that the report needs, as JSON can hold it.

    What is not defined, as an AUC without positives, is None.

    Same task, cell, setup and machine give the same figures, but for times.

    Raises:
        ConfigError: a switch of the model has a value that it cannot have.
    """
    began = time.monotonic()
    chosen = choose(cell.model)
    config = backbone_of(setup, chosen)
    training = setup.training.model_copy(update={"learning_rate": cell.learning_rate, "seed": cell.seed})
    replays = {split: _replay(task, getattr(task, split), config, cell.window) for split in SPLITS}
    torch.manual_seed(cell.seed)
    tables, reader = make_model(task, chosen, config)
    started = time.monotonic()
    epochs = fit(tables, reader, replays["train"], replays["valid"], config, training, say)
    trained = time.monotonic() - started
    table = tables.all_items()
    probabilities = predict(table, reader, replays["test"])
    shown = replays["test"].impressions
    lengths = replays["test"].history_lengths()
    best = best_epoch(epochs)
    found = {
        "task": task.name,
        "question": task.question,
        "model": cell.model,
        "family": chosen.model.family,
        "window": cell.window,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "metrics": summary(shown.user, shown.labels, probabilities, shown.first_time),
        "valid": {key: value for key, value in epochs[best].items() if key.startswith("valid_")},
        "epochs": {"trained": len(epochs), "best": best + 1, "of_each": epochs},
        "curves": curves(shown.labels, probabilities, lengths),
        "parameters": {
            "tables": sum(p.numel() for p in tables.parameters()),
            "long_term": sum(p.numel() for p in reader.long_term.parameters()),
            "others": sum(p.numel() for p in reader.parameters())
            - sum(p.numel() for p in reader.long_term.parameters()),
        },
        "cost": _as_json(measure_cost(table, reader)),
        "fidelity": _as_json(measure_fidelity(table, reader, replays["test"])),
        "seconds": {"training": trained, "all": time.monotonic() - began},
        "impressions_per_s": len(replays["train"].impressions) * len(epochs) / trained,
        "settings": {
            "backbone": config.model_dump(mode="json", exclude=set(PLATFORM_ONLY)),
            "training": training.model_dump(mode="json"),
            "long_term": dict(chosen.options) | dict(chosen.told),
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "machine": platform.machine(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "encode": __version__,
            "commit": git_commit(),
        },
    }
    plain: dict[str, Any] = _finite(found)
    return plain


def make_model(task: Task, chosen: Chosen, config: ModelConfig) -> tuple[Tables, Reader]:
    """Return tables and reader of a model for a task, initialized from torch's generator.

    Raises:
        ConfigError: a switch of the model has a value that it cannot have.
    """
    vocabulary, num_kinds = task.vocabulary, len(task.histories.behavior_names)
    tables = Tables(config, torch.from_numpy(vocabulary.category_index), vocabulary.num_categories, num_kinds)
    sizes = Sizes(
        num_items=len(vocabulary),
        num_categories=vocabulary.num_categories,
        num_kinds=num_kinds,
        embedding_dim=config.embedding_dim,
        projected_dim=config.projected_dim,
    )
    return tables, Reader(config, _long_term(chosen, sizes))


def check_model(name: str, setup: Setup) -> None:
    """Make a model for a vocabulary of next to nothing: its switches are seen to fit before anything is trained.

    Raises:
        ConfigError: there is no such model or switch, or a switch has a value that it cannot have.
    """
    chosen = choose(name)
    config = backbone_of(setup, chosen)
    few = Sizes(3, 3, 1, config.embedding_dim, config.projected_dim)
    Reader(config, _long_term(chosen, few))


def _long_term(chosen: Chosen, sizes: Sizes) -> LongTerm:
    try:
        return chosen.make(sizes)
    except ValidationError as error:
        raise ConfigError(f"model {chosen.name!r}: {_problems(error)}") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"model {chosen.name!r}: {error}") from None


def backbone_of(setup: Setup, chosen: Chosen) -> ModelConfig:
    """Return the backbone's settings with the switches of a model.

    Raises:
        ConfigError: a switch has a value that it cannot have.
    """
    try:
        return ModelConfig.model_validate(setup.backbone.model_dump() | dict(chosen.backbone))
    except ValidationError as error:
        raise ConfigError(f"model {chosen.name!r}: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    found = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()]
    return "; ".join(f"{where}: {text}" if where else text for where, text in found)


def _replay(task: Task, shown: Shown, config: ModelConfig, window: int | None) -> Replay:
    histories: Histories = task.histories
    return make_replay(histories, shown.impressions, shown.as_of, task.vocabulary, config.recent_length, window)


def _as_json(found: Cost | Fidelity | None) -> dict[str, Any] | None:
    return found._asdict() if found is not None else None


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _finite(value: Any) -> Any:
    """Return a tree of dicts and lists with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
