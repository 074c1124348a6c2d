"""Line plots as SVG that takes its colors from the page around it, light or dark, and needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

Point = tuple[float, float]
_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 12, 44
_STEPS = (1, 2, 2.5, 5, 10)


class Line(NamedTuple):
    """A named line; the name is a CSS class, too."""

    name: str
    points: Sequence[Point]
    dots: bool = True


def plot(title: str, x: str, y: str, lines: Sequence[Line], *, log: bool = False) -> str:
    """Draw lines in one frame; each dot tells its values when it is pointed at.

    Args:
        title: what it shows.
        x: what the first coordinate is.
        y: what the second is.
        lines: drawn in this order; points that are not finite are left out.
        log: the first coordinate is drawn as log(1 + x).
    """
    kept = [
        line._replace(points=[(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)])
        for line in lines
    ]
    xs, ys = ([point[axis] for line in kept for point in line.points] or [0.0, 1.0] for axis in (0, 1))
    x_ticks = _log_ticks(min(xs), max(xs)) if log else _ticks(min(xs), max(xs))
    y_ticks = _ticks(min(ys), max(ys))
    scale: Callable[[float], float] = math.log1p if log else float
    across = _axis(scale(min(*xs, x_ticks[0])), scale(max(*xs, x_ticks[-1])), _LEFT, _WIDTH - _RIGHT)
    up = _axis(min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]), _HEIGHT - _BOTTOM, _TOP)
    drawn = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_grid(_LEFT, up(tick), _WIDTH - _RIGHT, up(tick), f"{tick:g}", -8, 4, "end") for tick in y_ticks),
        *(
            _grid(across(scale(tick)), _TOP, across(scale(tick)), _HEIGHT - _BOTTOM, f"{tick:,g}", 0, 18, "middle")
            for tick in x_ticks
        ),
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>',
        f'<text x="14" y="{(_TOP + _HEIGHT - _BOTTOM) / 2}" text-anchor="middle" class="turned">{escape(y)}</text>',
    ]
    for line in kept:
        places = [(across(scale(first)), up(second)) for first, second in line.points]
        path = " ".join(f"{first:.1f},{second:.1f}" for first, second in places)
        drawn.append(f'<polyline class="{line.name}" points="{path}"/>')
        for place, (first, second) in zip(places, line.points if line.dots else (), strict=False):
            told = f"<title>{line.name}: {first:,.4g}, {second:.4g}</title>"
            at = f'cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3"'
            drawn.append(f'<circle class="{line.name}" {at}>{told}</circle>')
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(drawn)}</svg></figure>"


def _axis(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    return lambda value: begin + (end - begin) * (value - low) / (high - low or 1)


def _ticks(low: float, high: float) -> list[float]:
    """Return four to seven round numbers from the last at or below `low` to the first at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / 5))
    step = power * next(step for step in _STEPS if span / (power * step) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return numbers 1, 2 or 5 times a power of ten from the last at or below `low` to the first at or above `high`.

    Powers alone where those are too many; 0 is below 1.
    """
    first, last = (math.floor(math.log10(max(end, 1))) for end in (low, high))
    for leading in ((1, 2, 5), (1,)):
        ticks = [step * 10.0**power for power in range(first, last + 2) for step in leading]
        begin = max((tick for tick in ticks if tick <= low), default=ticks[0])
        end = min(tick for tick in ticks if tick >= high and tick > begin)
        kept = [0.0] * (low < 1) + [tick for tick in ticks if begin <= tick <= end]
        if len(kept) <= 7:
            break
    return kept


def _grid(x1: float, y1: float, x2: float, y2: float, text: str, dx: float, dy: float, anchor: str) -> str:
    """A line of the grid, and what it is called at its end on the axis."""
    at = f'x="{x1 + dx:.1f}" y="{(y1 if dx else y2) + dy:.1f}"'
    line = f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    return f'{line}<text {at} text-anchor="{anchor}">{text}</text>'
