"""The benchmark of swaps swaps, and counts."""

import json

import pytest

from benchmarks.swaps import CLUSTERS, main


@pytest.mark.filterwarnings("ignore")  # MLflow on SQLite warns of what SQLAlchemy deprecates
def test_it_counts_answers_and_swaps(capsys):
    assert main(["--json", "--swaps", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["swaps"], found["bundles"], found["failed"], found["mixed"]) == (2, len(CLUSTERS), 0, 0)
    assert found["answers"] > 10
    assert 0 < found["p50_ms"] <= found["p99_ms"]
