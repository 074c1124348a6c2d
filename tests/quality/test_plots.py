"""Pictures: which are made, what is in them, and that they can be read."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pytest
from matplotlib import colors, image
from matplotlib import pyplot as plt

from encode.quality import plots
from encode.quality.models import MODELS
from encode.quality.plots import COLORS, draw


def row(model, auc, window=None, cost=2.0, task="log", error=0.002):
    family = MODELS[model.partition(":")[0]].family
    return {
        "task": task,
        "model": model,
        "family": family,
        "window": window,
        "auc": auc,
        "auc_se": error,
        "cost_ms_per_1000": float(cost),
    }


MODELS_ALONE = [row(name, 0.7 + 0.004 * i, cost=1.5 * 1.25**i) for i, name in enumerate(MODELS)]
CLUSTERS = [row(f"encode:num_clusters={k}", 0.7 + 0.001 * k) for k in (4, 8, 64)]
WINDOWS = [row(name, 0.6 + 0.001 * window, window) for window in (50, 200) for name in ("full", "encode")]


@pytest.fixture
def figures(monkeypatch):
    """Figures that were drawn, kept open, by the name of the picture."""
    drawn = {}
    original = plots._save

    def save(figure, out, task, name):
        drawn[name] = figure
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plt, "close", lambda _figure: None)
            return original(figure, out, task, name)

    monkeypatch.setattr(plots, "_save", save)
    yield drawn
    plt.close("all")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([row("encode", 0.7)], []),
        ([row("encode", 0.7), row("full", 0.71)], ["log-cost"]),
        ([row("encode", 0.7), row("encode:pooling=mean", 0.71)], []),  # an ablation is no other model
        ([row("encode", 0.7), CLUSTERS[0]], ["log-clusters"]),
        (CLUSTERS, ["log-clusters"]),
        ([row("encode", 0.7), row("encode:num_clusters=8,pooling=mean", 0.7)], []),
        (WINDOWS, ["log-history"]),
        ([row("encode", 0.7), row("encode", 0.6, window=50)], ["log-history"]),
        ([row("full", 0.7), row("encode", 0.6, window=50)], []),
        ([*MODELS_ALONE, *CLUSTERS, *WINDOWS], ["log-cost", "log-clusters", "log-history"]),
        (
            [row("encode", 0.7), row("full", 0.71), *(one | {"task": "a/b"} for one in CLUSTERS)],
            ["log-cost", "a-b-clusters"],
        ),
        ([row("encode", 0.7), row("full", None)], []),
    ],
)
def test_there_is_a_picture_for_each_question_that_is_answered(tmp_path, rows, expected):
    made = draw(rows, tmp_path / "new")
    assert made == [tmp_path / "new" / f"{name}.png" for name in expected]
    assert not made or sorted((tmp_path / "new").iterdir()) == sorted(made)
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert image.imread(path).shape[:2] == (675, 1050)
    assert not plt.get_fignums()


def points_of(axes):
    """Color and points of each line with error bars."""
    return {
        container.get_label(): (colors.to_hex(container[0].get_color()), np.array(container[0].get_xydata()).tolist())
        for container in axes.containers
    }


def test_cost_against_auc(tmp_path, figures):
    rows = [row("encode", 0.76, cost=2), row("full", 0.77, cost=8), row("sim-soft", 0.75, cost=9)]
    draw([*rows, row("eta", 0.74, cost=10), row("recent", 0.5, cost=1)], tmp_path)
    (axes,) = figures["cost"].axes
    assert points_of(axes) == {
        "ceiling": (COLORS["ceiling"], [[8, 0.77]]),
        "search": (COLORS["search"], [[9, 0.75], [10, 0.74]]),
        "ours": (COLORS["ours"], [[2, 0.76]]),
    }
    texts = {text.get_text(): text for text in axes.texts}
    assert set(texts) == {"encode", "full", "sim-soft", "eta", "below: recent 0.500"}
    assert colors.to_hex(texts["eta"].get_color()) == COLORS["search"]
    assert axes.get_ylim()[0] > 0.7  # a floor far below does not press all others together
    assert axes.get_xscale() == "log"
    assert "ms for 1,000 candidates" in axes.get_xlabel()
    assert "AUC" in axes.get_ylabel()
    assert [text.get_text() for text in figures["cost"].legends[0].texts] == ["ceiling", "search", "ours"]


def test_a_floor_that_is_not_far_below_is_shown(tmp_path, figures):
    draw([row("encode", 0.76), row("full", 0.72), row("mean", 0.70)], tmp_path)
    assert points_of(figures["cost"].axes[0])["floor"] == (COLORS["floor"], [[2, 0.70]])


def test_names_cover_neither_each_other_nor_points(tmp_path, figures):
    draw(
        [one | {"auc": 0.75 + 0.002 * (i % 2), "cost_ms_per_1000": 2 * 1.1**i} for i, one in enumerate(MODELS_ALONE)],
        tmp_path,
    )
    figure = figures["cost"]
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert len(boxes) == len(MODELS)
    for name, box in boxes.items():
        assert axes.get_window_extent().contains(*box.p0), name
        assert axes.get_window_extent().contains(*box.p1), name
        for other, its in boxes.items():
            assert other == name or not box.overlaps(its), (name, other)
        for container in axes.containers:
            for point in axes.transData.transform(container[0].get_xydata()):
                assert not box.contains(*point), name


def test_clusters(tmp_path, figures):
    rows = [row("encode", 0.76), row("full", 0.765), row("mean", 0.3), row("twin", 0.9), *CLUSTERS, *WINDOWS]
    draw(rows, tmp_path)
    (axes,) = figures["clusters"].axes
    line = [[4, 0.704], [8, 0.708], [32, 0.76], [64, 0.764]]  # the default K among them
    assert points_of(axes) == {"encode": (COLORS["ours"], pytest.approx(np.array(line)))}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "8", "32", "64"]
    assert {text.get_text() for text in figures["clusters"].legends[0].texts} == {"encode", "full"}
    assert [text.get_text() for text in axes.texts] == ["below: mean 0.300"]


def test_history(tmp_path, figures):
    rows = [row("encode", 0.81), row("full", 0.82), row("recent", 0.65), *WINDOWS]
    draw(rows, tmp_path)
    (axes,) = figures["history"].axes
    assert points_of(axes) == {
        "full": (COLORS["ceiling"], pytest.approx(np.array([[50, 0.65], [200, 0.8], [600, 0.82]]))),
        "encode": (COLORS["ours"], pytest.approx(np.array([[50, 0.65], [200, 0.8], [600, 0.81]]))),
    }
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["50", "200", "whole"]
    assert {text.get_text() for text in figures["history"].legends[0].texts} == {"encode", "full", "recent"}


def test_two_models_of_a_family_are_told_apart(tmp_path, figures):
    draw([row(name, 0.7, window) for name in ("encode", "encode:pooling=mean") for window in (50, 200)], tmp_path)
    markers = [container[0].get_marker() for container in figures["history"].axes[0].containers]
    assert len(set(markers)) == 2


def test_one_seed_has_no_error_and_is_drawn_all_the_same(tmp_path):
    rows = [one | {"auc_se": None} for one in (*MODELS_ALONE, *CLUSTERS, *WINDOWS)]
    assert len(draw(rows, tmp_path)) == 3


def test_families_have_a_color_each():
    assert len(set(COLORS.values())) == len(COLORS)
    assert {model.family for model in MODELS.values()} == set(COLORS)
