"""Impressions trained a second: ours, against DIN and SIM of FuxiCTR (model_zoo/LongCTR) on the same log.

    python -m benchmarks.train [--json] [--impressions N] [--quick]

The log is generated (encode/data/generate.py): 100 impressions a user, histories lognormal with a median of 400 and at
most 5,000 behaviors, 25,000 items. `pip install --no-deps fuxictr==2.3.10` for the rivals. Timed is the loop of each as
its users run it, data loading included: ours is an epoch of encode.train with the defaults of the config, from the
clustering of all histories on; theirs is `fit`, fed by their LongCTR loader and stopped after some seconds. All in one
process with all its cores, in turns; the best of each counts, for a rival also of the numbers of workers that load.

Equal on all sides: the log, the width of embeddings (item 48, category 16), Adam (ours for the rows of a batch only),
the sizes of the MLP, impressions of an update (ours: those of 64 histories, on average), and that of a history the
latest 1,000 behaviors are read at most, the largest `max_len` in LongCTR's experiments. `*_50` are the same with the
`max_len: 50` of LongCTR's templates, against the same of ours: up to 1,000 behaviors, and the recent 50 beside them.
All else is as in the templates, but that DIN gets ReLU, which is faster than their Dice. They train without dropout.

A history that many impressions share is read once by ours, and once an impression by theirs: the fewer there are of
`impressions_per_history`, the closer they come.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from encode import train
from encode.config import ClusteringConfig, GeneratorConfig, ModelConfig, TrainingConfig
from encode.data.generate import generate
from encode.data.histories import Histories, to_histories
from encode.data.impressions import draw_impressions, snapshot_times
from encode.data.partitions import quiet
from encode.data.vocabulary import Vocabulary, build_vocabulary
from encode.evaluate.batches import batches
from encode.evaluate.replay import Replay, make_replay
from encode.interests.clustered import Clustered
from encode.model.ctr import Reader, Tables
from encode.quality.cells import processor
from encode.schema import BEHAVIORS, Window, day_start

MODEL, TRAINING = ModelConfig(), TrainingConfig()
IMPRESSIONS, IMPRESSIONS_PER_USER, WARM_UP_USERS = 200_000, 100, 64
LOG = GeneratorConfig(
    num_items=25_000,
    num_categories=200,
    interests_per_user=8,
    median_length=400,
    length_sigma=1.0,
    max_length=5_000,
    num_days=180,
)
WINDOW = 1_000
"""Latest behaviors of a history that are read."""
RIVALS = {
    "fuxictr_din": ("DIN", WINDOW),
    "fuxictr_sim": ("SIM", WINDOW),
    "fuxictr_din_50": ("DIN", 50),
    "fuxictr_sim_50": ("SIM", 50),
}
"""Model and `max_len` of each."""
SETTINGS = {
    "DIN": {"attention_hidden_units": [64], "attention_hidden_activations": "ReLU"},
    "SIM": {"attention_dim": 64, "num_heads": 2, "topk": 50, "short_seq_len": 50},
}
TARGETS = {"vs_fuxictr_din": "at least 3", "vs_fuxictr_sim": "at least 3"}


class Pace(NamedTuple):
    """How long it takes."""

    rounds: int = 2
    seconds: float = 5
    """Of each run of a rival, beside its warm-up."""
    warm_up: int = 2
    """Updates of a rival before the clock starts."""
    workers: tuple[int, ...] = (0, 1)
    """Processes of its loader that are tried."""


QUICK = Pace(1, 1, 1, (0,))


@dataclass(frozen=True)
class Run:
    """What one run has trained."""

    impressions: int
    seconds: float
    phases: dict[str, float]
    """Seconds of each phase: `data` is what the loop waits for, `forward` all that no other phase is."""

    @property
    def speed(self) -> float:
        """Impressions a second."""
        return self.impressions / self.seconds

    def share(self, phase: str) -> float:
        """Return the share of the time that a phase takes."""
        return round(self.phases[phase] / self.seconds, 4)


# --- data --------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The log, and the impressions of its last weeks."""

    histories: Histories
    vocabulary: Vocabulary
    replay: Replay

    @property
    def num_updates(self) -> int:
        """Updates of an epoch of ours."""
        return sum(1 for _ in batches(self.replay, None, TRAINING.histories_per_batch))

    @property
    def batch_size(self) -> int:
        """Impressions of an update of ours, on average."""
        return round(len(self.replay.impressions) / self.num_updates)


def make_data(num_impressions: int) -> Data:
    """Generate the log, and draw impressions as training does."""
    config = LOG.model_copy(update={"num_users": max(2, num_impressions // IMPRESSIONS_PER_USER)})
    table = pa.Table.from_batches([raw.batch for raw in generate(config)])
    seconds = table["timestamp"].cast(pa.int64()).to_numpy() // 1000
    columns = {"timestamp": pa.array(seconds), "behavior": table["behavior"].combine_chunks().dictionary_encode()}
    histories = to_histories(pa.table([columns.get(name, table[name]) for name in BEHAVIORS.names], schema=BEHAVIORS))
    end = config.start + timedelta(days=config.num_days)
    days = Window(end - timedelta(days=TRAINING.train_days), end)
    vocabulary = build_vocabulary(histories.before(day_start(days.end)), TRAINING.min_item_count)
    num_positives = max(1, num_impressions // (1 + TRAINING.num_negatives))
    return Data(histories, vocabulary, replay_of(histories, vocabulary, days, num_positives))


def replay_of(histories: Histories, vocabulary: Vocabulary, days: Window, num_positives: int) -> Replay:
    """Return impressions of `days` with the histories that they read."""
    impressions = draw_impressions(histories, days, TRAINING, num_positives)
    as_of = snapshot_times(impressions, days, TRAINING.snapshot_days)
    return make_replay(histories, impressions, as_of, vocabulary, MODEL.recent_length, WINDOW)


def describe(data: Data) -> dict[str, Any]:
    """Return the sizes of the log."""
    replay = data.replay
    read = replay.history_lengths()
    return {
        "impressions": len(replay.impressions),
        "users": len(data.histories),
        "behaviors": int(data.histories.offsets[-1]),
        "vocabulary": len(data.vocabulary),
        "histories": len(replay.history_begin),
        "impressions_per_history": round(len(replay.impressions) / len(replay.history_begin), 1),
        "batch_impressions": data.batch_size,
        "history_read_median": int(np.median(read)),
        "history_read_max": int(read.max()),
    }


# --- ours --------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, phase: str, function: Callable) -> Callable:
        """Return the function, whose calls count as a phase."""

        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[phase] += time.perf_counter() - began

        return run

    def waited(self, function: Callable[..., Iterable]) -> Callable[..., Iterator]:
        """Return what yields the same, where what the loop waits for counts as `data`."""

        def run(*args: Any, **options: Any) -> Iterator:
            source = iter(function(*args, **options))
            following = self.timed("data", lambda: next(source, None))
            while (batch := following()) is not None:
                yield batch

        return run


class Ours:
    """The product's model and its loop."""

    def __init__(self, data: Data) -> None:
        torch.manual_seed(0)
        vocabulary, self.replay = data.vocabulary, data.replay
        self.tables = Tables(MODEL, torch.from_numpy(vocabulary.category_index), vocabulary.num_categories)
        self.reader = Reader(MODEL, Clustered(MODEL, ClusteringConfig()))
        self.optimizers = train.optimizers_of(self.tables, self.reader, TRAINING)

    def run(self) -> Run:
        """Train an epoch."""
        clock = Clock()
        with (
            patch.object(train, "assign", clock.timed("clustering", train.assign)),
            patch.object(train, "batches", clock.waited(train.batches)),
            patch.object(torch.Tensor, "backward", clock.timed("backward", torch.Tensor.backward)),
            ExitStack() as steps,
        ):
            for optimizer in self.optimizers:
                steps.enter_context(patch.object(optimizer, "step", clock.timed("optimizer", optimizer.step)))
            began = time.perf_counter()
            train.run_epoch(
                self.tables,
                self.reader,
                self.replay,
                MODEL,
                TRAINING,
                self.optimizers,
                np.random.default_rng(0),
                torch.Generator().manual_seed(0),
                quiet,
            )
            seconds = time.perf_counter() - began
        phases = {name: clock.seconds[name] for name in ("clustering", "data", "backward", "optimizer")}
        return Run(len(self.replay.impressions), seconds, phases | {"forward": seconds - sum(phases.values())})


# --- rivals ------------------------------------------------------------------------------------------------


def has_rivals() -> bool:
    """Tell whether FuxiCTR is installed."""
    return find_spec("fuxictr") is not None


@contextmanager
def without_preparation() -> Iterator[None]:
    """Let FuxiCTR be imported without what it needs to prepare data, which is large and does nothing here."""
    stubs = {name: ModuleType(name) for name in ("ray", "h5py", "polars") if find_spec(name) is None}
    preprocess = ModuleType("fuxictr.preprocess")  # its own __init__ asks for more of ray
    preprocess.__path__ = [
        str(Path(folder) / "preprocess") for folder in find_spec("fuxictr").submodule_search_locations
    ]
    stubs[preprocess.__name__] = preprocess
    before = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(before)


def write_for_fuxictr(data: Data, folder: Path) -> dict[str, str]:
    """Write the log as LongCTR's experiments have it: impressions, whole histories by user, and items."""
    replay, offsets = data.replay, data.histories.offsets
    shown = replay.impressions
    tables = {
        "train_data": {
            "label": shown.labels.astype(np.int64),
            "user_index": shown.user,
            "item_index": replay.target_index,
            "seq_len": replay.recent_end - offsets[shown.user],
        },
        "user_info": {"full_item_seq": np.split(replay.behavior_index, offsets[1:-1])},
        "item_info": {
            "item_index": np.arange(len(replay.category_index)),
            "item_id": np.arange(len(replay.category_index)),
            "category_id": replay.category_index,
        },
    }
    paths = {name: str(folder / f"{name}.parquet") for name in tables}
    for name, columns in tables.items():
        pd.DataFrame(columns).to_parquet(paths[name])
    return paths


class Stream:
    """What a loop is fed with for some seconds after its warm-up, and what it has trained in them."""

    def __init__(self, loader: Iterable, pace: Pace) -> None:
        self.loader, self.pace = loader, pace

    def __len__(self) -> int:
        """Return the updates of an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator:
        """Yield batches until the time is over."""
        clock, source = Clock(), endless(self.loader)
        following = clock.timed("data", lambda: next(source))
        for _ in range(self.pace.warm_up):
            yield following()
        clock.seconds.clear()
        began, impressions = time.perf_counter(), 0
        while impressions == 0 or time.perf_counter() - began < self.pace.seconds:
            batch = following()
            yield batch
            impressions += len(batch[-1])
        self.run = Run(impressions, time.perf_counter() - began, dict(clock.seconds))
        source.close()  # ends the workers


def endless(loader: Iterable) -> Iterator:
    """Yield batches of one epoch after the other."""
    while True:
        yield from loader


class Rival:
    """A model of LongCTR with its own loop and loader."""

    def __init__(self, name: str, max_len: int, data: Data, paths: dict[str, str]) -> None:
        folder = Path(paths["train_data"]).parent
        self.paths, self.max_len, self.batch_size = paths, max_len, data.batch_size
        with without_preparation():
            self.loaders = importlib.import_module("fuxictr.pytorch.dataloaders")
            self.long_loader = importlib.import_module("model_zoo.LongCTR.longctr_dataloader").LongCTRDataLoader
            made = getattr(importlib.import_module(f"model_zoo.LongCTR.{name}.{name}"), name)
            self.features = importlib.import_module("fuxictr.features").FeatureMap("log", str(folder))
        sizes = {
            "item_id": (len(data.vocabulary), MODEL.embedding_dim - MODEL.category_dim),
            "category_id": (data.vocabulary.num_categories, MODEL.category_dim),
        }
        self.features.features = {
            **{feature: {"type": "meta"} for feature in ("user_index", "item_index", "seq_len")},
            **{
                feature: {"type": "categorical", "source": "item", "vocab_size": count, "embedding_dim": width}
                for feature, (count, width) in sizes.items()
            },
        }
        self.features.labels, self.features.default_emb_dim = ["label"], MODEL.embedding_dim
        common = {
            "embedding_dim": MODEL.embedding_dim,
            "dnn_hidden_units": list(MODEL.hidden_dims),
            "optimizer": "adam",
            "loss": "binary_crossentropy",
            "learning_rate": TRAINING.learning_rate,
            "metrics": ["AUC"],
            "eval_steps": sys.maxsize,
            "verbose": 0,
            "model_root": str(folder),
        }
        self.model = made(self.features, model_id=f"{name}_{max_len}", **common, **SETTINGS[name])
        Path(self.model.model_dir).mkdir(exist_ok=True)
        self.model.save_weights(self.model.checkpoint)  # `fit` ends by loading the best ones

    def loader(self, workers: int, shuffle: bool = True) -> Any:
        """Return what feeds it."""
        options = {"data_loader": self.long_loader, "max_len": self.max_len, "num_workers": workers}
        made, _ = self.loaders.RankDataLoader(
            self.features, "train", batch_size=self.batch_size, shuffle=shuffle, **options, **self.paths
        )
        return made

    def run(self, pace: Pace, workers: int) -> Run:
        """Train for some seconds."""
        stream = Stream(self.loader(workers), pace)
        self.model.fit(stream)
        return stream.run


# --- the race ----------------------------------------------------------------------------------------------


def race(data: Data, folder: Path, pace: Pace) -> dict[str, dict[str, Run]]:
    """Run all in turns; return the fastest run of each way of each contender."""
    warm_up(data)
    ours = Ours(data)
    contenders: dict[str, dict[str, Callable[[], Run]]] = {"ours": {"": ours.run}}
    if has_rivals():
        paths = write_for_fuxictr(data, folder)
        contenders |= {
            name: ways(Rival(model, max_len, data, paths), pace) for name, (model, max_len) in RIVALS.items()
        }
    else:
        say("the rivals need: pip install --no-deps fuxictr==2.3.10")
    best: dict[str, dict[str, Run]] = {name: {} for name in contenders}
    for turn in range(pace.rounds):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            for way, run in contenders[name].items():
                found = run()
                say(f"  round {turn + 1} of {pace.rounds}: {name} {way} {found.speed:,.0f} impressions/s")
                best[name][way] = max(best[name].get(way, found), found, key=lambda one: one.speed)
    return best


def ways(rival: Rival, pace: Pace) -> dict[str, Callable[[], Run]]:
    """Return the ways to run a rival, by its loader's workers."""
    return {f"{workers} workers": lambda workers=workers: rival.run(pace, workers) for workers in pace.workers}


def warm_up(data: Data) -> None:
    """Train on a few users: what is compiled is compiled, or loaded."""
    Ours(make_data(WARM_UP_USERS * IMPRESSIONS_PER_USER) if len(data.histories) > WARM_UP_USERS else data).run()


def measure(num_impressions: int, pace: Pace) -> dict[str, Any]:
    """Everything."""
    load = os.getloadavg()[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(num_cores())
    try:
        say(f"generating a log with {num_impressions:,} impressions")
        data = make_data(num_impressions)
        with tempfile.TemporaryDirectory() as folder:
            found = race(data, Path(folder), pace)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    best = {name: max(runs.values(), key=lambda run: run.speed) for name, runs in found.items()}
    ours = best.pop("ours")
    return {
        "impressions_per_s": round(ours.speed),
        **{f"vs_{name}": round(ours.speed / best[name].speed, 2) if name in best else None for name in RIVALS},
        "rivals_impressions_per_s": {
            name: {way: round(run.speed) for way, run in found[name].items()} for name in best
        },
        "phases": {name: ours.share(name) for name in ours.phases},
        "data_wait": {"ours": ours.share("data")} | {name: run.share("data") for name, run in best.items()},
        "log": describe(data),
        "environment": {
            "torch": torch.__version__,
            "threads": used,
            "machine": f"{processor()}, {num_cores()} cores",
            "load_before": round(load, 2),
        },
    }


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(line: str) -> None:
    """Tell about progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    log = found["log"]
    print(f"{log['impressions']:,} impressions, {log['users']:,} users, {log['behaviors']:,} behaviors", end="; ")
    print(f"an update is {log['batch_impressions']:,} impressions, of {log['histories']:,} histories")
    print(f"\n{'':<18}{'impressions/s':>14}{'ours is':>10}{'waits':>8}")
    print(f"{'ours':<18}{found['impressions_per_s']:>14,}{'':>10}{found['data_wait']['ours']:>8.1%}")
    for name, speeds in found["rivals_impressions_per_s"].items():
        speed = max(speeds.values())
        print(f"{name:<18}{speed:>14,}{found[f'vs_{name}']:>9.2f}x{found['data_wait'][name]:>8.1%}", end="  ")
        print(", ".join(f"{way} {speed:,}" for way, speed in speeds.items()))
    print("\nours: " + ", ".join(f"{name} {share:.1%}" for name, share in found["phases"].items()))
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items()))
    for name, target in TARGETS.items():
        ratio = "-" if found[name] is None else f"{found[name]:g}"
        print(f"{name:<18}{ratio:>14}   target: {target}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print a table or, as the last line, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--impressions", type=int, metavar="N", help=f"default: {IMPRESSIONS:,}; with --quick a tenth")
    parser.add_argument("--quick", action="store_true", help="one short round, for a first look: 20 seconds")
    options = parser.parse_args(arguments)
    if (load := os.getloadavg()[0]) > 0.5:
        say(f"the machine is busy (load {load:.1f}): the figures will be too low, ratios less exact")
    num_impressions = options.impressions or (IMPRESSIONS // 10 if options.quick else IMPRESSIONS)
    if num_impressions < 1_000:
        raise SystemExit(f"--impressions {num_impressions}: expected at least 1000")
    found = measure(num_impressions, QUICK if options.quick else Pace())
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
