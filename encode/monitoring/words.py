"""What was measured, as lines for people; `--json` has all of it as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from typing import Any

from encode.monitoring.stability import verdict
from encode.schema import Window, number_of

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_HEAD = f"  {'':<30}{'before':>10}{'now':>10}{'PSI':>9}{'by chance':>11}  moved"


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `Watch.look`: what is compared with what, and the numbers."""
    yield f"as of the start of {told['as_of']}"
    yield ""
    yield "what each stage holds:"
    yield from (f"  {name:<10} {_reach(one)}" for name, one in told["freshness"].items())
    if "drift" in told:
        yield from ("", *_drift(told["drift"]))
    if "skew" in told:
        yield from ("", *_skew(told["skew"]))
    if told["problems"]:
        yield from ("", "problems:", *(f"  {problem}" for problem in told["problems"]))


def _reach(stage: Mapping[str, Any]) -> str:
    if stage["ends"] is None:
        return "nothing yet"
    last = date.fromisoformat(stage["ends"]) - timedelta(days=1)
    if "age_days" in stage:
        return f"days up to {last}, {number_of(stage['age_days'], 'day')} old"
    return f"days up to {last}, {number_of(stage['ahead_days'], 'day')} ahead of that"


def _drift(drift: Mapping[str, Any]) -> Iterator[str]:
    sample, before = drift["sample"], drift["before"]
    against = f"against the one before it, {before}" if before else "and none before it to compare with"
    yield f"drift: snapshot {drift['snapshot']} of {number_of(drift['users'], 'user')}, {against}"
    yield f"  sample: {number_of(sample['users'], 'user')}, of {sample['buckets']} of {sample['of_buckets']} buckets"
    if "coverage_of_newest_day" in drift:
        yield f"  {drift['coverage_of_newest_day']:.1%} of the newest validated day's users are in the snapshot"
    if before:
        kept = drift["sampled_users_kept"]
        yield f"  {kept:.1%} of the users of the one before are still there" if kept == kept else "  no user before"
        yield from (_HEAD, *(_shift(name, one) for name, one in drift["measures"].items()))


def _skew(skew: Mapping[str, Any]) -> Iterator[str]:
    yield f"skew: behaviors of {skew['scored']}"
    yield f"  scored like, and held against, the model's own test days, {skew['trained']}"
    yield from _not_new(_window(skew["scored"]), _window(skew["trained"]))
    yield from (_HEAD.replace("before", "  test"), _shift("score", skew))
    yield f"  unknown items {skew['unknown_items']:.2%}, users without a history {skew['users_without_history']:.2%}"
    names = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss", "calibration": "calibration"}
    measured = ", ".join(f"{told} {skew[name]:.4f}" for name, told in names.items() if name in skew)
    yield f"  of the {skew['impressions']:,.0f} impressions scored: {measured}"


def _window(words: str) -> Window:
    """Read what `Window.in_words` wrote."""
    days = [date.fromisoformat(day) for day in _DAY.findall(words)]
    return Window(days[0], days[-1] + timedelta(days=1))


def _not_new(scored: Window, test: Window) -> Iterator[str]:
    """Yield which of the scored days the model knows, and what to do; nothing where all are after its test days."""
    if scored.start >= test.end:
        return
    if scored.start < test.start:
        known = Window(scored.start, min(scored.end, test.start))
        yield f"  trained on or tuned by, so that scores are too good: {known.in_words()}"
    if scored.end > test.start:
        tested = Window(max(scored.start, test.start), min(scored.end, test.end))
        yield f"  test days themselves, which show no skew: {tested.in_words()}"
    newer = (scored.end - test.end).days
    yield f"  to measure skew: {f'--score-days {newer}' if newer > 0 else 'validate newer days first'}"


def _shift(name: str, one: Mapping[str, float]) -> str:
    before, now = (_number(one.get(key, float("nan"))) for key in ("before", "now"))
    measured = f"{'-':>9}{'-':>11}  not measured"
    if "psi" in one and "chance" in one:
        measured = f"{one['psi']:>9.4f}{one['chance']:>11.4f}  {verdict(one['psi'], one['chance'])}"
    return f"  {name:<30}{before:>10}{now:>10}{measured}"


def numbers(told: Mapping[str, Any], depth: int = 1) -> Iterator[str]:
    """Yield nested numbers as they are called, what belongs together on one line."""
    for name, value in told.items():
        indent, label = "  " * depth, name.replace("_", " ")
        if not isinstance(value, Mapping):
            yield f"{indent}{label}: {_number(value)}"
        elif any(isinstance(one, Mapping) for one in value.values()):
            yield from (f"{indent}{label}", *numbers(value, depth + 1))
        else:
            short = ", ".join(f"{key.replace('_', ' ')} {_number(one)}" for key, one in value.items())
            yield f"{indent}{label}: {short}"


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value != value:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
