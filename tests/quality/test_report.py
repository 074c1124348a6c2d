"""What the bench says it found, by hand."""

from __future__ import annotations

import json
import math

import pytest

from encode.quality.report import mean_and_error, rows_of, to_markdown


def cell(model, seed, auc, window=None, **changed):
    metrics = dict.fromkeys(("auc", "gauc", "auc_first_time", "gauc_first_time"), auc)
    metrics |= {"logloss": 0.5, "calibration": 1.02}
    return {
        "task": "log",
        "question": "Is it clicked?",
        "model": model,
        "family": "ours",
        "window": window,
        "learning_rate": 0.002,
        "seed": seed,
        "metrics": metrics | changed.pop("metrics", {}),
        "cost": {"ms_per_1000": 2.0 + seed, "ms_by_length": {"100": 1.0, "1000": 2.0 + seed}, "state_bytes": 6532},
        "fidelity": None,
        "environment": {"python": "3.12.3", "torch": "2.13.0", "numpy": "2.4.6", "machine": "x86_64", "threads": 1},
        "parameters": {"tables": 100, "long_term": 7, "others": 20},
        "seconds": {"training": 10.0 + 2 * seed, "all": 20.0},
        **changed,
    }


def row_of(cells, model, window=None):
    (row,) = [row for row in rows_of(cells) if (row["model"], row["window"]) == (model, window)]
    return row


def test_mean_and_standard_error_by_hand():
    assert mean_and_error([0.7, 0.8, 0.9]) == (pytest.approx(0.8), pytest.approx(0.1 / math.sqrt(3)))
    assert mean_and_error([0.7]) == (0.7, None)
    assert mean_and_error([]) == (None, None)
    assert mean_and_error([0.7, math.nan]) == (None, None)
    assert mean_and_error([0.7, None]) == (None, None)


def test_a_row_is_the_mean_over_seeds():
    row = row_of([cell("encode", 0, 0.7), cell("encode", 1, 0.8), cell("encode", 2, 0.9)], "encode")
    assert row["auc"] == pytest.approx(0.8)
    assert row["auc_se"] == pytest.approx(0.1 / math.sqrt(3))
    assert (row["logloss"], row["logloss_se"]) == (0.5, 0)
    assert (row["seeds"], row["learning_rate"], row["family"]) == (3, 0.002, "ours")
    assert row["cost_ms_per_1000"] == pytest.approx(3)
    assert row["cost_ms_by_length"] == {"100": pytest.approx(1), "1000": pytest.approx(3)}
    assert row["training_seconds"] == pytest.approx(12)
    assert (row["parameters"], row["parameters_long_term"], row["state_bytes"]) == (127, 7, 6532)
    assert "fidelity" not in row


@pytest.mark.parametrize("other", [{"torch": "2.11.0"}, {"processor": "faster"}])
def test_times_are_of_the_machine_that_most_cells_of_a_task_ran_on(other):
    elsewhere = cell("encode", 0, 0.7)["environment"] | other
    cells = [cell("encode", 2, 0.9, environment=elsewhere), cell("encode", 1, 0.8), cell("encode", 0, 0.7)]
    cells.append(cell("full", 0, 0.7, environment=elsewhere))
    cells.append(cell("mean", 0, 0.7))
    assert row_of(cells, "full")["cost_ms_per_1000"] is row_of(cells, "full")["training_seconds"] is None
    row = row_of(cells, "encode")
    assert (row["seeds"], row["auc"]) == (3, pytest.approx(0.8))
    assert row["cost_ms_per_1000"] == pytest.approx(2.5)
    assert row["cost_ms_by_length"]["1000"] == pytest.approx(2.5)
    assert row["training_seconds"] == pytest.approx(11)


def test_differences_to_full_attention_are_paired_by_seed():
    """0.71 - 0.70, 0.79 - 0.80, 0.93 - 0.90: mean 0.01, standard error 0.02 / sqrt(3), though AUC varies more."""
    cells = [cell("full", seed, auc) for seed, auc in ((2, 0.90), (0, 0.70), (1, 0.80))]
    cells += [cell("encode", seed, auc) for seed, auc in ((0, 0.71), (1, 0.79), (2, 0.93))]
    row = row_of(cells, "encode")
    assert row["auc_minus_full"] == pytest.approx(0.01)
    assert row["auc_minus_full_se"] == pytest.approx(0.02 / math.sqrt(3))
    assert row["auc_se"] > 3 * row["auc_minus_full_se"]
    assert (row["gauc_minus_full"], row["gauc_minus_full_se"]) == (row["auc_minus_full"], row["auc_minus_full_se"])


def test_only_seeds_that_both_have_are_paired():
    row = row_of([cell("full", 0, 0.7), cell("encode", 0, 0.71), cell("encode", 1, 0.99)], "encode")
    assert (row["auc_minus_full"], row["auc_minus_full_se"]) == (pytest.approx(0.01), None)


def test_without_full_attention_there_is_no_difference():
    row = row_of([cell("encode", 0, 0.71), cell("encode", 1, 0.75)], "encode")
    assert (row["auc_minus_full"], row["auc_minus_full_se"]) == (None, None)


def test_windows_and_tasks_are_rows_of_their_own_and_compared_with_the_whole_history():
    cells = [cell("full", 0, 0.8), cell("full", 0, 0.7, window=50), cell("full", 0, 0.72, window=200)]
    cells += [cell("encode", 0, 0.9) | {"task": "other"}]
    assert len(rows_of(cells)) == 4
    assert row_of(cells, "full", 50)["auc_minus_full"] == pytest.approx(-0.1)
    assert row_of(cells, "full")["auc_minus_full"] == 0
    assert row_of(cells, "encode")["auc_minus_full"] is None  # of the other task


def test_what_is_not_known_is_null():
    cells = [cell("encode", 0, 0.7, metrics={"gauc": math.nan}), cell("full", 0, 0.7, metrics={"gauc": None})]
    (encode, full) = json.loads(json.dumps(rows_of(cells), allow_nan=False))
    for row in (encode, full):
        assert row["auc"] == 0.7
        assert row["auc_se"] is None
        assert row["gauc"] is row["gauc_se"] is row["gauc_minus_full"] is None


def test_rows_hold_what_programs_read():
    (row,) = json.loads(json.dumps(rows_of([cell("encode", 0, 0.7), cell("encode", 1, 0.8)])))
    expected = {"dataset", "task", "model", "auc", "auc_se", "gauc", "logloss", "seeds", "cost_ms_per_1000"}
    assert expected <= set(row)
    assert (row["dataset"], row["task"]) == ("log", "log")


def test_fidelity_is_a_mean_and_its_error_the_worst():
    known = [{"correlation": c, "max_error": e, "relative_error": 0.1} for c, e in ((0.9, 0.5), (0.8, 0.2))]
    cells = [cell("encode", seed, 0.7, fidelity=one) for seed, one in enumerate(known)]
    row = row_of(cells, "encode")
    assert row["fidelity"] == pytest.approx(0.85)
    assert row["fidelity_se"] == pytest.approx(0.05)
    assert row["fidelity_max_error"] == 0.5


def test_the_table():
    cells = [cell("recent", 0, 0.6), cell("recent", 1, 0.62), cell("full", 0, 0.8), cell("full", 1, 0.84)]
    cells += [cell("full", 0, 0.7, window=50, fidelity={"correlation": 0.9, "max_error": 1.0, "relative_error": 0.1})]
    table = to_markdown(rows_of(cells), {"log": "Is it clicked?"}).splitlines()
    assert table[:3] == ["### log", "", "Is it clicked?"]
    assert table[9:11] == ["Histories cut to their latest behaviors:", ""]
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in table if line.startswith("|")]
    assert {len(line) for line in lines} == {12}
    head, _, full, recent, again, _, cut = lines
    assert again == head
    assert "AUC first-time" not in head  # it would say nothing that AUC does not
    (full, recent, cut) = [dict(zip(head, row, strict=True)) for row in (full, recent, cut)]
    assert [row["model"] for row in (full, recent, cut)] == ["full", "recent", "full, last 50"]  # the best first
    assert full["AUC"] == "0.8200 ± 0.0200"
    assert recent["to full"] == "-0.2100 ± 0.0100"
    assert cut["to full"] == "-0.1000"  # one seed has no error
    assert full["to full"] == "+0.0000 ± 0.0000"
    assert (cut["fidelity"], full["fidelity"]) == ("0.9000", "")
    assert (full["ms / 1,000"], full["state, B"], full["training, s"]) == ("2.50", "6,532", "11")
    assert (full["rate"], full["seeds"], full["calibration"]) == ("0.002", "2", "1.020")


def test_first_time_items_have_a_column_where_they_differ():
    cells = [cell("full", 0, 0.8, metrics={"auc_first_time": 0.65}), cell("mean", 0, 0.7)]
    table = to_markdown(rows_of([*cells, cell("mean", 0, 0.5) | {"task": "other"}]), {})
    first, second = table.split("### other")
    assert "| AUC first-time |" in first
    assert "| 0.6500 |" in first
    assert "first-time" not in second


def test_what_is_changed_in_encode_has_a_table_of_its_own():
    cells = [cell("encode", 0, 0.8), cell("encode:num_clusters=4", 0, 0.7)]
    first, second = to_markdown(rows_of(cells), {}).split("ENCODE with something changed:")
    assert "| encode | 0.8000 |" in first
    assert "| encode:num_clusters=4 | 0.7000 |" in second
