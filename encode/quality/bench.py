"""The bench: every model on every task, tuned with the same budget, then trained with every seed.

Each model is trained once with each learning rate of the grid and the first seed; the one with the best validation AUC
is trained with the other seeds. A finished cell is a file, so a run goes on where it was interrupted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from encode.config import ModelConfig, TrainingConfig
from encode.errors import ConfigError, DataError
from encode.quality.cells import Cell, Setup, backbone_of, check_model, run_cell
from encode.quality.models import PLATFORM_ONLY, choose
from encode.quality.report import rows_of
from encode.quality.tasks import Task, load_task

SETUP = Setup(
    ModelConfig(embedding_dim=64, category_dim=16, projected_dim=16),
    TrainingConfig(num_epochs=6, patience=1, histories_per_batch=32, num_threads=1),
)
GRID = (2e-3, 4e-3)
QUICK_SETUP = Setup(SETUP.backbone, SETUP.training.model_copy(update={"num_epochs": 2}))
Finished = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a run is to find out."""

    tasks: tuple[str, ...]
    """As `tasks.load_task` reads them."""
    models: tuple[str, ...]
    seeds: int
    windows: tuple[int, ...] = ()
    """Lengths to which histories are cut, beside the whole, for `windowed` models."""
    windowed: tuple[str, ...] = ()
    grid: tuple[float, ...] = GRID
    quick: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "models", "windows", "windowed", "grid"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))

    def series(self) -> Iterator[tuple[str, str, int | None]]:
        """Yield every task, model and window, each once: what is tuned by itself."""
        for task in self.tasks:
            for model in self.models:
                yield task, model, None
            for model in self.windowed:
                yield from ((task, model, window) for window in self.windows)


def run(plan: Plan, out: Path, workers: int, say: Callable[[str], None]) -> list[Finished]:
    """Train and measure what is not there yet; return all cells of the plan, those of the chosen learning rate only.

    Args:
        plan: what is to be found out.
        out: folder of the cells, one JSON file each.
        workers: processes, each on one thread.
        say: told about progress.

    Raises:
        ConfigError: a task, a model or a switch is unknown, or the folder holds cells of another setup.
        DataError: a task's data cannot be had, or there is too little memory.
    """
    setup = QUICK_SETUP if plan.quick else SETUP
    _check(plan, setup, workers)
    return _Bench(plan, setup, out, workers, say).run()


def _check(plan: Plan, setup: Setup, workers: int) -> None:
    """Refuse what would fail, or be mixed up with something else, only after hours."""
    counts = [("seeds", plan.seeds), ("workers", workers), *(("windows", window) for window in plan.windows)]
    for name, count in counts:
        if count < 1:
            raise ConfigError(f"{name}: found {count}, expected at least 1")
    for rate in plan.grid:
        if not 0 < rate < 1:
            raise ConfigError(f"rates: found {rate:g}, expected a learning rate between 0 and 1")
    called: dict[str, str] = {}
    for task in plan.tasks:
        other = called.setdefault(task_name(task), task)
        if other != task:
            raise ConfigError(f"tasks {other!r} and {task!r}: both would be called {task_name(task)!r}; rename one")
    for model in (*plan.models, *plan.windowed):
        check_model(model, setup)


class _Bench:
    """One run: series at work, and what is known of each."""

    def __init__(self, plan: Plan, setup: Setup, out: Path, workers: int, say: Callable[[str], None]) -> None:
        self.plan, self.setup, self.out, self.say = plan, setup, out, say
        self.workers = workers
        self.found: dict[tuple[str, Cell], Finished] = {}
        self.waiting: dict[Future[Finished], tuple[str, Cell]] = {}
        self.done, self.started, self.trained_here = 0, time.monotonic(), 0
        seeds, grid = plan.seeds, len(plan.grid)
        self.total = (seeds - 1 + grid) * sum(1 for _ in plan.series())

    def run(self) -> list[Finished]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, initializer=_begin) as pool:
            try:
                for series in self.plan.series():
                    task, model, window = series
                    self._want(pool, task, [Cell(model, rate, 0, window) for rate in self.plan.grid])
                while self.waiting:
                    self._step(pool)
            except BrokenProcessPool:
                raise DataError(
                    f"a worker died, most likely for want of memory; run again with fewer than {self.workers} workers: "
                    f"the cells in {self.out} are kept"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
        chosen = []
        for task, model, window in self.plan.series():
            rate = self._best_rate(task, model, window)
            chosen += [self.found[task, Cell(model, rate, seed, window)] for seed in range(self.plan.seeds)]
        return chosen

    def _want(self, pool: Executor, task: str, cells: Sequence[Cell]) -> None:
        for cell in cells:
            path = self._path(task, cell)
            if path.exists():
                self.found[task, cell] = _read(path, self.setup, cell)
                self._count(task, cell, "is there")
                self._go_on(pool, task, cell)
            else:
                plan = self.plan
                with _interrupts_held():
                    future = pool.submit(_work, task, plan.cache, plan.quick, cell, self.setup, path)
                self.waiting[future] = (task, cell)

    def _step(self, pool: Executor) -> None:
        future = next(as_completed(self.waiting))
        task, cell = self.waiting.pop(future)
        self.found[task, cell] = future.result()
        self.trained_here += 1
        self._count(task, cell, f"{self.found[task, cell]['seconds']['all']:.0f} s{self._left()}")
        self._go_on(pool, task, cell)

    def _go_on(self, pool: Executor, task: str, cell: Cell) -> None:
        """Once all learning rates of a series are there, want the other seeds of the best one."""
        tuned = [Cell(cell.model, rate, 0, cell.window) for rate in self.plan.grid]
        if cell in tuned and all((task, one) in self.found for one in tuned):
            rate = self._best_rate(task, cell.model, cell.window)
            self._want(pool, task, [Cell(cell.model, rate, seed, cell.window) for seed in range(1, self.plan.seeds)])

    def _best_rate(self, task: str, model: str, window: int | None) -> float:
        def valid(rate: float) -> float:
            return float(self.found[task, Cell(model, rate, 0, window)]["valid"]["valid_auc"])

        return max(self.plan.grid, key=valid)

    def _path(self, task: str, cell: Cell) -> Path:
        return self.out / "cells" / task_name(task) / f"{cell.name}.json"

    def _count(self, task: str, cell: Cell, how: str) -> None:
        self.done += 1
        metrics = self.found[task, cell]["metrics"]
        measured = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("auc", "gauc") if metrics[name] is not None)
        self.say(f"[{self.done}/{self.total}] {task_name(task)} {cell.name}: {measured} ({how})")

    def _left(self) -> str:
        seconds = (time.monotonic() - self.started) / self.trained_here * (self.total - self.done - 1)
        return f", about {seconds / 60:.0f} min left" if seconds > 60 else ""


def task_name(task: str) -> str:
    """Return what a task is called in files and tables: `NAME=PATH` and paths become names."""
    name, _, _ = task.partition("=")
    return Path(name).resolve().name.removesuffix(".parquet")


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block; processes that are started in it never get it.

    It is for the parent to act on, and a worker that is still importing would answer with a traceback.
    """
    resource_tracker.ensure_running()  # starting it later would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """Set up a worker: one thread, and an end should the parent be killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@lru_cache(maxsize=1)
def _task(name: str, cache: Path | None, quick: bool) -> Task:
    """Load a task, once as long as a process works on it."""
    return load_task(name, cache, lambda line: None, quick=quick)


def _work(name: str, cache: Path | None, quick: bool, cell: Cell, setup: Setup, path: Path) -> Finished:
    """Run one cell in a process of its own and write it down."""
    finished = run_cell(_task(name, cache, quick), cell, setup, lambda line: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(finished, indent=1))
    aside.replace(path)
    return finished


def _read(path: Path, setup: Setup, cell: Cell) -> Finished:
    """Read a finished cell.

    Raises:
        ConfigError: it is damaged, or was made with another setup.
    """
    try:
        finished: Finished = json.loads(path.read_text())
        found = finished["settings"]["training"] | finished["settings"]["backbone"]
        rows_of([finished])
        float(finished["valid"]["valid_auc"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a cell of the bench ({type(error).__name__}: {error}); remove it") from None
    training = setup.training.model_copy(update={"learning_rate": cell.learning_rate, "seed": cell.seed})
    backbone = backbone_of(setup, choose(cell.model))
    expected = training.model_dump(mode="json") | backbone.model_dump(mode="json", exclude=set(PLATFORM_ONLY))
    # What a cell does not tell of came later, and its default is how things were.
    if other := sorted(key for key in found if found[key] != expected.get(key)):
        raise ConfigError(f"{path}: made with other settings ({', '.join(other)}); give another folder")
    return finished
