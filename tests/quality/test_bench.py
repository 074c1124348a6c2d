"""The bench runs what it is asked to, once, and its figures are those of its cells."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from encode import cli
from encode.errors import ConfigError, DataError
from encode.evaluate.metrics import summary
from encode.model.reproducible import reproducible
from encode.quality import bench, cost
from encode.quality import cells as cells_module
from encode.quality.bench import Plan, run, task_name
from encode.quality.cells import Cell, Setup, run_cell
from encode.quality.report import rows_of
from encode.quality.tasks.planted import Planting, load_planted
from encode.schema import SECONDS_PER_DAY, day_start

PLANTING = Planting(num_users=40, median_length=120, max_length=300, num_categories=20, impressions=(8, 8, 8))
SETUP = Setup(
    bench.SETUP.backbone.model_copy(update={"hidden_dims": (8,), "recent_length": 10}),
    bench.SETUP.training.model_copy(update={"num_epochs": 2}),
)
MODELS = ("mean", "encode:num_clusters=4")
PLAN = Plan(tasks=("planted",), models=MODELS, seeds=2, grid=(1e-3, 2e-2))


class Here(Executor):
    """Stands for the pool: what is submitted is done at once, in this process."""

    def __init__(self, *_arguments, **_options) -> None:
        pass

    def submit(self, work, *arguments):
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def trained(monkeypatch):
    """Names of the cells that are trained, on a tiny task and in this process."""
    names = []

    def load(name, _cache, _say, quick=False):
        task = load_planted(0, quick, PLANTING)
        return dataclasses.replace(task, name=task_name(name))

    def train(task, cell, *arguments):
        names.append(f"{task.name} {cell.name}")
        return run_cell(task, cell, *arguments)

    monkeypatch.setattr(bench, "load_task", load)
    monkeypatch.setattr(bench, "run_cell", train)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(bench, "SETUP", SETUP)
    monkeypatch.setattr(cost, "_CANDIDATES", 10)
    monkeypatch.setattr(cost, "LENGTHS", (1_000,))
    bench._task.cache_clear()
    with reproducible(1):
        yield names
    bench._task.cache_clear()


def quiet(_line):
    pass


def figures(finished):
    """A cell without its times."""
    return {key: value for key, value in finished.items() if key not in ("cost", "seconds", "impressions_per_s")} | {
        "state_bytes": finished["cost"]["state_bytes"]
    }


def files_of(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


# --- cells -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """What PLAN gives, its folder, and what it said; trained once for all tests here."""
    out = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "load_task", lambda *_, **__: load_planted(0, False, PLANTING))
        patch.setattr(bench, "ProcessPoolExecutor", Here)
        patch.setattr(bench, "SETUP", SETUP)
        patch.setattr(cost, "_CANDIDATES", 10)
        patch.setattr(cost, "LENGTHS", (1_000,))
        bench._task.cache_clear()
        said: list[str] = []
        with reproducible(1):
            cells = run(PLAN, out, 1, said.append)
        bench._task.cache_clear()
    return cells, out, said


def test_cells_are_files_and_their_figures_are_returned(once):
    cells, out, said = once
    names = files_of(out)
    tried = {f"{model}+lr={rate}+seed=0" for model in MODELS for rate in ("0.001", "0.02")}
    assert {Path(name).stem for name in names} > tried
    assert len(names) == len(tried) + 2  # a second seed of the better rate of each
    assert all(name.startswith("cells/planted/") and name.endswith(".json") for name in names)
    assert [(cell["model"], cell["seed"]) for cell in cells] == [(model, seed) for model in MODELS for seed in (0, 1)]
    for cell in cells:
        path = out / "cells/planted" / f"{cell['model']}+lr={cell['learning_rate']:g}+seed={cell['seed']}.json"
        assert json.loads(path.read_text()) == cell
    assert [line.split()[0] for line in said] == [f"[{place}/6]" for place in range(1, 7)]
    assert all("auc 0." in line for line in said)


def test_a_cell_is_json_for_anyone(trained, tmp_path, monkeypatch):
    """NaN is not JSON; what is not defined is null."""
    undefined = {"gauc": float("nan"), "logloss": float("inf")}
    monkeypatch.setattr(cells_module, "summary", lambda *arguments: summary(*arguments) | undefined)
    plan = dataclasses.replace(PLAN, models=("mean",), seeds=1, grid=(1e-2,))
    said = []
    (cell,) = run(plan, tmp_path, 1, said.append)
    assert cell["metrics"]["gauc"] is cell["metrics"]["logloss"] is None
    (name,) = files_of(tmp_path)
    assert json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail) == cell
    assert "auc 0." in said[0]
    assert "gauc" not in said[0]
    assert run(plan, tmp_path, 1, quiet) == [cell]
    assert rows_of([cell])[0]["gauc"] is None


def test_a_cell_says_what_it_was_made_of(once):
    cell = once[0][-1]
    assert cell["settings"]["long_term"]["num_clusters"] == 4
    assert cell["settings"]["training"]["seed"] == cell["seed"] == 1
    assert cell["settings"]["training"]["learning_rate"] == cell["learning_rate"]
    assert cell["settings"]["backbone"]["hidden_dims"] == [8]
    assert {"python", "torch", "threads", "commit"} <= set(cell["environment"])
    assert 1 <= cell["epochs"]["best"] <= cell["epochs"]["trained"] <= 2
    assert cell["metrics"]["impressions"] == 64
    assert 0 < cell["fidelity"]["correlation"] <= 1
    assert once[0][0]["fidelity"] is None
    parts = cell["parameters"]
    assert (parts["long_term"], parts["tables"] > 0, parts["others"] > 0) == (0, True, True)
    assert 0 < cell["seconds"]["training"] < cell["seconds"]["all"]


def test_the_rate_is_that_of_the_best_validation_auc(once):
    cells, out, _ = once
    for model in MODELS:
        tried = {
            rate: json.loads((out / "cells/planted" / f"{model}+lr={rate:g}+seed=0.json").read_text())
            for rate in PLAN.grid
        }
        values = {rate: cell["valid"]["valid_auc"] for rate, cell in tried.items()}
        assert len(set(values.values())) == 2
        best = max(values, key=values.get)
        assert {cell["learning_rate"] for cell in cells if cell["model"] == model} == {best}


def test_the_validation_split_alone_decides(trained, tmp_path, monkeypatch):
    """A rate that looks best on test and on GAUC is not taken for that."""

    def made_up(task, cell, setup, say):
        finished = run_cell(task, Cell("mean", 1e-3, 0), setup, say)
        finished["learning_rate"], finished["seed"] = cell.learning_rate, cell.seed
        good = cell.learning_rate == 2e-2
        finished["valid"] |= {"valid_auc": 0.6 if good else 0.7, "valid_gauc": 0.9 if good else 0.5}
        finished["metrics"]["auc"] = 0.9 if good else 0.5
        return finished

    monkeypatch.setattr(bench, "run_cell", made_up)
    cells = run(dataclasses.replace(PLAN, models=("mean",)), tmp_path, 1, quiet)
    assert [cell["learning_rate"] for cell in cells] == [1e-3, 1e-3]


def test_what_is_there_is_not_trained_again(once, trained, tmp_path):
    cells, out, _ = once
    shutil.copytree(out, tmp_path / "out")
    said = []
    assert run(PLAN, tmp_path / "out", 1, said.append) == cells
    assert trained == []
    assert all(line.endswith("(is there)") for line in said)
    assert rows_of(run(PLAN, tmp_path / "out", 1, quiet)) == rows_of(cells)


def test_more_seeds_train_what_is_missing(once, trained, tmp_path):
    cells, out, _ = once
    shutil.copytree(out, tmp_path / "out")
    plan = dataclasses.replace(PLAN, models=MODELS[:1], seeds=3)
    found = run(plan, tmp_path / "out", 1, quiet)
    assert trained == [f"planted mean+lr={cells[0]['learning_rate']:g}+seed=2"]
    assert found[:2] == cells[:2]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_cell_that_is_removed_is_made_again_the_same(once, trained, tmp_path, seed):
    cells, out, _ = once
    shutil.copytree(out, tmp_path / "out")
    name = f"encode:num_clusters=4+lr={cells[-1]['learning_rate']:g}+seed={seed}"
    (tmp_path / "out/cells/planted" / f"{name}.json").unlink()
    again = run(PLAN, tmp_path / "out", 1, quiet)
    assert trained == [f"planted {name}"]
    for one, other in zip(again, cells, strict=True):
        assert figures(one)["metrics"] == figures(other)["metrics"]
        assert figures(one)["curves"] == figures(other)["curves"]
        assert figures(one)["fidelity"] == figures(other)["fidelity"]


def test_seeds_differ(once):
    for model in MODELS:
        one, other = (cell["metrics"]["auc"] for cell in once[0] if cell["model"] == model)
        assert one != other


def test_a_cell_does_not_depend_on_those_before_it(once, trained):
    """Workers take cells in any order: nothing of one may be left for the next."""
    cell = Cell(MODELS[1], 1e-3, 0)
    again = run_cell(load_planted(0, False, PLANTING), cell, SETUP, quiet)
    torch.rand(17)
    assert json.loads((once[1] / "cells/planted" / f"{cell.name}.json").read_text())["metrics"] == again["metrics"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], r"mean\+lr=0.001\+seed=0.json: not a cell of the bench .*; remove it"),
        (lambda text: "", r"not a cell of the bench .*; remove it"),
        (lambda text: "[]", r"not a cell of the bench .*; remove it"),
        (lambda text: "{}", r"not a cell of the bench .*; remove it"),
        (lambda text: text.replace('"metrics"', '"meters"'), r"not a cell of the bench .*metrics.*; remove it"),
        (
            lambda text: text.replace('"num_epochs": 2', '"num_epochs": 9'),
            r"made with other settings \(num_epochs\); give another folder",
        ),
        (lambda text: text.replace('"seed": 0', '"seed": 7'), r"made with other settings \(seed\)"),
    ],
)
def test_a_cell_that_cannot_be_used_is_named_with_the_remedy(once, trained, tmp_path, spoil, message):
    shutil.copytree(once[1], tmp_path / "out")
    path = tmp_path / "out/cells/planted/mean+lr=0.001+seed=0.json"
    before = path.read_text()
    path.write_text(spoil(before))
    assert path.read_text() != before
    with pytest.raises(ConfigError, match=message):
        run(PLAN, tmp_path / "out", 1, quiet)
    assert trained == []


def test_cells_of_another_setup_are_not_mixed_in(once, trained, tmp_path, monkeypatch):
    shutil.copytree(once[1], tmp_path / "out")
    monkeypatch.setattr(
        bench, "SETUP", Setup(SETUP.backbone.model_copy(update={"dropout": 0.3, "recent_length": 9}), SETUP.training)
    )
    with pytest.raises(ConfigError, match=r"other settings \(dropout, recent_length\); give another folder"):
        run(PLAN, tmp_path / "out", 1, quiet)


# --- plans -------------------------------------------------------------------------------------------------


def test_histories_are_cut_where_it_is_asked_for(trained, tmp_path):
    plan = Plan(("planted",), ("mean",), seeds=1, windows=(5, 40), windowed=("mean", "recent"), grid=(1e-2,))
    cells = run(plan, tmp_path, 1, quiet)
    assert [(cell["model"], cell["window"]) for cell in cells] == [
        ("mean", None),
        *((model, window) for model in ("mean", "recent") for window in (5, 40)),
    ]
    assert "cells/planted/mean+last=5+lr=0.01+seed=0.json" in files_of(tmp_path)
    for cell in cells:
        longest = max(one["up_to"] for one in cell["curves"]["auc_by_history_length"])
        assert (longest == cell["window"]) if cell["window"] else (longest > 40)
    assert len({cell["metrics"]["auc"] for cell in cells[:3]}) == 3


def test_what_is_asked_for_twice_is_done_once(trained, tmp_path):
    plan = Plan(("planted",) * 2, ("mean",) * 2, seeds=2, windows=(5, 5), windowed=("mean",) * 2, grid=(1e-2, 1e-2))
    said = []
    cells = run(plan, tmp_path, 1, said.append)
    assert len(trained) == len(set(trained)) == len(cells) == 4
    assert said[-1].startswith("[4/4]")


def test_each_task_has_its_own_cells(trained, tmp_path):
    plan = Plan(("planted", "ml-1m=some/where", "logs/mine.parquet"), ("mean",), seeds=1, grid=(1e-2,))
    assert [cell["task"] for cell in run(plan, tmp_path, 1, quiet)] == ["planted", "ml-1m", "mine"]
    assert {Path(name).parts[1] for name in files_of(tmp_path)} == {"planted", "ml-1m", "mine"}


@pytest.mark.parametrize(
    ("changed", "workers", "message"),
    [
        ({"models": ("nope",)}, 1, r"model 'nope': unknown; have recent, "),
        ({"windowed": ("encode:k=2",), "windows": (50,)}, 1, r"unknown switch 'k'"),
        ({"models": ("encode:num_clusters=0",)}, 1, r"num_clusters: Input should be greater than 0"),
        ({"seeds": 0}, 1, r"seeds: found 0, expected at least 1"),
        ({"windows": (50, 0), "windowed": ("full",)}, 1, r"windows: found 0, expected at least 1"),
        ({"grid": (1e-3, 0.0)}, 1, r"rates: found 0, expected a learning rate"),
        ({"grid": (-1e-3,)}, 1, r"rates: found -0.001"),
        ({}, 0, r"workers: found 0, expected at least 1"),
        ({"tasks": ("a/log", "b/log")}, 1, r"'a/log' and 'b/log': both would be called 'log'; rename one"),
        ({"tasks": ("ml-1m", "ml-1m=x")}, 1, r"both would be called 'ml-1m'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_is_trained(trained, tmp_path, changed, workers, message):
    with pytest.raises(ConfigError, match=message):
        run(dataclasses.replace(PLAN, **changed), tmp_path, workers, quiet)
    assert trained == []
    assert files_of(tmp_path) == []


def test_an_error_of_a_cell_is_the_benchs_and_what_is_finished_is_kept(trained, tmp_path, monkeypatch):
    def broken(task, cell, *arguments):
        if cell.learning_rate == 2e-2:
            raise DataError("validation days: no user has both")
        return run_cell(task, cell, *arguments)

    monkeypatch.setattr(bench, "run_cell", broken)
    monkeypatch.setattr(bench.multiprocessing, "active_children", list)
    with pytest.raises(DataError, match="no user has both"):
        run(PLAN, tmp_path, 1, quiet)
    assert len(files_of(tmp_path)) == 2


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A small log with impressions: 20 users, 1,500 behaviors, 600 impressions."""
    rng = np.random.default_rng(0)
    folder, start = tmp_path_factory.mktemp("logs") / "small", day_start(date(2024, 3, 1))
    folder.mkdir()
    for name, count, first_day, days in (("behaviors", 1_500, 0, 20), ("impressions", 600, 10, 10)):
        item = rng.integers(1, 40, count)
        columns = {"user_id": rng.integers(1, 21, count), "item_id": item, "category_id": 1 + item % 5}
        columns["timestamp"] = start + first_day * SECONDS_PER_DAY + rng.integers(0, days * SECONDS_PER_DAY, count)
        columns |= {"behavior": ["view"] * count} if name == "behaviors" else {"label": (item % 3 == 0).astype(np.int8)}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def command(*arguments):
    return [sys.executable, "-m", "encode.cli", "bench", "quality", *map(str, arguments)]


def encode(cwd, *arguments):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=120
    )


def environment():
    """The same package as here, whatever the folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(bench.__file__).parents[2]), *sys.path])}


def test_the_command_in_processes_of_its_own(log, tmp_path):
    options = ("--quick", "--data", log, "--models", "mean", "recent", "--seeds", 2, "--workers", 1)
    done = encode(tmp_path, *options, "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert [(row["task"], row["model"], row["seeds"]) for row in found["rows"]] == [
        ("small", "mean", 2),
        ("small", "recent", 2),
    ]
    assert {"environment", "settings"} <= set(found)
    assert found["environment"]["threads"] == 1
    assert "[4/4] small " in done.stderr
    out = tmp_path / "quality"
    assert json.loads((out / "results.json").read_text()) == found
    assert (out / "report.md").read_text().startswith("### small\n")
    assert len(list((out / "cells/small").iterdir())) == 4
    assert (out / "small-cost.png").is_file()

    again = encode(tmp_path, *options)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(is there)") == 4
    assert "| recent |" in again.stdout
    assert "1 plots beside them" in again.stdout
    assert json.loads((out / "results.json").read_text())["rows"] == found["rows"]


def test_without_matplotlib_the_figures_are_there_all_the_same(once, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(once[1], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--data", "planted", "--models", "mean", "recent", "--seeds", "1", "--rates", "0.001", "0.02"]
    assert cli.main(["bench", "quality", *options, "--out", str(tmp_path / "out")]) == 0
    assert trained == ["planted recent+lr=0.001+seed=0", "planted recent+lr=0.02+seed=0"]
    said = capsys.readouterr().out
    assert "| recent |" in said
    assert said.endswith("no plots: matplotlib is not installed\n")
    assert {"results.json", "report.md"} <= set(files_of(tmp_path / "out"))


def processes_below(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(process):
    return [one for one in processes_below(process.pid) if "spawn_main" in " ".join(one.cmdline())]


def begin(tmp_path, *arguments):
    return subprocess.Popen(
        command("--quick", *arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_ends_it_at_once_and_leaves_whole_cells(log, tmp_path, early):
    """It reaches the whole group, as from a terminal: while a worker imports, or once a cell is finished."""
    process = begin(tmp_path, "--data", str(log), "--models", "recent", "mean", "full", "--workers", "2")
    if early:
        wait_for(lambda: any(worker.cpu_times().user > 0.3 for worker in workers_of(process)))
    else:
        assert process.stdout.readline().startswith("[1/6]")
    children = processes_below(process.pid)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert errors == "interrupted\n"
    wait_for(lambda: not any(child.is_running() for child in children), 5)
    cells = [path for path in tmp_path.rglob("*.json") if not path.name.startswith(".")]
    assert len(cells) >= (0 if early else 1)
    for path in cells:
        assert "metrics" in json.loads(path.read_text())


def test_workers_end_with_their_parent_whatever_ends_it(tmp_path):
    process = begin(tmp_path, "--models", "full", "--workers", "1")
    wait_for(lambda: workers_of(process))
    children = processes_below(process.pid)
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(child.is_running() for child in children), 15)


def test_a_dead_worker_is_told_with_the_remedy(tmp_path):
    process = begin(tmp_path, "--models", "full", "--workers", "1")
    wait_for(lambda: workers_of(process))
    workers_of(process)[0].kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a worker died, most likely for want of memory; run again with fewer than 1 workers" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "encoed"], "error: model 'encoed': unknown; have recent, "),
        (["--models", "encode:grouping=tim"], "error: model 'encode:grouping=tim': grouping: Input should be 'kmeans'"),
        (["--models", "encode:k=3"], "error: model 'encode:k=3': unknown switch 'k'; have num_clusters, "),
        (["--models", "recent", "--data", "nowhere"], "error: task 'nowhere': no such task or path; have planted, "),
        (["--models", "recent", "--seeds", "0"], "error: seeds: found 0, expected at least 1"),
        (["--models", "recent", "--workers", "0"], "error: workers: found 0, expected at least 1"),
    ],
)
def test_a_users_mistake_gets_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    assert cli.main(["bench", "quality", "--quick", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert files_of(tmp_path) == []


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from encode import cli\n"
        "try: cli.main(['bench', 'quality', '--help'])\n"
        "except SystemExit: print('heavy:', sorted({'torch', 'numpy', 'pyarrow', 'pydantic', 'matplotlib'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "heavy: []" in done.stdout
    for option in ("--data", "--models", "--seeds", "--windows", "--quick", "--json"):
        assert option in done.stdout
