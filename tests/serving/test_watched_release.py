"""Lineage and monitoring of a real release: the tiny preset, with MLflow on SQLite."""

import json
import shutil
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encode.cli import main
from encode.config import load_config
from encode.data.histories import read_histories
from encode.data.parquet import read_parquet
from encode.lineage import Lineage
from encode.monitoring import watch
from encode.monitoring.feedback import measure, reference_of, training_report
from encode.monitoring.stability import counts_of, psi
from encode.monitoring.watch import Watch
from encode.monitoring.words import lines
from encode.registry import Registry
from encode.schema import Window
from encode.serving.bundle import Asked
from encode.storage import open_storage

TINY = load_config("tiny")
pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow on SQLite warns of what SQLAlchemy deprecates


@pytest.fixture(scope="module")
def storage(places):
    return open_storage(places, writing=False)


@pytest.fixture(scope="module")
def known(places):
    return Registry(places, TINY.registry)


def every(node):
    yield node
    for one in (*node.made_from, *node.goes_into):
        yield from every(one)


def test_a_score_of_the_application_leads_to_every_day_of_the_log(storage, known, make_client):
    answer = make_client().post("/v1/score", json={"user_id": 1, "item_ids": [5, 6]})
    node = Lineage(storage, known, verify=True).of_score(answer.content, "answer")
    assert node.all_problems() == []
    bundle = node.made_from[0]
    assert bundle.name == f"bundle {answer.json()['bundle']['id']}"
    assert bundle.facts["served"] is True
    assert len({one.name for one in every(node) if one.kind == "raw"}) == 60
    [version] = [one for one in every(node) if one.kind == "version"]
    assert version.facts["aliases"] == ["champion", "candidate"]
    assert json.loads(answer.content)["probabilities"] == node.facts["probabilities"]


def test_the_number_of_the_version_and_the_id_of_the_bundle_are_enough(storage, known, released):
    lineage = Lineage(storage, known)
    assert lineage.trace(released.id).made_from == lineage.trace(released.id).made_from
    assert lineage.trace("1").goes_into[0].name.endswith(released.pointer.snapshot)
    forward = lineage.trace("raw/dt=2024-01-05")
    assert forward.facts["served"] is True
    assert {one.kind for one in every(forward)} >= {
        "behaviors",
        "histories",
        "interests",
        "models",
        "spaces",
        "version",
    }


def test_scoring_the_days_of_the_test_again_shows_no_skew(storage, known, released):
    """Exactly: they are the same impressions, scored by the same model."""
    as_of = released.card.as_of
    told = Watch(storage, known, as_of + timedelta(3), lambda _: None).look(released.card.test_days, TINY.training)
    assert told["problems"] == []
    assert told["skew"]["trained"] == told["skew"]["scored"]
    assert told["skew"]["psi"] == 0
    assert told["skew"]["auc"] == pytest.approx(released.card.metrics["auc"], abs=1e-6)
    assert {one["age_days"] for one in told["freshness"].values()} == {3}
    assert told["drift"]["coverage_of_newest_day"] == 1
    assert told["drift"]["before"] is None
    shown = "\n".join(lines(told))
    assert f"snapshot   days up to {as_of - timedelta(1)}, 3 days old" in shown
    drift = told["drift"]
    buckets = drift["sample"]["of_buckets"]
    assert drift["sample"] == {"users": drift["users"], "buckets": buckets, "of_buckets": buckets}
    first, last = as_of - timedelta(released.card.test_days), as_of - timedelta(1)
    assert told["skew"]["scored"].startswith(f"{first} to {last} (")
    assert f"test days themselves, which show no skew: {told['skew']['scored']}" in shown


def test_what_is_ahead_of_the_day_that_is_asked_about_has_no_negative_age(storage, known, released):
    as_of = released.card.as_of - timedelta(2)
    told = Watch(storage, known, as_of, lambda _: None).look(0, TINY.training)
    assert told["freshness"]["snapshot"] == {"ends": str(released.card.as_of), "ahead_days": 2}
    assert not any("age_days" in one for one in told["freshness"].values())
    expected = f"freshness: ahead of {as_of}, so without an age as of then: raw, behaviors, model, histories, snapshot"
    assert told["problems"] == [expected]
    last = released.card.as_of - timedelta(1)
    assert f"  raw        days up to {last}, 2 days ahead of that" in list(lines(told))


def test_an_empty_store_is_measured_as_far_as_it_goes(tmp_path, places, known):
    empty = open_storage(places.model_copy(update={"store": str(tmp_path)}))
    told = Watch(empty, known, date(2024, 3, 1), lambda _: None).look(0, TINY.training)
    assert told["freshness"]["behaviors"] == {"ends": None}
    assert "no snapshot yet" in told["problems"][0]


def test_feedback_of_a_bundle_is_held_against_its_training(storage, known, released, tmp_path):
    """Scores of the users' own newest items, and of a user and an item that the bundle does not know."""
    behaviors = read_parquet(storage.get("behaviors/dt=2024-02-29/part-00000.parquet"))[:150]
    users, items, times = (behaviors[name].to_pylist() for name in ("user_id", "item_id", "timestamp"))
    users, items, times = [*users, 10**9], [*items, 10**9], [*times, times[-1]]
    asked = [Asked(user, np.array([item])) for user, item in zip(users, items, strict=True)]
    scores = [released.score(one).probabilities.item() for one in asked]
    columns = {"user_id": users, "item_id": items, "probability": scores, "label": np.ones(len(users), np.int8)}
    columns |= {"timestamp": times, "bundle": [released.id] * len(users)}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    told = measure(storage, Lineage(storage, known), tmp_path / "log.parquet")
    skew = told["bundles"][released.id]["skew"]
    assert skew["version"] == "1"
    assert skew["training_mean"] == pytest.approx(0.2, abs=0.01), "four negatives to a positive"
    assert skew["psi"] > 0.25 > skew["chance"], "positives alone are no sample of what training saw"
    assert skew["unknown_users"] == pytest.approx(1 / 151)
    unknown = sum(not released.knows(item) for item in items)
    assert skew["unknown_items"] == pytest.approx(unknown / 151)
    assert "auc" not in told["days"][0], "one class alone has none"


def test_a_training_report_stands_for_the_scores_that_it_was_made_of(storage, known, released):
    """Their mean exactly; their distribution as well as ten means can tell."""
    version, card = known.by_number("1"), released.card
    reference = reference_of(training_report(storage, Lineage(storage, known), version)["reliability"])
    histories, _ = read_histories(storage, card.as_of)
    days = Window(card.as_of - timedelta(card.test_days), card.as_of)
    scores = watch._score(released.space, released.reader, histories, days, TINY.training).probabilities
    assert reference.mean == pytest.approx(scores.mean(), abs=1e-6)
    assert psi(reference.counts, counts_of(scores, reference.edges)) < 0.04


# --- as a user meets it ------------------------------------------------------------------------------------


@pytest.fixture
def encode(workdir, capsys):
    """Run a command on the release, or on another folder; return status and what was printed."""

    def run(*arguments, folder=workdir):
        status = main([*map(str, arguments), "--preset", "tiny", "--workdir", str(folder)])
        return status, *capsys.readouterr()

    return run


def test_the_commands_print_for_people_and_for_programs(encode, released, tmp_path):
    assert encode("lineage", released.id)[1].startswith(f"bundle {released.id}  served\n  from interests/")
    told = json.loads(encode("lineage", "1", "--json")[1])
    assert (told["name"], told["served"]) == ("version 1", True)
    assert encode("monitor", "--as-of", "2024-03-02")[1].startswith("as of the start of 2024-03-02\n")
    assert json.loads(encode("monitor", "--as-of", "2024-03-02", "--json")[1])["problems"] == []
    columns = {"user_id": [1, 2], "item_id": [5, 6], "probability": [0.5, 0.1], "label": [1, 0]}
    pq.write_table(pa.table(columns | {"timestamp": [1709251200] * 2, "bundle": [released.id] * 2}), tmp_path / "log")
    status, printed, _ = encode("feedback", tmp_path / "log", "--plot", tmp_path / "plot.svg")
    assert (status, printed.splitlines()[0][:32]) == (0, "  2024-03-01: impressions 2, pos")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_a_day_that_was_replayed_is_watched_with_all_its_rows(encode, workdir, tmp_path):
    """The newest day is landed again with rows of 50 users that no snapshot holds yet."""
    folder = tmp_path / "copy"
    shutil.copytree(workdir, folder)
    day, raw = "2024-02-29", folder / "store" / "raw" / "dt=2024-02-29"
    landed = pa.concat_tables(pq.read_table(path) for path in sorted(raw.glob("*.parquet")))
    before = json.loads(encode("monitor", "--as-of", "2024-03-01", "--json", folder=folder)[1])["drift"]
    more = landed[:50].set_column(0, "user_id", pa.array(range(10**6, 10**6 + 50), landed["user_id"].type))
    for path in raw.iterdir():
        path.unlink()
    pq.write_table(pa.concat_tables([landed, more]), raw / "again.parquet")
    assert encode("replay", "--start", day, folder=folder)[0] == 0
    assert (folder / "store" / "behaviors" / f"dt={day}" / "replay-001" / "manifest.json").is_file()
    status, printed, error = encode("monitor", "--as-of", "2024-03-01", "--json", folder=folder)
    assert (status, error) == (0, "")
    told = json.loads(printed)
    assert told["problems"] == []
    assert told["drift"]["coverage_of_newest_day"] < before["coverage_of_newest_day"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["lineage", "nonsense"], 2, "found 'nonsense', expected a score"),
        (["lineage", "99"], 1, "version 99: not in the registry"),
        (["lineage", __file__], 1, "not the answer of /v1/score"),
        (["monitor", "--as-of", "soon"], 2, "--as-of: found 'soon', expected a day"),
        (["feedback", "absent"], 2, "feedback: absent: no such file or folder"),
        (["feedback", "--plot", "plot.txt"], 2, "expected a name that ends in .png, .svg or .pdf"),
    ],
)
def test_a_mistake_gets_one_clear_line(encode, arguments, status, message):
    found, printed, error = encode(*arguments)
    assert (found, printed) == (status, "")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_broken_link_is_printed_and_is_an_error(encode, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    (tmp_path / "copy" / "store" / "raw" / "dt=2024-01-05" / "manifest.json").unlink()
    status, printed, error = encode("lineage", "1", folder=tmp_path / "copy")
    assert status == 1
    assert "behaviors/dt=2024-01-01 .. dt=2024-01-04 (4 days)" in printed, "the day stands apart"
    assert "! missing: no manifest in the store" in printed
    assert error == "error: lineage: missing, damaged or not as recorded: 1 link\n"
