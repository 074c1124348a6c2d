"""`encode bench quality`: options, and what is written and printed. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

QUICK_MODELS = ("recent", "full", "twin", "encode")
QUICK_TASKS = ("planted",)
EPILOG = """
Tasks: planted, complete-journey, complete-journey-past, ml-1m, ml-1m-200, taobao-814=PATH, or the path of a log with
impressions.parquet. NAME=PATH reads a task's behaviors from a file or folder rather than from PyPI.
Models: recent, mean, full, din, sim-hard, sim-soft, eta, sdim, twin, twin-v2, dman, mirrn, dare, ifa, sparse-ctr,
self-modulating, encode-paper, encode; with switches, as `encode:num_clusters=16,pooling=mean`. `counts=true` and
`categories=true` tell any of them how often the target and its category are in the history, as `encode` is told. `all`
stands for every model, `counted` for every model told both, `ablations` for ENCODE with one thing changed at a time.
`full` is what others are compared with.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the quality bench."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--data", nargs="+", metavar="TASK", help="tasks (default: ml-1m-200 complete-journey planted)")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="models (default: all)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds a model (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", metavar="R", help="learning rates that each model may try")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=(), metavar="W", help="also cut histories to their latest behaviors"
    )
    parser.add_argument(
        "--windowed", nargs="+", default=["full", "encode"], metavar="MODEL", help="those (default: full encode)"
    )
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder of results (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes, one thread each (default: one a core)")
    parser.add_argument("--cache", type=Path, help="folder for downloads (default: the user's cache)")
    parser.add_argument("--quick", action="store_true", help="small tasks, few models, two seeds: about 3 minutes")
    parser.add_argument("--json", action="store_true", help="print the results as one line of JSON")


def run(options: argparse.Namespace) -> None:
    """Run the bench; write cells, `results.json`, `report.md` and plots into the folder, and print the table.

    Raises:
        ConfigError: an option names something that there is not.
        DataError: a task's data cannot be had.
    """
    from encode.quality.bench import GRID, Plan, run
    from encode.quality.models import named
    from encode.quality.plots import draw
    from encode.quality.report import rows_of, to_markdown

    stream = sys.stderr if options.json else sys.stdout
    quick = options.quick
    plan = Plan(
        tasks=tuple(options.data or (QUICK_TASKS if quick else ("ml-1m-200", "complete-journey", "planted"))),
        models=named(options.models or (QUICK_MODELS if quick else ("all",))),
        seeds=min(2, options.seeds) if quick else options.seeds,
        windows=tuple(options.windows),
        windowed=named(options.windowed) if options.windows else (),
        grid=tuple(options.rates or ((2e-3,) if quick else GRID)),
        quick=quick,
        cache=options.cache,
    )
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    cells = run(plan, options.out, workers, lambda line: print(line, file=stream, flush=True))
    rows = rows_of(cells)
    table = to_markdown(rows, {cell["task"]: cell["question"] for cell in cells})
    found: dict[str, Any] = {"rows": rows, "environment": cells[0]["environment"], "settings": cells[0]["settings"]}
    (options.out / "results.json").write_text(json.dumps(found, indent=1))
    (options.out / "report.md").write_text(table)
    try:
        plots = f"{len(draw(rows, options.out))} plots beside them"
    except ModuleNotFoundError as error:
        plots = f"no plots: {error.name} is not installed"
    if options.json:
        print(json.dumps(found))
    else:
        print(f"\n{table}\n{options.out / 'results.json'}, {options.out / 'report.md'}, {plots}")
