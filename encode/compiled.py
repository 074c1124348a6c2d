"""What the kernels share: how Numba compiles them, the arrays that they are given, and the mixing of bits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

# What kernels are made of, constants of schema.py among it: Numba notices a change in a kernel's own file alone.
_SOURCES = hashlib.sha256(
    b"".join(
        text
        for path in sorted(Path(__file__).parent.rglob("*.py"))
        if b"compiled" in (text := path.read_bytes()) or b"numba" in text or path.name == "schema.py"
    )
).hexdigest()


def compiled(function: Any) -> Any:
    """Compile to a kernel without the GIL, cached beside the source, or in the user's cache, if one can be written."""
    kernel = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        kernel.enable_caching()
    except RuntimeError:  # a file system that is read-only throughout: each process compiles for itself
        return kernel
    kernel._cache._cache_file._source_stamp = _SOURCES
    return kernel


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a contiguous view that cannot be written, so that a kernel meets, and is compiled for, one kind of array.

    Arrow and safetensors give arrays that cannot be written, numpy and torch those that can.
    """
    plain = array.flags.c_contiguous and array.flags.aligned
    view = array.view() if plain else np.array(array, order="C")
    view.flags.writeable = False
    return view


@compiled
def mix(x: np.uint64) -> np.uint64:
    """Splitmix64's finalizer: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def table_bits(count: int) -> int:
    """Return the size of a table, 2^bits, of which that many keys fill half at most."""
    bits = 1
    while (1 << bits) < 2 * count:
        bits += 1
    return bits


@compiled
def hash_slot(key: int, bits: int) -> np.int64:
    """Return where in a table of 2^bits a key starts to look for itself; ids in steps of any size are spread."""
    factor = np.uint64(0x9E3779B97F4A7C15)
    x = np.uint64(key) * factor
    x = (x ^ (x >> np.uint64(32))) * factor
    return np.int64(x >> np.uint64(64 - bits))
