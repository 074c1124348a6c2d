"""The suite that judges a day, run by Great Expectations, and the page that shows the result.

Great Expectations reports, it does not move rows: what is wrong with each row is decided in `encode.data.verdicts`,
and the suite judges counts, shares and ranges over the whole day, and what `encode.data.trends` measured beside the
days before it. A failed `critical` expectation refuses the day, a failed `warning` is said and recorded, a failed
`info` is recorded. Result and page hold no dates of the run and no random ids: equal days give equal bytes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from html import escape
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa

from encode.config import ValidationConfig
from encode.data.trends import Measure
from encode.data.verdicts import REASONS, Verdict, count_reasons
from encode.errors import EncodeError
from encode.pages import POLICY
from encode.schema import SECONDS_PER_DAY, day_start, number_of

_MEASURE = "expect_measure_to_be_between"
_BOUNDS = ("min_value", "max_value")
_SECTIONS = """{% for section in sections %}{% set section_loop = loop %}{% include "section.j2" %}{% endfor %}"""
"""Of a page of Great Expectations only this: around it are links, controls and files of a site that is not there."""
_STYLE = """
:root{color-scheme:light dark;--ink:#222;--soft:#646c76;--rule:#d4d8dd;--head:#eef2f7;--good:#1a7f37;--bad:#b3261e;
--page:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#ddd;--soft:#9aa3ad;--rule:#3a4149;--head:#20262e;--good:#6cc08b;
--bad:#f2877f;--page:#15181c}}
body{font:14px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;padding:24px}
body{max-width:1080px}h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:28px 0 4px}h5{font-size:14px;margin:0}
p{margin:4px 0 8px}.note,small{color:var(--soft);font-weight:400}ul{margin:4px 0;padding-left:20px}
table{border-collapse:collapse;margin:8px 0}
td,th{border:1px solid var(--rule);padding:4px 10px;text-align:left;vertical-align:top}
.number{text-align:right;font-variant-numeric:tabular-nums}
.alert{background:var(--head);padding:6px 10px;margin-top:14px}
.badge{border:1px solid var(--rule);border-radius:3px;padding:0 4px;white-space:nowrap}
td:first-child .text-success:before{content:"\\2713";color:var(--good)}
td:first-child .text-danger:before,td:first-child .text-warning:before{content:"\\2717";color:var(--bad)}
@media (max-width:600px){body{padding:12px}td,th{padding:3px 6px}.badge{white-space:normal}
td:nth-child(2),td td{overflow-wrap:anywhere}.number{overflow-wrap:normal}}
"""
_DOES = {
    "critical": "refuses the day",
    "warning": "is said, recorded and shown here",
    "info": "is recorded and shown here",
}


@dataclass(frozen=True)
class Judgment:
    """What Great Expectations says about a day."""

    failed: tuple[str, ...]
    """Critical expectations that failed, each with what was found and expected."""
    warnings: tuple[str, ...]
    """Failed expectations of severity warning about the day itself."""
    drift: tuple[str, ...]
    """Failed expectations of severity warning about the day beside those before it."""
    notes: tuple[str, ...]
    """Failed expectations of severity info."""
    rejected: int
    """Rows with a reason, as Great Expectations counted them."""
    result: bytes
    """JSON."""
    page: bytes
    """HTML, complete in itself: it loads nothing from elsewhere, and runs nothing."""


def judge_day(
    day: date,
    verdicts: Sequence[Verdict],
    config: ValidationConfig,
    measures: Sequence[Measure],
    compared_with: int,
    hints: Sequence[str] = (),
) -> Judgment:
    """Run the suite over the verdicts of all rows of a day, and over its measures against `compared_with` earlier days.

    Args:
        day: the day.
        verdicts: of all of its rows.
        config: what is expected.
        measures: of the day beside those before it.
        compared_with: how many these are.
        hints: warnings that are no expectations; the page has them, too.

    Raises:
        EncodeError: an expectation could not be evaluated at all.
    """
    with _quiet():
        result = _validate(day, _frame(verdicts), config, measures)
    found: dict[str, list[str]] = {"critical": [], "warning": [], "drift": [], "info": []}
    rejected = -1
    for one in result.results:
        settings = one.expectation_config
        if one.exception_info.get("raised_exception"):
            raise EncodeError(f"validation of {day}: {settings.type} failed: {one.exception_info['exception_message']}")
        if settings.type == "expect_column_values_to_be_null":
            rejected = int(one.result["unexpected_count"])
        if not one.success:
            drifted = settings.type == _MEASURE and settings.severity == "warning"
            found["drift" if drifted else str(settings.severity.value)].append(_describe(one))
    failed, warned, drift, notes = (tuple(sorted(texts)) for texts in found.values())
    data = _to_json(day, result)
    reasons = count_reasons(np.concatenate([v.reason for v in verdicts]))
    head = [
        _verdict(day, sum(len(v.reason) for v in verdicts), reasons, config.max_rejected_share),
        _lists({"Refused": failed, "Warnings": (*warned, *hints, *drift), "Noted": notes}),
        _kept(reasons),
        _expected(result.results),
        _compared(measures, compared_with),
    ]
    with _quiet():
        page = _page(day, "refused" if failed else "published", head, _sections(result))
    return Judgment(failed, warned, drift, notes, rejected, data, page)


def _expectations(day: date, config: ValidationConfig, measures: Sequence[Measure]) -> list[Any]:
    """Return the suite: first what refuses a day, then what is worth a look."""
    measured = _import("encode.data.expect_measure").ExpectMeasureToBeBetween
    gxe = _import("great_expectations.expectations")
    column = _import("great_expectations.expectations.row_conditions").Column
    accepted = {"row_condition": column("reason").is_null(), "condition_parser": "great_expectations"}
    mostly = round(1 - config.max_rejected_share, 12)
    first = day_start(day)
    suite = [
        gxe.ExpectColumnValuesToBeNull(column="reason", mostly=mostly, severity="critical"),
        gxe.ExpectTableRowCountToBeBetween(min_value=config.min_rows, severity="critical", **accepted),
        gxe.ExpectColumnUniqueValueCountToBeBetween(
            column="user_id", min_value=config.min_users, severity="critical", **accepted
        ),
    ]
    suite += [
        gxe.ExpectColumnValuesToNotBeNull(column=name, mostly=mostly, severity="warning")
        for name in ("user_id", "item_id", "behavior", "timestamp")
    ]
    suite += [
        gxe.ExpectColumnValuesToBeBetween(column=name, min_value=low, max_value=high, mostly=mostly, severity="warning")
        for name, low, high in (
            ("user_id", 1, None),
            ("item_id", 1, None),
            ("category_id", 0, None),
            ("timestamp", first, first + SECONDS_PER_DAY - 1),
        )
    ]
    if config.behaviors is not None:
        suite.append(
            gxe.ExpectColumnValuesToBeInSet(
                column="behavior", value_set=list(config.behaviors), mostly=mostly, severity="warning"
            )
        )
    return suite + [
        measured(
            measure=one.name,
            observed=one.value,
            min_value=one.low,
            max_value=one.high,
            named=list(one.named),
            severity=one.severity,
        )
        for one in measures
    ]


def _frame(verdicts: Sequence[Verdict]) -> Any:
    """Return all rows as a pandas frame of numpy dtypes; unreadable values are NaN or None."""
    import pandas as pd

    reason = np.concatenate([v.reason for v in verdicts])
    columns: dict[str, Any] = {}
    for name in ("user_id", "item_id", "category_id", "timestamp"):
        values = np.concatenate([getattr(v, name) for v in verdicts])
        unreadable = np.isin(reason, _unreadable_codes(name))
        columns[name] = np.where(unreadable, np.nan, values) if unreadable.any() else values
    behavior = pa.chunked_array([v.behavior for v in verdicts], pa.string()).combine_chunks().dictionary_encode()
    names = np.array([*behavior.dictionary.to_pylist(), None], object)
    columns["behavior"] = names[behavior.indices.fill_null(len(names) - 1).to_numpy()]
    columns["reason"] = np.array([None, *REASONS[1:]], object)[reason]
    return pd.DataFrame({name: pd.Series(values, dtype=values.dtype) for name, values in columns.items()})


@cache
def _unreadable_codes(column: str) -> tuple[int, ...]:
    ends = ("missing", "not_integer", "inexact")
    return tuple(c for c, r in enumerate(REASONS) if r in {f"{column}_{end}" for end in ends} | {"malformed_row"})


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _import(name: str) -> Any:
    """Import a module of Great Expectations late, for it is slow, and as Any: its annotations do not fit its use."""
    return import_module(name)


@cache
def _batch_definition() -> Any:
    """Return how a frame becomes a batch, in the one context of this process; the import takes seconds."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.WARNING)  # else 200 lines in the log of each task
    context = _import("great_expectations").get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False, "profilers": False}
    asset = context.data_sources.add_pandas("behaviors").add_dataframe_asset("day")
    return asset.add_batch_definition_whole_dataframe("whole")


@cache
def _view() -> Any:
    """Return what makes HTML of a result; it keeps its compiled templates.

    Great Expectations escapes the parameters of its sentences and nothing else: a text that is a whole cell, as a
    value of the log is, would be markup.
    """
    view = _import("great_expectations.render.view").DefaultJinjaPageView()
    render = view.render_content_block

    def render_escaped(context: Any, block: Any, **settings: Any) -> Any:
        if isinstance(block, list):
            block = [escape(one) if isinstance(one, str) else one for one in block]
        return escape(block) if isinstance(block, str) else render(context, block, **settings)

    view.env.filters["render_content_block"] = _import("jinja2").pass_context(render_escaped)
    return view


def _validate(day: date, frame: Any, config: ValidationConfig, measures: Sequence[Measure]) -> Any:
    batch = _batch_definition().get_batch({"dataframe": frame})
    expectations = _expectations(day, config, measures)
    suite = _import("great_expectations").ExpectationSuite("behaviors", expectations=expectations)
    return batch.validate(suite, result_format="SUMMARY")


def _describe(one: Any) -> str:
    """Return one failed expectation in a line: what it is, what was found, what was expected."""
    settings, result = one.expectation_config, one.result
    if settings.type == _MEASURE:
        return _describe_measure(settings.kwargs)
    kwargs = {k: v for k, v in settings.kwargs.items() if k not in ("batch_id", "row_condition", "condition_parser")}
    column = kwargs.pop("column", "rows")
    bounds = {k: _bound(v, column) for k, v in kwargs.items() if k in _BOUNDS}
    expected = ", ".join(f"{key} {value}" for key, value in sorted((kwargs | bounds).items()))
    if "observed_value" in result:
        found = f"found {result['observed_value']:,}"
    else:
        found = f"{result['unexpected_count']:,} of {number_of(result['element_count'], 'row')} are not so"
    return f"{settings.type}({column}): {found}, expected {expected}"


def _to_json(day: date, result: Any) -> bytes:
    """Return the result without what differs from run to run."""
    values = result.to_json_dict()
    values["meta"] = {"great_expectations_version": values["meta"]["great_expectations_version"], "day": str(day)}
    values["results"].sort(key=lambda one: json.dumps(one["expectation_config"], sort_keys=True))
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def _describe_measure(measured: dict[str, Any]) -> str:
    low, high = (_number(measured.get(end)) for end in ("min_value", "max_value"))
    usual = f"at most {high}" if low == "" else f"{low} to {high}"
    named = f" ({', '.join(measured['named'])})" if measured.get("named") else ""
    return f"{measured['measure']}: found {_number(measured['observed'])}{named}, usually {usual}"


def _bound(value: float, column: str | None) -> str:
    """Return an end of a range, for Great Expectations a float, as what it is: a time, else a count or id."""
    return _value(value, column) if column == "timestamp" else f"{int(value):,}"


def _value(value: Any, column: str | None) -> Any:
    """Return a value of a column as it is in the log, a time also as a date; what is no whole number stays as it is."""
    if not isinstance(value, int | float) or value != value // 1:
        return value
    if column != "timestamp":
        return str(int(value))
    try:
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC ({int(value)})"
    except (OverflowError, ValueError, OSError):  # no year from 1 to 9999
        return str(int(value))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


# --- the page ----------------------------------------------------------------------------------------------


def _page(day: date, said: str, head: Sequence[str], sections: str) -> bytes:
    version = _import("great_expectations").__version__
    html = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{day}: {said}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{POLICY}<style>{_STYLE}</style></head><body><h1>{day}: {said}</h1>{''.join(head)}"
        "<h2>The rows, column by column</h2><p class=note>All raw rows are counted, accepted or not; the number of "
        "rows and that of users are of the accepted ones. A row goes to quarantine once, for the first reason that "
        "applies, and counts here in each column that is wrong, so that these counts may be higher than those of the "
        "reasons. What is missing or unreadable counts as null, and not also as out of range. By Great Expectations "
        f"{version}.</p>{sections}</body></html>\n"
    )
    return re.sub(r"\s*\n\s*", "\n", html).encode()


def _verdict(day: date, raw_rows: int, reasons: dict[str, int], allowed: float) -> str:
    rejected = sum(reasons.values())
    return (
        f"<p>{number_of(raw_rows, 'raw row')} of {day:%A}: {raw_rows - rejected:,} accepted, {rejected:,} rejected"
        f"{f' ({rejected / raw_rows:.2%})' if raw_rows else ''}, allowed {allowed:.2%}.</p>"
    )


def _lists(texts: dict[str, Sequence[str]]) -> str:
    """Return what is wrong with the day, by what follows from it."""
    return "".join(
        f"<h2>{title} <small>({len(lines)})</small></h2><ul>{''.join(f'<li>{escape(one)}' for one in lines)}</ul>"
        for title, lines in texts.items()
        if lines
    )


def _kept(reasons: dict[str, int]) -> str:
    rows = [(reason, f"{count:,}") for reason, count in reasons.items()]
    table = _table([("reason", "rows"), *rows, ("all", f"{sum(reasons.values()):,}")]) if rows else "<p>None.</p>"
    beside = (
        "<p class=note>In the store they lie beside this page, in part-00000.parquet, and what Great Expectations "
        "returned is in result.json.</p>"
    )
    return f"<h2>Rows in quarantine</h2>{table}{beside if rows else ''}"


def _expected(results: Sequence[Any]) -> str:
    """Return how many expectations hold, by what it does if one does not, and where they are on the page."""
    held = {severity: [0, 0] for severity in _DOES}
    for one in results:
        held[str(one.expectation_config.severity.value)][not one.success] += 1
    rows = [(name, _DOES[name], *map(str, counts)) for name, counts in held.items() if any(counts)]
    total = [str(sum(counts)) for counts in zip(*held.values(), strict=True)]
    measured = sum(one.expectation_config.type == _MEASURE for one in results)
    return (
        f"<h2>{number_of(len(results), 'expectation')}</h2>"
        f"{_table([('severity', 'one that does not hold', 'hold', 'do not'), *rows, ('all', '', *total)])}"
        f"<p class=note>Each has a line below: {measured} beside the days before, {len(results) - measured} about the "
        "rows.</p>"
    )


def _compared(measures: Sequence[Measure], compared_with: int) -> str:
    if not measures:
        have = f"{number_of(compared_with, 'day')} before it"
        return f"<h2>Not compared with the days before it</h2><p>{have}: too few, or it has no rows.</p>"
    rows = [("", "", "found", "usually from", "to")]
    for one in measures:
        usual = (one.low is None or one.value >= one.low) and (one.high is None or one.value <= one.high)
        mark = "\u2713" if usual else "\u2717 " + one.severity
        name = f"{one.name} ({', '.join(one.named)})" if one.named else one.name
        rows.append((mark, name, _number(one.value), _number(one.low), _number(one.high)))
    return (
        f"<h2>Beside {f'the {compared_with} days' if compared_with > 1 else 'the day'} before it</h2>{_table(rows)}"
        "<p class=note>Shares of rejected rows are of the raw rows, all else is of the accepted ones.</p>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is its head; columns of what looks like numbers stand to the right."""
    numbers = [all(text == "" or text[0] in "-0123456789" for text in column[1:]) for column in zip(*rows, strict=True)]
    kinds = [" class=number" if is_number else "" for is_number in numbers]
    lines = (
        "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, row, strict=True))
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    )
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _sections(result: Any) -> str:
    """Return the expectations about rows as Great Expectations shows them, column by column.

    Its header and run info are left out: they call a day failed for a mere warning, and know no data asset.
    """
    identifier = _import("great_expectations.core.run_identifier").RunIdentifier
    renderer = _import("great_expectations.render.renderer").ValidationResultsPageRenderer(run_info_at_end=True)
    result.meta["run_id"] = identifier(run_name="", run_time=datetime(1970, 1, 1, tzinfo=UTC))
    result.results = [one for one in result.results if one.expectation_config.type != _MEASURE]
    for one in result.results:
        if one.expectation_config.type == "expect_column_values_to_not_be_null":
            one.result.update(partial_unexpected_list=[], partial_unexpected_counts=[])  # else a line `nan` each
        _reword_values(one)
    document = renderer.render(result).to_json_dict()
    for sentence in _sentences(document):
        _reword(sentence)
    html: str = _view().env.from_string(_SECTIONS).render(sections=document["sections"][1:-1])
    return html


def _reword_values(one: Any) -> None:
    """Write the counts and sampled values of a result as people read them; its JSON was made before."""
    found, column = one.result, one.expectation_config.kwargs.get("column")
    if "observed_value" in found:
        found["observed_value"] = f"{found['observed_value']:,}"
    found["partial_unexpected_list"] = [_value(value, column) for value in found.get("partial_unexpected_list", ())]
    for count in found.get("partial_unexpected_counts", ()):
        count["value"] = _value(count["value"], column)


def _reword(sentence: dict[str, Any]) -> None:
    """Write the bounds and counts of a sentence as people read them."""
    sentence["template"] = sentence["template"].replace("_pct % of the time", "_pct% of the rows")
    words = sentence.get("params", {})
    words |= {end: _bound(words[end], words.get("column")) for end in _BOUNDS if words.get(end) is not None}
    for count in ("unexpected_count", "element_count"):
        if count in words:  # as digits, perhaps in groups of some locale
            words[count] = f"{int(re.sub(r'[^0-9]', '', words[count])):,}"


def _sentences(part: Any) -> Iterator[dict[str, Any]]:
    """Yield all sentences of a page of Great Expectations, with their parameters."""
    if isinstance(part, dict) and isinstance(part.get("template"), str):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _sentences(inner)
