"""Which bundle serves: a thread follows the registry's alias and the space's pointer.

What it finds is loaded beside the bundle in use, verified, and put in its place by one reference; requests under way
finish on the bundle they started with.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from encode.config import Places, RegistryConfig
from encode.errors import EncodeError
from encode.interests.snapshots import folder_of
from encode.pointers import read_pointer
from encode.registry import CHAMPION, Registry
from encode.serving.bundle import Bundle, load_bundle
from encode.serving.local_snapshot import remove_snapshots
from encode.storage import Storage, open_storage

_LOG = logging.getLogger("uvicorn.error")


class Follower:
    """Keeps `bundle` equal to what the registry's alias and the space's pointer name."""

    def __init__(
        self,
        places: Places,
        config: RegistryConfig,
        cache: Path,
        seconds: float,
        on_refused: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """Prepare; `start` begins to follow.

        Args:
            places: store and registry to follow.
            config: which registered model.
            cache: folder for fetched snapshots.
            seconds: between looks when nobody asks for one.
            on_refused: told of each look that failed.
        """
        self.bundle: Bundle | None = None
        self.error: str | None = None
        self._places, self._config, self._cache, self._seconds = places, config, cache, seconds
        self._on_refused = on_refused
        self._registry: Registry | None = None
        self._storage: Storage | None = None
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def look_now(self) -> None:
        """Look at once instead of at the next interval."""
        self._wake.set()

    def stop(self) -> None:
        """Stop following; the bundle stays."""
        self._stopping = True
        self._wake.set()

    def _follow(self) -> None:
        while not self._stopping:
            self._wake.clear()
            before, problem = self.error, None
            try:
                self.look()
            except Exception as error:  # also of the network, the store, MLflow: keep serving and try again
                problem = str(error) if isinstance(error, EncodeError) else f"{type(error).__name__}: {error}"
                self._on_refused(error)
            self.error = problem
            if problem and problem != before:
                _LOG.warning("not following: %s", problem)
            self._wake.wait(self._seconds)

    def look(self) -> None:
        """Load what alias and pointer name now, if it is not what serves.

        Raises:
            EncodeError: there is no champion, or its bundle cannot be loaded; the bundle in use stays.
        """
        self._storage = self._storage or open_storage(self._places, writing=False)
        self._registry = self._registry or Registry(self._places, self._config)
        version = self._registry.by_alias(CHAMPION)
        if version is None:
            raise EncodeError(f"no version of {self._config.model_name} has the alias {CHAMPION}; release one first")
        held = self.bundle
        if held is not None and held.model_version == version.number:
            pointer = read_pointer(self._storage, folder_of(version.space))
            if pointer is not None and pointer[0] == held.pointer:
                return
        files = self._registry.files(version)
        self.bundle = load_bundle(self._storage, files, version.number, self._cache)
        _LOG.info("serving bundle %s", self.bundle.describe())
        kept = [one.snapshot.prefixes for one in (held, self.bundle) if one]
        remove_snapshots(self._cache, set().union(*kept))
