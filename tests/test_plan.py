"""Dry runs: what they say is what is done then, and they leave everything as it is."""

import json
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from encode import plan, steps
from encode.config import Places, load_config
from encode.errors import ArtifactError, ConfigError, DataError
from encode.schema import Window, parse_day

TINY = load_config("tiny")


def quiet(_line):
    pass


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def landed(tmp_path_factory):
    """The tiny log, landed, with its first three days validated."""
    folder = tmp_path_factory.mktemp("plan")
    places = Places.in_folder(folder)
    first = parse_day(steps.land(TINY, places, quiet)["first_day"], "first day")
    steps.validate(TINY, places, Window(first, first + timedelta(days=3)), quiet)
    return folder, places, first


def test_a_dry_run_of_validation_says_what_is_done_and_what_would_be(landed):
    folder, places, first = landed
    window = Window(first - timedelta(days=1), first + timedelta(days=5))
    before, said = files_of(folder), []
    found = plan.validate(TINY, places, window, said.append)
    assert found["missing_days"] == [str(first - timedelta(days=1))]
    assert found["unchanged"] == 3
    assert found["to_validate"] == [str(first + timedelta(days=offset)) for offset in (3, 4)]
    assert found["writes"][:2] == [f"{kind}/dt={first + timedelta(days=3)}" for kind in ("behaviors", "quarantine")]
    assert f"would validate {first + timedelta(days=3)}..{first + timedelta(days=4)}" in said[1]
    assert files_of(folder) == before


def test_a_dry_run_fails_where_the_run_would(landed):
    folder, places, first = landed
    before, other = files_of(folder), Window(date(1999, 1, 1), date(1999, 1, 3))
    with pytest.raises(DataError, match=r"no raw data for any day of 1999-01-01\.\.1999-01-03"):
        plan.validate(TINY, places, other, quiet)
    changed = TINY.model_copy(update={"validation": TINY.validation.model_copy(update={"min_users": 2})})
    with pytest.raises(DataError, match=r"validation\.min_users changed since"):
        plan.validate(changed, places, Window(first, first + timedelta(days=1)), quiet)
    with pytest.raises(ConfigError, match="the store holds another log"):
        plan.train(load_config("complete-journey"), places, first, quiet)
    with pytest.raises(ArtifactError, match="no validated day before"):
        plan.train(TINY, places, first, quiet)
    assert files_of(folder) == before


def test_a_dry_run_of_a_replay_says_whose_quarantine_is_judged_anew(tmp_path):
    places = Places.in_folder(tmp_path)
    first = parse_day(steps.land(TINY, places, quiet)["first_day"], "first day")
    window = Window(first, first + timedelta(days=2))
    steps.validate(TINY, places, Window(first, first + timedelta(days=1)), quiet)
    assert plan.replay(TINY, places, window, quiet)["to_replay"] == []
    changed = TINY.model_copy(update={"validation": TINY.validation.model_copy(update={"min_users": 2})})
    before = files_of(tmp_path)
    found = plan.replay(changed, places, window, quiet)
    assert (found["to_replay"], found["to_validate"]) == ([str(first)], [str(first + timedelta(days=1))])
    assert files_of(tmp_path) == before
    steps.replay(changed, places, window, quiet)
    made = {name.removeprefix("store/").rpartition("/")[0] for name in files_of(tmp_path).keys() - before.keys()}
    assert made == set(found["writes"])
    assert plan.replay(changed, places, window, quiet)["writes"] == []


def test_a_dry_run_of_training_counts_what_is_validated_before_the_day(landed):
    folder, places, first = landed
    before = files_of(folder)
    found = plan.train(TINY, places, first + timedelta(days=2), quiet)
    rows = [
        json.loads((folder / f"store/behaviors/dt={first + timedelta(days=d)}/manifest.json").read_text())
        for d in (0, 1)
    ]
    assert (found["days"], found["rows"]) == (2, sum(one["counts"]["rows"] for one in rows))
    assert not found["done"]
    assert files_of(folder) == before


def test_the_command_line_has_dry_runs_too(landed):
    folder, _, first = landed
    before = files_of(folder)
    options = ["--preset", "tiny", "--workdir", str(folder), "--dry-run"]
    command = [sys.executable, "-m", "encode.cli", "validate", "--start", str(first + timedelta(days=3)), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "would validate" in done.stdout
    assert files_of(folder) == before
