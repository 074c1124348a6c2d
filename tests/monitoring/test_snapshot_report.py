"""The page beside a snapshot."""

import html.parser
import re
import shutil
from datetime import date

import numpy as np
import pyarrow as pa
import pytest

from encode.data.parquet import parquet_bytes
from encode.interests.snapshots import folder_of
from encode.monitoring.charts import bars
from encode.monitoring.drift import shift
from encode.monitoring.report import Drawn, _drift_row, render, report_key, write_report
from encode.monitoring.sample import read_sample
from encode.outputs import MANIFEST, read_manifest
from encode.pointers import read_pointer
from encode.schema import ITEMS
from encode.storage import FolderStorage


@pytest.fixture
def current(store, space):
    return read_pointer(store, folder_of(space.id))[0]


def page_of(store, space, current, before=None):
    said = []
    key = write_report(store, space.id, current, before, said.append)
    return store.get(key).decode() if key else None, said


class Checked(html.parser.HTMLParser):
    """Collects tags, and text outside of them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    checked = Checked()
    checked.feed(page)
    return checked, " ".join(" ".join(checked.text).split())


def test_the_page_tells_sizes_drift_freshness_and_examples(store, space, current, both):
    page, said = page_of(store, space, current)
    key = report_key(space.id, current.snapshot)
    assert said == [f"space {space.id}: report {store.uri}/{key}"]
    checked, text = read(page)
    for line in (
        f"Snapshot {current.snapshot}",
        "nothing of 2024-03-03 or later used",
        "61 users",
        f"{both[1][1].counts['interests']:,} interests",
        "5 clustered in this refresh",
        "Shares of all 61 users",
        f"the snapshot before, {both[0][0]}",
        "98.3% of the 60 users in the sample of the snapshot before are in that of this one",
        "2 validated days from 2024-03-01 to 2024-03-02",
        both[1][1].inputs[f"spaces/{space.id}"],
    ):
        assert line in text, line
    assert sum(tag == "svg" for tag, _ in checked.tags) == 5
    assert sum(attributes.get("class") == "before" for _, attributes in checked.tags) > 20


def test_the_page_says_what_is_a_sample(store, space, current, both):
    drawn = [
        Drawn(name, made, read_sample(store, f"{folder_of(space.id)}/{name}", made, enough=10)) for name, made in both
    ]
    _, text = read(render(space.id, drawn[1], drawn[0], None, []))
    users = [len(one.sample.user_ids) for one in drawn]
    assert 10 <= users[1] < 61
    assert f"Shares of a sample of {users[1]} users: all that are in 1 of 4 buckets" in text
    assert "61 users" in text
    assert f"of the {users[0]} users in the sample of the snapshot before are in that of this one" in text


def test_the_page_loads_nothing_and_names_no_user(store, space, current):
    page, _ = page_of(store, space, current)
    checked, text = read(page)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in checked.tags}
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert "user_id" not in page
    assert "101" not in re.findall(r"\d+", text.partition("A few users")[2].partition("behaviors")[0])
    assert len(page) < 60_000


def test_equal_stores_get_equal_pages_and_a_page_is_written_once(store, space, current, tmp_path):
    shutil.copytree(store.uri, tmp_path / "copy")
    other = FolderStorage(tmp_path / "copy")
    page, _ = page_of(store, space, current)
    assert page_of(other, space, current)[0] == page
    store.put(report_key(space.id, current.snapshot), b"mine")
    assert page_of(store, space, current)[0] == "mine"


def test_the_page_is_no_part_of_the_snapshot(store, space, current):
    prefix = f"{folder_of(space.id)}/{current.snapshot}"
    before = store.get(f"{prefix}/{MANIFEST}")
    page_of(store, space, current)
    assert store.get(f"{prefix}/{MANIFEST}") == before
    assert b"report" not in before


def test_the_first_snapshot_has_nothing_to_compare_with(store, space, both):
    pointer = read_pointer(store, folder_of(space.id))[0]
    first = type(pointer)(both[0][0], pointer.as_of, both[0][1].digest())
    page, _ = page_of(store, space, first)
    assert "There is no earlier snapshot of this space to compare with" in page
    assert 'class="before"' not in page


def test_a_snapshot_made_anew_is_compared_with_the_one_that_served(store, space, both, refresh, write_day):
    """Nothing in its manifest names that one: its histories are gone, so it was not built on."""
    before = read_pointer(store, folder_of(space.id))[0]
    (store._root / both[1][1].details["histories"] / MANIFEST).unlink()
    write_day(store, date(2024, 3, 3), [[1, 5, 5, 1709430000]])
    anew = refresh(store, 3)
    prefix = f"{folder_of(space.id)}/{anew.snapshot}"
    assert not any(name.startswith("interests/") for name in read_manifest(store, prefix).inputs)
    page, _ = page_of(store, space, anew, before)
    assert f"the snapshot before, <code>{before.snapshot}</code>" in page


def test_a_snapshot_that_is_damaged_gets_no_page_and_no_error(store, space, current, both):
    store.put(both[1][1].parts[0].key(f"{folder_of(space.id)}/{current.snapshot}"), b"damaged")
    page, said = page_of(store, space, current)
    assert page is None
    assert "no report of snapshot" in said[0]
    assert "damaged" in said[0]


def test_a_damaged_snapshot_before_is_not_compared_with(store, space, current, both):
    store.put(f"{folder_of(space.id)}/{both[0][0]}/{MANIFEST}", b"{}")
    page, said = page_of(store, space, current)
    assert "not compared with snapshot" in said[0]
    assert "There is no earlier snapshot" in page


def test_days_without_behaviors_are_told(store, space, write_day, refresh):
    write_day(store, date(2024, 3, 7), [[1, 5, 5, 1709800000]])
    page, _ = page_of(store, space, refresh(store, 7))
    assert "days between without any: 4</b>, the newest: 2024-03-03, 2024-03-04, 2024-03-05, 2024-03-06" in page


def test_names_of_items_are_shown_and_cannot_break_the_page(store, space, current):
    names = [f"<b>item & {number}" for number in range(1, 81)]
    table = pa.table([pa.array(range(1, 81)), pa.array(names), pa.nulls(80, pa.string())], schema=ITEMS)
    store.put("items/items.parquet", parquet_bytes(table))
    page, _ = page_of(store, space, current)
    assert "&lt;b&gt;item &amp; " in page
    assert "<b>item" not in page


def test_bars_by_hand():
    drawn = bars("a & b", ["x", "y"], [0.25, 0.5], [0.5, 0])
    assert 'aria-label="a &amp; b"' in drawn
    assert "x: 25.0%, before 50.0%" in drawn
    heights = [float(found) for found in re.findall(r'class="now"[^>]*height="([\d.]+)"', drawn)]
    assert heights[1] == 2 * heights[0]
    assert bars("none", [], []).startswith("<svg")


def test_what_could_not_be_measured_is_said_not_to_be():
    page = _drift_row(shift("behaviors a user", np.zeros(0), np.array([3.0, 5.0])))
    assert re.findall(r"<td[^>]*>([^<]*)", page) == ["behaviors a user", "-", "4", "-", "-", "not measured"]
