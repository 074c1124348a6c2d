"""The benchmark of training on a log of no size: it runs, and its rivals are given the same impressions and sizes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import train
from benchmarks.train import Pace, Rival, Stream, make_data, write_for_fuxictr

NEEDS_RIVALS = pytest.mark.skipif(not train.has_rivals(), reason="needs: pip install --no-deps fuxictr==2.3.10")
WINDOW = 40


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small = {"median_length": 40, "max_length": 200, "num_items": 300, "num_categories": 10, "num_days": 80}
    monkeypatch.setattr(train, "LOG", train.LOG.model_copy(update=small))
    monkeypatch.setattr(train, "WINDOW", WINDOW)
    monkeypatch.setitem(train.SETTINGS["SIM"], "short_seq_len", 10)  # theirs fails where all histories are shorter
    lengths = {50: 20, 1_000: WINDOW}
    rivals = {name: (model, lengths[max_len]) for name, (model, max_len) in train.RIVALS.items()}
    monkeypatch.setattr(train, "RIVALS", rivals)


@NEEDS_RIVALS
def test_it_reports_what_it_promises(monkeypatch, capsys):
    monkeypatch.setattr(train, "QUICK", Pace(rounds=1, seconds=0.01, warm_up=1, workers=(0, 1)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.main(["--json", "--quick", "--impressions", "1000"])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["impressions_per_s"] > 0
    assert list(found["rivals_impressions_per_s"]) == list(train.RIVALS)
    for name, speeds in found["rivals_impressions_per_s"].items():
        assert list(speeds) == ["0 workers", "1 workers"]
        assert found[f"vs_{name}"] == pytest.approx(
            found["impressions_per_s"] / max(speeds.values()), rel=0.02, abs=0.01
        )
    assert sum(found["phases"].values()) == pytest.approx(1, abs=0.001)
    assert found["phases"].keys() == {"clustering", "data", "forward", "backward", "optimizer"}
    assert all(0 <= share < 1 for share in found["phases"].values())
    assert found["data_wait"].keys() == {"ours", *train.RIVALS}
    assert all(0 <= share < 1 for share in found["data_wait"].values())
    assert 900 < found["log"]["impressions"] <= 1000
    assert found["log"]["history_read_max"] == WINDOW
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == train.num_cores()
    train.show(found)
    assert "fuxictr_din_50" in capsys.readouterr().out


def test_it_runs_without_rivals(monkeypatch):
    monkeypatch.setattr(train, "has_rivals", lambda: False)
    found = train.measure(1000, Pace(rounds=1))
    assert all(found[f"vs_{name}"] is None for name in train.RIVALS)
    assert math.isfinite(found["impressions_per_s"])
    train.show(found)


@NEEDS_RIVALS
def test_rivals_read_what_ours_reads(tmp_path):
    """The same impressions in the same order, and the latest behaviors before each of them."""
    data = make_data(1000)
    rival = Rival("SIM", WINDOW, data, write_for_fuxictr(data, tmp_path))
    replay, batch = data.replay, data.batch_size
    assert (
        sum(parameter.shape[1] for parameter in rival.model.embedding_layer.parameters()) == train.MODEL.embedding_dim
    )
    labels, targets, categories = [], [], []
    for place, (shown, items, mask) in enumerate(rival.loader(0, shuffle=False)):
        width = mask.shape[1] + 1
        rows = items["item_id"].view(-1, width)
        labels += shown["label"].tolist()
        targets += rows[:, -1].tolist()
        categories += items["category_id"].view(-1, width)[:, -1].tolist()
        for row, found in enumerate(rows[:, :-1].numpy()):
            end = replay.recent_end[place * batch + row]
            begin = max(end - WINDOW, data.histories.offsets[replay.impressions.user[place * batch + row]])
            np.testing.assert_array_equal(found[len(found) - (end - begin) :], replay.behavior_index[begin:end])
            assert not found[: len(found) - (end - begin)].any()
    np.testing.assert_array_equal(labels, replay.impressions.labels)
    np.testing.assert_array_equal(targets, replay.target_index)
    np.testing.assert_array_equal(categories, replay.category_index[replay.target_index])


@NEEDS_RIVALS
@pytest.mark.parametrize("name", ["DIN", "SIM"])
def test_a_rival_is_trained(tmp_path, name):
    """Its loop takes a step for each batch that it is fed, and all of its weights change."""
    data = make_data(1000)
    rival = Rival(name, WINDOW, data, write_for_fuxictr(data, tmp_path))
    before = {key: weight.clone() for key, weight in rival.model.state_dict().items()}
    changed = {}
    rival.model.load_weights = lambda _path: changed.update(
        {key: not torch.equal(weight, before[key]) for key, weight in rival.model.state_dict().items()}
    )
    run = rival.run(Pace(seconds=0, warm_up=1), 0)
    assert changed
    assert all(changed.values())
    assert run.impressions == data.batch_size


def test_the_warm_up_counts_for_nothing():
    stream = Stream([(None, None, [0, 0]), (None, None, [0, 0, 0])], Pace(seconds=0, warm_up=1))
    assert len(list(stream)) == 2
    assert stream.run.impressions == 3
    assert 0 < stream.run.phases["data"] < stream.run.seconds


def test_it_refuses_what_is_too_small():
    with pytest.raises(SystemExit, match="at least 1000"):
        train.main(["--impressions", "10"])
