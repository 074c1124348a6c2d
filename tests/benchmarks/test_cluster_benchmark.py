"""The clustering benchmark on a shape of no size: it runs, and its contenders cluster the same keys."""

from __future__ import annotations

import shutil
import warnings

import pytest

from benchmarks import cluster
from benchmarks.cluster import Shape


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rivals' own
        patch.setattr(cluster, "ROUNDS", 1)
        yield cluster.measure(Shape(6, 300, 3), cluster.build_limit(tmp_path_factory.mktemp("limit")))


def test_it_reports_what_it_promises(found, capsys):
    assert {"vs_scikit_learn", "vs_faiss", "vs_limit", "inertia_ratio", "inertia_ratio_own_seeding"} <= set(found)
    cluster.show(Shape(6, 300, 3), found)
    assert "from the same k-means++" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_the_limit_is_the_same_algorithm(found):
    """From the same centers, without what ours skips or relocates: nearly the same clusters."""
    assert found["inertia"]["limit"] == pytest.approx(found["inertia"]["ours"], rel=0.01)
    assert found["inertia"]["torch"] == pytest.approx(found["inertia"]["ours"], rel=1e-4)
