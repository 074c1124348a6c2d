"""Logged feedback: by hand, and what bad files get."""

from datetime import date
from math import log

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encode.errors import ConfigError, DataError
from encode.lineage import Lineage
from encode.monitoring.feedback import Origin, Skew, measure, plot, reference_of
from encode.monitoring.sample import Sample
from encode.schema import bucket_of, day_start

DAY = day_start(date(2024, 3, 1))
ROWS = {
    "user_id": [1, 1, 2, 2],
    "item_id": [5, 6, 5, 7],
    "probability": [0.8, 0.4, 0.5, 0.1],
    "label": [1, 0, 0, 1],
    "timestamp": [DAY, DAY + 5, DAY + 86_400, DAY + 86_401],
    "bundle": ["a", "a", "b", None],
}


class NoVersions:
    """A registry of which nothing was released."""

    def versions(self):
        return []

    def by_alias(self, alias):
        return None


@pytest.fixture
def measured(folder):
    return lambda source=None: measure(folder, Lineage(folder, NoVersions()), source)


def write(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: values for name, values in {**ROWS, **changes}.items() if values is not None}), path)
    return path


def test_days_and_bundles_by_hand(measured, tmp_path):
    told = measured(write(tmp_path / "log.parquet"))
    first, second = told["days"]
    assert first == {
        "day": "2024-03-01",
        "impressions": 2,
        "positives": 1,
        "mean_probability": pytest.approx(0.6),
        "logloss": pytest.approx(-(log(0.8) + log(0.6)) / 2),
        "calibration": pytest.approx(1.2),
        "auc": 1.0,
        "gauc": 1.0,
    }
    assert (second["auc"], second["calibration"]) == (0.0, pytest.approx(0.6))
    assert told["whole"]["impressions"] == 4
    assert told["whole"]["calibration"] == pytest.approx(1.8 / 2)
    assert told["bundles"]["a"]["calibration"] == pytest.approx(1.2)
    assert "calibration" not in told["bundles"]["b"], "nothing was clicked"
    assert "bundle b: none of the 0 registered versions" in told["bundles"]["b"]["skew"]
    assert told["bundles"]["unknown"]["skew"] == "no bundle was logged"


def test_a_folder_and_the_store_give_the_same(measured, folder, tmp_path):
    write(tmp_path / "log.parquet")
    expected = measured(tmp_path / "log.parquet")
    for number, day in enumerate(("2024-03-01", "2024-03-02")):
        part = {name: values[2 * number : 2 * number + 2] for name, values in ROWS.items()}
        path = write(tmp_path / "log" / f"dt={day}" / "part.parquet", **part)
        folder.put(f"feedback/dt={day}/part.parquet", path.read_bytes())
    assert measured(tmp_path / "log") == expected
    assert measured() == expected


def test_types_of_other_writers_are_taken(measured, tmp_path):
    table = pa.table(ROWS)
    for name, kind in {"probability": pa.float32(), "label": pa.int8(), "user_id": pa.uint32()}.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    pq.write_table(table.append_column("more", pa.array([1, 2, 3, 4])), tmp_path / "log.parquet")
    assert measured(tmp_path / "log.parquet")["whole"]["impressions"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, r"log.parquet: no column label; found user_id, .*expected user_id, item_id"),
        ({"label": [1, 0, 2, 0]}, r"row 2: label is 2, expected 0 or 1"),
        ({"probability": [0.1, float("nan"), 0.2, 0.3]}, r"row 1: probability is nan, expected 0 to 1"),
        ({"probability": [0.1, 0.2, 1.5, 0.3]}, r"row 2: probability is 1.5, expected 0 to 1"),
        ({"user_id": [1, None, 2, 3]}, r"row 1: user_id is None, expected a value"),
        ({"timestamp": [1709251200000] * 4}, r"row 0: timestamp is 1709251200000, expected UTC seconds"),
        ({"item_id": ["a", "b", "c", "d"]}, r"log.parquet: .*item_id string"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(measured, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        measured(write(tmp_path / "log.parquet", **changes))


def test_files_that_are_none_or_in_the_wrong_place_are_refused(measured, folder, tmp_path):
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"text.parquet: not a Parquet file"):
        measured(tmp_path / "text.parquet")
    with pytest.raises(ConfigError, match="no such file or folder"):
        measured(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"feedback: nothing in .*feedback; expected Parquet files with user_id"):
        measured()
    folder.put("feedback/dt=2024-03-01/part.parquet", write(tmp_path / "log.parquet").read_bytes())
    with pytest.raises(DataError, match="holds impressions of 2024-03-02"):
        measured()
    for name in ("a", "b"):
        write(tmp_path / "twice" / name / "log.parquet")
    with pytest.raises(DataError, match="2024-03-01 is in files of several folders"):
        measured(tmp_path / "twice")


def test_a_training_report_gives_bins_between_its_means():
    bins = [{"predicted": p, "impressions": 10} for p in (0.1, 0.2, 0.2, 0.6)]
    reference = reference_of(bins)
    odds = [(1 / 9 * 1 / 4) ** 0.5, 1 / 4, (1 / 4 * 3 / 2) ** 0.5]
    assert reference.edges == pytest.approx([odd / (1 + odd) for odd in odds])
    assert reference.counts.tolist() == [10, 0, 20, 10]
    assert reference.mean == pytest.approx(0.275)


def test_unknown_users_count_where_the_sample_knows_them(space):
    users = np.arange(1, 41)
    held = users[bucket_of(users, 4) == 0]
    none = np.zeros(0, np.int64)
    sample = Sample(held[1:], none, none, none, none, pa.table({}), 1)
    reference = reference_of([{"predicted": 0.2, "impressions": 30}, {"predicted": 0.4, "impressions": 30}])
    skew = Skew(Origin("3", reference, space.vocabulary, sample, 4))
    skew.add(users, np.array([5, 999] * 20), np.repeat([0.1, 0.5], 20))
    told = skew.summary()
    assert told["sampled_impressions"] == len(held) < len(users)
    assert told["unknown_users"] == pytest.approx(1 / len(held))
    assert told["unknown_items"] == 0.5
    assert told["version"] == "3"
    assert told["psi"] == pytest.approx(0, abs=1e-9)


def test_the_plot_has_a_point_a_day(measured, tmp_path):
    figure = plot(measured(write(tmp_path / "log.parquet")))
    assert [len(axis.lines[0].get_xdata()) for axis in figure.axes] == [2, 2, 2]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
