"""The data sets and questions that models of long-term interest are held against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from encode.errors import ConfigError
from encode.quality.tasks.clicks import load_clicks
from encode.quality.tasks.columns import BEHAVIORS_FILE, IMPRESSIONS_FILE
from encode.quality.tasks.planted import load_planted
from encode.quality.tasks.purchases import load_complete_journey, load_taobao
from encode.quality.tasks.ratings import load_ratings
from encode.quality.tasks.task import Shown, Task

__all__ = ["TASKS", "Shown", "Task", "load_task"]

TASKS = ("planted", "complete-journey", "complete-journey-past", "ml-1m", "ml-1m-200", "taobao-814")


def load_task(
    name_or_path: str, cache: Path | None, say: Callable[[str], None], seed: int = 0, quick: bool = False
) -> Task:
    """Load a task by name, or make one of a user's own log with impressions.

    Args:
        name_or_path: one of `TASKS`; `NAME=PATH` to read its behaviors from a file or folder rather than to fetch them;
            or a path to a log with `impressions.parquet`. A folder that is called as a task and holds its behaviors
            means that task.
        cache: folder for downloads; None takes the default one.
        say: told what is loaded.
        seed: of all that is drawn.
        quick: a small task of the same shape: a few hundred users, a few thousand impressions.

    Raises:
        ConfigError: there is no such task or path, or the task cannot do with what it was given.
        DataError: the data cannot be had, break their contract, or are too few.
    """
    name, path = _resolve(name_or_path)
    say(f"loading task {name}" + (f" from {path}" if path else ""))
    task = _load(name, path, cache, seed, quick)
    counts = ", ".join(f"{split} {counts['impressions']:,}" for split, counts in task.details["splits"].items())
    say(
        f"task {task.name}: {task.details['users']:,} users, {task.details['behaviors']:,} behaviors, "
        f"{task.details['vocabulary_items']:,} items in the vocabulary; impressions: {counts}"
    )
    return task


def _load(name: str | None, path: Path | None, cache: Path | None, seed: int, quick: bool) -> Task:
    if name == "planted":
        if path:
            raise ConfigError(f"planted={path}: found a path, but this task is made up; leave the path out")
        return load_planted(seed, quick)
    if name in ("complete-journey", "complete-journey-past"):
        return load_complete_journey(path, cache, seed, quick, past=name.endswith("past"))
    if name in ("ml-1m", "ml-1m-200"):
        return load_ratings(path, cache, seed, quick, min_ratings=200 if name.endswith("200") else 0)
    if path is None:
        raise ConfigError(f"task {name}: cannot be fetched; give the file or folder of its behaviors: {name}=PATH")
    if name == "taobao-814":
        return load_taobao(path, seed, quick)
    return load_clicks(path, seed, quick)


def _resolve(text: str) -> tuple[str | None, Path | None]:
    """Return the name of a task, None for a user's own log, and the path that was given."""
    if text in TASKS:
        return text, None
    name, _, rest = text.partition("=")
    if name in TASKS:
        if not rest:
            raise ConfigError(f"task {text!r}: found no path after `=`; expected {name}=PATH, or {name} alone")
        return name, _existing(Path(rest), text)
    path = _existing(Path(text), text)
    if path.is_file() or (path / IMPRESSIONS_FILE).is_file():
        return None, path
    called = path.resolve().name
    if called in TASKS and (path / BEHAVIORS_FILE).is_file():
        return called, path
    raise ConfigError(
        f"task {text!r}: found no {IMPRESSIONS_FILE} in the folder; expected one, beside {BEHAVIORS_FILE} if there is "
        f"one, or NAME=PATH with one of {', '.join(TASKS)}"
    )


def _existing(path: Path, text: str) -> Path:
    if not path.exists():
        raise ConfigError(f"task {text!r}: no such task or path; have {', '.join(TASKS)}, or give an existing path")
    return path
