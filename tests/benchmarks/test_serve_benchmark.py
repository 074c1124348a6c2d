"""The benchmark of serving on few users: it runs with real servers, and what it times computes what it says."""

from __future__ import annotations

import json
import math

import httpx
import numpy as np
import pytest
import torch

from benchmarks import release, serve, serve_http, whole_history
from benchmarks.serve import Pace
from benchmarks.serve_http import HttpPace, running
from encode.config import Places
from encode.model.long_term import Sizes
from encode.quality.rivals.attention import FullAttention, Whole
from encode.quality.rivals.retrieved import top_behaviors
from encode.serving.bundle import Asked, load_bundle
from encode.stack.ports import free_port
from encode.storage import open_storage

HTTP = HttpPace(headline=0.5, rate=0.2, trial=0.2, requests=10, steps=1, one_client=0.05, clients=0.1)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(serve, "LENGTH", 60)
    monkeypatch.setattr(serve, "FULL_LENGTH", 200)
    monkeypatch.setattr(serve, "LENGTHS", (20, 60, 200))
    monkeypatch.setattr(serve, "COUNTS", (1, 9))
    monkeypatch.setattr(serve, "CLUSTERS", (2, 5))
    monkeypatch.setattr(serve, "MODEL_CLUSTERS", 5)
    monkeypatch.setattr(serve, "QUICK", Pace(requests=4, curve=2, warm_up=1, http=HTTP))
    monkeypatch.setattr(serve_http, "RATES", (20, 50))
    monkeypatch.setattr(serve_http, "MODELS", ("full_attention",))


@pytest.mark.filterwarnings("ignore")  # MLflow on SQLite warns of what SQLAlchemy deprecates
def test_it_reports_what_it_promises(capsys):
    threads = torch.get_num_threads()
    serve.main(["--json", "--quick", "--candidates", "30"])
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for prefix in ("ms_by", "http_ms_by"):
        curves = {name: list(found[f"{prefix}_{name}"]) for name in ("candidates", "clusters", "length")}
        assert curves == {"candidates": ["1", "9"], "clusters": ["2", "5"], "length": ["20", "60", "200"]}
    ratios = ("flatness", "vs_full_attention", "vs_full_attention_http", "vs_training_code", "vs_floor")
    figures = ("model_p50_ms", "model_p99_ms", "p50_ms", "p99_ms", "p50_ms_json", "p99_ms_json", "late_p99_ms")
    assert all(math.isfinite(found[name]) and found[name] > 0 for name in (*ratios, *figures))
    assert found["model_p50_ms"] < found["p50_ms"] <= found["p99_ms"]
    assert found.keys() >= {"max_rate", "vs_mlflow_serve", "vs_mlflow_serve_per_s"}
    assert list(found["by_rate"]) == ["20", "50"]
    assert list(found["servers"]) == ["encode", "encode_json", "mlflow"]
    assert list(found["whole_histories"]) == ["encode", "full_attention"]
    for one in (*found["servers"].values(), *found["whole_histories"].values()):
        assert 0 < one["ms"] < 1_000
        assert 1 < one["per_s"] < 10_000
    assert found["candidates"] == 30
    serve.show(found)
    assert "target: at most 3" in capsys.readouterr().out


def test_both_ways_score_the_stored_users(tmp_path):
    served = serve.make_served(tmp_path, (20, 60), 5)
    for length in (20, 60):
        ours, training = (make(served, length, 30) for make in (serve.model_time, serve.by_training_code))
        np.testing.assert_allclose(ours(1), training(1), rtol=0, atol=1e-5)
        assert not np.array_equal(ours(0), ours(1))
        row = served.snapshot.find(served.user_id(length, 1))
        assert (row["num_behaviors"], len(row["size"])) == (length, 5)
        history = served.space.vocabulary.index(served.histories[length][1])
        assert np.isin(served.candidates(length, 1, 30), history).sum() >= 3


def test_full_attention_scores_each_candidate_of_each_user(tmp_path):
    full = serve.by_full_attention(serve.make_served(tmp_path, (60,), 5), 60, 30)
    assert full(0).shape == (30,)
    assert not torch.equal(full(0), full(1))


@pytest.mark.parametrize("name", whole_history.MODELS)
def test_a_rival_scores_each_candidate_of_each_user_by_its_history(tmp_path, name):
    served = release.make_served(tmp_path, (60,), 5)
    bundle = load_bundle(open_storage(Places.in_folder(tmp_path)), release.files_of(served), "1", tmp_path / "cache")
    histories = serve_http.write_histories(tmp_path / "histories", served, 60)
    rival = whole_history.with_model(bundle, name, histories)
    items = served.space.vocabulary.items_at(served.candidates(60, 0, 30))
    once, again = (rival.score(Asked(1, items)).probabilities for _ in range(2))
    assert np.array_equal(once, again)
    assert len(set(once)) > 20
    others = rival.score(Asked(2, items)).probabilities
    assert not np.array_equal(once, others)
    assert not np.array_equal(others, bundle.score(Asked(2, items)).probabilities)
    np.testing.assert_allclose(rival.score(Asked(1, items[::-1])).probabilities, once[::-1], atol=1e-5)


def test_rivals_are_faster_but_read_the_same():
    torch.manual_seed(0)
    score, mask = torch.randn(2, 5, 40), torch.arange(40) < torch.tensor([[40], [7]])
    exact, kept = top_behaviors(score, mask, 10)
    places, any_kept = whole_history.any_top(score.clone(), mask, 10)
    for group in range(2):
        for target in range(5):
            wanted = exact[group, target][kept[group, target]]
            assert torch.equal(wanted, places[group, target][any_kept[group, target]].sort().values)
    sizes = Sizes(9, 3, 1, 4, 2)
    state = Whole(torch.randn(1, 6, 4), torch.randn(1, 6, 2), mask[:1, :6], mask[:1, :6].long(), torch.tensor(2.0))
    target = whole_history.Target(
        torch.randn(1, 3, 4), torch.randn(1, 3, 2), torch.ones(1, 3).long(), torch.ones(1, 3).long()
    )
    lean, full = (FullAttention(sizes, counts=counts).read(state, target) for counts in (False, True))
    assert torch.equal(lean.vectors, full.vectors)
    assert torch.equal(lean.scalars, full.scalars[..., :1])


@pytest.mark.parametrize("count", ["0", "5001"])
def test_as_many_candidates_as_no_request_has_are_refused(count):
    with pytest.raises(SystemExit, match="expected 1 to 5000"):
        serve.main(["--candidates", count])


def test_no_server_outlives_an_interrupt(tmp_path, monkeypatch):
    """Not even one that ignores SIGTERM, nor what it has started."""
    monkeypatch.setattr(serve_http, "_STOP_SECONDS", 0.5)
    port = free_port(())
    code = (
        "import http.server, os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.fork() or signal.pause(); "
        f"http.server.test(http.server.SimpleHTTPRequestHandler, port={port}, bind='127.0.0.1')"
    )

    def interrupted():
        with running(["-c", code], port, "/", tmp_path):
            assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/")


def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path):
    with (
        pytest.raises(SystemExit, match="status 1: no such model"),
        running(["-c", "raise SystemExit('no such model')"], free_port(()), "/", tmp_path),
    ):
        pass
