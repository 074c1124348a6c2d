"""The report of a release: why a candidate may serve or not, as one HTML file without any foreign resource.

I impressions
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from html import escape

import numpy as np

from encode.gates import Floats, Gate, Measured
from encode.monitoring.stability import counts_of, edges_of, psi
from encode.pages import POLICY
from encode.registry import Version
from encode.release_plots import Line, plot
from encode.schema import Window
from encode.serving.bundle import Bundle

MEANINGS = {
    "auc": "probability that a positive scores above a negative",
    "gauc": "the same within each user, weighted by impressions",
    "auc_first_time": "AUC of the impressions of items that the user never had before",
    "logloss": "mean negative log likelihood, nats",
    "calibration": "mean predicted over mean observed; above 1 promises too much",
    "coverage": "share of the test days' users that the snapshot holds",
    "parity": "largest difference of a probability between serving and replay",
    "latency_ms": "median for 1,000 candidates of one user, on one thread",
    "size_mb": "weights and space, 10^6 bytes",
    "auc_over_champion": "AUC minus that of the champion, same impressions",
    "gauc_over_champion": "GAUC minus that of the champion",
    "logloss_over_champion": "log loss minus that of the champion; below 0 is better",
    "miscalibration_over_champion": "how much further from 1 the calibration is than that of the champion",
    "coverage_of_champion": "share of the users of the champion's snapshot that this one holds",
}
"""What each gate's value is."""

_BINS = 20
_STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f8; --panel: #fff; --line: #d9dce5; --text: #1b1f2a; --muted: #596074;
  --candidate: #3d56d6; --champion: #c2560c; --good: #14713d; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #11141b; --panel: #1a1f29; --line: #323a4a; --text: #e8eaf0;
  --muted: #a3abbd; --candidate: #93a5ff; --champion: #ff9d5c; --good: #6fd79b; --bad: #ff9c94; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--ground); color: var(--text); max-width: 1080px; margin: 0 auto; padding: 20px;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.35rem; } h2 { font-size: 1rem; margin-bottom: 8px; }
p { color: var(--muted); } a { color: var(--candidate); }
header { border-left: 6px solid var(--verdict); padding-left: 14px; margin-bottom: 16px; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: 16px;
  margin-bottom: 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); } tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 0.85rem; overflow-wrap: anywhere; }
small { display: block; color: var(--muted); font: 0.85rem/1.3 system-ui, "DejaVu Sans", sans-serif; }
.passed { color: var(--good); } .missed { color: var(--bad); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 16px; }
figure { max-width: 520px; } figcaption { font-weight: 600; font-size: 0.9rem; }
svg { width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 11.5px; } svg .turned { transform: rotate(-90deg); transform-box: fill-box;
  transform-origin: center; }
svg .grid { stroke: var(--line); } polyline { fill: none; stroke-width: 2; }
polyline.candidate { stroke: var(--candidate); } circle.candidate { fill: var(--candidate); }
polyline.champion { stroke: var(--champion); } circle.champion { fill: var(--champion); }
polyline.perfect { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 4 4; }
.key::before { content: ""; display: inline-block; width: 12px; height: 3px; margin: 0 6px 4px 0;
  background: var(--key); }
.key { margin-right: 16px; }
.note { font-size: 0.85rem; margin-top: 10px; }
@media (max-width: 600px) { body { padding: 8px; } section { padding: 10px; } table { font-size: 0.85rem; }
  td.limit { white-space: normal; } th, td { padding-right: 6px; } td.code:first-child { min-width: 7.5em; } }
"""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    version: Version
    bundle: Bundle
    measured: Measured
    settings: Mapping[str, str]
    """That it was trained with, as they were logged."""


def shift(scores: Floats, before: Floats) -> float:
    """Return the population stability index of two sets of scores, over bins with equal shares of those before.

    NaN if a score is.

    Args:
        scores: of the candidate, [I].
        before: of the champion, [I].
    """
    if not (np.isfinite(scores).all() and np.isfinite(before).all()):
        return float("nan")
    edges = edges_of(before)
    return psi(counts_of(before, edges), counts_of(scores, edges))


def changes(candidate: Side, champion: Side | None) -> list[tuple[str, str, str]]:
    """Return what both are made of, and the settings that they do not share: name, the candidate's, the champion's."""
    new, old = _facts(candidate), _facts(champion) if champion else {}
    rows = [(name, value, old.get(name, "")) for name, value in new.items()]
    if champion is None:
        return rows
    names = sorted({**candidate.settings, **champion.settings})
    both = [(name, candidate.settings.get(name, ""), champion.settings.get(name, "")) for name in names]
    return rows + [row for row in both if row[1] != row[2]]


def _facts(side: Side) -> dict[str, str]:
    card, bundle = side.bundle.card, side.bundle.describe()
    return {
        "version": side.version.number,
        "days": f"{card.first_day} to {card.as_of}",
        "space": bundle["space"],
        "snapshot": bundle["snapshot"],
        "bundle": bundle["id"],
        "model": side.version.model[:12],
        "commit": side.version.tags.get("encode.git_commit", "")[:12],
    }


def to_html(title: str, gates: Sequence[Gate], candidate: Side, champion: Side | None, links: Mapping[str, str]) -> str:
    """Return the report as one HTML document; it loads nothing and runs nothing.

    Args:
        title: the model's name.
        gates: held against their limits.
        candidate: what is judged.
        champion: what serves, on the same impressions.
        links: addresses by name.
    """
    missed = [gate for gate in gates if not gate.passed]
    verdict = f"is refused: {len(missed)} of {len(gates)} gates missed" if missed else f"passed its {len(gates)} gates"
    number, card, metrics = candidate.version.number, candidate.bundle.card, candidate.measured.metrics
    test = Window(card.as_of - timedelta(days=card.test_days), card.as_of).in_words()
    beside = f"beside champion version {champion.version.number}" if champion else "there is no champion yet"
    shown = " · ".join(f'<a href="{escape(url)}" target="_blank">{escape(name)}</a>' for name, url in links.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{POLICY}
<title>{escape(title)} version {number}</title><style>{_STYLE}</style></head><body>
<header style="--verdict: var(--{"bad" if missed else "good"})">
<h1>{escape(title)} version {number} <span class="{"missed" if missed else "passed"}">{verdict}</span></h1>
<p>Measured on {metrics["impressions"]:,.0f} impressions ({metrics["positives"]:,.0f} positive) of {test}, {beside}.</p>
<p>{shown}</p></header>
<section><h2>Gates</h2>{_gates_table(gates)}{_seen_before(metrics)}</section>
<section><h2>On the test days</h2>{_plots(candidate, champion)}</section>
<section><h2>What changed</h2>{_changes_table(changes(candidate, champion))}</section>
</body></html>
"""


def _gates_table(gates: Sequence[Gate]) -> str:
    rows = []
    for gate in gates:
        said = ("passed", "passed") if gate.passed else ("missed", "MISSED")
        cells = [
            f'<td class="code">{gate.name}<small>{MEANINGS[gate.name]}</small></td>',
            f'<td class="number">{gate.value:.4g}</td>',
            f'<td class="number">{_number(gate.champion)}</td><td class="number limit">{escape(gate.limit)}</td>',
            f'<td class="{said[0]}">{said[1]}</td>',
        ]
        rows.append("".join(cells))
    head = '<th>gate</th><th class="number">value</th><th class="number">champion</th><th class="number">limit</th>'
    return _table(head + "<th></th>", rows)


def _seen_before(metrics: Mapping[str, float]) -> str:
    return (
        '<p class="note">Seen before: the user had the item earlier than the impression; first time: not. '
        f"<code>auc_seen_before</code> is {metrics['auc_seen_before']:.4g}: the AUC of ranking by that alone, without "
        "any model. It is what habit explains of <code>auc</code>, and no AUC among items seen before; "
        "<code>auc_first_time</code> is what the model knows beyond habit.</p>"
    )


def _changes_table(changed: Sequence[tuple[str, str, str]]) -> str:
    rows = ["".join(f'<td class="code">{escape(text)}</td>' for text in row) for row in changed]
    return _table("<th></th><th>candidate</th><th>champion</th>", rows)


def _table(head: str, rows: Iterable[str]) -> str:
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plots(candidate: Side, champion: Side | None) -> str:
    sides = {"champion": champion.measured} if champion else {}
    sides |= {"candidate": candidate.measured}  # last, so that it is drawn over the other
    reliability = [
        Line(name, [(one["predicted"], one["observed"]) for one in side.curves["reliability"]])
        for name, side in sides.items()
    ]
    top = max((max(point) for line in reliability for point in line.points), default=1.0)
    lengths = [
        Line(name, [(one["up_to"], one["auc"]) for one in side.curves["auc_by_history_length"]])
        for name, side in sides.items()
    ]
    highest = max(float(np.nanmax(side.probabilities, initial=0.0)) for side in sides.values()) or 1.0
    scores = [Line(name, _distribution(side.probabilities, highest), dots=False) for name, side in sides.items()]
    moved = note = ""
    if champion:
        moved = f", PSI {shift(candidate.measured.probabilities, champion.measured.probabilities):.3f}"
        note = '<p class="note">PSI: how far the scores moved from the champion\'s; by custom above 0.25 is much.</p>'
    colors = {name: name for name in reversed(sides)} | {"perfectly calibrated (dashed)": "muted"}
    keys = "".join(f'<span class="key" style="--key: var(--{color})">{name}</span>' for name, color in colors.items())
    drawn = [
        plot(
            "Reliability",
            "predicted (mean of a tenth)",
            "observed share",
            [Line("perfect", [(0, 0), (top, top)], dots=False), *reliability],
        ),
        plot("AUC by length of the history", "behaviors (upper end of a tenth)", "AUC", lengths, log=True),
        plot(f"Distribution of scores{moved}", "probability", "share of impressions", scores),
    ]
    return f'<p>{keys}</p><div class="plots">{"".join(drawn)}</div>{note}'


def _distribution(probabilities: Floats, highest: float) -> list[tuple[float, float]]:
    """Return the share of scores in each of the equal bins up to the highest, at their middles."""
    counts, edges = np.histogram(probabilities[np.isfinite(probabilities)], bins=_BINS, range=(0, highest))
    middles = (edges[1:] + edges[:-1]) / 2
    return [(float(x), float(y)) for x, y in zip(middles, counts / max(1, len(probabilities)), strict=True)]


def to_markdown(gates: Sequence[Gate], candidate: Side, champion: Side | None, report: str) -> str:
    """Return the difference for a person who has to approve: the gates, what changed, and where the report is."""
    lines = [f"[Report]({report})" if report.startswith("http") else f"Report: `{report}`", ""]
    lines += ["| gate | value | champion | limit |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {gate.name} | {gate.value:.4g} | {_number(gate.champion)} | {gate.limit} |" for gate in gates]
    lines += ["", "| made of | candidate | champion |", "| --- | --- | --- |"]
    for row in changes(candidate, champion):
        lines.append("| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)
