"""What validation said, in a local folder: an index that loads nothing, and the page of a day."""

from __future__ import annotations

from datetime import date, timedelta
from xml.etree import ElementTree

import pyarrow as pa
import pytest

from encode.cli import main
from encode.config import Config, SourceConfig, ValidationConfig
from encode.data.docs import write_docs
from encode.data.docs_index import DayLine, index_page
from encode.data.parquet import parquet_bytes
from encode.data.validation import validate_window
from encode.errors import ArtifactError, QualityError
from encode.schema import Window, day_start
from encode.storage import FolderStorage

DAY = date(2024, 3, 5)
CONFIG = Config(name="test", source=SourceConfig(), validation=ValidationConfig(max_rejected_share=0.2))


def put_rows(storage, day, count, bad=0):
    rows = range(count)
    columns = {
        "user_id": [1 + i % 50 for i in rows] + [0] * bad,
        "item_id": [1 + i for i in rows] + [7] * bad,
        "behavior": ["pv"] * (count + bad),
        "timestamp": [day_start(day) + i * 400 for i in range(count + bad)],
    }
    storage.put(f"raw/dt={day}/a.parquet", parquet_bytes(pa.table(columns)))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Nine days in a store: the eighth is half a day, the ninth is refused."""
    workdir = tmp_path_factory.mktemp("work")
    storage = FolderStorage(workdir / "store")
    days = [DAY + timedelta(days=number) for number in range(9)]
    for day in days:
        put_rows(storage, day, 100 if day == days[7] else 200, bad=100 if day == days[8] else 2)
    with pytest.raises(QualityError):
        validate_window(storage, Window(days[0], days[-1] + timedelta(days=1)), CONFIG)
    return workdir


@pytest.fixture
def storage(workdir):
    return FolderStorage(workdir / "store")


def panels(page):
    """The drawings of the page, parsed: they are XML."""
    drawn = ["<svg" + rest.partition("</svg>")[0] + "</svg>" for rest in page.split("<svg")[1:]]
    return {tree.get("aria-label"): tree for tree in map(ElementTree.fromstring, drawn)}


def test_the_index_shows_each_day_and_marks_those_to_look_at(tmp_path, storage):
    summary = write_docs(storage, tmp_path / "docs", None, None)
    assert {key: summary[key] for key in ("days", "warned", "refused")} == {"days": 9, "warned": 1, "refused": 1}
    page = (tmp_path / "docs" / "index.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    half, refused = DAY + timedelta(days=7), DAY + timedelta(days=8)
    assert f'<a href="{half}.html">{half}</a> Tue' in page
    assert "rows: found 100, usually 160 to 250" in page
    assert "refused: 100 of 300 rows rejected" in page
    found = panels(page)
    assert list(found) == ["rows", "users", "share of rejected rows", "PSI of hours", "PSI of categories"]
    assert [one.text for one in found["rows"].iter("title")] == [
        f"{half}: 100, usually 160 to 250",
        next(one.text for one in found["rows"].iter("title") if one.text.startswith(f"{refused}: refused: ")),
    ]
    (line,) = found["rows"].iter("polyline")
    assert len(line.get("points").split()) == 9
    linked = {path.name for path in (tmp_path / "docs").glob("2024*.html")}
    assert len(linked) == 2
    assert all(f'href="{name}"' in page for name in linked)


def test_a_window_of_days_and_one_day(tmp_path, storage):
    said = []
    window = Window(DAY, DAY + timedelta(days=3))
    summary = write_docs(storage, tmp_path / "docs", DAY, window, said.append)
    assert summary["days"] == 3
    assert summary["address"] == f"{storage.uri}/quarantine/dt={DAY}/index.html"
    assert said[1] == f"{DAY}: published"
    assert "  2 rows rejected: user_id_not_positive" in said
    assert f"    raw/dt={DAY}/a.parquet row 201: user_id '0', item_id '7'" in "\n".join(said)
    assert (tmp_path / "docs" / f"{DAY}.html").read_bytes() == storage.get(f"quarantine/dt={DAY}/index.html")
    with pytest.raises(ArtifactError, match=r"2025-01-01: not validated, or .* \d+ days from 2024-03-05 to 2024-03-13"):
        write_docs(storage, tmp_path / "docs", date(2025, 1, 1), None)
    with pytest.raises(ArtifactError, match="no day was validated in 2025-01-01"):
        write_docs(storage, tmp_path / "docs", None, Window(date(2025, 1, 1), date(2025, 1, 2)))


def test_the_page_of_the_day_that_is_asked_for_is_fetched_beside_the_newest(tmp_path, storage, monkeypatch):
    monkeypatch.setattr("encode.data.docs._MAX_PAGES", 1)
    summary = write_docs(storage, tmp_path / "docs", DAY, None)
    assert summary["page"] == str(tmp_path / "docs" / f"{DAY}.html")
    refused = next(name.name for name in (tmp_path / "docs").glob(f"{DAY + timedelta(days=8)}-refused-*.html"))
    index = (tmp_path / "docs" / "index.html").read_text()
    assert {path.name for path in (tmp_path / "docs").glob("2024*.html")} == {f"{DAY}.html", refused}
    assert f'href="{refused}"' in index
    assert index.count("href=") == 1


def test_missing_days_are_gaps_and_what_is_said_is_escaped():
    days = [DAY, DAY + timedelta(days=1), DAY + timedelta(days=3)]
    lines = [DayLine(day, {"rows": 10.0}, {"rows": (5.0, 20.0)}, ["<b>&"], None, None, "s3://b/x") for day in days]
    page = index_page(lines, "s3://b")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    rows = panels(page)["rows"]
    assert [len(one.get("points").split()) for one in rows.iter("polyline")] == [2, 1]
    assert page.count("no day has it yet") == 4


def test_one_odd_day_does_not_flatten_the_others():
    days = [DAY + timedelta(days=number) for number in range(30)]
    lines = [DayLine(day, {"users": 100.0}, {"users": (80.0, 120.0)}, [], None, None, "") for day in days[:-1]]
    lines.append(DayLine(days[-1], {"users": 1e6}, {"users": (80.0, 120.0)}, [], None, None, ""))
    users = panels(index_page(lines, ""))["users"]
    heights = [float(point.split(",")[1]) for point in next(users.iter("polyline")).get("points").split()]
    assert heights[0] < 80  # of 132, from above
    assert [one.get("class") for one in users.iter("path")] == ["band", "out"]


def test_the_command_writes_and_prints_where(tmp_path, workdir, capsys):
    preset = tmp_path / "test.yaml"
    preset.write_text("source: {reader: parquet}\nvalidation: {max_rejected_share: 0.2}\n")
    common = ["--preset", str(preset), "--workdir", str(workdir)]
    assert main(["docs", str(DAY), *common, "--to", str(tmp_path / "docs")]) == 0
    out = capsys.readouterr().out
    assert f"9 days, 1 with warnings, 1 refused: {tmp_path / 'docs' / 'index.html'}" in out
    assert main(["docs", "yesterday", *common]) == 2
    assert "expected a day as YYYY-MM-DD" in capsys.readouterr().err
    assert main(["replay", *common]) == 2
    assert main(["replay", "--start", str(DAY), *common]) == 0
    assert "0 days to replay, 1 validated before" in capsys.readouterr().out
