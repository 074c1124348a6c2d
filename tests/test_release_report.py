"""The report of a release as a page, and what a person is asked."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from made import MEASURED, SPACE, make_bundle

from encode.cli import main
from encode.config import ReleaseConfig
from encode.evaluate.metrics import curves
from encode.gates import Measured, gates_of
from encode.registry import Version
from encode.release_plots import Line, plot
from encode.release_report import MEANINGS, Side, changes, shift, to_html, to_markdown

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 2, 400)
LENGTHS = RANDOM.integers(0, 3000, 400)
METRICS = {"impressions": 400.0, "positives": 200.0, "auc_seen_before": 0.752, **MEASURED}


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    """A function that makes one side from a bundle made by hand and numbers that are given."""
    bundle = make_bundle(tmp_path_factory.mktemp("bundle"))

    def make(number, learning_rate="0.01", seed=0, **metrics):
        scores = np.random.default_rng(seed).random(400) * 0.5 + 0.3 * LABELS
        return Side(
            Version(number, SPACE.id, "d" * 64, {"encode.git_commit": "c" * 40}),
            bundle,
            Measured({**METRICS, **metrics}, curves(LABELS, scores, LENGTHS), scores),
            {"training.learning_rate": learning_rate, "model.margin": "dynamic"},
        )

    return make


def page(candidate, champion=None, title="encode-ctr", links=None):
    measured = None if champion is None else champion.measured
    gates = gates_of(candidate.measured, measured, 0.97, ReleaseConfig())
    return to_html(title, gates, candidate, champion, links or {})


class Page(HTMLParser):
    """Tags and attributes of a page, and the text of its cells, row by row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *one) for one in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "line", "polyline", "circle") or tag == "circle":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_says_who_passed_and_shows_each_gate_beside_the_champion(side):
    text = page(side("7"), side("3", auc=0.79))
    assert "encode-ctr version 7" in text
    assert "passed its 14 gates" in text
    assert "400 impressions (200 positive) of 2024-03-10, beside champion version 3" in text
    rows = {row[0]: row[1:] for row in Page(text).rows}
    assert rows["auc"][:4] == ["0.8", "0.79", ">= 0.6", "passed"]
    assert rows["auc_over_champion"][:4] == ["0.01", "", ">= -0.002", "passed"]
    assert set(MEANINGS) <= set(rows)
    assert "<code>auc_seen_before</code> is 0.752: the AUC of ranking by that alone, without any model" in text


def test_the_page_of_a_refused_candidate_says_which_gates_it_missed(side):
    text = page(side("7", auc=float("nan"), latency_ms=80.0), side("3"))
    assert "is refused: 3 of 14 gates missed" in text
    rows = {row[0]: row[1:] for row in Page(text).rows}
    assert [name for name, row in rows.items() if "MISSED" in row] == ["auc", "latency_ms", "auc_over_champion"]
    assert rows["auc"][0] == "nan"


def test_the_first_candidate_has_nothing_beside_it(side):
    text = page(side("1"))
    assert "there is no champion yet" in text
    assert "PSI" not in text
    assert ("polyline", "class", "champion") not in Page(text).attributes


def test_the_page_loads_and_runs_nothing(side):
    found = Page(page(side("7"), side("3"), links={"run": "https://mlflow/#/experiments/1/runs/2"}))
    assert not {"script", "img", "link", "iframe", "object"} & set(found.tags)
    addresses = [value for _, name, value in found.attributes if name in ("src", "href")]
    assert addresses == ["https://mlflow/#/experiments/1/runs/2"]
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    policy = next(value for tag, name, value in found.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_others_have_written_is_text(side):
    evil = "<script>alert(1)</script>"
    text = page(side("7", learning_rate=evil), side("3"), title=evil, links={evil: '"><b>'})
    assert not {"script", "b"} & set(Page(text).tags)
    assert text.count("&lt;script&gt;") == 4  # the title twice, the setting, the link


def test_all_three_plots_show_both(side):
    found = Page(page(side("7"), side("3", seed=1)))
    assert found.tags.count("svg") == 3
    drawn = [value for tag, name, value in found.attributes if tag == "polyline" and name == "class"]
    assert drawn == ["perfect", *["champion", "candidate"] * 3]


def test_only_settings_that_differ_are_listed(side):
    rows = changes(side("7", learning_rate="0.02"), side("3"))
    assert rows[0] == ("version", "7", "3")
    assert ("snapshot", "20240311-made", "20240311-made") in rows
    assert rows[-1] == ("training.learning_rate", "0.02", "0.01")
    assert "model.margin" not in [name for name, _, _ in rows]


def test_a_person_is_asked_with_the_gates_and_the_report(side):
    candidate, champion = side("7"), side("3", auc=0.79)
    gates = gates_of(candidate.measured, champion.measured, 0.97, ReleaseConfig())
    lines = to_markdown(gates, candidate, champion, "http://mlflow/report").splitlines()
    assert lines[0] == "[Report](http://mlflow/report)"
    assert "| auc | 0.8 | 0.79 | >= 0.6 |" in lines
    assert f"| space | {SPACE.id} | {SPACE.id} |" in lines
    assert len(to_markdown(gates, candidate, champion, "http://mlflow/report")) < 4000


def test_scores_that_moved_are_told_by_their_psi():
    before = np.linspace(0.1, 0.9, 100)
    assert shift(before, before) == 0
    assert shift(np.full(4, 0.5), np.full(4, 0.5)) == 0
    assert 0.25 < shift(before**2, before) < shift(before**8, before)
    assert np.isnan(shift(np.array([np.nan, 0.2]), before))


def test_points_are_where_they_belong_and_what_is_not_finite_is_left_out():
    drawn = plot("t", "x", "y", [Line("candidate", [(0, 0), (1, 1), (2, float("nan"))])])
    attributes = {name: value for tag, name, value in Page(drawn).attributes if tag == "polyline"}
    assert attributes["points"] == "66.0,236.0 436.0,12.0"
    assert "candidate: 1, 1" in drawn


def test_ticks_are_round_and_hold_all_points():
    drawn = plot("t", "x", "y", [Line("candidate", [(30, 0.713), (2_500, 0.748)])], log=True)
    for tick in (">10<", ">100<", ">1,000<", ">10,000<", ">0.71<", ">0.72<", ">0.75<"):
        assert tick in drawn
    assert ">1<" not in drawn


def test_nothing_to_draw_is_an_empty_frame():
    assert "polyline" in plot("t", "x", "y", [Line("candidate", [])], log=True)


def test_probabilities_that_are_not_numbers_leave_the_page_whole(side):
    broken = side("7")
    broken = replace(broken, measured=replace(broken.measured, probabilities=np.full(400, np.nan)))
    assert "PSI nan" in page(broken, side("3"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refuse", "3"], "--refuse VERSION and --reason TEXT belong together"),
        (["--reason", "slow"], "--refuse VERSION and --reason TEXT belong together"),
    ],
)
def test_the_command_line_wants_a_reason_for_a_refusal(options, message, tmp_path, capsys):
    assert main(["release", "--preset", "tiny", "--workdir", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nobody_approves_and_refuses_at_once(capsys):
    with pytest.raises(SystemExit):
        main(["release", "--approve", "3", "--refuse", "3"])
    assert "not allowed with" in capsys.readouterr().err
