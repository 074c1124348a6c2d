"""The refresh of all users' interests, against sorting the same log; then the next day, with 1% of the users active.

    python -m benchmarks.refresh [--json] [--behaviors N ...] [--plot PNG] [--workdir DIR] [--keep]

The log is generated (benchmarks/behaviors.py) as validated days in a folder. Timed is `refresh_interests`, from these
days to the moved pointer: grouped histories and interests written, with checksums and fsync. The floor reads the same
files, sorts them by user and time, and writes them back (benchmarks/floor.py), by DuckDB or Polars, whichever is
faster; `pip install duckdb polars`.

Everything timed runs in a process of its own, alternating, after a sync of the disk. Imports are not timed, nor is the
compiling of the kernels (once a machine): each refresh is preceded by one of a tiny log. Peak memory is of the whole
process, imports and tiny log included. Sizes from 1 to 20 M are run twice, the faster time and the higher peak count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import floor, stages
from benchmarks.stages import Result

SIZES = (10_000_000, 30_000_000, 100_000_000)
BEST_OF_TWO = range(1_000_000, 20_000_001)
BYTES_PER_BEHAVIOR, SPARE_BYTES = 150, 1_000_000_000
"""Free disk that a size needs."""
RSS_LIMIT_GB = 4
PLOT = Path(__file__).parent.parent / "docs" / "images" / "refresh.png"
COST = {"generate": 0.6, "duckdb": 0.35, "polars": 0.65, "full": 0.45, "active": 0.03}
"""Rough seconds a million behaviors, from which the time left is told at first."""
START_SECONDS = 4
TARGETS = {
    "vs_floor": "at most 2",
    "rss_ratio": "at most 1.3",
    "rss_gb": f"under {RSS_LIMIT_GB}",
    "incremental_ratio": "at most 0.04",
    "linearity": "0.85 to 1.15",
}


@dataclass(frozen=True)
class Step:
    """One process: `what` is a key of COST."""

    size: int
    what: str

    @property
    def cost(self) -> float:
        """Seconds, roughly."""
        return START_SECONDS + COST[self.what] * self.size / 1e6

    def run(self, root: Path) -> Result:
        """Run it in the folder of its size."""
        if self.what == "generate":
            return stages.in_child(stages.generate, root, self.size)
        if self.what == "full":
            return stages.in_child(stages.refresh_all, root)
        if self.what == "active":
            return stages.in_child(stages.refresh_active, root, self.size)
        return stages.in_child(stages.sort_floor, root, self.what)


def plan(sizes: Sequence[int], tools: Sequence[str]) -> list[Step]:
    """Return all steps in order; what is run twice is run in another order the second time."""
    steps = []
    for size in sizes:
        steps.append(Step(size, "generate"))
        for repeat in range(2 if size in BEST_OF_TWO else 1):
            blocks = [list(tools), ["full", "active"]]
            for block in blocks[::-1] if repeat else blocks:
                steps += [Step(size, what) for what in block]
    return steps


def run(steps: Sequence[Step], workdir: Path, keep: bool) -> dict[Step, Result]:
    """Run all steps, of each the fastest time and the highest peak; remove each log when its size is done."""
    results: dict[Step, Result] = {}
    began, total, done = time.monotonic(), sum(step.cost for step in steps), 0.0
    for place, step in enumerate(steps):
        elapsed = time.monotonic() - began
        left = (total - done) * (elapsed / done if done else 1)
        say(f"[{place + 1}/{len(steps)}] {step.size:,} behaviors: {step.what}; about {left / 60:.1f} min left")
        root = workdir / str(step.size)
        result = step.run(root)
        if step.what != "generate":
            say(f"    {result['seconds']:.2f} s, {result['cpu_s']:.1f} s of CPU, {result['rss_gb']:.2f} GB")
        if before := results.get(step):
            peak = max(before["rss_gb"], result["rss_gb"])
            result = min(before, result, key=lambda one: one["seconds"]) | {"rss_gb": peak}
        results[step] = result
        done += step.cost
        if not keep and (place + 1 == len(steps) or steps[place + 1].size != step.size):
            shutil.rmtree(root)
    return results


def summarize(results: dict[Step, Result], sizes: Sequence[int], tools: Sequence[str]) -> Result:
    """Return the headline figures, those of the largest size, and a row for each size."""
    rows = []
    for size in sizes:
        full, active = results[Step(size, "full")], results[Step(size, "active")]
        sorts = {tool: results[Step(size, tool)] for tool in tools}
        fastest = min(sorts, key=lambda tool: sorts[tool]["seconds"])
        lowest = sorts[fastest]["seconds"]
        rows.append(
            {
                "behaviors": size,
                "users": full["users"],
                "log_bytes_per_behavior": round(results[Step(size, "generate")]["bytes_per_behavior"], 2),
                "seconds": round(full["seconds"], 2),
                "cpu_seconds": round(full["cpu_s"], 2),
                "behaviors_per_s": round(size / full["seconds"]),
                "rss_gb": round(full["rss_gb"], 3),
                "floor_tool": fastest,
                "floor_seconds": round(lowest, 2),
                "floor_cpu_seconds": round(sorts[fastest]["cpu_s"], 2),
                "floor_rss_gb": round(sorts[fastest]["rss_gb"], 3),
                "vs_floor": round(full["seconds"] / lowest, 3),
                "incremental_users": active["clustered"],
                "incremental_seconds": round(active["seconds"], 3),
                "incremental_rss_gb": round(active["rss_gb"], 3),
                "incremental_ratio": round(active["seconds"] / full["seconds"], 4),
            }
            | {f"{tool}_seconds": round(result["seconds"], 2) for tool, result in sorts.items()}
        )
    first, last = rows[0], rows[-1]
    several = len(rows) > 1
    return {
        "behaviors_per_s": last["behaviors_per_s"],
        "vs_floor": last["vs_floor"],
        "rss_gb": last["rss_gb"],
        "rss_ratio": round(last["rss_gb"] / first["rss_gb"], 3) if several else None,
        "incremental_ratio": last["incremental_ratio"],
        "linearity": round(first["behaviors_per_s"] / last["behaviors_per_s"], 3) if several else None,
        "sizes": rows,
    }


def draw(rows: Sequence[Result], path: Path) -> None:
    """Plot time and peak memory against the number of behaviors."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter, FormatStrFormatter, NullFormatter, NullLocator

    behaviors = [row["behaviors"] for row in rows]
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    lines = [
        ("refresh of all users", "o-", "#1f5fa8", (7, -15), ("seconds", "rss_gb")),
        ("next day, 1% of users active", "s-", "#d9822b", (-15, -15), ("incremental_seconds", "incremental_rss_gb")),
        ("floor: read, sort, write", "^--", "#666666", (-15, 7), ("floor_seconds", "floor_rss_gb")),
    ]
    for place, (panel, label) in enumerate(zip(panels, ("seconds", "peak memory of the process, GB"), strict=True)):
        for name, style, color, above, columns in lines:
            values = [row[columns[place]] for row in rows]
            panel.plot(behaviors, values, style, color=color, label=name if place == 0 else None)
            for x, y in zip(behaviors, values, strict=True):
                text = f"{y:.2f}" if y < 1 else f"{y:.1f}"
                panel.annotate(text, (x, y), (0, above[place]), textcoords="offset points", ha="center", color=color)
        panel.set(xscale="log", yscale="log", xlabel="behaviors", ylabel=label)
        panel.margins(0.12, 0.15)
        panel.grid(alpha=0.3)
        panel.set_xticks(behaviors, [EngFormatter()(size) for size in behaviors])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panels[1].axhline(RSS_LIMIT_GB, color="#b03030", lw=1, ls=":", label=f"{RSS_LIMIT_GB} GB")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(summary: Result) -> None:
    """Print a table of the sizes, then the headline figures and their targets."""
    rows = summary["sizes"]
    for name in rows[0]:
        cells = (f"{row[name]:>16,}" if not isinstance(row[name], str) else f"{row[name]:>16}" for row in rows)
        print(f"{name:<22}", *cells)
    print()
    for name, target in TARGETS.items():
        found = "-" if summary[name] is None else f"{summary[name]:g}"
        print(f"{name:<22} {found:>16}   target: {target}")


def say(line: str) -> None:
    """Tell about progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def scratch_folder(parent: Path | None, size: int, keep: bool) -> Iterator[Path]:
    """Make a folder of our own with room for `size` behaviors, and remove it however the benchmark ends.

    Raises:
        SystemExit: there is not enough room.
    """
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="encode-bench-", dir=parent))
    try:
        needed, free = size * BYTES_PER_BEHAVIOR + SPARE_BYTES, shutil.disk_usage(folder).free
        if free < needed:
            raise SystemExit(
                f"{folder.parent}: {free / 1e9:.1f} GB free, {size:,} behaviors need {needed / 1e9:.1f} GB; "
                "give another folder with --workdir, or fewer --behaviors"
            )
        yield folder
    finally:
        if keep:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--behaviors", type=int, nargs="+", default=SIZES, metavar="N", help="sizes of the log")
    parser.add_argument("--plot", type=Path, metavar="PNG", help=f"default, with the default sizes: {PLOT}")
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", help="where to work; default: the system's temporary folder"
    )
    parser.add_argument("--keep", action="store_true", help="leave the logs and what was made of them")
    options = parser.parse_args()
    if not (tools := list(floor.tools())):
        raise SystemExit("the floor needs DuckDB or Polars: pip install duckdb polars")
    sizes = sorted(set(options.behaviors))
    if sizes[0] < stages.WARM_UP_BEHAVIORS:
        raise SystemExit(f"--behaviors {sizes[0]}: expected at least {stages.WARM_UP_BEHAVIORS}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda found, _frame: sys.exit(128 + found))
    if (load := os.getloadavg()[0]) > 0.5:
        say(f"the machine is busy (load {load:.1f}): seconds will be too long, compare the CPU seconds")
    with scratch_folder(options.workdir, sizes[-1], options.keep) as workdir:
        summary = summarize(run(plan(sizes, tools), workdir, options.keep), sizes, tools)
    if plot := options.plot or (PLOT if sizes == sorted(SIZES) else None):
        draw(summary["sizes"], plot)
        say(f"plot: {plot}")
    if options.json:
        print(json.dumps(summary))
    else:
        show(summary)


if __name__ == "__main__":
    main()
