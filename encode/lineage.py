"""Lineage: from a score back to the raw partitions that it rests on, and from a partition on to what serves.

    score -> bundle -> model version -> model, space -> behaviors -> raw
                    -> snapshot -> histories         -> behaviors -> raw

Nothing is recorded for it: every link is what a manifest or a registered version says that it was made from, held
against what is in the store now. A link that is missing, damaged or of another content is a problem of its node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any

from encode.errors import ArtifactError, DataError
from encode.lineage_names import DAILY, OUTPUT, SHORT, named
from encode.model.files import MODEL_FILES, digest_of_parts
from encode.outputs import MANIFEST, Manifest, Part, read_manifest, read_part
from encode.pointers import Pointer, read_pointer
from encode.registry import CANDIDATE, CHAMPION, Registry, Version
from encode.schema import digest, fingerprint, number_of
from encode.serving.bundle import bundle_id
from encode.storage import Storage

_NUM_THREADS = 8
_ALIASES = (CHAMPION, CANDIDATE)
_RAW_DAY = re.compile(r"raw/dt=\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Node:
    """One thing and what it is joined to."""

    kind: str
    """score, bundle, version, erasures, or the first part of an output's key."""
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """What is missing, damaged or not as recorded."""
    made_from: tuple[Node, ...] = ()
    goes_into: tuple[Node, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the tree as JSON can hold it; what is empty is left out."""
        joined = {name: [one.as_json() for one in getattr(self, name)] for name in ("made_from", "goes_into")}
        told = {"kind": self.kind, "name": self.name, **self.facts, "problems": list(self.problems), **joined}
        return {name: value for name, value in told.items() if value not in ([], {}, None)}

    def all_problems(self) -> list[str]:
        """Return the problems of the whole tree, each once."""
        own = [f"{self.name}: {problem}" for problem in self.problems]
        below = [line for one in (*self.made_from, *self.goes_into) for line in one.all_problems()]
        return list(dict.fromkeys(own + below))


class Lineage:
    """Follows links through one store and one registry, reading each manifest once."""

    def __init__(self, storage: Storage, registry: Registry, verify: bool = False) -> None:
        """Follow no link yet.

        Args:
            storage: where outputs are.
            registry: of the versions.
            verify: also read every file that is reached, and hold it against its digest.
        """
        self._storage, self._registry, self._verify = storage, registry, verify
        self._manifests: dict[str, Manifest | str] = {}
        self._keys: dict[str, frozenset[str]] = {}
        self._damaged: dict[str, tuple[str, ...]] = {}
        self._of_owners: dict[str, str] = {}
        self._shown: set[str] = set()
        self.files_whole = 0
        """How many files were read and are what their digests say, if `verify`."""

    def trace(self, what: str) -> Node:
        """Return the lineage of a bundle id, a snapshot, a partition, a version's number, or any output by its key.

        Raises:
            ConfigError: it is none of these.
            ArtifactError: there is no such thing.
        """
        self._shown.clear()
        kind, name = named(what, self._storage.uri)
        if kind == "version":
            return self._version(self._registry.by_number(name), both=True)
        if kind == "bundle":
            return self._bundle(name, *self.halves(name), {}, None)
        if kind == "output":
            return self._both_ways(name)
        outputs = self._outputs("interests") + self._outputs("histories")
        if found := [prefix for prefix in outputs if prefix.endswith(f"/{name}")]:
            return self._both_ways(found[0])
        raise ArtifactError(f"lineage: {self._storage.uri} has no snapshot {name}")

    def of_score(self, data: str | bytes, where: str) -> Node:
        """Return the lineage of an answer of `POST /v1/score` or `encode score --json`.

        Raises:
            DataError: it is none; `where` names the place.
        """
        try:
            answer = json.loads(data)
            bundle = {name: str(answer["bundle"][name]) for name in ("id", "model_version", "space", "snapshot")}
            user = int(answer["user_id"]) if "user_id" in answer else None
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: not the answer of /v1/score ({type(error).__name__}: {error}); expected JSON with "
                '"bundle": {"id", "model_version", "space", "snapshot"}, as `encode score --json` prints it'
            ) from None
        self._shown.clear()
        facts = {name: answer[name] for name in ("user_id", "item_ids", "probabilities", "fallbacks") if name in answer}
        version = self._try_version(bundle["model_version"])
        found = self._bundle(bundle["id"], version, f"interests/{bundle['space']}/{bundle['snapshot']}", bundle, user)
        return Node("score", f"score of user {user}" if user is not None else "score", facts, made_from=(found,))

    # --- bundles and versions ------------------------------------------------------------------------------

    @cached_property
    def _versions(self) -> list[Version]:
        return self._registry.versions()

    @cached_property
    def _aliases(self) -> dict[str, Version]:
        found = {alias: self._registry.by_alias(alias) for alias in _ALIASES}
        return {alias: version for alias, version in found.items() if version is not None}

    def halves(self, bundle: str) -> tuple[Version, str]:
        """Return the version and the key of the snapshot that make a bundle.

        Raises:
            ArtifactError: no registered version with a snapshot in the store makes it.
        """
        for version in reversed(self._versions):
            for prefix in reversed(self._outputs(f"interests/{version.space}")):
                manifest, _ = self._manifest(prefix)
                if manifest and bundle_id(version.model, manifest.digest()) == bundle:
                    return version, prefix
        raise ArtifactError(
            f"bundle {bundle}: none of the {len(self._versions)} registered versions with a snapshot in the store has "
            "this id; its snapshot or its version may have been removed, or the id is of another store"
        )

    def _bundle(
        self, bundle: str, version: Version | str, snapshot: str, told: Mapping[str, str], user: int | None
    ) -> Node:
        """Return a bundle with its two halves, held against the id that joins them."""
        manifest, _ = self._manifest(snapshot)
        half = self._output(snapshot, user=user)
        if isinstance(version, str):
            missing = Node("version", f"version {told['model_version']}", problems=(version,))
            return Node("bundle", f"bundle {bundle}", made_from=(half, missing))
        problems = []
        if told and version.space != told["space"]:
            problems.append(f"version {version.number} is of space {version.space}, the score of {told['space']}")
        if manifest and (found := bundle_id(version.model, manifest.digest())) != bundle:
            problems.append(f"version {version.number} and {snapshot} make bundle {found} now, not this one")
        facts = {"served": self._is_served(version, snapshot)}
        return Node("bundle", f"bundle {bundle}", facts, tuple(problems), (half, self._version(version)))

    def _try_version(self, number: str) -> Version | str:
        try:
            return self._registry.by_number(number)
        except ArtifactError as error:
            return str(error)

    def _version(self, version: Version, both: bool = False) -> Node:
        models = self.models_of(version)
        problems = () if models else ("no output under models/ has the files that were registered",)
        made_from = [self._output(prefix) for prefix in (*models, f"spaces/{version.space}")]
        goes_into = [self._snapshot_of(prefix) for prefix in self._outputs(f"interests/{version.space}")]
        return Node(
            "version",
            f"version {version.number}",
            self._version_facts(version),
            problems,
            tuple(made_from),
            tuple(goes_into) if both else (),
        )

    def models_of(self, version: Version) -> list[str]:
        """Return the keys of the stored models that were registered as a version: one, if nothing is missing."""
        return [prefix for prefix in self._outputs("models") if self._model_digest(prefix) == version.model]

    def _version_facts(self, version: Version) -> dict[str, Any]:
        tags = {name.removeprefix("encode."): value for name, value in version.tags.items()}
        aliases = [alias for alias, one in self._aliases.items() if one.number == version.number]
        facts = {"aliases": aliases, "served": CHAMPION in aliases, "space": version.space, "model": version.model}
        return facts | {name: tags[name] for name in ("as_of", "git_commit", "run", "refused") if name in tags}

    def _model_digest(self, prefix: str) -> str | None:
        """Return `model.files.model_digest` of a stored model, of the digests that its manifest has already."""
        manifest, _ = self._manifest(prefix)
        files = {part.name: part.sha256 for part in manifest.parts} if manifest else {}
        return digest_of_parts(files) if {*MODEL_FILES} <= {*files} else None

    # --- from what it was made -----------------------------------------------------------------------------

    def _output(self, prefix: str, expected: str | None = None, leaf: bool = False, user: int | None = None) -> Node:
        """Return an output with all that it was made from; what the tree has shown already is not opened again."""
        kind = prefix.partition("/")[0]
        manifest, problem = self._manifest(prefix)
        if manifest is None:
            if kind == "raw" and problem is None and self._of_owner(prefix):
                return self._raw_of_owner(prefix, expected)
            return Node(kind, prefix, problems=(problem or "missing: no manifest in the store",))
        problems = [*self._damages(prefix, manifest)]
        found = _identity(prefix, manifest)
        if expected is not None and found != expected:
            problems.append(f"is another one now: found {found[:SHORT]}, recorded {expected[:SHORT]}")
        facts = self._facts(prefix, manifest)
        if leaf or prefix in self._shown:
            return Node(kind, prefix, facts, tuple(problems))
        self._shown.add(prefix)
        if kind == "histories" and user is not None:
            facts["user"] = self._user_days(prefix, manifest, user)
        self._prefetch(manifest.inputs)
        inputs = sorted(manifest.inputs.items(), key=lambda item: (item[0].partition("/")[0] == kind, item[0]))
        made_from = tuple(self._input(kind, name, value, user) for name, value in inputs)
        return Node(kind, prefix, facts, tuple(problems), made_from)

    def _input(self, kind: str, name: str, expected: str, user: int | None) -> Node:
        if name == "erasures.json":
            return self._erasures(expected)
        if kind in ("raw", "items") or not OUTPUT.fullmatch(name):  # a file of the log, which is not in the store
            return Node("source", name, {"digest": expected})
        return self._output(name, expected, leaf=name.partition("/")[0] == kind, user=user)

    def _erasures(self, expected: str) -> Node:
        from encode.data.erasures import ERASURES, erased_users

        try:
            now = digest(erased_users(self._storage).tobytes())
        except ArtifactError as error:
            return Node("erasures", ERASURES, problems=(str(error),))
        return Node("erasures", ERASURES, {"digest": expected, "grown_since": now != expected})

    def _of_owner(self, prefix: str) -> bool:
        """Tell whether a raw partition holds files that were not landed from here: what is landed has a manifest."""
        from encode.data.landing import LANDED_SUFFIX

        owned = any(not key.endswith(LANDED_SUFFIX) for key in self._files(prefix))
        return owned and _RAW_DAY.fullmatch(prefix) is not None

    def _raw_of_owner(self, prefix: str, expected: str | None) -> Node:
        """Return a partition that the owner of the log wrote: it has no manifest, so its files must be read."""
        facts: dict[str, Any] = {"files": len(self._files(prefix)), "verified": self._verify}
        if not self._verify:
            return Node("raw", prefix, facts)
        found = self._digest_of_owner(prefix)
        problems = [f"is another one now: found {found[:SHORT]}, recorded {expected[:SHORT]}"] if expected else []
        return Node("raw", prefix, facts | {"digest": found}, tuple(problems if found != expected else []))

    def _digest_of_owner(self, prefix: str) -> str:
        from encode.data.raw_days import find_raw_days

        if prefix not in self._of_owners:
            day = date.fromisoformat(prefix.removeprefix("raw/dt="))
            raw = find_raw_days(self._storage, [day]).get(day)
            self._of_owners[prefix] = fingerprint(raw.digests) if raw else "nothing"
        return self._of_owners[prefix]

    def _damages(self, prefix: str, manifest: Manifest) -> tuple[str, ...]:
        """Return what is wrong with the files of an output: each must be there, or with `verify` be whole."""
        if prefix not in self._damaged:
            self._damaged[prefix] = tuple(self._find_damages(prefix, manifest))
        return self._damaged[prefix]

    def _find_damages(self, prefix: str, manifest: Manifest) -> Iterator[str]:
        if self._verify:
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                damages = list(pool.map(lambda part: self._damage(prefix, part), manifest.parts))
            self.files_whole += damages.count(None)
            yield from filter(None, damages)
            return
        wanted = [part.key(prefix) for part in manifest.parts]
        missing = [key for key in wanted if key not in self._listed(key.rpartition("/")[0])]
        if missing:
            yield f"missing: {len(missing)} of {number_of(len(wanted), 'file')}, first {missing[0]}"

    def _damage(self, prefix: str, part: Part) -> str | None:
        try:
            read_part(self._storage, prefix, part)
        except ArtifactError as error:
            return str(error)
        return None

    def _user_days(self, prefix: str, manifest: Manifest, user: int) -> dict[str, Any]:
        """Return on which days a user's history lies: whose partitions a score of theirs rests on."""
        import numpy as np

        from encode.data.buckets import read_bucket
        from encode.schema import bucket_of, day_of

        users = np.array([user], np.int64)
        try:
            bucket = int(bucket_of(users, int(manifest.config["num_buckets"]))[0])
            rows = read_bucket(self._storage, prefix, manifest.parts, bucket, users).rows
        except ArtifactError as error:
            return {"user_id": user, "problem": str(error)}
        days = sorted({str(day_of(time)) for time in rows[:, 2].tolist()})
        return {"user_id": user, "behaviors": len(rows), "days": days}

    # --- into what it went ---------------------------------------------------------------------------------

    def _both_ways(self, prefix: str) -> Node:
        node, goes_into = self._output(prefix), self._goes_into(prefix)
        if not node.facts and not goes_into and self._manifest(prefix) == (None, None):
            raise ArtifactError(f"{self._storage.uri}/{prefix}: not in the store, or unfinished")
        return _serving(replace(node, goes_into=goes_into))

    def _goes_into(self, prefix: str) -> tuple[Node, ...]:
        kind = prefix.partition("/")[0]
        if kind == "raw":
            of_day = self._outputs(prefix.replace("raw", "behaviors", 1))  # its partition, and what replays added to it
            return tuple(self._made_with(of_day, prefix))
        if kind == "behaviors":
            folders = ("histories", "models", "spaces")
            return tuple(node for folder in folders for node in self._made_with(self._outputs(folder), prefix))
        if kind in ("histories", "spaces"):
            return tuple(self._made_with(self._outputs("interests"), prefix))
        versions = [one for one in self._versions if self._joins(one, prefix)]
        return tuple(Node("version", f"version {one.number}", self._version_facts(one)) for one in reversed(versions))

    def _joins(self, version: Version, prefix: str) -> bool:
        """Tell whether a version is of a model, or reads a snapshot."""
        if prefix.startswith(f"interests/{version.space}/"):
            return self._manifest(prefix)[0] is not None
        return self._model_digest(prefix) == version.model

    def _made_with(self, prefixes: Sequence[str], source: str) -> Iterator[Node]:
        """Yield those outputs that name `source` among their inputs, newest first, with what they went into."""
        self._prefetch(prefixes)
        made, _ = self._manifest(source)
        now = _identity(source, made) if made else None
        for prefix in sorted(prefixes, reverse=True):
            manifest, problem = self._manifest(prefix)
            if problem is not None:
                yield Node(prefix.partition("/")[0], prefix, problems=(problem,))
            if manifest is None or source not in manifest.inputs:
                continue
            recorded = manifest.inputs[source]
            problems = (f"was made from another {source}, {recorded[:SHORT]}",) if now and recorded != now else ()
            node = self._snapshot_of(prefix) if prefix.startswith("interests/") else self._leaf(prefix, manifest)
            goes_into = self._goes_into(prefix)
            yield _serving(replace(node, problems=(*node.problems, *problems), goes_into=goes_into))

    def _leaf(self, prefix: str, manifest: Manifest) -> Node:
        return Node(prefix.partition("/")[0], prefix, self._facts(prefix, manifest))

    def _snapshot_of(self, prefix: str) -> Node:
        manifest, problem = self._manifest(prefix)
        return self._leaf(prefix, manifest) if manifest else Node("interests", prefix, problems=(str(problem),))

    # --- what is in the store ------------------------------------------------------------------------------

    def _facts(self, prefix: str, manifest: Manifest) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "digest": _identity(prefix, manifest),
            "settings": fingerprint(manifest.config),
            "recipe": manifest.fingerprint,
            "version": manifest.version,
            "git_commit": manifest.git_commit,
            "seed": manifest.seed,
            "counts": manifest.counts,
        }
        if "as_of" in manifest.details:
            facts["as_of"] = manifest.details["as_of"]
        folder, _, name = prefix.rpartition("/")
        if folder == "histories" or folder.startswith("interests/"):
            pointer = self._pointer(folder)
            facts["current"] = pointer is not None and pointer.snapshot == name
        if folder.startswith("interests/"):
            champion = self._aliases.get(CHAMPION)
            facts["served"] = champion is not None and self._is_served(champion, prefix)
        return facts

    def _is_served(self, version: Version, snapshot: str) -> bool:
        """Tell whether alias and pointer name this version with this snapshot now."""
        champion, (folder, _, name) = self._aliases.get(CHAMPION), snapshot.rpartition("/")
        pointer = self._pointer(folder)
        is_champion = champion is not None and champion.number == version.number
        return (
            is_champion and folder == f"interests/{version.space}" and pointer is not None and pointer.snapshot == name
        )

    def _pointer(self, folder: str) -> Pointer | None:
        try:
            found = read_pointer(self._storage, folder)
        except ArtifactError:
            return None  # then nothing is current; the snapshots themselves are whole
        return found[0] if found else None

    def _manifest(self, prefix: str) -> tuple[Manifest | None, str | None]:
        """Return the manifest of an output, or why it cannot be read; neither where there is none."""
        if prefix not in self._manifests:
            try:
                self._manifests[prefix] = read_manifest(self._storage, prefix) or ""
            except ArtifactError as error:
                self._manifests[prefix] = str(error)
        found = self._manifests[prefix]
        return (None, found or None) if isinstance(found, str) else (found, None)

    def _prefetch(self, prefixes: Sequence[str] | Mapping[str, str]) -> None:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(self._manifest, [prefix for prefix in prefixes if "/" in prefix]))

    def _outputs(self, folder: str) -> list[str]:
        """Return the outputs below a folder, in order."""
        ending = f"/{MANIFEST}"
        return [key.removesuffix(ending) for key in self._files(folder) if key.endswith(ending)]

    def _files(self, folder: str) -> list[str]:
        """Return the keys below a folder, in order."""
        return sorted(key for key in self._listed(folder) if key.startswith(f"{folder}/"))

    def _listed(self, folder: str) -> frozenset[str]:
        """Return at least the keys below a folder, listed once; of daily partitions all together."""
        kind = folder.partition("/")[0]
        listed = kind if kind in DAILY else folder
        if listed not in self._keys:
            self._keys[listed] = frozenset(self._storage.list(f"{listed}/"))
        return self._keys[listed]


def _identity(prefix: str, manifest: Manifest) -> str:
    """Return the digest by which other manifests name an output."""
    if prefix.startswith("raw/"):
        return fingerprint({f"{prefix}/{part.name}": part.sha256 for part in manifest.parts})
    return manifest.fingerprint if prefix.startswith("spaces/") else manifest.digest()


def _serving(node: Node) -> Node:
    """Return a node that says whether anything that it went into serves."""
    if node.kind == "interests":
        return node  # a snapshot that the pointer has left is of a version that serves, too
    return replace(node, facts={**node.facts, "served": any(one.facts.get("served") for one in node.goes_into)})
