"""Small charts as SVG, in the colors of the page that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 320, 150
_LEFT, _TOP, _FLOOR = 8, 26, 124


def bars(title: str, labels: Sequence[str], now: Sequence[float], before: Sequence[float] | None = None) -> str:
    """Return shares as bars, those of before as a line across each.

    Args:
        title: above the chart.
        labels: of the bars; every second one is left out where they are many.
        now: shares, 0 to 1.
        before: the same of the earlier snapshot, if there is one.
    """
    step = (_WIDTH - 2 * _LEFT) / max(len(labels), 1)
    top = max([*now, *(before or ()), 1e-9])
    every = 1 + (len(labels) - 1) // 10
    parts = [f'<text class="title" x="{_LEFT}" y="14">{escape(title)}</text>']
    for place, (label, value) in enumerate(zip(labels, now, strict=True)):
        x, width = _LEFT + place * step, step * 0.8
        y = _y(value, top)
        told = f"{label}: {value:.1%}"
        line = ""
        if before is not None:
            told += f", before {before[place]:.1%}"
            line = f'<path class="before" d="M{x:.1f} {_y(before[place], top):.1f}h{width:.1f}"/>'
        bar = f'<rect class="now" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_FLOOR - y:.1f}"/>'
        parts.append(f"<g><title>{escape(told)}</title>{bar}{line}</g>")
        if place % every == 0:
            parts.append(f'<text class="tick" x="{x + width / 2:.1f}" y="{_FLOOR + 15}">{escape(label)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_FLOOR}H{_WIDTH - _LEFT}"/>')
    parts.append(f'<text class="tick end" x="{_WIDTH - _LEFT}" y="14">max {top:.0%}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _y(value: float, top: float) -> float:
    return _FLOOR - (_FLOOR - _TOP) * value / top
