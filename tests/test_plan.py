"""Dry runs: what they say is what is done then, and they leave everything as it is."""

import json
import secrets
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest
from made import draw_space

from encode import plan, steps
from encode.config import Places, RegistryConfig, load_config
from encode.errors import ArtifactError, ConfigError, DataError
from encode.interests.snapshots import folder_of, write_space
from encode.registry import CANDIDATE
from encode.schema import Window, day_start, parse_day
from encode.storage import open_log

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
    assert f"would validate {first + timedelta(days=3)} to {first + timedelta(days=4)}" in said[1]
    assert files_of(folder) == before


def test_a_dry_run_fails_where_the_run_would(landed):
    folder, places, first = landed
    before, other = files_of(folder), Window(date(1999, 1, 1), date(1999, 1, 3))
    with pytest.raises(DataError, match=r"no raw data for any day of 1999-01-01 to 1999-01-02 \(2 days\)"):
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
    with pytest.raises(ConfigError, match=r"newest validated day is .*, more than a year before; is the year mistyped"):
        plan.train(TINY, places, date(first.year + 70, first.month, first.day), quiet)
    assert files_of(folder) == before


@pytest.fixture
def trained(tmp_path, write_day, mlflow_server):
    """A store with one validated day, and a candidate in MLflow whose space it holds."""
    import mlflow

    places = Places(store=str(tmp_path / "store"), tracking_uri=mlflow_server)
    config = TINY.model_copy(update={"registry": RegistryConfig(model_name=f"plan-{secrets.token_hex(4)}")})
    first, space = date(2024, 3, 1), draw_space(40, 4, 3)
    storage = open_log(places, TINY.name)
    write_space(storage, space, {})
    rows = [[user, 1 + (user * place) % 40, 1, day_start(first) + place] for user in range(1, 9) for place in range(20)]
    write_day(storage, first, rows)
    client, name = mlflow.MlflowClient(mlflow_server, mlflow_server), config.registry.model_name
    client.create_registered_model(name)
    made = client.create_model_version(name, "s3://models/m", tags={"encode.space": space.id})
    client.set_registered_model_alias(name, CANDIDATE, made.version)
    return config, places, first + timedelta(days=1), folder_of(space.id)


def test_a_dry_run_of_a_refresh_says_what_is_made_anew(trained):
    base, places, as_of, interests = trained
    store = Path(places.store)
    for changes, writes in (
        ({}, ["histories", interests]),
        ({}, []),
        ({"kmeans": "torch"}, [interests]),
        ({"kmeans": "torch", "min_buckets": 8}, ["histories", interests]),
        ({"kmeans": "torch", "min_buckets": 4}, []),
    ):
        config = base.model_copy(update={"refresh": base.refresh.model_copy(update=changes)})
        before = files_of(store)
        assert plan.refresh(config, places, as_of, quiet)["writes"] == writes, changes
        assert files_of(store) == before
        steps.refresh(config, places, as_of, quiet)
        made = files_of(store).keys() - before.keys()
        folders = {next(one for one in (interests, "histories") if name.startswith(f"{one}/")) for name in made}
        assert folders == set(writes), changes


def test_the_command_line_has_dry_runs_too(landed):
    folder, _, first = landed
    before = files_of(folder)
    options = ["--preset", "tiny", "--workdir", str(folder), "--dry-run"]
    command = [sys.executable, "-m", "encode.cli", "validate", "--start", str(first + timedelta(days=3)), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "would validate" in done.stdout
    assert files_of(folder) == before
