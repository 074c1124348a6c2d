"""Outputs: immutable directories that are complete when their manifest is there, and absent before."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from encode import __version__
from encode.errors import ArtifactError
from encode.schema import canonical_json, digest, fingerprint
from encode.storage import LostRace, Storage, check_key

_NUM_THREADS = 8
MANIFEST = "manifest.json"


class Part(BaseModel):
    """One file of an output."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    bytes: int
    sha256: str
    rows: int | None = None
    at: str | None = Field(default=None, exclude_if=lambda at: at is None)
    """Prefix of the earlier output that wrote the file, where it is referenced and not copied."""

    def key(self, prefix: str) -> str:
        """Return where the file lies, for an output at `prefix`.

        Raises:
            ConfigError: that is no key; on a local disk it could lead anywhere.
        """
        return check_key(f"{self.at or prefix}/{self.name}")

    def referenced(self, prefix: str) -> Part:
        """Return this file of the output at `prefix` as another output names it."""
        return self if self.at else self.model_copy(update={"at": prefix})


class Manifest(BaseModel):
    """What an output is, what it was made from, and with what. Written last; without it the output does not exist."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    fingerprint: str
    parts: tuple[Part, ...]
    counts: dict[str, int | float]
    columns: dict[str, str]
    config: dict[str, Any]
    inputs: dict[str, str]
    details: dict[str, Any]
    seed: int | None
    version: str
    git_commit: str

    def to_bytes(self) -> bytes:
        """Return the one spelling of this manifest."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Return the digest that names this output wherever another was made from it; the commit is not in it."""
        return digest(canonical_json(self.model_dump(mode="json", exclude={"git_commit"})))


def recipe(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str], seed: int | None = None) -> str:
    """Return the fingerprint of an output before it is made: what kind, from what, with what settings."""
    return fingerprint({"kind": kind, "config": dict(config), "inputs": dict(inputs), "seed": seed, "v": __version__})


def read_manifest(storage: Storage, prefix: str) -> Manifest | None:
    """Return the manifest of the output at `prefix`, or None when the output is absent or unfinished.

    Raises:
        ArtifactError: there is a manifest, but it cannot be read.
    """
    found = storage.get_versioned(f"{prefix}/{MANIFEST}")
    if found is None:
        return None
    try:
        return Manifest.model_validate_json(found[0])
    except ValidationError as error:
        raise ArtifactError(
            f"{storage.uri}/{prefix}/{MANIFEST}: not a manifest ({error.error_count()} errors, first: "
            f"{error.errors()[0]['msg']}); remove the output and run its step again"
        ) from None


def part_of(name: str, data: bytes, rows: int | None = None) -> Part:
    """Describe a file of an output."""
    return Part(name=name, bytes=len(data), sha256=digest(data), rows=rows)


def write_part(storage: Storage, prefix: str, name: str, data: bytes, rows: int | None = None) -> Part:
    """Write one file of an output that `complete_output` will complete, and describe it."""
    _write(storage, prefix, name, data)
    return part_of(name, data, rows)


def _write(storage: Storage, prefix: str, name: str, data: bytes) -> None:
    """Write a file, in place of what a try that was killed has left, but not of what is complete by now."""
    key = f"{prefix}/{name}"
    try:
        storage.create(key, data)
    except LostRace:
        found = storage.get_versioned(key)
        if found is None or (found[0] != data and read_manifest(storage, prefix) is None):
            storage.put(key, data)


def write_output(
    storage: Storage, prefix: str, parts: Mapping[str, bytes], *, rows: Mapping[str, int] | None = None, **facts: Any
) -> Manifest:
    """Write all parts, then the manifest. Killed in between, the output is absent and the next try overwrites it.

    Of two who write an output at once, with other bytes, the second leaves alone what the first has completed.

    Args:
        storage: the object store.
        prefix: where.
        parts: content of each file.
        rows: of some of them.
        facts: as for `complete_output`.

    Raises:
        ArtifactError: a complete output with another content is already there.
    """
    described = [part_of(name, data, (rows or {}).get(name)) for name, data in sorted(parts.items())]
    if read_manifest(storage, prefix) is None:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(lambda item: _write(storage, prefix, *item), parts.items()))
    return complete_output(storage, prefix, described, **facts)


def complete_output(
    storage: Storage,
    prefix: str,
    parts: Sequence[Part],
    *,
    kind: str,
    fingerprint: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    columns: Mapping[str, str] | None = None,
    counts: Mapping[str, int | float] | None = None,
    details: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Manifest:
    """Write the manifest of an output whose files are all written.

    Two writers of one output write the same bytes, so whoever is second changes nothing.

    Raises:
        ArtifactError: a complete output with another content is already there.
    """
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint,
        parts=tuple(parts),
        counts=dict(counts or {}),
        columns=dict(columns or {}),
        config=dict(config),
        inputs=dict(inputs),
        details=dict(details or {}),
        seed=seed,
        version=__version__,
        git_commit=git_commit(),
    )
    if (existing := read_manifest(storage, prefix)) is not None:
        return _same(storage, prefix, existing, manifest)
    try:
        storage.create(f"{prefix}/{MANIFEST}", manifest.to_bytes())
    except LostRace:
        written = read_manifest(storage, prefix)
        return _same(storage, prefix, written, manifest) if written else manifest
    return manifest


def _same(storage: Storage, prefix: str, existing: Manifest, manifest: Manifest) -> Manifest:
    if existing.parts != manifest.parts:
        changed = sorted({p.name for p in set(existing.parts) ^ set(manifest.parts)})
        raise ArtifactError(
            f"{storage.uri}/{prefix}: already complete with another content (differs in {', '.join(changed)}); "
            "outputs are immutable: write under another key, or remove this one first"
        )
    return existing


def read_part(storage: Storage, prefix: str, part: Part) -> bytes:
    """Return one file of an output after checking its digest.

    Raises:
        ArtifactError: the file is missing or is not the one that the manifest names.
    """
    try:
        data = storage.get(part.key(prefix))
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {_remedy(part)}") from None
    if digest(data) != part.sha256:
        found = f"{len(data)} bytes with digest {digest(data)[:12]}"
        raise damaged(storage, prefix, part, f"{found}, expected {part.bytes} bytes with {part.sha256[:12]}")
    return data


def read_referenced(storage: Storage, part: Part) -> bytes:
    """Return one file of an earlier output, `part.at`, after checking its digest; raises as `read_part` does."""
    return read_part(storage, str(part.at), part)


def read_range(storage: Storage, part: Part, begin: int, end: int) -> bytes:
    """Return bytes [begin, end) of a file of an earlier output, `part.at`; what they hold is the caller's to check.

    Raises:
        ArtifactError: the file is missing or cut off.
    """
    try:
        return storage.get_range(part.key(str(part.at)), begin, end)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {_remedy(part)}") from None


def damaged(storage: Storage, prefix: str, part: Part, why: str) -> ArtifactError:
    """Return the error that names a file of the output at `prefix`, and what to do about it."""
    return ArtifactError(f"{storage.uri}/{part.key(prefix)}: damaged: {why}; {_remedy(part)}")


def _remedy(part: Part) -> str:
    if part.at is None:
        return "remove the output and run its step again"
    return f"remove {part.at} and {part.at.rpartition('/')[0]}/current.json and refresh again"


def read_parts(storage: Storage, prefix: str, parts: Sequence[Part]) -> list[bytes]:
    """Return several files of an output, checked, in the order of `parts`."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda part: read_part(storage, prefix, part), parts))


def read_files(storage: Storage, prefix: str, manifest: Manifest) -> dict[str, bytes]:
    """Return all files of an output by name, checked."""
    names = [part.name for part in manifest.parts]
    return dict(zip(names, read_parts(storage, prefix, manifest.parts), strict=True))


@cache
def git_commit() -> str:
    """Return the commit of this code: ENCODE_GIT_COMMIT where an image was built from it, else what git says."""
    if commit := os.environ.get("ENCODE_GIT_COMMIT"):
        return commit
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"
