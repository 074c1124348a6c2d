"""Raw days into behaviors and quarantine: counts reconcile, bytes repeat, a refused day loses nothing."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from datetime import date, timedelta
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from browser import BINARY, open_browser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encode.config import Config, GeneratorConfig, SourceConfig, ValidationConfig
from encode.data import daily
from encode.data.histories import read_histories
from encode.data.landing import land
from encode.data.parquet import parquet_bytes, read_parquet
from encode.data.validation import MAX_REFUSED_DAYS, validate_day, validate_window
from encode.errors import DataError, EncodeError, QualityError
from encode.outputs import read_manifest
from encode.schema import BEHAVIORS, QUARANTINE, Window, day_start
from encode.storage import FolderStorage

SAMPLE = Path(__file__).parents[1] / "samples" / "complete-journey.parquet"
DAY = date(2024, 3, 5)
NOON = day_start(DAY) + 43_200
NAMES = ("user_id", "item_id", "category_id", "behavior", "timestamp")


def config(reader="parquet", source=None, **validation):
    return Config(
        name="test", source=SourceConfig(reader=reader, **(source or {})), validation=ValidationConfig(**validation)
    )


def put_rows(storage, rows, day=DAY, name="export.parquet"):
    columns = {key: pa.array(column) for key, column in zip(NAMES, zip(*rows, strict=True), strict=True)}
    storage.put(f"raw/dt={day}/{name}", parquet_bytes(pa.table(columns)))


def good_rows(count, day=DAY):
    return [(1 + i % 7, 1 + i, i % 3, "buy" if i % 5 else "pv", day_start(day) + i) for i in range(count)]


def table(storage, key):
    return read_parquet(storage.get(key))


def reasons_in(storage, prefix):
    counts = table(storage, f"{prefix}/part-00000.parquet")["reason"].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}


def content(storage):
    return {key: hashlib.sha256(storage.get(key)).hexdigest() for key in storage.list("")}


def gx_rejected(storage, prefix):
    """Rows with a reason, by Great Expectations' own count in result.json."""
    result = json.loads(storage.get(f"{prefix}/result.json"))
    (found,) = [
        one["result"]["unexpected_count"]
        for one in result["results"]
        if one["expectation_config"]["type"] == "expect_column_values_to_be_null"
    ]
    return found


def test_good_rows_are_published_and_bad_ones_kept_with_a_reason(tmp_path):
    storage = FolderStorage(tmp_path)
    bad = [(None, 1, 1, "pv", NOON), (1, -4, 1, "pv", NOON), (5, 5, 5, "pv", NOON), (5, 5, 5, "pv", NOON)]
    put_rows(storage, good_rows(400) + bad)
    report = validate_day(storage, DAY, config())
    assert (report.rows, report.accepted, report.rejected) == (404, 401, 3)
    assert report.reasons == {"duplicate": 1, "item_id_not_positive": 1, "user_id_missing": 1}
    behaviors = table(storage, f"behaviors/dt={DAY}/part-00000.parquet")
    assert behaviors.schema.equals(BEHAVIORS)
    assert [tuple(row.values()) for row in behaviors.to_pylist()] == [*good_rows(400), (5, 5, 5, "pv", NOON)]
    assert behaviors["behavior"].combine_chunks().dictionary.to_pylist() == ["buy", "pv"]
    quarantine = table(storage, f"quarantine/dt={DAY}/part-00000.parquet")
    assert quarantine.schema.equals(QUARANTINE)
    assert [(r["file"], r["row"], r["reason"], r["item_id"]) for r in quarantine.to_pylist()] == [
        (f"raw/dt={DAY}/export.parquet", 401, "user_id_missing", "1"),
        (f"raw/dt={DAY}/export.parquet", 402, "item_id_not_positive", "-4"),
        (f"raw/dt={DAY}/export.parquet", 404, "duplicate", "5"),
    ]
    assert gx_rejected(storage, f"quarantine/dt={DAY}") == 3
    manifest = read_manifest(storage, f"behaviors/dt={DAY}")
    assert manifest.counts == {"rows": 401, "raw_rows": 404, "rejected": 3, "without_category": 134, "users": 7}
    assert manifest.parts[0].rows == 401
    assert list(manifest.inputs) == [f"raw/dt={DAY}"]


class Page(HTMLParser):
    """Its tags with attributes, and the cells of each row of its tables as text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self._in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
            self._in_cell = False
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data.strip()


def test_the_page_is_complete_in_itself_and_leads_nowhere(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, [*good_rows(400), (0, 1, 1, "pv", NOON)])
    validate_day(storage, DAY, config(behaviors=("pv", "buy")))
    page = Page(storage.get(f"quarantine/dt={DAY}/index.html").decode())
    dead = {"a", "button", "input", "form", "label", "link", "script", "img", "iframe", "nav"}
    assert {tag for tag, _ in page.tags} & dead == set()
    named = {name for _, attributes in page.tags for name in attributes}
    assert {name for name in named if name in ("href", "src") or name.startswith("on")} == set()


def test_the_numbers_of_the_page_agree_with_the_report_and_with_one_another(tmp_path):
    """The last row has two faults and one reason; that the file mixes units of time is no expectation."""
    storage = FolderStorage(tmp_path)
    missing = [(None, 500 + place, 1, "pv", NOON) for place in range(3)]
    put_rows(storage, [*good_rows(400), *missing, (9, 9, 1, "pv", NOON * 1000), (None, 7, 1, "?", NOON)])
    report = validate_day(storage, DAY, config(behaviors=("pv", "buy"), max_rejected_share=0.02))
    text = storage.get(f"quarantine/dt={DAY}/index.html").decode()
    page = Page(text)
    raw, rejected = report.rows, report.rejected
    assert (raw, rejected) == (405, 5)
    assert f"405 raw rows of Tuesday: {report.accepted} accepted, 5 rejected (1.23%), allowed 2.00%" in text
    start = page.rows.index(["reason", "rows"])
    kept = {reason: int(count) for reason, count in page.rows[start + 1 : start + 2 + len(report.reasons)]}
    assert kept == report.reasons | {"all": rejected}
    assert f"Warnings <small>({len(report.warnings)})" in text
    assert all(escape(line) in text for line in report.warnings)
    assert any("mixed time units" in line for line in report.warnings)
    result = json.loads(storage.get(f"quarantine/dt={DAY}/result.json"))
    held, failed = (int(cell) for cell in next(row for row in page.rows if row[0] == "all" and len(row) == 4)[2:])
    assert (held, failed) == tuple(sum(one["success"] is good for one in result["results"]) for good in (True, False))
    shown = sum(text.count(sentence) for sentence in ("values must ", "Must have ", "then must have "))
    assert shown == held + failed == len(result["results"])
    assert "behavior_unknown" not in report.reasons
    assert "may be higher than those of the reasons" in text
    assert "nan" not in [cell for row in page.rows for cell in row]


def test_times_counts_and_bounds_of_the_page_are_to_be_read_by_people(tmp_path):
    """One unreadable value makes all of its column floats, beyond the year 9999 there are no dates."""
    storage = FolderStorage(tmp_path)
    bad = [(1, 1, 1, "pv", None), (1, 2, 1, "pv", NOON - 86_400), (1, 3, 1, "pv", 10**12), (None, -2, 1, "pv", NOON)]
    put_rows(storage, good_rows(1_200) + bad * 9)
    with pytest.raises(QualityError, match="found 1,200, expected min_value 2,000"):
        validate_day(storage, DAY, config(behaviors=("pv", "buy"), min_rows=2_000, max_rejected_share=0.001))
    (key,) = storage.list(f"quarantine/dt={DAY}/refused-")[:1]
    text = storage.get(f"{key.rpartition('/')[0]}/index.html").decode()
    cells = [cell for row in Page(text).rows for cell in row]
    start, end = day_start(DAY), day_start(DAY) + 86_399
    words = f"min_value 2024-03-05 00:00:00 UTC ({start})"
    assert f"expected max_value 2024-03-05 23:59:59 UTC ({end}), {words}" in text.replace("\n", " ")
    assert f"2024-03-05 00:00:00 UTC ({start})</span>" in text
    assert f"2024-03-04 12:00:00 UTC ({NOON - 86_400})" in cells
    assert {str(10**12), "-2", "1,200"} <= set(cells)
    assert "of 1,236 total rows" in text
    assert ">2,000</span>" in text
    assert not re.search(r"\b(\d+\.0|1200|1236)\b(?!%)|% of the time", text)
    assert "1,200 rows fit, 9 look like ms" in text
    assert "<th class=number>hold</th>" in text


TITLE = f"{DAY}: published"
NASTY = (
    '<svg onload="document.title = 1337">',
    "<iframe src=javascript:top.document.title=1337></iframe>",
    '<img src="x" onerror="document.title = 1337">',
    "<script>document.title = 1337",  # never closed: the page must not end here
    "</td></table><b onmouseover=document.title=1337>&amp;",
    "</head><body><style>body{display:none}",
    "background: url('x') ${column} $v__0 $$ {{ 7 * 7 }}",
)


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory):
    """The page of a published day, some of whose behaviors, and a name in the settings, are markup."""
    folder = tmp_path_factory.mktemp("nasty")
    storage = FolderStorage(folder)
    bad = [(1, 1000 + place, 1, name, NOON) for place, name in enumerate(NASTY)]
    put_rows(storage, good_rows(400) + bad)
    report = validate_day(storage, DAY, config(behaviors=("pv", "buy", "<s>$v__0"), max_rejected_share=0.1))
    assert report.reasons == {"behavior_unknown": len(NASTY)}
    return folder / f"quarantine/dt={DAY}/index.html"


def test_nothing_that_came_with_the_log_is_markup_in_the_page(nasty_page):
    page = nasty_page.read_text()
    for name in NASTY:
        assert escape(name) in page
        assert name not in page
    assert "&lt;s&gt;$v__0</span>" in page
    for markup in ("<svg", "<iframe", "<img", "<script", "<b ", "<s>"):
        assert markup not in page
    assert page.count("</head>") == page.count("<body>") == page.count("</html>") == 1
    assert page.index("default-src 'none'") < page.index("<style>")


def test_a_browser_runs_nothing_of_a_page_and_shows_every_value_as_it_came(nasty_page, tmp_path):
    if BINARY is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    with open_browser(tmp_path) as browser:
        browser.open(nasty_page.as_uri())
        assert browser.run("document.title") == TITLE
        shown = browser.run("[...document.querySelectorAll('.table-bordered td:first-child')].map(td => td.innerText)")
        assert sorted(shown) == sorted([*NASTY, "behavior_unknown"])
        assert browser.logged == []
        # Even if it were left raw, the policy of the page would not let it run.
        raw = tmp_path / "raw.html"
        raw.write_text(nasty_page.read_text().replace(escape(NASTY[0]), NASTY[0]))
        browser.open(raw.as_uri())
        assert browser.run("document.querySelectorAll('svg[onload]').length") == 1
        assert browser.run("document.title") == TITLE


def test_ids_survive_exactly_beyond_what_a_float_holds(tmp_path):
    storage = FolderStorage(tmp_path)
    ids = [2**53 + 1, 2**63 - 1, 2**62 + 3]
    put_rows(storage, [(i, i, i, "pv", NOON) for i in ids])
    validate_day(storage, DAY, config())
    found = table(storage, f"behaviors/dt={DAY}/part-00000.parquet")
    for name in ("user_id", "item_id", "category_id"):
        assert found[name].to_pylist() == ids


def test_a_second_run_is_a_no_op_and_another_store_gets_the_same_bytes(tmp_path, monkeypatch):
    stores = [FolderStorage(tmp_path / name) for name in "ab"]
    for storage in stores:
        put_rows(storage, [*good_rows(300), (1, 1, 1, "pv", None)])
        validate_day(storage, DAY, config())
    assert content(stores[0]) == content(stores[1])
    monkeypatch.setattr(daily, "judge_rows", lambda *_: pytest.fail("the day was judged again"))
    again = validate_day(stores[0], DAY, config())
    assert again.unchanged
    assert (again.rows, again.rejected, again.reasons) == (301, 1, {"timestamp_missing": 1})


def test_another_process_gets_the_same_bytes(tmp_path):
    storage = FolderStorage(tmp_path / "a")
    put_rows(storage, [*good_rows(300), (1, 1, 1, "pv", None)])
    put_rows(FolderStorage(tmp_path / "b"), [*good_rows(300), (1, 1, 1, "pv", None)])
    validate_day(storage, DAY, config())
    code = (
        "import sys; from pathlib import Path; from datetime import date; from encode.config import Config\n"
        "from encode.data.validation import validate_day; from encode.storage import FolderStorage\n"
        "validate_day(FolderStorage(Path(sys.argv[1])), date.fromisoformat(sys.argv[2]), Config(name='test'))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b"), str(DAY)], capture_output=True, text=True, check=False
    )
    # Nothing that Great Expectations has to say reaches the terminal.
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert content(FolderStorage(tmp_path / "b")) == content(storage)


def test_a_refused_day_keeps_its_quarantine_and_publishes_nothing(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, good_rows(90) + [(i, i, 1, "pv", NOON * 1000) for i in range(1, 11)])
    with pytest.raises(QualityError, match=r"10 of 100 rows rejected \(10.00%; timestamp_looks_like_ms 10\)") as error:
        validate_day(storage, DAY, config())
    assert "expected at most 1.00%" in str(error.value)
    assert "times look like ms, source.time_unit is s" in str(error.value)
    assert storage.list("behaviors/") == []
    prefix = storage.list(f"quarantine/dt={DAY}/")[0].rpartition("/")[0]
    assert prefix in str(error.value)
    assert reasons_in(storage, prefix) == {"timestamp_looks_like_ms": 10}
    assert gx_rejected(storage, prefix) == 10
    assert any("mixed time units" in line for line in read_manifest(storage, prefix).details["warnings"])
    # A later try with other settings is not in its way.
    report = validate_day(storage, DAY, config(max_rejected_share=0.2))
    assert report.accepted == 90
    assert reasons_in(storage, f"quarantine/dt={DAY}") == {"timestamp_looks_like_ms": 10}


@pytest.mark.parametrize(
    ("rows", "rules", "words"),
    [
        (good_rows(5), {"min_rows": 6}, "found 5, expected min_value 6"),
        (good_rows(5), {"min_users": 6}, r"\(user_id\): found 5, expected min_value 6"),
        ([(0, 1, 1, "pv", NOON)] * 3, {"max_rejected_share": 1.0}, "found 0, expected min_value 1"),
        ([(1, 1, 1, "view", NOON)], {"behaviors": ("pv",)}, "behavior_unknown 1"),
    ],
)
def test_a_day_that_misses_an_expectation_is_refused(tmp_path, rows, rules, words):
    storage = FolderStorage(tmp_path)
    put_rows(storage, rows)
    with pytest.raises(QualityError, match=words):
        validate_day(storage, DAY, config(**rules))
    assert storage.list("behaviors/") == []


def test_exactly_the_allowed_share_is_allowed(tmp_path):
    for share, bad in ((0.18, 18), (0.57, 57), (0.01, 1)):  # 1 - 0.18 > 0.82, 100 * 0.57 < 57
        storage = FolderStorage(tmp_path / str(bad))
        put_rows(storage, good_rows(100 - bad) + [(0, 1, 1, "pv", NOON)] * bad)
        assert validate_day(storage, DAY, config(max_rejected_share=share)).rejected == bad
        with pytest.raises(DataError, match="validated before"):
            validate_day(storage, DAY, config(max_rejected_share=share / 2))


def test_an_empty_day_is_refused_unless_it_may_be_empty(tmp_path):
    storage = FolderStorage(tmp_path)
    columns = {name: pa.array([], pa.int64()) for name in ("user_id", "item_id", "timestamp")}
    storage.put(f"raw/dt={DAY}/a.parquet", parquet_bytes(pa.table(columns)))
    with pytest.raises(QualityError, match="found 0, expected min_value 1"):
        validate_day(storage, DAY, config())
    assert validate_day(storage, DAY, config(min_rows=0, min_users=0)).rows == 0
    assert table(storage, f"behaviors/dt={DAY}/part-00000.parquet").schema.equals(BEHAVIORS)


def test_restated_raw_data_and_changed_settings_are_named(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, good_rows(10))
    validate_day(storage, DAY, config())
    with pytest.raises(DataError, match=r"validation.reject_duplicates changed since; .*remove behaviors/dt="):
        validate_day(storage, DAY, config(reject_duplicates=False))
    put_rows(storage, good_rows(11))
    with pytest.raises(DataError, match=rf"behaviors/dt={DAY}: validated before, but the raw data changed since"):
        validate_day(storage, DAY, config())
    for kind in ("behaviors", "quarantine"):
        for key in storage.list(f"{kind}/"):
            (tmp_path / key).unlink()
    assert validate_day(storage, DAY, config()).rows == 11


def test_another_version_of_the_package_does_not_make_a_day_stale(tmp_path, monkeypatch):
    storage = FolderStorage(tmp_path)
    put_rows(storage, good_rows(10))
    validate_day(storage, DAY, config())
    monkeypatch.setattr("encode.outputs.__version__", "99.0")
    assert validate_day(storage, DAY, config()).unchanged


def test_owners_may_land_files_in_the_format_of_the_preset(tmp_path):
    storage = FolderStorage(tmp_path)
    storage.put(f"raw/dt={DAY}/b.csv", f"1,11,5,pv,{NOON}\r\nhalf,a,row\r\n".encode())
    storage.put(f"raw/dt={DAY}/hour=01/a.csv", b"\xef\xbb\xbf" + f"2,11,5,pv,{NOON}\n".encode())
    storage.put(f"raw/dt={DAY}/_SUCCESS", b"")
    put_rows(storage, [(3, 1, 1, "buy", NOON)], name="c.parquet")
    validate_day(storage, DAY, config("taobao", max_rejected_share=0.5))
    found = table(storage, f"behaviors/dt={DAY}/part-00000.parquet")
    assert found["user_id"].to_pylist() == [1, 3, 2]
    (lost,) = table(storage, f"quarantine/dt={DAY}/part-00000.parquet").to_pylist()
    assert (lost["file"], lost["row"], lost["reason"]) == (f"raw/dt={DAY}/b.csv", 2, "malformed_row")
    assert lost["user_id"] == "half,a,row"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"", "a.csv: empty file"),
        ("a.parquet", b"PAR1 cut off", "a.parquet: not a readable Parquet file"),
        ("part-00000.landed.parquet", b"x", "a landing was stopped half-way"),
    ],
)
def test_broken_raw_files_are_named(tmp_path, name, data, words):
    storage = FolderStorage(tmp_path)
    storage.put(f"raw/dt={DAY}/{name}", data)
    with pytest.raises(DataError, match=words):
        validate_day(storage, DAY, config("taobao"))
    assert storage.list("behaviors/") == storage.list("quarantine/") == []


def test_no_raw_data_is_an_error(tmp_path):
    storage = FolderStorage(tmp_path)
    with pytest.raises(DataError, match="no raw data for this day; land the log first"):
        validate_day(storage, DAY, config())
    with pytest.raises(DataError, match=f"no raw data for any day of {DAY}"):
        validate_window(storage, Window(DAY, DAY + timedelta(days=3)), config())


def test_files_beside_a_landed_day_are_not_ignored(tmp_path):
    storage = FolderStorage(tmp_path)
    source = {"generator": GeneratorConfig(num_users=5, num_days=2)}
    settings_ = config("generated", source)
    first = land(storage, settings_.source).days[0]
    put_rows(storage, good_rows(3), day=first, name="late.parquet")
    with pytest.raises(DataError, match=r"found 1 file beside those of its manifest \(first: late.parquet\)"):
        validate_day(storage, first, settings_)


def test_counts_that_do_not_reconcile_publish_nothing(tmp_path, monkeypatch):
    storage = FolderStorage(tmp_path)
    put_rows(storage, good_rows(10))
    real = daily.judge_day
    wrong = lambda *args: daily.Judgment(**{**vars(real(*args)), "rejected": 1})  # noqa: E731
    monkeypatch.setattr(daily, "judge_day", wrong)
    with pytest.raises(EncodeError, match="Great Expectations counted 1 rejected rows, the masks 0"):
        validate_day(storage, DAY, config())
    assert storage.list("behaviors/") == []


# --- windows -----------------------------------------------------------------------------------------------


def test_a_window_is_landed_validated_and_then_left_alone(tmp_path):
    storage = FolderStorage(tmp_path)
    settings_ = config("generated", {"generator": GeneratorConfig(num_users=20, median_length=60, num_days=4)})
    landed = land(storage, settings_.source)
    window = Window(landed.days[0] - timedelta(days=1), landed.days[-1] + timedelta(days=2))
    said = []
    summary = validate_window(storage, window, settings_, say=said.append)
    assert summary["missing_days"] == [str(window.start), str(window.end - timedelta(days=1))]
    assert (summary["validated"], summary["unchanged"]) == (4, 0)
    assert summary["rows"] == summary["accepted"] == landed.landed
    assert said[0] == "4 days to validate, 0 validated before"
    assert said[1] == f"no raw data for 2 days: {window.start}, {window.end - timedelta(days=1)}"
    assert "validated 4/4 days" in said[2]
    assert said[3] == f"4 days not compared with earlier ones, for want of them: {landed.days[0]} to {landed.days[3]}"
    assert said[4].startswith(f"Data Docs: {storage.uri}/quarantine/dt=DAY/index.html")
    again = validate_window(storage, window, settings_)
    assert again == summary | {"validated": 0, "unchanged": 4, "added": 0}
    histories, _ = read_histories(storage, window.end)
    assert (len(histories), len(histories.item_ids)) == (20, landed.landed)


def test_refused_days_do_not_keep_the_others_back_until_there_are_too_many(tmp_path):
    storage = FolderStorage(tmp_path)
    days = [DAY + timedelta(days=i) for i in range(6)]
    for day in days:
        put_rows(storage, good_rows(10, day), day)
    put_rows(storage, [(0, 1, 1, "pv", NOON)], days[1])
    with pytest.raises(QualityError, match=rf"1 of 6 days refused: day {days[1]} refused"):
        validate_window(storage, Window(days[0], days[-1] + timedelta(days=1)), config())
    published = [day for day in days if read_manifest(storage, f"behaviors/dt={day}")]
    assert published == [days[0], *days[2:]]
    other = FolderStorage(tmp_path / "other")
    for day in days:
        put_rows(other, [(0, 1, 1, "pv", NOON)], day)
    with pytest.raises(QualityError, match="3 of 6 days refused, the rest was not tried"):
        validate_window(other, Window(days[0], days[-1] + timedelta(days=1)), config())
    refused = {key.split("/")[1] for key in other.list("quarantine/")}
    assert len(refused) == MAX_REFUSED_DAYS


def test_a_real_sample_goes_all_the_way(tmp_path):
    storage = FolderStorage(tmp_path)
    settings_ = config(source={"path": SAMPLE}, behaviors=("buy",))
    landed = land(storage, settings_.source)
    assert (landed.landed, len(landed.days), landed.days[0]) == (61_461, 119, date(2017, 9, 3))
    window = Window(landed.days[0], landed.days[0] + timedelta(days=14))
    summary = validate_window(storage, window, settings_)
    sample = pq.read_table(SAMPLE)
    inside = sample.filter(pc.less(sample["timestamp"], day_start(window.end)))
    assert summary["rows"] == inside.num_rows
    assert summary["accepted"] + summary["rejected"] == inside.num_rows
    histories, inputs = read_histories(storage, window.end)
    assert len(inputs) == 14
    assert set(histories.user_ids) == set(inside["user_id"].to_pylist())


# --- beside the days before --------------------------------------------------------------------------------


def many_rows(day, count=200):
    """Rows of 100 users around the clock; days differ a little."""
    first = day.toordinal() % 7
    return [
        (1 + (i * 37 + first) % 100, 1 + i, 1 + i % 3, "pv", day_start(day) + i * 86_400 // count) for i in range(count)
    ]


def week(storage, count=8):
    days = [DAY + timedelta(days=number) for number in range(count)]
    for day in days:
        put_rows(storage, many_rows(day), day)
    return days, Window(days[0], days[-1] + timedelta(days=1))


def test_an_unusual_day_is_said_recorded_and_published(tmp_path):
    storage = FolderStorage(tmp_path)
    days, window = week(storage)
    put_rows(storage, many_rows(days[-1])[:100], days[-1])
    said = []
    summary = validate_window(storage, window, config(), said.append)
    assert (summary["days"], summary["compared"]) == (8, 1)
    assert "7 days not compared with earlier ones, for want of them: 2024-03-05 to 2024-03-11" in said
    (rows, hours) = (next(w for w in summary["warnings"] if text in w) for text in ("rows: found 100", "PSI of hours"))
    assert rows == "2024-03-12: rows: found 100, usually 160 to 250"
    assert rows in said
    assert hours in said
    manifest = read_manifest(storage, f"quarantine/dt={days[-1]}")
    assert list(manifest.details["compared_with"]) == [str(day) for day in days[:-1]]
    page = storage.get(f"quarantine/dt={days[-1]}/index.html").decode()
    assert f"<h1>{days[-1]}: published</h1>" in page
    assert f"<h2>Warnings <small>({len(summary['warnings'])})</small></h2>" in page
    numbers = "".join(f"<td class=number>{number}</td>" for number in (100, 160, 250))
    assert f"<td>rows</td>{numbers}" in page
    assert "Not compared with the days before it" in storage.get(f"quarantine/dt={days[0]}/index.html").decode()
    result = json.loads(storage.get(f"quarantine/dt={days[-1]}/result.json"))
    measured = {
        one["expectation_config"]["kwargs"]["measure"]: (one["success"], one["expectation_config"]["severity"])
        for one in result["results"]
        if one["expectation_config"]["type"] == "expect_measure_to_be_between"
    }
    assert measured["rows"] == (False, "warning")
    assert measured["items"][1] == "info"
    assert validate_window(storage, window, config())["warnings"] == summary["warnings"]


def test_the_order_of_validation_changes_what_is_said_and_not_what_is_published(tmp_path):
    forward, backward = FolderStorage(tmp_path / "forward"), FolderStorage(tmp_path / "backward")
    days, window = week(forward)
    week(backward)
    validate_window(forward, window, config())
    for day in reversed(days):
        validate_day(backward, day, config())
    published = [{k: v for k, v in content(one).items() if k.startswith("behaviors/")} for one in (forward, backward)]
    assert published[0] == published[1]
    compared = [
        read_manifest(storage, f"quarantine/dt={days[-1]}").details["compared_with"] for storage in (forward, backward)
    ]
    assert [len(one) for one in compared] == [7, 0]
    # Its neighbors are there by now, and so are wider bands: a day that is done stays as it is.
    before = content(backward)
    other = config(trends={"width": 9.0, "min_days": 3})
    assert validate_window(backward, window, other)["unchanged"] == 8
    assert content(backward) == before


def test_a_day_that_was_killed_before_it_was_published_keeps_its_verdict(tmp_path, dying):
    die, power_cut = dying
    storage = FolderStorage(tmp_path)
    days, window = week(storage)
    with pytest.raises(power_cut):
        validate_day(die(storage, 5), days[-1], config())  # its quarantine are three files and a manifest
    verdict = content(storage)
    assert f"quarantine/dt={days[-1]}/manifest.json" in verdict
    summary = validate_window(storage, window, config())
    assert (summary["validated"], summary["compared"]) == (8, 0)
    assert content(storage).items() >= verdict.items()


def test_a_refused_day_can_be_tried_again_beside_other_days(tmp_path):
    storage = FolderStorage(tmp_path)
    days, _ = week(storage)
    for _ in range(2):
        with pytest.raises(QualityError, match="found 200, expected min_value 201"):
            validate_day(storage, days[-1], config(min_rows=201))
        validate_window(storage, Window(days[0], days[-1]), config())


values = st.one_of(st.none(), st.integers(-1, 4), st.sampled_from([NOON, NOON + 1, NOON * 1000]))
frames = st.lists(st.tuples(values, values, values, st.sampled_from(["pv", "", None]), values), min_size=1, max_size=30)


@given(frames)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_reconcile_whatever_comes(tmp_path_factory, rows):
    storage = FolderStorage(tmp_path_factory.mktemp("store"))
    put_rows(storage, rows)
    report = validate_day(storage, DAY, config(max_rejected_share=1.0, min_rows=0, min_users=0))
    assert report.rows == len(rows) == report.accepted + report.rejected
    assert sum(reasons_in(storage, f"quarantine/dt={DAY}").values()) == report.rejected
    assert gx_rejected(storage, f"quarantine/dt={DAY}") == report.rejected
    assert table(storage, f"behaviors/dt={DAY}/part-00000.parquet").num_rows == report.accepted
