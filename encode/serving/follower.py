"""Which bundles serve: a thread follows the registry's aliases and the spaces' pointers.

What it finds is loaded beside the bundle in use, verified and tried, and put in its place by one reference; requests
under way finish on the bundle they started with. The bundle before is kept: going back to it takes no load.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path

from encode.config import Places, RegistryConfig
from encode.data.erasures import erased_users
from encode.errors import ArtifactError, EncodeError
from encode.interests.snapshots import folder_of
from encode.pointers import read_pointer
from encode.registry import CHAMPION, REFUSED, Registry
from encode.serving.bundle import Asked, Bundle, Chain, Scored, load_bundle
from encode.serving.local_snapshot import remove_files
from encode.serving.rollout import Role, Rollout, Watch
from encode.serving.trial import Recorder, timed, timed_aside, try_bundle
from encode.storage import Storage, open_storage

_STOP_SECONDS = 1.0
_MOST_REFUSED = 100
"""Bundles that are remembered as refused; the oldest is forgotten first."""
_LOG = logging.getLogger("uvicorn.error")


class Follower:
    """Keeps `bundle` equal to what the champion's alias and the space's pointer name, unless that is refused."""

    def __init__(
        self,
        places: Places,
        config: RegistryConfig,
        cache: Path,
        seconds: float,
        rollout: Rollout | None = None,
        on_refused: Callable[[Exception], None] = lambda _: None,
        on_withdrawn: Callable[[Role], None] = lambda _: None,
    ) -> None:
        """Prepare; `start` begins to follow.

        Args:
            places: store and registry to follow.
            config: which registered model.
            cache: folder for fetched snapshots.
            seconds: between looks when nobody asks for one.
            rollout: whom to hold, whether there is a challenger, and what is too slow.
            on_refused: told of each look that failed.
            on_withdrawn: told what each bundle was that was withdrawn.
        """
        self.bundle: Bundle | None = None
        """The champion, which serves."""
        self.previous: Bundle | None = None
        """Served before it."""
        self.challenger: Bundle | None = None
        self.refused: dict[Chain, str] = {}
        """What did not pass its trial or was withdrawn, and why: not loaded again until somebody asks."""
        self.withdrawn: dict[str, str] = {}
        """Model versions that did badly on every snapshot they served: no snapshot of them is loaded, either."""
        self.error: str | None = None
        """Why the newest look failed."""
        self.erased: frozenset[int] = frozenset()
        """Users who are unknown to every bundle at hand."""
        self.before_first: Callable[[], None] = lambda: None
        """Called when the first bundle is loaded and tried, before it serves."""
        self.recorder = Recorder()
        self._places, self._config, self._cache, self._seconds = places, config, cache, seconds
        self._rollout = rollout or Rollout()
        self._on_refused, self._on_withdrawn = on_refused, on_withdrawn
        self._registry: Registry | None = None
        self._storage: Storage | None = None
        self._watches: dict[str, Watch] = {}
        self._swap = threading.Lock()
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._obeying = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._eraser = threading.Thread(target=self._follow_erasures, name="eraser", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()
        self._eraser.start()

    def in_use(self) -> dict[Role, Bundle]:
        """Return what answers requests, by its role."""
        found: dict[Role, Bundle | None] = {"champion": self.bundle, "challenger": self.challenger}
        return {role: bundle for role, bundle in found.items() if bundle is not None}

    def look_now(self, again: bool = False) -> None:
        """Look at once instead of at the next interval.

        Args:
            again: also at what was refused.
        """
        if again:
            self.refused, self.withdrawn = {}, {}
        self._wake.set()

    def stop(self) -> bool:
        """Stop following; the bundles stay. Return whether a load that is under way goes on."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)
        return self._thread.is_alive()

    def _follow(self) -> None:
        while not self._stopping.is_set():
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

    def _follow_erasures(self) -> None:
        """Obey the list also while a load is under way, which may take minutes. What fails here, `look` says."""
        while not self._stopping.wait(self._seconds):
            if self._storage is not None:
                with suppress(Exception):
                    self._obey_erasures(self._storage)

    def look(self) -> None:
        """Obey the list of erased users, and load what aliases and pointers name now, if it is not at hand.

        Raises:
            EncodeError: there is no champion, or a bundle cannot be loaded or is refused, or the list cannot be read;
                what serves, stays.
        """
        self._storage = self._storage or open_storage(self._places, writing=False)
        try:
            self._obey_erasures(self._storage)
            self._look_for_champion()
        finally:
            try:
                if self._rollout.challenger:
                    self._look_for_challenger(self._rollout.challenger)
            finally:
                self._forget()

    def score(self, bundle: Bundle, asked: Asked) -> tuple[Scored, float]:
        """Score with a bundle, and note how it did; return also the seconds it took. Whatever fails passes through."""
        with self._failure_noted(bundle, asked):
            scored, seconds = timed(bundle, asked)
        self.note(bundle, seconds, len(asked.item_ids))
        return scored, seconds

    async def score_aside(self, bundle: Bundle, asked: Asked, pool: Executor) -> tuple[Scored, float]:
        """Do the same from the event loop, which goes on while a thread of the pool computes."""
        with self._failure_noted(bundle, asked):
            scored, seconds = await timed_aside(bundle, asked, pool)
        self.note(bundle, seconds, len(asked.item_ids))
        return scored, seconds

    @contextmanager
    def _failure_noted(self, bundle: Bundle, asked: Asked) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.note(bundle, None, len(asked.item_ids))
            raise

    def note(self, bundle: Bundle, seconds: float | None, num_candidates: int) -> None:
        """Note a request that a bundle answered, or could not; withdraw the bundle if it does badly.

        Args:
            bundle: that was asked.
            seconds: it took to score, None if it failed.
            num_candidates: that were scored.
        """
        watch = self._watches.get(bundle.id)
        if watch and (why := watch.note(seconds, num_candidates)):
            self._withdraw(bundle, why)

    def _withdraw(self, bundle: Bundle, why: str) -> None:
        """Go back to the bundle before, or do without the challenger. The first bundle of a process has none before."""
        with self._swap:
            instead = self.previous if bundle is self.bundle else None
            if instead is not None:
                self.bundle, self.previous = instead, None
            elif bundle is self.challenger:
                self.challenger = None
            else:
                return
            self._refuse(bundle, why)
            if instead is None or instead.model_version != bundle.model_version:
                self.withdrawn[bundle.model_version] = why
        self.error = f"bundle {bundle.id} of model version {bundle.model_version} was withdrawn: {why}"
        self._on_withdrawn("champion" if instead is not None else "challenger")
        _LOG.error("%s", self.error)

    def _obey_erasures(self, storage: Storage) -> None:
        with self._obeying:
            erased = frozenset(erased_users(storage).tolist())
            for one in self._held():
                one.snapshot.erased = erased
            if erased != self.erased:
                _LOG.info("%d erased users are answered as unknown", len(erased))
            self.erased = erased

    def _look_for_champion(self) -> None:
        champion = self._bring(CHAMPION)
        if champion is None:
            raise EncodeError(f"no version of {self._config.model_name} has the alias {CHAMPION}; release one first")
        if self.bundle is None:
            self.before_first()
        with self._swap:
            if champion is self.bundle:
                return
            # Going back is what people do to get away from the bundle in use: it is no measure.
            before = self._watches.get(self.bundle.id) if self.bundle and champion is not self.previous else None
            self._watches[champion.id] = Watch(before)
            self.previous, self.bundle = self.bundle, champion
            if champion is self.challenger:
                self.challenger = None
        _LOG.info("serving bundle %s", champion.describe())

    def _look_for_challenger(self, alias: str) -> None:
        found = self._bring(alias)
        with self._swap:
            challenger = None if found is self.bundle else found
            if challenger is not None and challenger is not self.challenger:
                self._watches[challenger.id] = Watch()
                _LOG.info("challenger is bundle %s", challenger.describe())
            self.challenger = challenger

    def _bring(self, alias: str) -> Bundle | None:
        """Return the bundle that an alias leads to, at hand or loaded and tried; None where nothing has the alias."""
        storage = self._storage = self._storage or open_storage(self._places, writing=False)
        self._registry = self._registry or Registry(self._places, self._config)
        version = self._registry.by_alias(alias)
        if version is None or (alias != CHAMPION and REFUSED in version.tags):
            return None
        pointer = read_pointer(storage, folder_of(version.space))
        if pointer is not None:
            chain = version.number, pointer[0]
            if why := self.refused.get(chain) or self.withdrawn.get(version.number):
                raise ArtifactError(
                    f"model version {version.number} with snapshot {pointer[0].snapshot} stays refused: {why}; "
                    "POST /v1/release/reload?again=true tries it again"
                )
            if (held := next((one for one in self._held() if one.chain == chain), None)) is not None:
                return held
        files = self._registry.files(version)
        bundle = load_bundle(storage, files, version.number, self._cache, self._rollout.shard)
        try:
            try_bundle(bundle, self.recorder.latest(), self._rollout.max_model_ms, self.bundle)
        except Exception as error:
            self._refuse(bundle, str(error) if isinstance(error, EncodeError) else type(error).__name__)
            raise
        return bundle

    def _refuse(self, bundle: Bundle, why: str) -> None:
        refused = {**self.refused, bundle.chain: why}  # a new one: other threads may be reading
        self.refused = dict(list(refused.items())[-_MOST_REFUSED:])

    def _held(self) -> list[Bundle]:
        return [one for one in (self.bundle, self.previous, self.challenger) if one is not None]

    def _forget(self) -> None:
        """Let go of what no bundle at hand needs."""
        held = self._held()
        self._watches = {one.id: self._watches.setdefault(one.id, Watch()) for one in held}
        remove_files(self._cache, set().union(*(one.snapshot.keys for one in held)))
