"""What the benchmark of the refresh measures, each in a process of its own, so that peak memory is of that alone."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Only what is light is imported here: on Linux a child's peak memory is at least what its parent had when it forked.
from benchmarks import floor

WARM_UP_BEHAVIORS = 2_000
FEW_ACTIVE = 100
"""Fewer active users say so little about drift that everybody may be clustered anew."""
Result = dict[str, Any]


def in_child(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a new process and return its result with that process's peak memory.

    Raises:
        SystemExit: the process failed; it has said why.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(sender, function, args))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        why = "killed: out of memory?" if child.exitcode == -signal.SIGKILL else f"failed with {child.exitcode}"
        raise SystemExit(f"{function.__name__}{args}: {why}") from None
    finally:
        child.kill()
        child.join()


def _in_child(sender: Connection, function: Callable[..., Result], args: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    result = function(*args)
    sender.send(result | {"rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9})


def generate(root: Path, num_behaviors: int) -> Result:
    """Write the log and the space, but for the last day; return how long a behavior is in its files."""
    from benchmarks.behaviors import make_log, make_space, write_days
    from encode.interests.snapshots import write_space
    from encode.storage import FolderStorage

    log, storage = make_log(num_behaviors), FolderStorage(root / "store")
    write_days(storage, log, root / "scratch")
    write_space(storage, make_space(log), {})
    written = sum(path.stat().st_size for path in (root / "store").glob("behaviors/*/*.parquet"))
    return {"bytes_per_behavior": written / num_behaviors}


def sort_floor(root: Path, tool: str) -> Result:
    """Sort the days with one tool."""
    files = sorted(str(path) for path in (root / "store").glob("behaviors/*/*.parquet"))
    target = root / "scratch" / "sorted.parquet"
    result = timed(floor.tools()[tool](files, target))
    target.unlink()
    return result


def refresh_all(root: Path) -> Result:
    """Refresh everybody as of the last day; what an earlier refresh left is removed first."""
    from benchmarks.behaviors import LAST_DAY

    _warm_up(root)
    for folder in (root / "store").iterdir():
        if folder.name not in ("behaviors", "spaces"):
            shutil.rmtree(folder)
    result = _refresh(root, LAST_DAY)
    if result["clustered"] != result["users"]:
        raise SystemExit(f"not a full refresh: {result}")
    return result


def refresh_active(root: Path, num_behaviors: int) -> Result:
    """Write the last day, refresh who was active on it, and remove the day: others read all that there are."""
    from benchmarks.behaviors import LAST_DAY, make_log, write_last_day
    from encode.storage import FolderStorage

    _warm_up(root)
    active = write_last_day(FolderStorage(root / "store"), make_log(num_behaviors))
    result = _refresh(root, LAST_DAY + timedelta(days=1))
    if result["clustered"] != active and active >= FEW_ACTIVE:
        raise SystemExit(f"not incremental: {active} users were active, but {result}")
    shutil.rmtree(root / "store" / "behaviors" / f"dt={LAST_DAY}")
    return result


def _warm_up(root: Path) -> None:
    from benchmarks.behaviors import LAST_DAY, make_log, write_last_day
    from encode.storage import FolderStorage

    with tempfile.TemporaryDirectory(prefix="warm-up-", dir=root) as name:
        generate(Path(name), WARM_UP_BEHAVIORS)
        _refresh(Path(name), LAST_DAY)
        write_last_day(FolderStorage(Path(name) / "store"), make_log(WARM_UP_BEHAVIORS))
        _refresh(Path(name), LAST_DAY + timedelta(days=1))


def _refresh(root: Path, as_of: date) -> Result:
    from encode.config import Places, RefreshConfig
    from encode.engines.local import LocalEngine
    from encode.interests.refresh import refresh_interests
    from encode.interests.snapshots import folder_of
    from encode.pointers import read_current
    from encode.storage import FolderStorage

    storage, config = FolderStorage(root / "store"), RefreshConfig()
    engine = LocalEngine(config, Places(store=storage.uri, scratch=root / "scratch"))
    space_id = next(key.split("/")[1] for key in storage.list("spaces/"))
    result = timed(lambda: refresh_interests(storage, [space_id], as_of, config, engine, lambda _: None))
    pointer, manifest = read_current(storage, folder_of(space_id))
    if pointer.as_of != as_of:
        raise SystemExit(f"the pointer was not moved: {pointer}, expected as of {as_of}")
    return result | {name: manifest.counts[name] for name in ("users", "behaviors", "clustered")}


def timed(work: Callable[[], object]) -> Result:
    """Call `work` when the disk is at rest; return its seconds and the CPU time of all threads."""
    os.sync()
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
