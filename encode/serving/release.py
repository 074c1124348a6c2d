"""The release from outside the serving process: load the bundle here first, then see serving load the same."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from encode.config import Places
from encode.interests.snapshots import folder_of
from encode.pointers import read_pointer
from encode.registry import Registry, Version
from encode.serving.bundle import Bundle, load_bundle
from encode.serving.client import connect
from encode.storage import open_storage

_TIMEOUT_SECONDS = 120
_ALIAS_MOVED = "The alias has moved to that version, and serving follows it by itself: do not roll back again"


@contextmanager
def loaded(registry: Registry, places: Places, version: Version) -> Iterator[Bundle]:
    """Load a version's bundle as serving will, all checks included, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="encode-") as cache:
        yield load_bundle(open_storage(places), registry.files(version), version.number, Path(cache))


def see_served(
    places: Places, bundle: Bundle, say: Callable[[str], None], again: bool = False, remedy: str = _ALIAS_MOVED
) -> str:
    """Ask serving to look at the registry now, and wait until it serves exactly this bundle.

    A newer snapshot of the same model version, published meanwhile, is as good: whatever its space points at.

    Args:
        places: where the serving process is.
        bundle: that is to serve.
        say: told where nothing is to be asked.
        again: serving is to try also what it has refused or withdrawn, for somebody has decided so.
        remedy: for people, where it does not serve the bundle.

    Returns:
        The address of the serving process, or "no serving process" where none is configured.

    Raises:
        TimeoutError: it refuses the bundle, cannot be asked, or serves something else after two minutes; asking again
            may cure it.
    """
    import httpx

    if not places.serving_url:
        say("no serving process is configured; the bundle was loaded and checked here")
        return "no serving process"
    wanted = {"model_version": bundle.model_version, "snapshot": bundle.pointer.snapshot}
    until, storage = time.monotonic() + _TIMEOUT_SECONDS, open_storage(places, writing=False)
    try:
        with connect(places) as client:
            client.post("/v1/release/reload", params={"again": again}).raise_for_status()
            while True:
                state = client.get("/v1/release").raise_for_status().json()
                served = state["bundle"] or {"id": None, "model_version": None, "snapshot": None}
                if served["id"] == bundle.id:
                    return places.serving_url
                if served["model_version"] == bundle.model_version:
                    current = read_pointer(storage, folder_of(bundle.space.id))
                    if current is not None and served["snapshot"] == current[0].snapshot:
                        return places.serving_url
                refused = any(wanted.items() <= one.items() for one in state["refused"])
                if refused or time.monotonic() > until:
                    why = f"serves {state['bundle']}, its last error: {state['error']}"
                    break
                time.sleep(0.5)
    except httpx.HTTPError as error:
        why = f"cannot be asked: {type(error).__name__}: {error}"
    raise TimeoutError(
        f"{places.serving_url}: expected bundle {bundle.id} of version {bundle.model_version}, {why}. {remedy}"
    )
