"""The benchmark of serving on few users: it runs, and what it times computes what it says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import serve
from benchmarks.serve import Pace


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(serve, "LENGTH", 60)
    monkeypatch.setattr(serve, "FULL_LENGTH", 200)
    monkeypatch.setattr(serve, "LENGTHS", (20, 60, 200))
    monkeypatch.setattr(serve, "COUNTS", (1, 9))
    monkeypatch.setattr(serve, "CLUSTERS", (2, 5))
    monkeypatch.setattr(serve, "QUICK", Pace(requests=4, curve=2, warm_up=1))


def test_it_reports_what_it_promises(capsys):
    threads = torch.get_num_threads()
    serve.main(["--json", "--quick", "--candidates", "30"])
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    curves = {name: list(found[f"ms_by_{name}"]) for name in ("candidates", "clusters", "length")}
    assert curves == {"candidates": ["1", "9"], "clusters": ["2", "5"], "length": ["20", "60", "200"]}
    figures = ("model_p50_ms", "model_p99_ms", "flatness", "vs_full_attention", "vs_training_code", "vs_floor")
    assert all(math.isfinite(found[name]) and found[name] > 0 for name in figures)
    assert found["model_p50_ms"] <= found["model_p99_ms"]
    assert found["candidates"] == 30
    serve.show(found)
    assert "target: at most 3" in capsys.readouterr().out


def test_both_ways_score_the_stored_users(tmp_path):
    served = serve.make_served(tmp_path, (20, 60), 5)
    for length in (20, 60):
        ours, training = (make(served, length, 30) for make in (serve.model_time, serve.by_training_code))
        torch.testing.assert_close(ours(1), training(1), rtol=0, atol=1e-5)
        assert not torch.equal(ours(0), ours(1))
        row = served.snapshot.find(served.user_id(length, 1))
        assert (row["num_behaviors"].as_py(), len(row["size"])) == (length, 5)
        history = served.space.vocabulary.index(served.histories[length][1])
        assert np.isin(served.candidates(length, 1, 30), history).sum() >= 3


def test_full_attention_scores_each_candidate_of_each_user(tmp_path):
    full = serve.by_full_attention(serve.make_served(tmp_path, (60,), 5), 60, 30)
    assert full(0).shape == (30,)
    assert not torch.equal(full(0), full(1))


def test_no_candidates_are_refused():
    with pytest.raises(SystemExit, match="expected at least 1"):
        serve.main(["--candidates", "0"])
