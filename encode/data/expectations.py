"""The suite that judges a day, run by Great Expectations, and the page that shows the result.

Great Expectations reports, it does not move rows: what is wrong with each row is decided in `encode.data.verdicts`,
and the suite judges counts, shares and ranges over the whole day, and what `encode.data.trends` measured beside the
days before it. A failed `critical` expectation refuses the day, a failed `warning` is said and recorded, a failed
`info` is recorded. Result and page hold no dates of the run and no random ids: equal days give equal bytes.
"""

from __future__ import annotations

import json
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
from encode.schema import SECONDS_PER_DAY, day_start

_MEASURE = "expect_measure_to_be_between"
_FROM_ELSEWHERE = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<footer\b.*?</footer>|background: url\('[^']*'\)[^;]*;",
    re.DOTALL,
)
_STYLE = """<style>
body{font:14px/1.5 system-ui,sans-serif;margin:1.5rem;color:#222;background:#fff}h4,h5,h6{margin:.4rem 0}
table{border-collapse:collapse;margin:.5rem 0}
td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}
.alert{background:#eef;padding:.5rem .8rem}.badge{border:1px solid #999;border-radius:3px;padding:0 .3rem}
.text-success:before{content:"\\2713 ";color:#080}.text-danger:before,.text-warning:before{content:"\\2717 ";color:#b00}
nav,.card-header,.btn-group{display:none}ul{margin:0}
@media (prefers-color-scheme:dark){body{background:#181818;color:#ddd}.alert{background:#223}td,th{border-color:#444}}
</style>"""


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
    day: date, verdicts: Sequence[Verdict], config: ValidationConfig, measures: Sequence[Measure], compared_with: int
) -> Judgment:
    """Run the suite over the verdicts of all rows of a day, and over its measures against `compared_with` earlier days.

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
    said = f"refused: {'; '.join(failed)}" if failed else f"published, {len(warned) + len(drift)} warnings"
    reasons = count_reasons(np.concatenate([v.reason for v in verdicts]))
    data = _to_json(day, result)
    with _quiet():
        page = _render(day, result, _tables(day, said, reasons, measures, compared_with), published=not failed)
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
    expected = ", ".join(f"{key} {value}" for key, value in sorted(kwargs.items()) if key != "column")
    if "observed_value" in result:
        found = f"found {result['observed_value']}"
    else:
        found = f"{result['unexpected_count']} of {result['element_count']} rows are not so"
    return f"{settings.type}({kwargs.get('column', 'rows')}): {found}, expected {expected}"


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


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _tables(day: date, said: str, reasons: dict[str, int], measures: Sequence[Measure], compared_with: int) -> str:
    """Return what stands above the page of Great Expectations: the verdict, what was rejected, what is unusual."""
    rejected = _table([(reason, f"{count:,}") for reason, count in reasons.items()] or [("none",)])
    rows = [("", "", "found", "usually from", "to")]
    for one in measures:
        usual = (one.low is None or one.value >= one.low) and (one.high is None or one.value <= one.high)
        mark = "\u2713" if usual else "\u2717 " + one.severity
        name = f"{one.name} ({', '.join(one.named)})" if one.named else one.name
        rows.append((mark, name, _number(one.value), _number(one.low), _number(one.high)))
    compared = f"Beside the {compared_with} days before it" if measures else "Not compared with the days before it"
    few = _table(rows) if measures else f"<p>There are {compared_with} of them, too few, or the day has no rows.</p>"
    return f"<h3>{day}: {escape(said)}</h3><h4>Rows in quarantine</h4>{rejected}<h4>{compared}</h4>{few}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _render(day: date, result: Any, tables: str, *, published: bool) -> bytes:
    """Return the page: our tables, then all expectations but the measures, which are in the tables.

    Great Expectations calls a day failed for a mere warning; the page calls it so if it is refused.
    """
    identifier = _import("great_expectations.core.run_identifier").RunIdentifier
    renderer = _import("great_expectations.render.renderer").ValidationResultsPageRenderer(run_info_at_end=True)
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    result.meta.pop("batch_markers", None)
    result.meta["run_id"] = identifier(run_name=f"dt={day}", run_time=midnight)
    result.results = [one for one in result.results if one.expectation_config.type != _MEASURE]
    result.success = published
    html: str = _view().render(renderer.render(result))
    html = _FROM_ELSEWHERE.sub("", html).replace("<head>", "<head>" + POLICY, 1)
    html = html.replace("</head>", _STYLE + "</head>", 1).replace("<body>", "<body>" + tables, 1)
    return re.sub(r"\s*\n\s*", "\n", html).encode()
