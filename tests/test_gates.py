"""What the gates measure, on a release made by hand, and what they let pass."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import AS_OF, END, HISTORIES, MEASURED, MODEL, READER, SPACE, make_bundle, make_model

from encode.config import ReleaseConfig, TrainingConfig, load_config
from encode.gates import Gate, Measured, gates_of, measure, share_held
from encode.model.ctr import Encode, Reader
from encode.schema import Window, day_start
from encode.serving.engine import Engine

NAN = float("nan")
TRAINING = TrainingConfig(snapshot_days=1)
DAY = Window(AS_OF, END)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def measured(bundle):
    return measure(bundle, HISTORIES, DAY, TRAINING)


def reader_like(change):
    """The reader with weights that are changed."""
    reader = Reader(MODEL, Encode(MODEL)).eval()
    reader.load_state_dict({name: change(weight) for name, weight in READER.state_dict().items()})
    return reader


def gates(limits=None, champion=None, champions_users=0.99, **values):
    champion = None if champion is None else Measured({**MEASURED, **champion}, {}, np.zeros(0))
    found = gates_of(
        Measured({**MEASURED, **values}, {}, np.zeros(0)), champion, champions_users, limits or ReleaseConfig()
    )
    return {gate.name: gate for gate in found}


def missed(**options):
    return [name for name, gate in gates(**options).items() if not gate.passed]


# --- what is measured --------------------------------------------------------------------------------------


def test_coverage_is_the_share_of_the_days_users_that_the_snapshot_holds(measured, bundle):
    active = {
        int(HISTORIES.user_ids[user])
        for user, timestamp in zip(HISTORIES.user_of, HISTORIES.timestamps, strict=True)
        if day_start(AS_OF) <= timestamp < day_start(END)
    }
    held = [user for user in active if bundle.snapshot.find(user) is not None]
    assert measured.metrics["coverage"] == len(held) / len(active)
    assert 12 in active, "who came on that day alone"
    assert 12 not in held


def test_serving_and_replay_agree(measured):
    assert 0 < measured.metrics["parity"] < 1e-6
    assert len(measured.probabilities) == measured.metrics["impressions"]


def test_parity_sees_an_engine_with_other_weights(bundle):
    other = replace(bundle, engine=Engine(SPACE, reader_like(lambda weight: weight * 1.01)))
    assert measure(other, HISTORIES, DAY, TRAINING).metrics["parity"] > ReleaseConfig().max_parity


def test_parity_sees_an_engine_of_another_space(bundle):
    space, _, _ = make_model(1)
    other = replace(bundle, engine=Engine(space, READER))
    assert measure(other, HISTORIES, DAY, TRAINING).metrics["parity"] > ReleaseConfig().max_parity


def test_a_model_that_gives_no_numbers_passes_neither_its_metrics_nor_parity(bundle):
    broken = replace(bundle, reader=reader_like(lambda weight: weight * NAN))
    found = measure(broken, HISTORIES, DAY, TRAINING)
    by_name = {gate.name: gate.passed for gate in gates_of(found, None, None, ReleaseConfig(max_parity=1.0))}
    assert [by_name[name] for name in ("logloss", "calibration", "parity")] == [False, False, False]


def test_size_is_that_of_weights_and_space(measured):
    weights = sum(weight.nbytes for weight in READER.state_dict().values())
    assert measured.metrics["size_mb"] * 1e6 == pytest.approx(weights + sum(map(len, SPACE.files.values())))


def test_latency_is_of_one_thread_and_leaves_torch_as_it_was(bundle, monkeypatch):
    used, threads = [], torch.get_num_threads()
    monkeypatch.setattr(type(bundle), "score", lambda *_: used.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        assert 0 < measure(bundle, HISTORIES, DAY, TRAINING).metrics["latency_ms"] < 50
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(used) == {1}


def test_the_same_impressions_are_drawn_for_every_bundle(measured, bundle):
    again = measure(replace(bundle, reader=reader_like(lambda weight: weight * 2)), HISTORIES, DAY, TRAINING)
    same = ("impressions", "positives", "auc_seen_before", "coverage")
    assert [again.metrics[name] for name in same] == [measured.metrics[name] for name in same]
    assert again.metrics["logloss"] != measured.metrics["logloss"]


def test_users_held_by_hand(bundle):
    assert share_held(np.array([1, 2, 12, 99]), bundle.snapshot) == 0.5
    assert share_held(np.array([], np.int64), bundle.snapshot) == 0.0


# --- what passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auc", 0.59),
        ("gauc", 0.54),
        ("auc_first_time", 0.54),
        ("logloss", 0.61),
        ("calibration", 0.79),
        ("calibration", 1.26),
        ("coverage", 0.89),
        ("parity", 1.1e-4),
        ("latency_ms", 50.1),
        ("size_mb", 4096.1),
    ],
)
def test_each_absolute_limit_is_held(name, value):
    assert missed() == []
    assert missed(**{name: value}) == [name]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auc_over_champion", {"champion": {"auc": 0.8021}}),
        ("gauc_over_champion", {"champion": {"gauc": 0.7051}}),
        ("logloss_over_champion", {"champion": {"logloss": 0.2949}}),
        ("miscalibration_over_champion", {"champion": {"calibration": 0.999}, "calibration": 1.102}),
        ("coverage_of_champion", {"champion": {}, "champions_users": 0.89}),
    ],
)
def test_each_limit_beside_the_champion_is_held(name, options):
    assert missed(champion={}) == []
    assert missed(**options) == [name]


def test_being_better_than_the_champion_passes():
    worse = {"auc": 0.6, "gauc": 0.6, "logloss": 0.5, "calibration": 0.8}
    assert missed(champion=worse) == []
    assert gates(champion=worse)["miscalibration_over_champion"].value == pytest.approx(0.1 - 0.2)


def test_the_first_candidate_has_no_champion_to_be_held_against():
    assert set(gates()) == set(MEASURED)
    assert all(gate.champion is None for gate in gates().values())


def test_the_champions_values_stand_beside_the_candidates():
    assert gates(champion={"auc": 0.79})["auc"].champion == 0.79


@pytest.mark.parametrize("name", [*gates(champion={})])
def test_not_a_number_never_passes(name):
    base = name.removesuffix("_over_champion").replace("miscalibration", "calibration")
    if name == "coverage_of_champion":
        assert name in missed(champion={}, champions_users=NAN)
    else:
        assert name in missed(champion={}, **{base: NAN})
        assert name == base or name in missed(champion={base: NAN})


def test_a_gate_says_value_and_limits():
    assert str(Gate("calibration", 1.3, 0.8, 1.25)) == "calibration 1.3 (>= 0.8 and <= 1.25)"
    assert str(Gate("parity", 2.345678e-7, highest=1e-4)) == "parity 2.346e-07 (<= 0.0001)"


@pytest.mark.parametrize("preset", ["tiny", "complete-journey", str(Path(__file__).parent / "samples" / "small.yaml")])
def test_no_preset_asks_for_approval_or_switches_a_gate_off(preset):
    limits = load_config(preset).release
    assert not limits.approval
    assert missed(limits=limits, champion={}) == []
    bad = dict.fromkeys(MEASURED, 1e9) | {"auc": 0.39, "gauc": 0.49, "auc_first_time": 0.39, "coverage": 0.0}
    assert set(missed(limits=limits, **bad)) == set(MEASURED)
