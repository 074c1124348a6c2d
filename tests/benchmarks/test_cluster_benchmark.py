"""The clustering benchmark on a shape of no size: it runs, and its contenders cluster the same keys."""

from __future__ import annotations

import shutil
import warnings
from importlib.util import find_spec

import pytest

from benchmarks import cluster
from benchmarks.cluster import Shape

HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
HAS_FAISS = find_spec("faiss") is not None


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rivals' own
        patch.setattr(cluster, "ROUNDS", 1)
        yield cluster.measure(Shape(6, 300, 3), cluster.build_limit(tmp_path_factory.mktemp("limit")))


def test_it_reports_what_it_promises(found, capsys):
    rivals = {"scikit_learn": True, "torch": True, "limit": HAS_COMPILER, "faiss": HAS_FAISS, "faiss_of_60": HAS_FAISS}
    assert {name: found[f"vs_{name}"] is not None for name in rivals} == rivals
    assert all(found[f"vs_{name}"] > 0 for name, is_there in rivals.items() if is_there)
    assert all(0.9 < found[name] < 1.1 for name in ("inertia_ratio", "inertia_ratio_own_seeding"))
    cluster.show(Shape(6, 300, 3), found)
    assert "from the same k-means++" in capsys.readouterr().out


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
def test_the_limit_is_the_same_algorithm(found):
    """From the same centers, without what ours skips or relocates: nearly the same clusters."""
    assert found["inertia"]["limit"] == pytest.approx(found["inertia"]["ours"], rel=0.01)
    assert found["inertia"]["torch"] == pytest.approx(found["inertia"]["ours"], rel=1e-4)


@pytest.mark.skipif(not HAS_FAISS, reason="needs faiss")
def test_each_rival_may_use_its_threads_in_any_way(found):
    """Which way is fastest depends on the length of histories."""
    assert {
        name: len(ways) for name, ways in found["behaviors_per_s"].items() if "faiss" in name or "scikit" in name
    } == {
        "scikit_learn": 3,
        "faiss": 3,
        "faiss_of_60": 3,
    }
