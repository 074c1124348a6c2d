"""What the bench found, as rows, as a table, and against full attention seed by seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

Row = dict[str, Any]
CEILING = "full"
"""The model that others are compared with, seed by seed."""
TIMED_ON = ("python", "torch", "numpy", "machine", "processor", "threads")
"""What of a cell's environment tells where it ran."""
MEASURES = ("auc", "gauc", "auc_first_time", "gauc_first_time", "logloss", "calibration")


def rows_of(cells: Sequence[Row]) -> list[Row]:
    """Return one row for each task, model and window: means over seeds, with standard errors.

    `auc_minus_full` is the mean over seeds of the difference to full attention with the same seed, on the same
    impressions, and `auc_minus_full_se` its standard error: what seeds have in common is not in it. What is not
    defined is None: standard errors with one seed, and a measure that any of the seeds does not have.

    Cells may come from several machines; all times of a task are of the one that most of its cells ran on, and None
    where none of a row's cells did.
    """

    def key(cell: Row) -> tuple[str, str, int]:
        return (cell["task"], cell["model"], cell["window"] or 0)

    by_seed = sorted(cells, key=lambda cell: (*key(cell), cell["seed"]))
    by_series = {series: list(group) for series, group in groupby(by_seed, key)}
    places = {
        task: Counter(_ran_on(cell) for cell in cells if cell["task"] == task).most_common(1)[0][0]
        for task in {cell["task"] for cell in cells}
    }
    rows = []
    for (task, model, window), group in by_series.items():
        row: Row = {"dataset": task.partition("/")[0], "task": task, "model": model, "window": window or None}
        row["family"] = group[0]["family"]
        row["seeds"] = len(group)
        row["learning_rate"] = group[0]["learning_rate"]
        for name in MEASURES:
            row[name], row[f"{name}_se"] = mean_and_error([cell["metrics"][name] for cell in group])
        ceiling = {cell["seed"]: cell["metrics"] for cell in by_series.get((task, CEILING, 0), [])}
        paired = [(cell["metrics"], ceiling[cell["seed"]]) for cell in group if cell["seed"] in ceiling]
        for name in ("auc", "gauc"):
            differences = [_difference(ours[name], theirs[name]) for ours, theirs in paired]
            row[f"{name}_minus_full"], row[f"{name}_minus_full_se"] = mean_and_error(differences)
        timed = [cell for cell in group if _ran_on(cell) == places[task]]
        row["cost_ms_per_1000"], _ = mean_and_error([cell["cost"]["ms_per_1000"] for cell in timed])
        row["cost_ms_by_length"] = {
            length: mean_and_error([cell["cost"]["ms_by_length"][length] for cell in timed])[0]
            for length in group[0]["cost"]["ms_by_length"]
        }
        row["state_bytes"] = group[0]["cost"]["state_bytes"]
        row["parameters"] = sum(group[0]["parameters"].values())
        row["parameters_long_term"] = group[0]["parameters"]["long_term"]
        row["training_seconds"], _ = mean_and_error([cell["seconds"]["training"] for cell in timed])
        if group[0]["fidelity"] is not None:
            row["fidelity"], row["fidelity_se"] = mean_and_error([cell["fidelity"]["correlation"] for cell in group])
            row["fidelity_max_error"] = max(cell["fidelity"]["max_error"] for cell in group)
        rows.append(row)
    return rows


def _ran_on(cell: Row) -> tuple[Any, ...]:
    return tuple(cell["environment"].get(name) for name in TIMED_ON)


def mean_and_error(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return mean and standard error of the mean; None for what too few values, or an undefined one, do not give."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return None, None
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return mean, math.sqrt(variance / len(known))


def _difference(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def to_markdown(rows: Sequence[Row], questions: dict[str, str]) -> str:
    """Return tables for each task, the best AUC first: models, ENCODE with something changed, histories cut short.

    Args:
        rows: of `rows_of`.
        questions: what each task asks.
    """
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = sorted((row for row in rows if row["task"] == task), key=lambda row: -(row["auc"] or 0))
        lines += [f"### {task}", "", questions.get(task, ""), ""]
        for title in ("", CHANGED, CUT):
            held = [row for row in own if _title(row) == title]
            if held:
                lines += [*([title, ""] if title else []), *_table(held), ""]
    return "\n".join(lines)


CHANGED = "ENCODE with something changed:"
CUT = "Histories cut to their latest behaviors:"


def _title(row: Row) -> str:
    return CUT if row["window"] else CHANGED if row["model"].startswith("encode:") else ""


def _table(rows: Sequence[Row]) -> list[str]:
    first_time = any((row["auc_first_time"] or row["auc"]) != row["auc"] for row in rows)
    head = ["model", "AUC", "to full", "GAUC", "logloss", "calibration"]
    head += ["AUC first-time"] if first_time else []
    head += ["fidelity", "ms / 1,000", "state, B", "training, s", "rate", "seeds"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cut = f", last {row['window']}" if row["window"] else ""
        cells = [f"{row['model']}{cut}", _with_error(row, "auc"), _with_error(row, "auc_minus_full", sign=True)]
        cells += [_with_error(row, "gauc"), _number(row["logloss"]), _number(row["calibration"], 3)]
        cells += [_with_error(row, "auc_first_time")] if first_time else []
        cells += [_number(row.get("fidelity")), _number(row["cost_ms_per_1000"], 2), f"{row['state_bytes']:,}"]
        cells += [_number(row["training_seconds"], 0), f"{row['learning_rate']:g}", str(row["seeds"])]
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _with_error(row: Row, name: str, *, sign: bool = False) -> str:
    value, error = row[name], row[f"{name}_se"]
    if value is None:
        return ""
    return (f"{value:+.4f}" if sign else f"{value:.4f}") + (f" ± {error:.4f}" if error is not None else "")
