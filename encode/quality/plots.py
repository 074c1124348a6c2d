"""The bench's pictures: AUC against cost, against K, and against the length of the history."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encode.quality.models import COUNTED

Row = dict[str, Any]
_DEFAULT_CLUSTERS = 32
COLORS = {
    "floor": "#9aa0a6",
    "ceiling": "#202124",
    "search": "#1a73e8",
    "cluster": "#e8710a",
    "memory": "#9334e6",
    "newer": "#12a4b8",
    "ours": "#d93025",
}
_MARKERS = "osD^v"
_LABEL_PLACES = [
    (side * far, up * far, {-1: "right", 0: "center", 1: "left"}[side], {-1: "top", 0: "center", 1: "bottom"}[up])
    for far in (6, 14)
    for side, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]
"""Where a name may stand beside its point: offsets in points and alignment, the most natural first."""


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw what the rows give, a picture for each task and each question; return the files.

    A question that no row of the task answers has no picture.
    """
    made = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task and row["auc"] is not None]
        whole = [row for row in own if row["window"] is None]
        made += _against_cost(task, [row for row in whole if ":" not in row["model"]], out, "cost")
        counted = [row for row in whole if row["model"] in COUNTED]
        if any(":" in row["model"] for row in counted):
            made += _against_cost(f"{task}, all told the counts", counted, out, "cost-counted")
        made += _against_clusters(task, whole, out)
        made += _against_history(task, own, out)
    return made


def _against_cost(title: str, rows: Sequence[Row], out: Path, name: str) -> list[Path]:
    """AUC against milliseconds a request: up and to the left is better."""
    rows = [row for row in rows if row["cost_ms_per_1000"] is not None]
    if len(rows) < 2:
        return []
    figure, axes = _axes(title, "ms for 1,000 candidates, history of 1,000 behaviors (log)")
    shown = _zoom(axes, [row for row in rows if row["family"] != "floor"], rows)
    for family in COLORS:
        own = [row for row in shown if row["family"] == family]
        if own:
            _errorbar(axes, [row["cost_ms_per_1000"] for row in own], own, "o", family, family)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    _plain_ticks(axes)
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False, fontsize=8)
    _name_points(figure, axes, shown)
    return [_save(figure, out, rows[0]["task"], name)]


def _against_clusters(task: str, whole: Sequence[Row], out: Path) -> list[Path]:
    """AUC of ENCODE with nothing changed but K."""
    points = {k: row for row in whole if (k := _num_clusters(row)) is not None}
    levels = [row for row in whole if row["model"] in ("full", "mean", "recent")]
    return _lines(task, "interests a user, K (log)", {"encode": points}, levels, out, "clusters")


def _against_history(task: str, rows: Sequence[Row], out: Path) -> list[Path]:
    """AUC against how much of the history a model is given; all of it comes last."""
    cut = [row for row in rows if row["window"] is not None]
    models = dict.fromkeys(row["model"] for row in cut)
    end = 3.0 * max((row["window"] for row in cut), default=1)
    series = {model: {float(row["window"] or end): row for row in rows if row["model"] == model} for model in models}
    levels = [row for row in rows if row["window"] is None and row["model"] in ("mean", "recent")]
    return _lines(task, "latest behaviors of the history (log)", series, levels, out, "history", {end: "whole"})


def _lines(
    task: str,
    x: str,
    series: Mapping[str, Mapping[float, Row]],
    levels: Sequence[Row],
    out: Path,
    name: str,
    called: Mapping[float, str] = {},
) -> list[Path]:
    """Draw AUC as a line for each model of the series that has at least two points, and as a level for others.

    Args:
        task: title.
        x: what the first coordinate is.
        series: rows of each model by that coordinate.
        levels: rows without it.
        out: folder.
        name: of the picture.
        called: ticks that are not called by their number.
    """
    series = {model: dict(sorted(points.items())) for model, points in series.items() if len(points) > 1}
    if not series:
        return []
    figure, axes = _axes(task, x)
    drawn = [row for points in series.values() for row in points.values()]
    for place, (model, points) in enumerate(series.items()):
        rows, marker = list(points.values()), _MARKERS[place % len(_MARKERS)]
        _errorbar(axes, list(points), rows, f"{marker}-", rows[0]["family"], model)
    for row, style in zip(_zoom(axes, drawn, levels), ("--", ":", "-."), strict=False):
        axes.axhline(row["auc"], color=COLORS[row["family"]], linestyle=style, linewidth=1.2, label=row["model"])
    axes.set_xscale("log")
    ticks = sorted({x for points in series.values() for x in points})
    _plain_ticks(axes, {tick: called.get(tick, f"{tick:,g}") for tick in ticks})
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return [_save(figure, out, task, name)]


def _base(row: Row) -> str:
    """Return the name of a model without its switches."""
    return str(row["model"]).partition(":")[0]


def _num_clusters(row: Row) -> float | None:
    """Return K of a row that is ENCODE with nothing but another K, None of any other."""
    found = re.fullmatch(r"encode(:num_clusters=([0-9]+))?", row["model"])
    return None if found is None else float(found[2] or _DEFAULT_CLUSTERS)


def _axes(task: str, x: str) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_title(task)
    axes.set_xlabel(x)
    axes.set_ylabel("AUC, ± standard error")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _errorbar(axes: Any, xs: Sequence[float], rows: Sequence[Row], style: str, family: str, label: str) -> None:
    errors = [row["auc_se"] or 0 for row in rows]
    ys = [row["auc"] for row in rows]
    axes.errorbar(xs, ys, errors, fmt=style, color=COLORS[family], capsize=2, markersize=5, label=label)


def _zoom(axes: Any, focus: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Fit the second axis to the focus; return the rows that are not far below it, and say where the others are."""
    focus = focus if len(focus) > 1 else [*focus, *rows]
    ys = [row["auc"] for row in focus]
    span = max(max(ys) - min(ys), 0.01)
    near = [row for row in rows if row["auc"] >= min(ys) - span]
    ys += [row["auc"] for row in near]
    room = max(0.08 * (max(ys) - min(ys)), 0.002) + max((row["auc_se"] or 0) for row in [*focus, *near])
    axes.set_ylim(min(ys) - room, max(ys) + room)
    below = [f"{_base(row)} {row['auc']:.3f}" for row in rows if row not in near]
    if below:
        axes.text(0.01, 0.01, f"below: {', '.join(below)}", transform=axes.transAxes, fontsize=8, color=COLORS["floor"])
    return near


def _plain_ticks(axes: Any, ticks: Mapping[float, str] | None = None) -> None:
    """Write the first axis in numbers as people do, or in the ticks that are given."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_minor_locator(NullLocator())
    if ticks is None:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    else:
        axes.set_xticks(list(ticks), list(ticks.values()))


def _name_points(figure: Any, axes: Any, rows: Sequence[Row]) -> None:
    """Write each model's name beside its point, where it covers the least of other names and points."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    points = [axes.transData.transform((row["cost_ms_per_1000"], row["auc"])) for row in rows]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in points]

    def covered(box: Any) -> float:
        outside = float(box.width * box.height) - _overlap(box, axes.bbox)
        return outside + sum(_overlap(box, other) for other in taken)

    for row in rows:
        at = (row["cost_ms_per_1000"], row["auc"])
        name = axes.annotate(
            _base(row), at, xytext=(0, 0), textcoords="offset points", fontsize=8, color=COLORS[row["family"]]
        )
        places = []
        for x, y, ha, va in _LABEL_PLACES:
            name.set(position=(x, y), ha=ha, va=va)
            places.append((covered(name.get_window_extent()), x, y, ha, va))
        _, x, y, ha, va = min(places, key=lambda place: place[0])
        name.set(position=(x, y), ha=ha, va=va)
        taken.append(name.get_window_extent())


def _overlap(box: Any, other: Any) -> float:
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return max(float(width), 0.0) * max(float(height), 0.0)


def _save(figure: Any, out: Path, task: str, name: str) -> Path:
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{task.replace('/', '-')}-{name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
