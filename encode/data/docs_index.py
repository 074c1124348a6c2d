"""The index over the days: one HTML file that loads nothing, small multiples over time as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from typing import TypeVar

from encode.pages import POLICY
from encode.schema import number_of

T = TypeVar("T")

_PANELS = (
    ("rows", "Rows", "accepted"),
    ("users", "Users", "active on the day"),
    ("share of rejected rows", "Rejected share", "of the raw rows"),
    ("PSI of hours", "PSI of hours", "users by hour of the day, UTC, beside the days before"),
    ("PSI of categories", "PSI of categories", "rows by category, beside the days before"),
)
_WIDTH, _HEIGHT = 1080, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 20
_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#646c76;--line:#2f6fb5;--band:#2f6fb51f;--grid:#e3e6ea;--bad:#c4320a;
--page:#fff;--card:#f7f8fa}
@media (prefers-color-scheme:dark){:root{--ink:#e3e6ea;--soft:#9aa3ad;--line:#77b1ee;--band:#77b1ee26;--grid:#30363d;
--bad:#ff8a65;--page:#14171b;--card:#1b1f24}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:1130px}
body{padding:24px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:15px;margin:18px 0 2px}h2 small{font-weight:400;color:var(--soft)}
p{margin:0 0 8px;color:var(--soft)}.panel{overflow-x:auto}
svg{display:block;width:100%;min-width:900px;height:auto;background:var(--card);border-radius:6px}
@media (max-width:600px){body{padding:12px}}
text{font:12px system-ui,sans-serif;fill:var(--soft)}.grid{stroke:var(--grid)}.band{fill:var(--band)}
.line{fill:none;stroke:var(--line);stroke-width:1.4;stroke-linejoin:round}.dot{fill:var(--line)}
.bad{fill:var(--bad)}.refused{stroke:var(--bad);stroke-width:2}.out{fill:var(--bad)}
table{border-collapse:collapse;margin-top:6px;width:100%}
td{text-align:left;vertical-align:top;padding:4px 12px 4px 0;border-bottom:1px solid var(--grid)}
td:first-child{white-space:nowrap}a{color:var(--line)}.key{color:var(--bad)}
"""


@dataclass(frozen=True)
class DayLine:
    """What the index says of one day."""

    day: date
    values: Mapping[str, float | None]
    bands: Mapping[str, tuple[float | None, float | None]]
    """What was usual, by the name of the value."""
    warnings: Sequence[str]
    refusal: str | None
    page: str | None
    """Its Data Docs beside the index, where they were fetched."""
    address: str
    """Of its Data Docs in the store."""


def index_page(lines: Sequence[DayLine], uri: str) -> str:
    """Return the index over one day or more, oldest first."""
    first, last = lines[0].day, lines[-1].day
    warned = [line for line in lines if line.warnings or line.refusal]
    panels = "".join(
        f"<h2>{title} <small>{about}</small></h2><div class=panel>{_panel(name, lines)}</div>"
        for name, title, about in _PANELS
    )
    rows = "".join(_row(line) for line in reversed(warned)) or "<tr><td>none</td></tr>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Validated days</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{POLICY}<style>{_STYLE}</style></head><body><h1>Validated days, {first} to {last}</h1>"
        f"<p>{escape(uri)}: {number_of(len(lines), 'day')}, {len(warned)} with something to look at. Shaded: what is "
        'usual, by the days before; <span class="key">&#9679;</span> outside of it, <span class="key">|</span> a '
        "refused day.</p>"
        f"{panels}<h2>Days to look at <small>newest first</small></h2><table>{rows}</table></body></html>\n"
    )


def _row(line: DayLine) -> str:
    texts = [f"refused: {line.refusal}"] if line.refusal else []
    said = "<br>".join(escape(text) for text in [*texts, *line.warnings])
    link = f'<a href="{escape(line.page)}">{line.day}</a>' if line.page else str(line.day)
    return f'<tr><td title="{escape(line.address)}">{link} {line.day:%a}</td><td>{said}</td></tr>'


def _panel(name: str, lines: Sequence[DayLine]) -> str:
    """Return one value over time: its band, its line, and the days outside."""
    known = [(line, value) for line in lines if (value := line.values.get(name)) is not None]
    ends = [end for line in lines for end in line.bands.get(name, ()) if end is not None]
    values = sorted(value for _, value in known)
    if not known:
        return "<p>no day has it yet</p>"
    # One odd day must not flatten all others: the scale ends a little above what is usual, and what is higher is cut.
    top = min(values[-1], 1.6 * max([values[int(0.95 * (len(values) - 1))], *sorted(ends)[: int(0.95 * len(ends))]]))
    top = top * 1.06 or 1.0
    start, days = lines[0].day, max((lines[-1].day - lines[0].day).days, 1)

    def x(day: date) -> float:
        return _LEFT + (day - start).days / days * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (1 - min(value / top, 1)) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [_grid(top, y), _months(lines, x)]
    drawn += [f'<path class="band" d="{path}"/>' for path in _bands(name, lines, x, y)]
    drawn += [f'<polyline class="line" points="{run}"/>' for run in _runs(known, x, y)]
    for line, value in known:
        low, high = line.bands.get(name, (None, None))
        if (low is not None and value < low) or (high is not None and value > high):
            note = f"{line.day}: {_text(value)}, usually {_text(low or 0)} to {_text(high or 0)}"
            drawn.append(_mark(x(line.day), y(value), note, cut=value > top))
    for line in lines:
        if line.refusal:
            at, note = x(line.day), escape(f"{line.day}: refused: {line.refusal}")
            ends_at = f'y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"'
            drawn.append(f'<line class="refused" x1="{at:.1f}" x2="{at:.1f}" {ends_at}><title>{note}</title></line>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}">{"".join(drawn)}</svg>'


def _mark(x: float, y: float, note: str, *, cut: bool) -> str:
    """Return a dot, or where the value is above the scale an arrow."""
    title = f"<title>{escape(note)}</title>"
    if cut:
        return f'<path class="out" d="M{x - 4:.1f} {y + 8:.1f}h8l-4 -8z">{title}</path>'
    return f'<circle class="bad" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'


def _grid(top: float, y: Callable[[float], float]) -> str:
    lines = []
    for value in (0.0, _round(top / 2), 2 * _round(top / 2)):
        if value <= top:
            at = y(value)
            lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            lines.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_text(value)}</text>')
    return "".join(lines)


def _round(value: float) -> float:
    """Return the largest 1, 2, 2.5 or 5 times a power of ten that is not above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(step * power for step in (1, 2, 2.5, 5) if step * power <= value)


def _months(lines: Sequence[DayLine], x: Callable[[date], float]) -> str:
    """Return the labels of the time axis: each month, or with many of them each quarter or year."""
    first, last = lines[0].day, lines[-1].day
    months = (last.year - first.year) * 12 + last.month - first.month
    step = 1 if months <= 14 else 3 if months <= 42 else 12
    labels = []
    for count in range(months + 1):
        year, month = divmod(first.year * 12 + first.month - 1 + count, 12)
        day = max(date(year, month + 1, 1), first)
        if (month % step == 0 or count == 0) and (last - day).days * 40 >= (last - first).days:
            text = f"{day:%b %Y}" if month == 0 or count == 0 else f"{day:%b}"
            labels.append(f'<text x="{x(day):.1f}" y="{_HEIGHT - 5}">{text}</text>')
    return "".join(labels)


def _bands(
    name: str, lines: Sequence[DayLine], x: Callable[[date], float], y: Callable[[float], float]
) -> Iterator[str]:
    """Yield the area of what is usual for each run of days that have one."""
    having = [(line, line.bands[name]) for line in lines if name in line.bands]
    for run in _consecutive(having):
        upper = [f"{x(line.day):.1f} {y(high if high is not None else 0):.1f}" for line, (_, high) in run]
        lower = [f"{x(line.day):.1f} {y(low or 0):.1f}" for line, (low, _) in reversed(run)]
        yield f"M{'L'.join(upper + lower)}z"


def _runs(
    known: Sequence[tuple[DayLine, float]], x: Callable[[date], float], y: Callable[[float], float]
) -> Iterator[str]:
    for run in _consecutive(known):
        yield " ".join(f"{x(line.day):.1f},{y(value):.1f}" for line, value in run)


def _consecutive(pairs: Sequence[tuple[DayLine, T]]) -> Iterator[list[tuple[DayLine, T]]]:
    """Yield the runs of pairs whose days follow one another: a missing day is a gap."""
    run: list[tuple[DayLine, T]] = []
    for pair in pairs:
        if run and (pair[0].day - run[-1][0].day).days != 1:
            yield run
            run = []
        run.append(pair)
    if run:
        yield run


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"
